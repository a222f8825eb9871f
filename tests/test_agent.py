"""One turn of conversation, from the boxes to the events."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.artefacts import ArtefactStore
from services.boxes import (
    BoxState,
    Finished,
    SpokenEarlier,
    Words,
)
from services.errors import BadRequest, PresetProblem
from services.events import (
    PartDone,
    PartFailed,
    PartPreview,
    PartProgress,
    PartStarted,
    TextDelta,
    TurnDone,
    TurnStarted,
)
from services.messages import MediaPart, Message, Role, SpokenPart, TextPart, TurnOptions
from services.presets import CostLimits, GenerationDefaults, Limits
from tests.fake_boxes import (
    AUDIO,
    IMAGE,
    VIDEO,
    FakeDecoder,
    FakeEncoder,
    FakeSpeaker,
    agent,
    events_of,
    failure,
    said,
    signal,
)


async def test_a_turn_tells_its_parts_in_order_with_running_sequence_numbers(store: ArtefactStore) -> None:
    speaker = FakeSpeaker(
        Words("Here "), Words("it is."), signal(IMAGE), Words(" And more."), Finished("stop")
    )
    events = await events_of(agent(store, speaker, FakeDecoder(store, IMAGE)))
    assert [event.sequence for event in events] == list(range(len(events)))
    assert isinstance(events[0], TurnStarted)
    assert isinstance(events[-1], TurnDone)
    texts = [(event.index, event.text) for event in events if isinstance(event, TextDelta)]
    assert texts == [(0, "Here"), (0, " it is."), (2, "And more.")]
    started = [event for event in events if isinstance(event, PartStarted)]
    assert [(event.index, event.modality, event.caption) for event in started] == [(1, IMAGE, "a bell")]
    progress = [(event.step, event.total) for event in events if isinstance(event, PartProgress)]
    assert progress == [(1, 2), (2, 2)]
    done = [event for event in events if isinstance(event, PartDone)]
    assert [event.index for event in done] == [1]
    assert store.read(done[0].artefact.id) == b"data"


async def test_a_decoder_starts_while_the_text_goes_on(store: ArtefactStore) -> None:
    decoder = FakeDecoder(store, IMAGE)

    async def until_decoding() -> None:
        async with asyncio.timeout(2):
            while not decoder.began:
                await asyncio.sleep(0.001)

    speaker = FakeSpeaker(signal(IMAGE), until_decoding, Words("later"), Finished("stop"))
    events = await events_of(agent(store, speaker, decoder))
    assert isinstance(events[-1], TurnDone)


async def test_decoders_work_at_the_same_time_and_are_told_in_the_order_spoken(
    store: ArtefactStore,
) -> None:
    slow = FakeDecoder(store, VIDEO, steps=1, step_s=0.2)
    fast = FakeDecoder(store, IMAGE, steps=1, step_s=0.05)
    speaker = FakeSpeaker(signal(VIDEO), signal(IMAGE), Finished("stop"))
    events = await events_of(agent(store, speaker, slow, fast))
    assert fast.ended[0] < slow.ended[0]
    assert fast.began[0] < slow.ended[0]
    assert [event.modality for event in events if isinstance(event, PartDone)] == [VIDEO, IMAGE]


async def test_one_failed_part_loses_neither_text_nor_the_other_parts(store: ArtefactStore) -> None:
    broken = FakeDecoder(store, IMAGE, error=MemoryError())
    works = FakeDecoder(store, AUDIO)
    speaker = FakeSpeaker(Words("Here."), signal(IMAGE), Words("Listen."), signal(AUDIO), Finished("stop"))
    events = await events_of(agent(store, speaker, broken, works))
    failed = [event for event in events if isinstance(event, PartFailed)]
    assert [(event.index, event.code) for event in failed] == [(1, "out_of_memory")]
    assert [event.index for event in events if isinstance(event, PartDone)] == [3]
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["Here.", "Listen."]
    assert isinstance(events[-1], TurnDone)


async def test_an_error_nobody_foresaw_is_logged_and_hides_its_details(
    store: ArtefactStore, caplog: pytest.LogCaptureFixture
) -> None:
    broken = FakeDecoder(store, IMAGE, error=RuntimeError("secret path"))
    events = await events_of(agent(store, FakeSpeaker(signal(IMAGE), Finished("stop")), broken))
    (failed,) = [event for event in events if isinstance(event, PartFailed)]
    assert failed.code == "internal_error"
    assert "secret" not in failed.message
    assert "secret path" in caplog.text


async def test_a_failure_with_words_of_its_own_is_logged_in_one_line(
    store: ArtefactStore, caplog: pytest.LogCaptureFixture
) -> None:
    problem = PresetProblem("The image decoder cannot be loaded: x is missing.", code="weights_missing")
    lost = FakeDecoder(store, IMAGE, error=problem)
    await events_of(agent(store, FakeSpeaker(signal(IMAGE), Finished("stop")), lost))
    await events_of(agent(store, FakeSpeaker(problem)))
    assert [record.getMessage() for record in caplog.records] == [
        f"The image decoder failed: {problem.message}",
        f"The language model failed: {problem.message}",
        f"A turn failed: {problem.message}",
    ]
    assert not any(record.exc_info for record in caplog.records)


async def test_closing_a_turn_stops_speaker_and_decoders(store: ArtefactStore) -> None:
    decoder = FakeDecoder(store, IMAGE, steps=1000, step_s=0.01)
    speaker = FakeSpeaker(signal(IMAGE), lambda: asyncio.sleep(60), Finished("stop"))
    async with aclosing(agent(store, speaker, decoder).turn(said(), TurnOptions())) as events:
        async for event in events:
            if isinstance(event, PartProgress):
                break
    assert decoder.stopped
    assert speaker.closed
    assert decoder.steps_taken < 10


async def test_a_failing_language_model_still_delivers_what_it_has_spoken(store: ArtefactStore) -> None:
    decoder = FakeDecoder(store, IMAGE, step_s=0.02)
    speaker = FakeSpeaker(signal(IMAGE), BadRequest("Too long.", code="context_length_exceeded"))
    events = await events_of(agent(store, speaker, decoder))
    assert any(isinstance(event, PartDone) for event in events)
    assert failure(events)["code"] == "context_length_exceeded"


async def test_a_decoder_that_is_down_is_not_promised(store: ArtefactStore) -> None:
    speaker = FakeSpeaker(Words("words"), Finished("stop"))
    the_agent = agent(store, speaker, FakeDecoder(store, IMAGE), FakeDecoder(store, AUDIO, now=BoxState.GONE))
    await events_of(the_agent)
    assert speaker.options is not None
    assert speaker.options.allowed == {IMAGE}
    failed = failure(await events_of(the_agent, modalities=[AUDIO]))
    assert (failed["kind"], failed["code"]) == ("Unavailable", "decoder_unavailable")


@pytest.mark.parametrize("now", [BoxState.LOADING, BoxState.GONE])
@pytest.mark.parametrize("part", ["language model", "encoder"])
async def test_a_turn_is_refused_in_time_while_what_it_needs_is_not_ready(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch, part: str, now: BoxState
) -> None:
    monkeypatch.setattr("services.admission.PATIENCE_S", 0.05)
    speaker, encoder = FakeSpeaker(Words("words"), Finished("stop")), FakeEncoder()
    the_agent = agent(store, speaker, FakeDecoder(store, IMAGE), encoder=encoder)
    (speaker if part == "language model" else encoder).now = now
    shown = store.put(b"x", media_type="image/png", filename="a.png").id
    failed = failure(await events_of(the_agent, [Message(Role.USER, (MediaPart(shown, IMAGE),))]))
    assert (failed["kind"], failed["code"], failed["retry_after_s"]) == ("Unavailable", "model_loading", 5)
    how = "is still being loaded" if now is BoxState.LOADING else "has stopped and is being started again"
    assert failed["message"].startswith(f"The {part} {how}. Try again in 5 s")
    assert not speaker.prompt
    answered = await events_of(the_agent)  # words alone need no encoder
    assert isinstance(answered[-1], TurnDone) is (part == "encoder")


async def test_a_turn_waits_for_a_decoder_that_is_nearly_there(store: ArtefactStore) -> None:
    speaker, decoder = FakeSpeaker(Finished("stop")), FakeDecoder(store, IMAGE, now=BoxState.LOADING)
    turn = asyncio.create_task(events_of(agent(store, speaker, decoder)))
    await asyncio.sleep(0.05)
    assert not speaker.options
    decoder.now = BoxState.READY
    await turn
    assert speaker.options is not None
    assert speaker.options.allowed == {IMAGE}


async def test_a_decoder_that_is_still_loaded_is_not_quietly_left_out(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.admission.PATIENCE_S", 0.05)
    speaker = FakeSpeaker(Finished("stop"))
    decoders = FakeDecoder(store, IMAGE), FakeDecoder(store, AUDIO, now=BoxState.LOADING)
    the_agent = agent(store, speaker, *decoders)
    failed = failure(await events_of(the_agent))
    assert failed["code"] == "model_loading"
    assert "The audio decoder is still being loaded" in failed["message"]
    assert "modalities ['text', 'image']" in failed["message"]
    assert isinstance((await events_of(the_agent, modalities=[Modality.TEXT, IMAGE]))[-1], TurnDone)


async def test_modalities_of_a_request_are_all_that_is_allowed(store: ArtefactStore) -> None:
    speaker = FakeSpeaker(Words("words"), Finished("stop"))
    decoders = FakeDecoder(store, IMAGE), FakeDecoder(store, AUDIO)
    await events_of(agent(store, speaker, *decoders), modalities=[Modality.TEXT])
    assert speaker.options is not None
    assert speaker.options.allowed == frozenset()


async def test_a_modality_that_the_preset_lacks_is_refused_by_name(store: ArtefactStore) -> None:
    the_agent = agent(store, FakeSpeaker(Finished("stop")), FakeDecoder(store, IMAGE))
    failed = failure(await events_of(the_agent, modalities=[Modality.TEXT, VIDEO]))
    assert failed["code"] == "unsupported_modality"
    assert failed["param"] == "modalities"
    assert "it makes text, image" in failed["message"]
    failed = failure(await events_of(the_agent, decoders={AUDIO: DecodeSettings(seed=1)}))
    assert (failed["code"], failed["param"]) == ("unsupported_modality", "decoders.audio")


async def test_a_decoder_may_not_be_asked_for_more_than_its_limits(store: ArtefactStore) -> None:
    limits = {IMAGE: CostLimits(steps=10)}
    the_agent = agent(store, FakeSpeaker(Finished("stop")), FakeDecoder(store, IMAGE), cost_limits=limits)
    failed = failure(await events_of(the_agent, decoders={IMAGE: DecodeSettings(steps=11)}))
    assert failed["code"] == "decoder_limit_exceeded"
    assert failed["param"] == "decoders.image.num_inference_steps"


@pytest.mark.parametrize(
    ("modality", "settings", "name", "way_out"),
    [
        (IMAGE, DecodeSettings(num_frames=8), "num_frames is 8", "size says. Leave num_frames out."),
        (AUDIO, DecodeSettings(width_px=64, height_px=32), "size is 64x32", "seconds says. Leave size out."),
        (
            VIDEO,
            DecodeSettings(duration_s=2.0),
            "seconds is 2.0",
            "size and num_frames says. Leave seconds out.",
        ),
    ],
)
async def test_a_size_that_such_a_medium_does_not_have_is_refused_before_anything_is_said(
    store: ArtefactStore, modality: Modality, settings: DecodeSettings, name: str, way_out: str
) -> None:
    speaker, decoder = FakeSpeaker(Finished("stop")), FakeDecoder(store, modality)
    the_agent = agent(store, speaker, decoder, cost_limits={modality: CostLimits()})
    failed = failure(await events_of(the_agent, decoders={modality: settings}))
    assert failed["code"] == "invalid_value"
    assert failed["param"] == f"decoders.{modality.value}.{name.split()[0]}"
    assert failed["message"].startswith(name)
    assert failed["message"].endswith(way_out)
    assert speaker.options is None


async def test_media_get_seeds_that_follow_from_the_seed_of_the_turn(store: ArtefactStore) -> None:
    speaker = FakeSpeaker(signal(IMAGE), signal(IMAGE), Finished("stop"))
    the_agent = agent(store, speaker, FakeDecoder(store, IMAGE))

    async def seeds(**options: Any) -> list[int]:
        # By place in the reply: which of the two decoders begins first is left to chance.
        events = await events_of(the_agent, seed=7, **options)
        done = {event.index: event.manifest["seed"] for event in events if isinstance(event, PartDone)}
        return [done[index] for index in sorted(done)]

    assert await seeds() == [7, 8]
    assert await seeds(decoders={IMAGE: DecodeSettings(seed=3)}) == [3, 3]


@pytest.mark.parametrize(
    ("conversation", "code"),
    [
        ([], "invalid_conversation"),
        (said("  \n"), "empty_message"),
        ([Message(Role.USER, ())], "empty_message"),
        ([*said(), Message(Role.ASSISTANT, (TextPart("hi"),))], "invalid_conversation"),
        (said() * 7, "too_many_messages"),
        ([Message(Role.USER, (MediaPart("file-0"),) * 4)], "media_limit_exceeded"),
    ],
)
async def test_a_conversation_that_cannot_be_answered_is_refused(
    store: ArtefactStore, conversation: list[Message], code: str
) -> None:
    limits = Limits(max_messages=6, max_media=3)
    the_agent = agent(store, FakeSpeaker(Finished("stop")), limits=limits)
    assert failure(await events_of(the_agent, conversation))["code"] == code


async def test_an_error_in_a_medium_says_which_part_it_was(store: ArtefactStore) -> None:
    stored = store.put(b"x", media_type="audio/wav", filename="a.wav")
    conversation = [*said(), Message(Role.USER, (TextPart("and"), MediaPart(stored.id, AUDIO)))]
    failed = failure(await events_of(agent(store, FakeSpeaker()), conversation))
    assert (failed["code"], failed["param"]) == ("unsupported_media", "messages[1].content[1]")


async def test_an_earlier_medium_of_the_assistant_is_shown_as_its_signal(store: ArtefactStore) -> None:
    speaker = FakeSpeaker(Finished("stop"))
    conversation = [
        *said(),
        Message(Role.ASSISTANT, (TextPart("Here."), SpokenPart(IMAGE, "Here."), SpokenPart(AUDIO, "Ding."))),
        *said("now a blue one"),
    ]
    await events_of(agent(store, speaker), conversation)
    assert speaker.prompt[1].parts == ("Here.", SpokenEarlier(IMAGE), "Ding.", SpokenEarlier(AUDIO))


async def test_a_turn_reports_usage_and_timings(store: ArtefactStore) -> None:
    speaker = FakeSpeaker(Words("hi"), Finished("length", {"prompt_tokens": 5, "completion_tokens": 1}))
    *_, done = await events_of(agent(store, speaker))
    assert isinstance(done, TurnDone)
    assert done.finish_reason == "length"
    assert done.usage == {"prompt_tokens": 5, "completion_tokens": 1}
    assert 0 <= done.timings["first_text_s"] <= done.timings["total_s"]


async def test_how_the_words_are_chosen_reaches_the_language_model(store: ArtefactStore) -> None:
    speaker = FakeSpeaker(Finished("stop"))
    wishes: dict[str, Any] = {
        "top_k": 5,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "stop": ("bell",),
    }
    await events_of(agent(store, speaker), **wishes)
    assert {name: getattr(speaker.options, name) for name in wishes} == wishes
    defaults = GenerationDefaults(top_k=7, repetition_penalty=1.25)
    await events_of(agent(store, speaker, generation=defaults))
    assert speaker.options is not None
    assert (speaker.options.top_k, speaker.options.repetition_penalty, speaker.options.stop) == (7, 1.25, ())


async def test_decoders_know_whose_media_they_make(store: ArtefactStore) -> None:
    decoder = FakeDecoder(store, IMAGE)
    the_agent = agent(store, FakeSpeaker(signal(IMAGE), signal(IMAGE), Finished("stop")), decoder)
    for user in ("ann", "ann", None, None):
        await events_of(the_agent, user=user)
    named, anonymous = decoder.users[:4], decoder.users[4:]
    assert set(named) == {"user ann"}
    assert anonymous[0] == anonymous[1] != anonymous[2] == anonymous[3]
    assert not any(name.startswith("user ") for name in anonymous)


async def test_previews_are_told_to_those_who_ask(store: ArtefactStore) -> None:
    the_agent = agent(store, FakeSpeaker(signal(IMAGE), Finished("stop")), FakeDecoder(store, IMAGE, steps=3))
    events = await events_of(the_agent, previews=2)
    looks = [event for event in events if isinstance(event, PartPreview)]
    assert [(look.index, look.step, look.total, look.data) for look in looks] == [
        (0, 1, 3, b"look"),
        (0, 2, 3, b"look"),
    ]
    assert not any(isinstance(event, PartPreview) for event in await events_of(the_agent))
