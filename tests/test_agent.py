import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.agent import Agent
from services.artefacts import Artefact, ArtefactStore
from services.boxes import (
    Encoded,
    Finished,
    Made,
    Preview,
    Progress,
    PromptMessage,
    Speech,
    SpeechOptions,
    SpokenEarlier,
    SpokenSignal,
    Step,
    Words,
)
from services.errors import BadRequest
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
    TurnStarted,
)
from services.making import SIGNAL_PURPOSE, kept
from services.messages import MediaPart, Message, Role, SpokenPart, TextPart, TurnOptions
from services.presets import CostLimits, GenerationDefaults, Limits

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO


def signal(modality: Modality, caption: str = "a bell") -> SpokenSignal:
    zeros = np.zeros((2, 4), dtype=np.float32)
    return SpokenSignal(modality, caption, zeros, zeros)


class FakeEncoder:
    async def encode(self, artefact_id: str, expect: Modality | None) -> Encoded:
        if expect is AUDIO:
            raise BadRequest("This is not a sound.", code="unsupported_media")
        tokens = np.zeros((3, 4), dtype=np.float32)
        return Encoded(expect or IMAGE, tokens, tokens[0], (3,))


class FakeSpeaker:
    """Says what it is given; a callable in the list is called instead of said."""

    def __init__(self, *script: Speech | Exception | Callable[[], Any]) -> None:
        self.script = script
        self.prompt: list[PromptMessage] = []
        self.options: SpeechOptions | None = None
        self.closed = False

    async def generate(
        self, prompt: Sequence[PromptMessage], options: SpeechOptions
    ) -> AsyncGenerator[Speech, None]:
        self.prompt, self.options = list(prompt), options
        try:
            for item in self.script:
                if isinstance(item, Exception):
                    raise item
                if callable(item):
                    await item()
                    continue
                yield item
                await asyncio.sleep(0)
        finally:
            self.closed = True


class FakeDecoder:
    """Takes ``steps`` of ``step_s`` seconds each, and fails at the end if it is told to."""

    def __init__(
        self, store: ArtefactStore, modality: Modality, steps: int = 2, step_s: float = 0.0,
        error: Exception | None = None, up: bool = True,
    ) -> None:  # fmt: skip
        self.store, self.modality = store, modality
        self.steps, self.step_s, self.error, self.up = steps, step_s, error, up
        self.began: list[float] = []
        self.ended: list[float] = []
        self.settings: list[DecodeSettings] = []
        self.signals: list[SpokenSignal] = []
        self.users: list[str] = []
        self.sources: list[str | None] = []
        self.steps_taken = 0
        self.stopped = False

    async def available(self) -> bool:
        return self.up

    async def decode(
        self,
        signal: SpokenSignal,
        settings: DecodeSettings,
        *,
        user: str = "",
        previews: int = 0,
        source: str | None = None,
    ) -> AsyncGenerator[Step, None]:
        self.began.append(time.monotonic())
        self.settings.append(settings)
        self.signals.append(signal)
        self.users.append(user)
        self.sources.append(source)
        try:
            for step in range(self.steps):
                await asyncio.sleep(self.step_s)
                self.steps_taken += 1
                yield Progress(step + 1, self.steps, None)
                if step < previews:
                    yield Preview(step + 1, self.steps, b"look", "image/jpeg")
        except (GeneratorExit, asyncio.CancelledError):
            self.stopped = True
            raise
        if self.error is not None:
            raise self.error
        made = self.store.put(
            b"data", media_type="image/png", filename="x.png", modality=self.modality, caption=signal.caption
        )
        self.ended.append(time.monotonic())
        yield Made(made, {"seed": settings.seed})


@pytest.fixture
def store(tmp_path: Path) -> ArtefactStore:
    return ArtefactStore(tmp_path.as_uri())


def agent(store: ArtefactStore, speaker: FakeSpeaker, *decoders: FakeDecoder, **rest: Any) -> Agent:
    return Agent(
        encode=rest.pop("encoder", FakeEncoder()),
        generate=speaker,
        decode={decoder.modality: decoder for decoder in decoders},
        store=store,
        **rest,
    )


def said(text: str = "draw a bell") -> list[Message]:
    return [Message(Role.USER, (TextPart(text),))]


async def events_of(agent: Agent, conversation: list[Message] | None = None, **options: Any) -> list[Event]:
    conversation = said() if conversation is None else conversation
    return [event async for event in agent.turn(conversation, TurnOptions(**options))]


def failure(events: list[Event]) -> dict[str, Any]:
    assert isinstance(events[-1], TurnFailed), events
    return dict(events[-1].error)


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
    the_agent = agent(store, speaker, FakeDecoder(store, IMAGE), FakeDecoder(store, AUDIO, up=False))
    await events_of(the_agent)
    assert speaker.options is not None
    assert speaker.options.allowed == {IMAGE}
    assert await the_agent.outputs() == (IMAGE,)
    failed = failure(await events_of(the_agent, modalities=[AUDIO]))
    assert (failed["kind"], failed["code"]) == ("Unavailable", "decoder_unavailable")


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


async def test_a_part_that_cannot_be_made_again_says_why(store: ArtefactStore) -> None:
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
    decoder.up = False
    assert await refusal(turn, 1) == "decoder_unavailable"


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

    assert decoder.sources == [made, None, shown]
    assert decoder.settings[0].strength == 0.5

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


def turn_of(events: Sequence[Event]) -> str:
    assert isinstance(events[0], TurnStarted)
    return events[0].id
