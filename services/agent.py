"""One turn of conversation: media in, words and media out, as a stream of events.

The agent knows three protocols and a store. It knows nothing of HTTP, of Ray, or of tensors.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from alignment.second_look import SecondLook
from decoders.settings import MAX_SEED, DecodeSettings
from encoders.media import Modality
from services.adapters import chosen_adapters
from services.admission import Admission
from services.artefacts import ArtefactStore
from services.boxes import (
    LOCAL,
    Array,
    Box,
    BoxState,
    Counts,
    DecodeBox,
    EncodeBox,
    Finished,
    GenerateBox,
    Made,
    Preview,
    Progress,
    PromptMessage,
    SpeechOptions,
    SpokenSignal,
    Words,
)
from services.errors import BadRequest, ServiceError, translate
from services.events import (
    Event,
    PartAsked,
    PartPreview,
    PartProgress,
    PartStarted,
    TurnDone,
    TurnFailed,
    TurnStarted,
    new_turn_id,
)
from services.looking import Looking
from services.making import Making, Order, PartFailure, Told, changed, kept
from services.messages import MEDIA, MediaPart, Message, TextPart, TurnOptions
from services.presets import AdapterPreset, CostLimits, GenerationDefaults, Limits
from services.prompting import Prompting
from services.reading import Reader
from services.turn_state import MediumState, SpeechEnded, TurnState

logger = logging.getLogger(__name__)

QUESTIONS = {
    Modality.IMAGE: "Shall I make this picture?",
    Modality.VIDEO: "Shall I make this video?",
    Modality.AUDIO: "Shall I make this sound?",
}

Number = TypeVar("Number", int, float)


class Agent:
    """Makes turns of conversation out of the three kinds of boxes."""

    def __init__(
        self,
        *,
        encode: EncodeBox,
        generate: GenerateBox,
        decode: Mapping[Modality, DecodeBox],
        store: ArtefactStore,
        inputs: Sequence[Modality] = MEDIA,
        generation: GenerationDefaults | None = None,
        limits: Limits | None = None,
        cost_limits: Mapping[Modality, CostLimits] | None = None,
        adapters: Mapping[str, AdapterPreset] | None = None,
        second_look: SecondLook | None = None,
    ) -> None:
        self.encode = encode
        self.reader = Reader(encode, inputs, limits or Limits())
        self.generate = generate
        self.decode = decode
        self.store = store
        self.generation = generation or GenerationDefaults()
        self.limits = limits or Limits()
        self.adapters = adapters or {}
        self.admission = Admission(
            encode=encode,
            generate=generate,
            decode=decode,
            store=store,
            cost_limits=cost_limits or {},
            adapters=self.adapters,
        )
        self.looking = None if second_look is None else Looking(encode, generate, store, second_look)
        self.making = Making(decode, store, self.looking)
        self.prompting = Prompting(generate, self.generation)
        self.num_spoken = self.num_asked = 0

    @property
    def boxes(self) -> dict[str, Box]:
        """The boxes by their names in ``/health`` and ``/metrics``."""
        decoders = {modality.value: box for modality, box in self.decode.items()}
        return {"encoder": self.encode, "language_model": self.generate, **decoders}

    async def states(self) -> dict[str, BoxState]:
        """Return which boxes can work now."""
        return {name: await box.state() for name, box in self.boxes.items()}

    async def counts(self) -> dict[str, Mapping[str, Counts]]:
        """Return what is counted: by part of the service (an agent, a box), then by replica."""
        boxes = self.boxes
        answers = await asyncio.gather(*(box.counts() for box in boxes.values()))
        return {"agent": self.own_counts(), **dict(zip(boxes, answers, strict=True))}

    def own_counts(self) -> Mapping[str, Counts]:
        """Return what this agent counts itself."""
        counts = {"media_total": self.num_spoken, "asked_total": self.num_asked}
        if self.looking is not None:
            counts |= {"looked_total": self.looking.num_looks, "remade_total": self.looking.num_retries}
        return {LOCAL: counts}

    def turn(self, conversation: Sequence[Message], options: TurnOptions) -> AsyncGenerator[Event, None]:
        """Stream the reply to a conversation. Closing the stream stops all models.

        The last event is :class:`TurnDone` or :class:`TurnFailed`; no other error leaves here.
        """
        return _told(self._events(conversation, options))

    async def embed(self, items: Sequence[TextPart | MediaPart]) -> list[Array]:
        """Return a vector of length 1 for each item, all in one space.

        Raises:
            ServiceError: an item cannot be read, or the encoder is not ready.

        """
        for place, item in enumerate(items):
            if isinstance(item, MediaPart):
                try:
                    self.reader.expect_readable(item)
                except BadRequest as error:
                    raise error.at(f"input[{place}]") from error
        await self.admission.ready({"encoder": self.encode}, [])
        return await self.encode.embed(items)

    async def cancel_part(self, turn: str, index: int) -> bool:
        """Stop one medium of a turn and nothing else; return False when it is not being made here.

        The turn tells it as a :class:`PartFailed` with the code ``part_cancelled``.
        """
        return await self.making.cancel(turn, index)

    def retry_part(
        self, turn: str, index: int, wishes: DecodeSettings, *, user: str | None = None, previews: int = 0
    ) -> AsyncGenerator[Event, None]:
        """Make one medium of an earlier turn again, from the same signal; ``wishes`` change its settings.

        The last event is :class:`PartDone`, :class:`PartFailed` or, when it cannot even start,
        :class:`TurnFailed`; no other error leaves here. Closing the stream stops the decoder.
        """
        return _told(self._retried(turn, index, wishes, user, previews))

    async def _retried(
        self, turn: str, index: int, wishes: DecodeSettings, user: str | None, previews: int
    ) -> AsyncGenerator[Event, None]:
        order = await asyncio.to_thread(kept, self.store, turn, index)
        signal, modality = order.signal, order.signal.modality
        settings = changed(order.settings, wishes)
        await self.admission.check_source(settings, modality, order.source, "")
        self.admission.check_decode(wishes, modality)
        self.admission.check_up([modality], await self.admission.ready({}, [modality]), param=None)
        order = replace(
            order,
            settings=settings,
            user=_user(user, turn),
            previews=previews,
            verified=order.verified and wishes.seed is None,
        )
        medium = MediumState(modality, signal.caption, 0.0)
        yield PartStarted(index=index, modality=modality, caption=signal.caption)
        async with aclosing(self._told_of(order)) as told:
            async for item in told:
                match item:
                    case Progress() | Preview():
                        yield _step_event(index, item)
                    case _:
                        medium.settle(index, item)
        assert medium.outcome is not None
        yield medium.outcome

    async def _told_of(self, order: Order) -> AsyncGenerator[Told, None]:
        """Make one medium of which everything is stored that is to be, and yield what is told of it."""
        told: asyncio.Queue[Told] = asyncio.Queue()
        task = self.making.start(order, told.put_nowait, again=True)
        try:
            while True:
                item = await told.get()
                yield item
                if isinstance(item, Made | PartFailure):
                    return
        finally:
            await _end([task])

    def make(
        self,
        modality: Modality,
        prompt: str,
        settings: DecodeSettings,
        *,
        user: str | None = None,
        previews: int = 0,
    ) -> AsyncGenerator[Event, None]:
        """Make one medium of words, which are put to the language model where the preset says how.

        Otherwise the decoder's own text encoder reads them. The last event is :class:`PartDone`, or
        :class:`TurnFailed` where it could not be made; no other error leaves here. Closing the stream stops
        the decoder.
        """
        return _told(self._made(modality, prompt, settings, user, previews))

    async def _made(
        self, modality: Modality, prompt: str, settings: DecodeSettings, user: str | None, previews: int
    ) -> AsyncGenerator[Event, None]:
        if modality not in self.decode:
            made = ", ".join(known.value for known in self.decode) or "nothing but text"
            raise BadRequest(
                f"This model cannot make {modality.value}; it makes {made}. Ask for that.",
                code="unsupported_modality",
            )
        self.admission.check_decode(settings, modality)
        needed = {"language model": self.generate} if self.prompting.asks_for(modality) else {}
        self.admission.check_up([modality], await self.admission.ready(needed, [modality]), param=None)
        seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
        turn = new_turn_id()
        user = _user(user, turn)
        signal = await self.prompting.signal(modality, prompt, seed=seed, user=user)
        order = Order(
            turn=turn, index=0, signal=signal, settings=replace(settings, seed=seed), user=user,
            previews=previews,
        )  # fmt: skip
        medium = MediumState(modality, signal.caption, 0.0)
        started = False
        async with aclosing(self._told_of(order)) as told:
            async for item in told:
                if isinstance(item, PartFailure):
                    raise item.error
                if not started:  # a decoder that takes no more says so before it begins
                    started = True
                    yield PartStarted(index=0, modality=modality, caption=signal.caption)
                match item:
                    case Progress() | Preview():
                        yield _step_event(0, item)
                    case Made():
                        medium.settle(0, item)
        assert medium.outcome is not None
        yield medium.outcome

    async def _events(
        self, conversation: Sequence[Message], options: TurnOptions
    ) -> AsyncGenerator[Event, None]:
        reply = TurnState()
        self.reader.check(conversation)
        options, adapter = self._adapted(options)
        self.admission.check_wishes(options)
        allowed = await self.admission.allowed(conversation, options)
        seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        read = await self.reader.read(conversation)
        for modality, wishes in options.decoders.items():
            await self.admission.check_source(
                wishes, modality, read.newest.get(modality), f"decoders.{modality.value}."
            )
        timings: dict[str, Any] = {"encode_s": reply.now()}
        speech = SpeechOptions(
            allowed=allowed,
            max_signals=self.limits.max_decoder_calls,
            max_new_tokens=min(
                options.max_new_tokens or self.generation.max_new_tokens, self.generation.max_new_tokens
            ),
            temperature=_given(options.temperature, self.generation.temperature),
            top_p=_given(options.top_p, self.generation.top_p),
            top_k=_given(options.top_k, self.generation.top_k),
            repetition_penalty=_given(options.repetition_penalty, self.generation.repetition_penalty),
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            stop=options.stop,
            seed=seed,
            adapter=adapter,
            user=_user(options.user, reply.turn),
        )
        yield TurnStarted(id=reply.turn, seed=seed)

        reply.tasks.append(asyncio.create_task(self._speak(reply, read.prompt, speech)))
        finished: Finished | None = None
        ended: SpeechEnded | None = None
        try:
            while ended is None or reply.waiting:
                index, item = await reply.queue.get()
                match item:
                    case Words(text=text):
                        timings.setdefault("first_text_s", reply.now())
                        if (delta := reply.words(text)) is not None:
                            yield delta
                    case SpokenSignal():
                        timings.setdefault("first_signal_s", reply.now())
                        order = self._order(reply, item, options, seed, read.newest)
                        for event in await self._begun(reply, order, options):
                            yield event
                    case Finished():
                        finished = item
                    case SpeechEnded():
                        ended = item
                        timings["text_s"] = reply.now()
                    case Progress() | Preview():
                        yield _step_event(index, item)
                    case _:
                        reply.media[index].settle(index, item, reply.now())
                        for event in reply.ready():
                            yield event
            if ended.error is not None:
                raise ended.error
        finally:
            await _end(reply.tasks)
        timings["parts"] = [
            {
                "index": index,
                "modality": medium.modality.value,
                "spoken_s": medium.started_s,
                "done_s": medium.done_s,
            }
            for index, medium in reply.media.items()
        ]
        timings["total_s"] = reply.now()
        yield TurnDone(
            finish_reason=finished.reason if finished else "stop",
            usage=dict(finished.usage) if finished else {},
            timings=timings,
        )

    async def _speak(self, reply: TurnState, prompt: Sequence[PromptMessage], options: SpeechOptions) -> None:
        error: ServiceError | None = None
        try:
            async with aclosing(self.generate.generate(prompt, options)) as stream:
                async for said in stream:
                    reply.tell(-1, said)
        except Exception as caught:
            error = translate(caught)
            if error.status == 500:
                traced = error is not caught  # what has a message of its own needs no traceback
                logger.error("The language model failed: %s", error.message, exc_info=traced)
        reply.tell(-1, SpeechEnded(error))

    def _order(
        self,
        reply: TurnState,
        signal: SpokenSignal,
        options: TurnOptions,
        seed: int,
        newest: Mapping[Modality, str],
    ) -> Order:
        nth = sum(medium.modality is signal.modality for medium in reply.media.values())
        index = reply.next_medium(signal)
        settings = options.decoders.get(signal.modality, DecodeSettings())
        verified = options.verify is not False and settings.seed is None  # a seed that is named is the seed
        if settings.seed is None:
            settings = replace(settings, seed=(seed + nth) % (MAX_SEED + 1))
        return Order(
            turn=reply.turn,
            index=index,
            signal=signal,
            settings=settings,
            user=_user(options.user, reply.turn),
            previews=options.previews,
            source=newest.get(signal.modality),
            verified=verified,
        )

    async def _begun(self, reply: TurnState, order: Order, options: TurnOptions) -> list[Event]:
        """Start the decoder, or ask where the model is less sure than it has to be."""
        index, signal = order.index, order.signal
        started = PartStarted(index=index, modality=signal.modality, caption=signal.caption)
        self.num_spoken += 1
        if signal.confidence >= _given(options.ask_below, self.generation.ask_below or 0.0):
            reply.expect(index)
            reply.tasks.append(self.making.start(order, partial(reply.tell, index)))
            return [started]
        if (failure := await self.making.put_aside(order)) is not None:
            reply.expect(index)
            reply.media[index].settle(index, failure, reply.now())
            return [started, *reply.ready()]
        self.num_asked += 1
        asked = PartAsked(
            index=index,
            modality=signal.modality,
            caption=signal.caption,
            confidence=round(signal.confidence, 6),
            question=QUESTIONS[signal.modality],
        )
        return [asked]

    def _adapted(self, options: TurnOptions) -> tuple[TurnOptions, str | None]:
        """Return options whose decoders have their adapters, and the adapter of the language model."""
        own = {modality: settings.lora for modality, settings in options.decoders.items() if settings.lora}
        for modality, name in own.items():
            self.admission.check_adapter(name, modality, f"decoders.{modality.value}.lora")
        chosen = chosen_adapters([*options.adapters, *own.values()], self.adapters)
        decoders = dict(options.decoders)
        for modality in self.decode:
            if modality.value in chosen:
                settings = decoders.get(modality, DecodeSettings())
                decoders[modality] = replace(settings, lora=chosen[modality.value])
        return replace(options, decoders=decoders), chosen.get("language_model")


async def _told(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """Number the events, and end with :class:`TurnFailed` where they end with an error."""
    sequence = itertools.count()
    try:
        async with aclosing(events):
            async for event in events:
                yield replace(event, sequence=next(sequence))
    except Exception as error:
        known = translate(error)
        if known.status == 500:
            logger.error("A turn failed: %s", known.message, exc_info=known is not error)
        yield TurnFailed(sequence=next(sequence), error=known.to_wire())


def _step_event(index: int, step: Progress | Preview) -> PartProgress | PartPreview:
    if isinstance(step, Progress):
        return PartProgress(index=index, step=step.step, total=step.total, eta_s=step.eta_s)
    return PartPreview(
        index=index, step=step.step, total=step.total, data=step.data, media_type=step.media_type
    )


def _user(name: str | None, turn: str) -> str:
    """Return who shares the models with others; nobody can take another's name by leaving his own out."""
    return f"turn {turn}" if name is None else f"user {name}"


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel what still runs and wait until it has really ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
