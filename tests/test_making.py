"""Media of a reply: cancelled, made again, edited, and what is kept of them."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from decoders.settings import DecodeSettings
from services.artefacts import Artefact, ArtefactStore
from services.boxes import (
    BoxState,
    Finished,
    Words,
)
from services.events import (
    Event,
    PartDone,
    PartFailed,
    PartPreview,
    PartProgress,
    PartStarted,
    TextDelta,
    TurnDone,
    TurnFailed,
)
from services.making import SIGNAL_PURPOSE, kept
from services.messages import MediaPart, Message, Role, SpokenPart, TextPart, TurnOptions
from services.presets import CostLimits
from tests.fake_boxes import (
    AUDIO,
    IMAGE,
    VIDEO,
    FakeDecoder,
    FakeSpeaker,
    agent,
    events_of,
    failure,
    said,
    signal,
    turn_of,
)


async def test_a_cancelled_part_loses_neither_text_nor_the_other_parts(store: ArtefactStore) -> None:
    slow = FakeDecoder(store, IMAGE, steps=1000, step_s=0.01)
    speaker = FakeSpeaker(Words("Here."), signal(IMAGE), Words("Listen."), signal(AUDIO), Finished("stop"))
    the_agent = agent(store, speaker, slow, FakeDecoder(store, AUDIO))
    events: list[Event] = []
    async for event in the_agent.turn(said(), TurnOptions()):
        events.append(event)
        if isinstance(event, PartProgress) and event.index == 1 and not slow.stopped:
            assert await the_agent.cancel_part(turn_of(events), 1)
            assert slow.stopped
            assert not await the_agent.cancel_part(turn_of(events), 1)
    (failed,) = [event for event in events if isinstance(event, PartFailed)]
    assert (failed.index, failed.code) == (1, "part_cancelled")
    assert [event.index for event in events if isinstance(event, PartDone)] == [3]
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["Here.", "Listen."]
    assert isinstance(events[-1], TurnDone)


async def test_a_part_can_be_cancelled_before_its_decoder_has_begun(store: ArtefactStore) -> None:
    decoder = FakeDecoder(store, IMAGE)
    the_agent = agent(store, FakeSpeaker(signal(IMAGE), Finished("stop")), decoder)
    events: list[Event] = []
    async for event in the_agent.turn(said(), TurnOptions()):
        events.append(event)
        if isinstance(event, PartStarted):
            assert await the_agent.cancel_part(turn_of(events), 0)
    assert decoder.steps_taken == 0
    assert [event.code for event in events if isinstance(event, PartFailed)] == ["part_cancelled"]


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
async def test_a_signal_is_stored_while_its_decoder_works_and_before_its_end_is_told(
    end: str, store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, stored_s = store.put, []

    def slow_put(*args: Any, **options: Any) -> Artefact:
        if options.get("purpose") == SIGNAL_PURPOSE:
            time.sleep(0.2)
            stored_s.append(time.monotonic())
        return put(*args, **options)

    monkeypatch.setattr(store, "put", slow_put)
    decoder = FakeDecoder(store, IMAGE, error=MemoryError() if end == "failed" else None)
    the_agent = agent(store, FakeSpeaker(signal(IMAGE), Finished("stop")), decoder)
    events: list[Event] = []
    async for event in the_agent.turn(said(), TurnOptions()):
        events.append(event)
        if isinstance(event, PartProgress) and end == "cancelled":
            await the_agent.cancel_part(turn_of(events), 0)
        if isinstance(event, PartDone | PartFailed):
            assert kept(store, turn_of(events), 0).signal.caption == "a bell"
            break
    assert isinstance(events[-1], PartDone if end == "done" else PartFailed)
    assert decoder.began[0] < stored_s[0] - 0.1


async def test_a_medium_whose_signal_cannot_be_stored_is_told_as_failed(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = store.put

    def full(*args: Any, **options: Any) -> Artefact:
        if options.get("purpose") == SIGNAL_PURPOSE:
            raise OSError("No space left on device")
        return put(*args, **options)

    monkeypatch.setattr(store, "put", full)
    speaker = FakeSpeaker(signal(IMAGE), Finished("stop"))
    events = await events_of(agent(store, speaker, FakeDecoder(store, IMAGE)))
    assert [event.code for event in events if isinstance(event, PartFailed)] == ["internal_error"]


async def test_a_failed_part_is_made_again_from_the_same_signal_without_the_language_model(
    store: ArtefactStore,
) -> None:
    broken = FakeDecoder(store, IMAGE, error=MemoryError())
    speaker = FakeSpeaker(Words("Here."), signal(IMAGE), Finished("stop"))
    wishes = {IMAGE: DecodeSettings(steps=4, seed=3)}
    turn = turn_of(await events_of(agent(store, speaker, broken), decoders=wishes))

    other = FakeDecoder(store, IMAGE)  # in another process, after a restart
    silent = FakeSpeaker(RuntimeError("nobody asked it to speak"))
    the_agent = agent(store, silent, other)
    events = [event async for event in the_agent.retry_part(turn, 1, DecodeSettings(), previews=1)]

    assert [type(event) for event in events] == [
        PartStarted, PartProgress, PartPreview, PartProgress, PartDone
    ]  # fmt: skip
    assert [event.sequence for event in events] == list(range(5))
    assert {event.index for event in events if not isinstance(event, TurnFailed)} == {1}
    (before,), (after,) = broken.signals, other.signals
    assert (after.modality, after.caption) == (before.modality, before.caption)
    np.testing.assert_array_equal(after.hidden, before.hidden)
    np.testing.assert_array_equal(after.embeddings, before.embeddings)
    assert other.settings == [DecodeSettings(steps=4, seed=3)]
    assert not silent.prompt

    again = [event async for event in the_agent.retry_part(turn, 1, DecodeSettings(seed=9), user="ann")]
    assert isinstance(again[-1], PartDone)
    assert other.settings[-1] == DecodeSettings(steps=4, seed=9)
    assert other.users[-1] == "user ann"


async def test_a_part_that_cannot_be_made_again_says_why(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.admission.PATIENCE_S", 0.05)
    decoder = FakeDecoder(store, IMAGE, steps=1000, step_s=0.01)
    limits = {IMAGE: CostLimits(steps=10)}
    speaker = FakeSpeaker(Words("Here."), signal(IMAGE), Finished("stop"))
    the_agent = agent(store, speaker, decoder, cost_limits=limits)

    async def refusal(turn: str, index: int, **wishes: int) -> str:
        events = [event async for event in the_agent.retry_part(turn, index, DecodeSettings(**wishes))]
        told = failure(events)
        assert told["param"] == ("num_inference_steps" if wishes else None)
        return str(told["code"])

    events: list[Event] = []
    async with aclosing(the_agent.turn(said(), TurnOptions())) as stream:
        async for event in stream:
            events.append(event)
            if isinstance(event, PartProgress):
                assert await refusal(turn_of(events), 1) == "part_running"
                break
    turn = turn_of(events)
    assert await refusal(turn, 0) == "part_not_found"
    assert await refusal("0" * 32, 1) == "part_not_found"
    assert await refusal(turn, 1, steps=11) == "decoder_limit_exceeded"
    decoder.now = BoxState.GONE
    assert await refusal(turn, 1) == "decoder_unavailable"
    decoder.now = BoxState.LOADING
    assert await refusal(turn, 1) == "model_loading"


async def test_an_edit_starts_from_the_newest_medium_of_its_kind(store: ArtefactStore) -> None:
    shown, made, sound = (store.put(b"x", media_type="image/png", filename="a.png").id for _ in range(3))
    conversation = [
        Message(Role.USER, (MediaPart(shown, IMAGE), TextPart("make it red"))),
        Message(Role.ASSISTANT, (TextPart("Here."), SpokenPart(IMAGE, "Here.", made))),
        Message(Role.USER, (MediaPart(sound, VIDEO), TextPart("and now blue"))),
    ]
    decoder = FakeDecoder(store, IMAGE)
    the_agent = agent(store, FakeSpeaker(signal(IMAGE), Finished("stop")), decoder)
    wishes = {IMAGE: DecodeSettings(strength=0.5)}

    await events_of(the_agent, conversation, decoders=wishes)
    turn = turn_of(await events_of(the_agent, conversation))
    await events_of(the_agent, [conversation[0]], decoders=wishes)

    assert decoder.sources == [made, made, shown]
    assert [settings.strength for settings in decoder.settings] == [0.5, None, 0.5]

    again = [event async for event in the_agent.retry_part(turn, 0, wishes[IMAGE])]
    assert isinstance(again[-1], PartDone)
    assert decoder.sources[-1] == made


async def test_an_edit_without_anything_to_start_from_is_refused(store: ArtefactStore) -> None:
    decoder = FakeDecoder(store, IMAGE)
    speaker = FakeSpeaker(signal(IMAGE), Finished("stop"))
    the_agent = agent(store, speaker, decoder)
    wishes = {IMAGE: DecodeSettings(strength=0.5)}

    failed = failure(await events_of(the_agent, decoders=wishes))
    assert (failed["code"], failed["param"]) == ("no_source", "decoders.image.strength")
    assert "the conversation holds no image to start from" in failed["message"]
    assert not speaker.prompt

    keeping = {IMAGE: DecodeSettings(keep_untouched=True)}
    failed = failure(await events_of(the_agent, decoders=keeping))
    assert (failed["code"], failed["param"]) == ("no_source", "decoders.image.keep_untouched")
    assert "leave keep_untouched out" in failed["message"]

    gone = [Message(Role.ASSISTANT, (SpokenPart(IMAGE, "Here.", "file-" + "0" * 32),)), *said()]
    failed = failure(await events_of(the_agent, gone, decoders=wishes))
    assert (failed["code"], failed["param"]) == ("file_not_found", "decoders.image.strength")

    turn = turn_of(await events_of(the_agent))
    failed = failure([event async for event in the_agent.retry_part(turn, 0, wishes[IMAGE])])
    assert (failed["code"], failed["param"]) == ("no_source", "strength")


async def test_a_retry_can_be_cancelled_or_dropped(store: ArtefactStore) -> None:
    speaker = FakeSpeaker(signal(IMAGE), Finished("stop"))
    turn = turn_of(await events_of(agent(store, speaker, FakeDecoder(store, IMAGE))))
    slow = FakeDecoder(store, IMAGE, steps=1000, step_s=0.01)
    the_agent = agent(store, speaker, slow)

    events = []
    async for event in the_agent.retry_part(turn, 0, DecodeSettings()):
        events.append(event)
        if isinstance(event, PartProgress) and event.step == 1:
            assert await the_agent.cancel_part(turn, 0)
    assert isinstance(events[-1], PartFailed)
    assert events[-1].code == "part_cancelled"

    slow.stopped = False
    async with aclosing(the_agent.retry_part(turn, 0, DecodeSettings())) as stream:
        async for event in stream:
            if isinstance(event, PartProgress):
                break
    assert slow.stopped
    assert slow.steps_taken < 20
