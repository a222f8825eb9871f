"""The agent asks about media of which the model is not sure enough, and makes them when it is told to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.agent import Agent
from services.artefacts import Artefact, ArtefactStore
from services.boxes import Finished, SpokenEarlier, SpokenSignal, Words
from services.events import (
    Event,
    PartAsked,
    PartDone,
    PartFailed,
    PartStarted,
    TextDelta,
    TurnDone,
    TurnStarted,
)
from services.gateway import build_gateway
from services.local import local_agent
from services.making import SIGNAL_PURPOSE, kept
from services.messages import TurnOptions
from services.metrics import exposition
from services.presets import GenerationDefaults, Preset, load_preset
from services.session import Session
from tests.fake_boxes import FakeDecoder, FakeSpeaker, agent, events_of, said, signal, turn_of
from tests.scripted_agent import FakeAgent, ask, body, chunks_of, client, done
from tests.tiny import tiny_values

IMAGE, AUDIO = Modality.IMAGE, Modality.AUDIO
QUESTION = "Shall I make this picture?"
ASKED = PartAsked(index=1, modality=IMAGE, caption="Here is a bell.", confidence=0.25, question=QUESTION)
ENTRY = {
    "type": "image",
    "status": "asked",
    "caption": "Here is a bell.",
    "confidence": 0.25,
    "question": QUESTION,
}


@pytest.fixture
def store(tmp_path: Path) -> ArtefactStore:
    return ArtefactStore((tmp_path / "files").as_uri())


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    return Preset(**tiny_values(), file=tmp_path / "tiny.yaml")  # type: ignore[arg-type]


def unsure(modality: Modality, confidence: float) -> SpokenSignal:
    return replace(signal(modality), confidence=confidence)


def types_of(events: list[Event]) -> list[type[Event]]:
    return [type(event) for event in events]


async def test_what_the_model_is_less_sure_of_is_asked_about_and_the_rest_is_made(
    store: ArtefactStore,
) -> None:
    speaker = FakeSpeaker(
        Words("A bell."), unsure(IMAGE, 0.39999), Words("And how it sounds."), unsure(AUDIO, 0.4),
        Finished("stop"),
    )  # fmt: skip
    picture, sound = FakeDecoder(store, IMAGE), FakeDecoder(store, AUDIO, steps=0)
    the_agent = agent(store, speaker, picture, sound, generation=GenerationDefaults(ask_below=0.4))

    events = await events_of(the_agent)

    assert types_of(events) == [TurnStarted, TextDelta, PartAsked, TextDelta, PartStarted, PartDone, TurnDone]
    assert [event.sequence for event in events] == list(range(7))
    asked = events[2]
    assert isinstance(asked, PartAsked)
    assert (asked.index, asked.caption, asked.confidence) == (1, "a bell", 0.39999)
    assert asked.question == QUESTION
    assert not picture.began
    last = events[-1]
    assert isinstance(last, TurnDone)
    assert [(part["index"], part["done_s"] is None) for part in last.timings["parts"]] == [
        (1, True),
        (3, False),
    ]
    lines = exposition({"agent": the_agent.own_counts()}).splitlines()
    assert 'patchbay_agent_media_total{replica="local"} 2' in lines
    assert 'patchbay_agent_asked_total{replica="local"} 1' in lines


@pytest.mark.parametrize(
    ("preset_asks", "request_asks", "is_asked"),
    [(None, None, False), (0.5, None, True), (0.5, 0.0, False), (0.5, 0.2, False), (None, 0.5, True)],
)
async def test_a_request_has_the_last_word_on_asking(
    store: ArtefactStore, preset_asks: float | None, request_asks: float | None, is_asked: bool
) -> None:
    the_agent = agent(
        store,
        FakeSpeaker(unsure(IMAGE, 0.3), Finished("stop")),
        FakeDecoder(store, IMAGE),
        generation=GenerationDefaults(ask_below=preset_asks),
    )
    events = await events_of(the_agent, ask_below=request_asks)
    assert any(isinstance(event, PartAsked) for event in events) is is_asked
    assert any(isinstance(event, PartDone) for event in events) is not is_asked


async def test_what_was_asked_about_is_made_as_it_would_have_been(store: ArtefactStore) -> None:
    speaker = FakeSpeaker(unsure(IMAGE, 0.3), unsure(IMAGE, 0.9), Finished("stop"))
    wishes: dict[str, Any] = {"seed": 5, "decoders": {IMAGE: DecodeSettings(steps=4)}}
    at_once, later = FakeDecoder(store, IMAGE), FakeDecoder(store, IMAGE)
    await events_of(agent(store, speaker, at_once), **wishes)
    the_agent = agent(store, speaker, later)
    turn = turn_of(await events_of(the_agent, ask_below=0.5, **wishes))
    assert not await the_agent.cancel_part(turn, 0)

    events = [event async for event in the_agent.retry_part(turn, 0, DecodeSettings())]

    assert isinstance(events[-1], PartDone)
    assert [settings.seed for settings in at_once.settings] == [5, 6]
    assert later.settings == [at_once.settings[1], at_once.settings[0]]
    np.testing.assert_array_equal(later.signals[1].hidden, at_once.signals[0].hidden)


async def test_an_unsure_medium_whose_signal_cannot_be_stored_is_told_as_failed(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = store.put

    def full(*args: Any, **options: Any) -> Artefact:
        if options.get("purpose") == SIGNAL_PURPOSE:
            raise OSError("No space left on device")
        return put(*args, **options)

    monkeypatch.setattr(store, "put", full)
    speaker = FakeSpeaker(unsure(IMAGE, 0.3), Words("And more."), Finished("stop"))
    events = await events_of(agent(store, speaker, FakeDecoder(store, IMAGE)), ask_below=0.5)
    assert types_of(events) == [TurnStarted, PartStarted, PartFailed, TextDelta, TurnDone]


def asking(*rest: Event) -> list[Event]:
    return [TurnStarted(id="a" * 32, seed=1), TextDelta(index=0, text="Here is a bell."), ASKED, *rest]


MORE = TextDelta(index=2, text="And more.")
END = TurnDone(finish_reason="stop")


async def test_a_question_is_text_for_whoever_knows_nothing_of_it_and_a_part_for_the_others(
    preset: Preset, store: ArtefactStore
) -> None:
    plain = await ask(FakeAgent(*asking(MORE, END)), preset, store, body())
    message = plain.json()["choices"][0]["message"]
    assert message["content"] == f"Here is a bell.\n{QUESTION}\nAnd more."
    assert message["parts"] == [
        {"type": "text", "text": "Here is a bell."},
        ENTRY,
        {"type": "text", "text": "And more."},
    ]
    assert "images" not in message

    streamed = await ask(FakeAgent(*asking(MORE, END)), preset, store, body(stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(streamed.text)]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert [part for delta in deltas for part in delta.get("parts", [])] == [{"index": 1, **ENTRY}]


async def test_the_threshold_of_a_request_reaches_the_agent(preset: Preset, store: ArtefactStore) -> None:
    fake = FakeAgent(*asking(END))
    for given in (0.25, 0):
        await ask(fake, preset, store, body(ask_below=given))
        assert fake.options == TurnOptions(ask_below=given)
    for wrong in (1, -0.1, "often"):
        refused = await ask(fake, preset, store, body(ask_below=wrong))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "ask_below")


async def test_the_model_is_told_of_its_question_until_the_medium_is_made(
    preset: Preset, store: ArtefactStore
) -> None:
    """However much of the reply a client keeps, the model sees a signal only where there is a medium."""
    answer = await ask(FakeAgent(*asking(MORE, END)), preset, store, body())
    completion = answer.json()
    message = completion["choices"][0]["message"]
    retrying = FakeAgent(done(store, 1, IMAGE, "Here is a bell."))
    async with client(build_gateway(preset, retrying, store)) as http:
        made = (await http.post(f"/v1/responses/{completion['id']}/parts/1/retry")).json()
    text, _, more = message["parts"]

    words = f"Here is a bell.\n{QUESTION}\nAnd more."
    for earlier, expected in (
        (message, [words]),
        ({"role": "assistant", "content": message["content"]}, [words]),
        (
            {"role": "assistant", "parts": [text, made, more]},
            ["Here is a bell.", SpokenEarlier(IMAGE), "And more."],
        ),
    ):
        hearing = FakeAgent(*asking(END))
        payload = body()
        payload["messages"] = [*payload["messages"], earlier, {"role": "user", "content": "yes"}]
        await ask(hearing, preset, store, payload)
        speaker = FakeSpeaker(Finished("stop"))
        await events_of(agent(store, speaker), list(hearing.conversation))
        assert list(speaker.prompt[1].parts) == expected


@pytest.fixture(scope="module")
def tiny_agent(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Agent:
    store = ArtefactStore(tmp_path_factory.mktemp("files").as_uri())
    return local_agent(load_preset(str(tiny_preset)), store)


async def test_real_models_say_how_sure_they_are_and_a_picture_is_made_when_it_is_wished(
    tiny_agent: Agent, tiny_preset: Path
) -> None:
    events = [e async for e in tiny_agent.turn(said(), TurnOptions(seed=3, ask_below=0.999999))]
    (asked,) = [event for event in events if isinstance(event, PartAsked)]
    assert 0.5 < asked.confidence < 0.999999
    assert (asked.modality, asked.caption) == (IMAGE, "here is a bell.")
    surer = TurnOptions(seed=3, ask_below=asked.confidence - 0.01)
    assert any(isinstance(e, PartDone) for e in [e async for e in tiny_agent.turn(said(), surer)])

    order = kept(tiny_agent.store, turn_of(events), asked.index)
    assert order.settings.seed == 3
    app = build_gateway(load_preset(str(tiny_preset)), tiny_agent, tiny_agent.store)
    async with client(app) as http:
        plain = await http.post("/v1/chat/completions", json=body(ask_below=0.999999, seed=3))
        part = plain.json()["choices"][0]["message"]["parts"][asked.index]
        assert part["confidence"] == pytest.approx(asked.confidence, abs=1e-3)
        made = await retried(http, plain.json()["id"], asked.index)
        at_once = (await http.post("/v1/chat/completions", json=body(seed=3))).json()
        picture = at_once["choices"][0]["message"]["parts"][asked.index]
        assert made["status"] == "done"
        files = [(await http.get(entry["url"])).content for entry in (made, picture)]
    assert files[0] == files[1]


async def retried(http: httpx.AsyncClient, reply_id: str, index: int) -> dict[str, Any]:
    answer = await http.post(f"/v1/responses/{reply_id}/parts/{index}/retry")
    part: dict[str, Any] = answer.json()
    return part


def test_a_session_makes_what_it_asked_about(tiny_preset: Path) -> None:
    with Session.open(str(tiny_preset)) as session:
        reply = session.chat([{"role": "user", "content": "draw a bell"}], ask_below=0.999999, seed=1)
        asked = reply.parts[1]
        assert (asked.data, asked.question) == (None, QUESTION)
        assert reply.text == f"here is a bell.\n{QUESTION}"
        made = session.make(reply, 1)
    assert made.id == reply.id
    assert made.parts[0] == reply.parts[0]
    assert made.parts[1].data is not None
    assert made.parts[1].question is None
