"""When media are made again, and that a second look never loses what was made."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx
import pytest

from alignment.second_look import SecondLook, likeness, next_seed
from decoders.settings import MAX_SEED, DecodeSettings
from encoders.media import Modality
from services import looking
from services.agent import Agent
from services.artefacts import ArtefactStore
from services.boxes import Encoded, Finished, SpokenSignal
from services.errors import NotFound, Unavailable
from services.events import Event, PartDone, PartFailed, PartProgress, TurnDone
from services.gateway import build_gateway
from services.messages import TurnOptions
from services.presets import Preset
from tests.fake_boxes import (
    AUDIO,
    IMAGE,
    FakeDecoder,
    FakeEncoder,
    FakeSpeaker,
    agent,
    events_of,
    said,
    signal,
    turn_of,
)

WISH = SecondLook(retries=2, below=0.5, question="what is this?", modalities=frozenset({IMAGE}))


def looking_agent(
    store: ArtefactStore, *likenesses: float | Exception, modality: Modality = IMAGE, **rest: Any
) -> tuple[Agent, FakeSpeaker, FakeDecoder]:
    speaker = FakeSpeaker(signal(modality), Finished("stop"))
    speaker.likenesses = list(likenesses)
    decoder = rest.pop("decoder", FakeDecoder(store, modality))
    return agent(store, speaker, decoder, second_look=rest.pop("wish", WISH), **rest), speaker, decoder


def done(events: list[Event]) -> PartDone:
    (part,) = [event for event in events if isinstance(event, PartDone)]
    return part


def seeds(decoder: FakeDecoder) -> list[int | None]:
    return [settings.seed for settings in decoder.settings]


def test_the_least_probable_word_says_how_much_a_medium_looks_like_its_caption() -> None:
    assert likeness([math.log(0.9), math.log(0.2), math.log(0.99)]) == pytest.approx(0.2)


def test_seeds_of_attempts_differ_from_each_other_and_from_those_of_neighbours() -> None:
    found = {next_seed(first, attempt) for first in range(100) for attempt in range(9)}
    assert len(found) == 900
    assert next_seed(7, 0) == 7
    assert 0 <= next_seed(MAX_SEED, 8) <= MAX_SEED


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"retries": 0}, "retries is 0; expected at least 1"),
        ({"below": 1.0}, "below is 1.0; expected a probability"),
        ({"question": " "}, "question is empty"),
    ],
)
def test_a_second_look_that_makes_no_sense_is_refused(wrong: dict[str, Any], complaint: str) -> None:
    whole: dict[str, Any] = {"retries": 1, "below": 0.5, "question": "?", "modalities": frozenset()}
    with pytest.raises(ValueError, match=complaint):
        SecondLook(**whole | wrong)


async def test_a_medium_that_looks_like_its_caption_is_made_once(store: ArtefactStore) -> None:
    the_agent, speaker, decoder = looking_agent(store, 0.9)
    part = done(await events_of(the_agent, seed=5, user="ada"))
    assert seeds(decoder) == [5]
    assert (part.attempts, part.manifest["attempts"], part.manifest["likeness"]) == (1, 1, 0.9)
    ((prompt, caption, user),) = speaker.looks
    assert (caption, user) == ("a bell", "user ada")
    assert isinstance(prompt[0].parts[0], Encoded)
    assert prompt[0].parts[1] == "what is this?"


@pytest.mark.parametrize(
    ("likenesses", "attempts", "best"),
    [((0.1, 0.7), 2, 1), ((0.3, 0.2, 0.1), 3, 0), ((0.1, 0.4, 0.2), 3, 1), ((0.1, 0.2, 0.3), 3, 2)],
)
async def test_what_does_not_is_made_again_with_seeds_that_follow_and_the_best_is_kept(
    likenesses: tuple[float, ...], attempts: int, best: int, store: ArtefactStore
) -> None:
    the_agent, _, decoder = looking_agent(store, *likenesses)
    events = await events_of(the_agent, seed=5)
    tried = [next_seed(5, attempt) for attempt in range(attempts)]
    part = done(events)
    assert seeds(decoder) == tried
    assert part.manifest == {"seed": tried[best], "likeness": likenesses[best], "attempts": attempts}
    assert part.attempts == attempts
    assert [event.step for event in events if isinstance(event, PartProgress)] == [1, 2] * attempts
    kept = [artefact.id for artefact in store.of_purpose("user_data")]
    assert kept == [part.artefact.id]  # the others are gone


async def test_media_of_other_kinds_and_without_words_are_taken_as_they_come(store: ArtefactStore) -> None:
    for the_agent, speaker, decoder in (
        looking_agent(store, modality=AUDIO),
        looking_agent(store, wish=None),
    ):
        part = done(await events_of(the_agent, seed=5))
        assert (part.attempts, part.manifest, speaker.looks) == (1, {"seed": 5}, [])
        assert seeds(decoder) == [5]
    silent = FakeSpeaker(signal(IMAGE, " "), Finished("stop"))
    done(await events_of(agent(store, silent, FakeDecoder(store, IMAGE), second_look=WISH)))
    assert silent.looks == []


@pytest.mark.parametrize(
    "wishes", [{"verify": False}, {"decoders": {IMAGE: DecodeSettings(seed=8)}}], ids=["asked", "own seed"]
)
async def test_a_request_may_take_media_as_they_come(wishes: dict[str, Any], store: ArtefactStore) -> None:
    the_agent, speaker, decoder = looking_agent(store)
    events = await events_of(the_agent, seed=8, **wishes)
    assert (done(events).attempts, speaker.looks, seeds(decoder)) == (1, [], [8])
    again = [event async for event in the_agent.retry_part(turn_of(events), 0, DecodeSettings())]
    assert isinstance(again[-1], PartDone)
    assert speaker.looks == []


async def test_a_medium_that_is_made_of_the_callers_words_is_not_looked_at(store: ArtefactStore) -> None:
    the_agent, speaker, _ = looking_agent(store)
    done([event async for event in the_agent.make(IMAGE, "a bell", DecodeSettings(seed=1))])
    assert speaker.looks == []


async def test_a_part_that_is_made_again_is_looked_at_unless_a_seed_is_named(store: ArtefactStore) -> None:
    the_agent, speaker, decoder = looking_agent(store, 0.1, 0.9, 0.1, 0.9)
    first = await events_of(the_agent, seed=5)
    same = [event async for event in the_agent.retry_part(turn_of(first), 0, DecodeSettings())]
    assert done(same).manifest == done(first).manifest
    other = [event async for event in the_agent.retry_part(turn_of(first), 0, DecodeSettings(seed=6))]
    assert done(other).manifest == {"seed": 6}
    assert (len(speaker.looks), len(seeds(decoder))) == (4, 5)


class Blind(FakeEncoder):
    async def encode(self, artefact_id: str, expect: Modality | None) -> Encoded:
        raise Unavailable("The encoder is gone.", code="encoder_unavailable")


class Slow(FakeEncoder):
    async def encode(self, artefact_id: str, expect: Modality | None) -> Encoded:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")


@pytest.mark.parametrize("encoder", [Blind(), Slow()])
async def test_a_medium_that_nobody_can_look_at_is_passed_on(
    encoder: FakeEncoder, store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "LOOKS_WITHIN_S", 0.05)
    the_agent, speaker, decoder = looking_agent(store, encoder=encoder)
    part = done(await events_of(the_agent, seed=5))
    assert (part.manifest, speaker.looks, seeds(decoder)) == ({"seed": 5}, [], [5])


class FailsLater(FakeDecoder):
    """Makes one medium, and no second one."""

    async def decode(self, signal: SpokenSignal, settings: DecodeSettings, **rest: Any) -> Any:
        self.error = MemoryError() if self.settings else None
        async for step in super().decode(signal, settings, **rest):
            yield step


async def test_a_second_attempt_that_fails_or_cannot_be_looked_at_leaves_the_first(
    store: ArtefactStore,
) -> None:
    decoder = FailsLater(store, IMAGE)
    the_agent, _, _ = looking_agent(store, 0.1, decoder=decoder)
    part = done(await events_of(the_agent, seed=5))
    assert part.manifest == {"seed": 5, "likeness": 0.1, "attempts": 1}

    the_agent, _, _ = looking_agent(store, 0.1, RuntimeError("lost"), RuntimeError("lost"))
    part = done(await events_of(the_agent, seed=5))
    assert (part.manifest["seed"], part.attempts) == (5, 3)


@pytest.mark.parametrize("who", ["part", "turn"])
async def test_a_cancel_stops_an_attempt_that_nobody_has_heard_of(who: str, store: ArtefactStore) -> None:
    decoder = FakeDecoder(store, IMAGE, step_s=0.01)
    the_agent, _, _ = looking_agent(store, 0.1, 0.2, 0.3, decoder=decoder)
    stream = the_agent.turn(said(), TurnOptions(seed=5))
    events: list[Event] = []
    async for event in stream:
        events.append(event)
        if isinstance(event, PartProgress) and len(decoder.settings) == 2:
            if who == "turn":
                break
            if not decoder.stopped:
                assert await the_agent.cancel_part(turn_of(events), 0)
    await stream.aclose()
    assert decoder.stopped
    assert len(decoder.settings) == 2
    if who == "part":
        assert [event.code for event in events if isinstance(event, PartFailed)] == ["part_cancelled"]
        assert isinstance(events[-1], TurnDone)


async def test_an_attempt_that_vanished_meanwhile_is_no_reason_to_fail(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(artefact_id: str) -> None:
        raise NotFound("No such file.", code="file_not_found")

    monkeypatch.setattr(store, "delete", gone)
    the_agent, _, _ = looking_agent(store, 0.1, 0.9)
    assert done(await events_of(the_agent)).attempts == 2


async def test_looks_and_attempts_are_counted_where_there_are_any(store: ArtefactStore) -> None:
    the_agent, _, _ = looking_agent(store, 0.1, 0.2, 0.9)
    await events_of(the_agent)
    assert the_agent.own_counts()["local"] == {
        "media_total": 1,
        "asked_total": 0,
        "looked_total": 3,
        "remade_total": 2,
    }
    assert "looked_total" not in looking_agent(store, wish=None)[0].own_counts()["local"]


async def test_a_client_hears_how_many_were_made_and_may_ask_for_none(
    preset: Preset, store: ArtefactStore
) -> None:
    the_agent, speaker, _ = looking_agent(store, 0.1, 0.9)
    gateway = httpx.ASGITransport(build_gateway(preset, the_agent, store))
    body = {"model": preset.name, "messages": [{"role": "user", "content": "draw a bell"}], "seed": 5}
    async with httpx.AsyncClient(transport=gateway, base_url="http://test") as http:
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        (part,) = answer["choices"][0]["message"]["parts"]
        assert (part["attempts"], part["manifest"]["seed"]) == (2, next_seed(5, 1))
        plain = (await http.post("/v1/chat/completions", json=body | {"verify": False})).json()
        (part,) = plain["choices"][0]["message"]["parts"]
        assert (part["attempts"], part["manifest"]) == (1, {"seed": 5})
    assert len(speaker.looks) == 2
