"""One turn of conversation: media in, words and media out, as a stream of events.

The agent knows three protocols and a store. It knows nothing of HTTP, of Ray, or of tensors.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from decoders.settings import MAX_SEED, DecodeSettings
from encoders.media import Modality
from services.adapters import chosen_adapters, no_adapter
from services.artefacts import ArtefactStore
from services.boxes import (
    DecodeBox,
    EncodeBox,
    Encoded,
    Finished,
    GenerateBox,
    Made,
    Progress,
    PromptMessage,
    PromptPart,
    SpeechOptions,
    SpokenEarlier,
    SpokenSignal,
    Words,
)
from services.errors import BadRequest, ServiceError, TooLarge, Unavailable, translate
from services.events import (
    Event,
    PartDone,
    PartFailed,
    PartProgress,
    PartStarted,
    TextDelta,
    TurnDone,
    TurnFailed,
    TurnStarted,
)
from services.messages import (
    MEDIA,
    MediaPart,
    Message,
    Role,
    SpokenPart,
    TextPart,
    TurnOptions,
)
from services.presets import AdapterPreset, CostLimits, GenerationDefaults, Limits

logger = logging.getLogger(__name__)

ENCODED_KEPT = 64


@dataclass(frozen=True)
class _SpeechEnded:
    """The language model is done; ``error`` says why if it was not its own choice."""

    error: ServiceError | None


@dataclass(frozen=True)
class _PartFailure:
    error: ServiceError


@dataclass
class _MediaBeingMade:
    """A medium that was spoken: what it is, and its last event once there is one."""

    modality: Modality
    caption: str
    started_s: float
    done_s: float | None = None
    outcome: PartDone | PartFailed | None = None


@dataclass
class _Reply:
    """The state of one turn while it runs."""

    began: float = field(default_factory=time.monotonic)
    queue: asyncio.Queue[tuple[int, Any]] = field(default_factory=asyncio.Queue)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    media: dict[int, _MediaBeingMade] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)  # media not yet told of, in the order spoken
    num_parts: int = 0
    text_index: int | None = None
    held_space: str = ""

    def now(self) -> float:
        """Seconds since the turn began."""
        return round(time.monotonic() - self.began, 4)

    def words(self, text: str) -> TextDelta | None:
        """Return the event for some more text.

        White space at either edge of a text part is dropped, so it is held back until more follows.
        """
        if self.text_index is None:
            text = text.lstrip()
            if not text:
                return None
            self.text_index = self.num_parts
            self.num_parts += 1
        text = self.held_space + text
        kept = text.rstrip()
        self.held_space = text[len(kept) :]
        return TextDelta(index=self.text_index, text=kept) if kept else None

    def next_medium(self, signal: SpokenSignal) -> int:
        """Open the part of a medium and return its index."""
        index = self.num_parts
        self.num_parts += 1
        self.text_index, self.held_space = None, ""
        self.media[index] = _MediaBeingMade(signal.modality, signal.caption, self.now())
        self.waiting.append(index)
        return index

    def ready(self) -> list[Event]:
        """Return the outcomes that may be told now: those with no unfinished medium before them."""
        events: list[Event] = []
        while self.waiting and (outcome := self.media[self.waiting[0]].outcome) is not None:
            self.waiting.pop(0)
            events.append(outcome)
        return events


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
    ) -> None:
        self.encode = encode
        self.generate = generate
        self.decode = decode
        self.store = store
        self.inputs = tuple(inputs)
        self.generation = generation or GenerationDefaults()
        self.limits = limits or Limits()
        self.cost_limits = cost_limits or {}
        self.adapters = adapters or {}
        self.encoded: OrderedDict[tuple[str, Modality | None], Encoded] = OrderedDict()

    async def outputs(self) -> tuple[Modality, ...]:
        """Return the media that can be made now."""
        up = await asyncio.gather(*(box.available() for box in self.decode.values()))
        alive = {modality for modality, is_up in zip(self.decode, up, strict=True) if is_up}
        return tuple(modality for modality in MEDIA if modality in alive)

    async def turn(
        self, conversation: Sequence[Message], options: TurnOptions
    ) -> AsyncGenerator[Event, None]:
        """Stream the reply to a conversation. Closing the stream stops all models.

        The last event is :class:`TurnDone` or :class:`TurnFailed`; no other error leaves here.
        """
        sequence = itertools.count()
        try:
            async with aclosing(self._events(conversation, options)) as events:
                async for event in events:
                    yield replace(event, sequence=next(sequence))
        except Exception as error:
            known = translate(error)
            if known.status == 500:
                logger.exception("A turn failed.")
            yield TurnFailed(sequence=next(sequence), error=known.to_wire())

    async def _events(
        self, conversation: Sequence[Message], options: TurnOptions
    ) -> AsyncGenerator[Event, None]:
        reply = _Reply()
        self._check_conversation(conversation)
        options, adapter = self._adapted(options)
        allowed = self._allowed(options, await self.outputs())
        seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        prompt = await self._prompt(conversation)
        timings: dict[str, Any] = {"encode_s": reply.now()}
        speech = SpeechOptions(
            allowed=allowed,
            max_signals=self.limits.max_decoder_calls,
            max_new_tokens=min(
                options.max_new_tokens or self.generation.max_new_tokens, self.generation.max_new_tokens
            ),
            temperature=_given(options.temperature, self.generation.temperature),
            top_p=_given(options.top_p, self.generation.top_p),
            seed=seed,
            adapter=adapter,
        )
        yield TurnStarted(seed=seed)

        reply.tasks.append(asyncio.create_task(self._speak(reply, prompt, speech)))
        finished: Finished | None = None
        ended: _SpeechEnded | None = None
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
                        yield self._start_decoder(reply, item, options, seed)
                    case Finished():
                        finished = item
                    case _SpeechEnded():
                        ended = item
                        timings["text_s"] = reply.now()
                    case Progress(step=step, total=total, eta_s=eta_s):
                        yield PartProgress(index=index, step=step, total=total, eta_s=eta_s)
                    case _:
                        self._settle(reply, index, item)
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

    async def _speak(self, reply: _Reply, prompt: Sequence[PromptMessage], options: SpeechOptions) -> None:
        error: ServiceError | None = None
        try:
            async with aclosing(self.generate.generate(prompt, options)) as stream:
                async for said in stream:
                    reply.queue.put_nowait((-1, said))
        except Exception as caught:
            error = translate(caught)
            if error.status == 500:
                logger.exception("The language model failed.")
        reply.queue.put_nowait((-1, _SpeechEnded(error)))

    def _start_decoder(
        self, reply: _Reply, signal: SpokenSignal, options: TurnOptions, seed: int
    ) -> PartStarted:
        nth = sum(medium.modality is signal.modality for medium in reply.media.values())
        index = reply.next_medium(signal)
        settings = options.decoders.get(signal.modality, DecodeSettings())
        if settings.seed is None:
            settings = replace(settings, seed=(seed + nth) % (MAX_SEED + 1))
        reply.tasks.append(asyncio.create_task(self._make(reply, index, signal, settings)))
        return PartStarted(index=index, modality=signal.modality, caption=signal.caption)

    async def _make(self, reply: _Reply, index: int, signal: SpokenSignal, settings: DecodeSettings) -> None:
        try:
            async with aclosing(self.decode[signal.modality].decode(signal, settings)) as stream:
                made: Made | None = None
                async for step in stream:
                    if isinstance(step, Made):
                        made = step
                    else:
                        reply.queue.put_nowait((index, step))
            if made is None:
                raise Unavailable(
                    f"The {signal.modality.value} decoder stopped before it was done. Try again.",
                    code="decoder_unavailable",
                )
            reply.queue.put_nowait((index, made))
        except Exception as caught:
            error = translate(caught)
            if error.status == 500:
                logger.exception("The %s decoder failed.", signal.modality.value)
            reply.queue.put_nowait((index, _PartFailure(error)))

    def _settle(self, reply: _Reply, index: int, item: Made | _PartFailure) -> None:
        medium = reply.media[index]
        medium.done_s = reply.now()
        if isinstance(item, Made):
            medium.outcome = PartDone(
                index=index,
                modality=medium.modality,
                caption=medium.caption,
                artefact=item.artefact,
                manifest=item.manifest,
            )
        else:
            medium.outcome = PartFailed(
                index=index,
                modality=medium.modality,
                caption=medium.caption,
                code=item.error.code,
                message=item.error.message,
            )

    def _check_conversation(self, conversation: Sequence[Message]) -> None:
        if not conversation or conversation[-1].role is not Role.USER:
            raise BadRequest(
                "The last message must be the user's. Add one that says what is wanted.",
                code="invalid_conversation",
                param="messages",
            )
        last = conversation[-1]
        if not any(not isinstance(part, TextPart) or part.text.strip() for part in last.parts):
            raise BadRequest(
                "The message is empty. Write something, or attach a picture, a video or a sound.",
                code="empty_message",
                param=f"messages[{len(conversation) - 1}].content",
            )
        if len(conversation) > self.limits.max_messages:
            raise TooLarge(
                f"The conversation has {len(conversation)} messages; at most {self.limits.max_messages} are "
                "read. Leave out the oldest.",
                code="too_many_messages",
                param="messages",
            )
        num_media = sum(isinstance(part, MediaPart) for message in conversation for part in message.parts)
        if num_media > self.limits.max_media:
            raise TooLarge(
                f"The conversation holds {num_media} media; at most {self.limits.max_media} are read. "
                "Leave out the oldest.",
                code="media_limit_exceeded",
                param="messages",
            )

    def _adapted(self, options: TurnOptions) -> tuple[TurnOptions, str | None]:
        """Return options whose decoders have their adapters, and the adapter of the language model."""
        own = {modality: settings.lora for modality, settings in options.decoders.items() if settings.lora}
        for modality, name in own.items():
            if name not in self.adapters or self.adapters[name].box != modality.value:
                raise no_adapter(name, modality.value, self.adapters).at(f"decoders.{modality.value}.lora")
        chosen = chosen_adapters([*options.adapters, *own.values()], self.adapters)
        decoders = dict(options.decoders)
        for modality in self.decode:
            if modality.value in chosen:
                settings = decoders.get(modality, DecodeSettings())
                decoders[modality] = replace(settings, lora=chosen[modality.value])
        return replace(options, decoders=decoders), chosen.get("language_model")

    def _allowed(self, options: TurnOptions, up: Sequence[Modality]) -> frozenset[Modality]:
        named = [(modality, "modalities") for modality in options.modalities or ()]
        named += [(modality, f"decoders.{modality.value}") for modality in options.decoders]
        for modality, param in named:
            if modality is not Modality.TEXT and modality not in self.decode:
                made = ", ".join(("text", *(known.value for known in self.decode)))
                raise BadRequest(
                    f"This model cannot make {modality.value}; it makes {made}. Leave {modality.value} out.",
                    code="unsupported_modality",
                    param=param,
                )
        for modality in options.modalities or ():
            if modality is not Modality.TEXT and modality not in up:
                raise Unavailable(
                    f"The {modality.value} decoder is not available at the moment. Try again soon, or leave "
                    f"{modality.value} out of modalities.",
                    code="decoder_unavailable",
                    param="modalities",
                    retry_after_s=5,
                )
        for modality, settings in options.decoders.items():
            if modality in self.cost_limits:
                self.cost_limits[modality].check(settings, modality)
        wanted = set(up) if options.modalities is None else set(options.modalities)
        return frozenset(wanted & set(up))

    async def _prompt(self, conversation: Sequence[Message]) -> list[PromptMessage]:
        prompt = []
        for number, message in enumerate(conversation):
            parts: list[PromptPart] = []
            for place, part in enumerate(message.parts):
                match part:
                    case TextPart(text=text):
                        parts.append(text)
                    case SpokenPart(modality=modality, caption=caption):
                        if caption and not (parts and isinstance(parts[-1], str) and parts[-1].strip()):
                            parts.append(caption)
                        parts.append(SpokenEarlier(modality))
                    case MediaPart():
                        try:
                            parts.append(await self._encoded(part))
                        except (ServiceError, ValueError) as error:
                            raise translate(error).at(f"messages[{number}].content[{place}]") from error
            prompt.append(PromptMessage(message.role, tuple(parts)))
        return prompt

    async def _encoded(self, part: MediaPart) -> Encoded:
        if part.modality is not None and part.modality not in self.inputs:
            raise BadRequest(
                f"This model cannot read {part.modality.value}; it reads "
                f"{', '.join(('text', *(known.value for known in self.inputs)))}. Leave it out.",
                code="unsupported_modality",
            )
        artefact = await asyncio.to_thread(self.store.get, part.artefact_id)
        key = (artefact.sha256, part.modality)
        if key not in self.encoded:
            self.encoded[key] = await self.encode.encode(artefact.id, part.modality)
        self.encoded.move_to_end(key)
        while len(self.encoded) > ENCODED_KEPT:
            self.encoded.popitem(last=False)
        return self.encoded[key]


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel what still runs and wait until it has really ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
