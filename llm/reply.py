"""One reply as a state machine over tokens: what may be said next, and what was said.

This is the only place that knows the rules: whole signal blocks, allowed and required media, the token
limit, stop strings, the end. It holds no tensors of the model; an engine feeds it one sampled token at a
time and feeds the model what it answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from encoders.media import Modality
from llm.role_words import EndOfReply
from llm.signals import Signal
from llm.tokenizer import ConversationTokenizer, TextStream

FinishReason = Literal["stop", "length", "cancelled"]
ALL_MEDIA = frozenset({Modality.IMAGE, Modality.VIDEO, Modality.AUDIO})


class ContextTooLong(ValueError):
    """The conversation, and the media that must follow, do not fit: ``tokens`` of at most ``limit``."""

    def __init__(self, tokens: int, limit: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(
            f"The conversation needs {tokens} tokens; this model sees at most {limit}. "
            f"Leave out early turns or media."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """How a reply is made. Immutable; checked when it is made.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 leave all tokens in. ``repetition_penalty``
    divides the positive and multiplies the negative logits of words that the conversation or the reply
    has used already; 1 changes nothing. ``presence_penalty`` is taken off the logits of words that the
    reply has used, ``frequency_penalty`` as many times as it has used them. ``seed`` None draws another
    reply each time. The text ends before the first of the ``stop`` strings; it may not span a medium. Only
    ``allowed`` media are made, at most ``max_signals``. Each medium in ``required`` comes (twice if it is
    named twice); where the model would end without them, they follow in this order. ``max_new_tokens``
    counts text, the end and the tokens of blocks; a block that has begun and the required ones are made
    whole beyond it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    allowed: frozenset[Modality] = ALL_MEDIA
    max_signals: int = 4
    required: tuple[Modality, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0 and at most 1.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected 0 (all tokens) or more.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; expected more than 0, 1 for none."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number, 0 for none.")
        if not all(self.stop):
            raise ValueError("A stop string is empty; expected at least one character in each.")
        if self.max_signals < 0:
            raise ValueError(f"max_signals is {self.max_signals}; expected 0 or more.")
        if len(self.required) > self.max_signals or not self.allowed.issuperset(self.required):
            raise ValueError(
                f"required is {', '.join(self.required)}; expected at most max_signals ({self.max_signals}) "
                f"of the allowed media ({', '.join(sorted(self.allowed)) or 'none'})."
            )


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the reply's text: never empty, never half a character."""

    text: str


@dataclass(frozen=True, eq=False, slots=True)
class SignalReady:
    """A whole signal block.

    ``confidence`` in [0, 1] is the probability, at temperature 1, that a medium which comes at this place is
    this one of those that could. That any comes at all is left out: it doubts other things too.
    """

    signal: Signal
    confidence: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and tokens made, media slots, blocks and the end included."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a reply: why it ended, and every id of it, blocks and the end included.

    ``stop`` is the model's end or a stop string, ``length`` the token limit or the context's end. A
    cancelled reply may end in a block of which no signal came out.
    """

    reason: FinishReason
    usage: Usage
    ids: tuple[int, ...]


GenerationEvent = TextDelta | SignalReady | Finished


class Reply:
    """What has been said so far, and what may be said next.

    Args:
        tokenizer: gives the blocks and the text.
        options: the wishes.
        prompt: the ids that the model reads first.
        context: positions that the model sees, prompt and reply together.

    Raises:
        ContextTooLong: the prompt, and the required media or one token, do not fit.
        ValueError: a required medium that the model has no signal for.

    """

    def __init__(
        self,
        tokenizer: ConversationTokenizer,
        options: GenerationOptions,
        prompt: Sequence[int],
        context: int,
    ) -> None:
        self.options = options
        self.ids: list[int] = []
        self.block: Modality | None = None  # being fed; its signal comes with the next pass
        self.reason: FinishReason | None = None
        self.missing = list(options.required)
        self.num_signals = 0
        self.random = random.Random(options.seed)
        self._tokenizer = tokenizer
        self._prompt_tokens, self._context = len(prompt), context
        self._starts = {
            modality: start
            for start, modality in tokenizer.signal_starts.items()
            if modality in options.allowed
        }
        if absent := set(options.required) - self._starts.keys():
            raise ValueError(f"This model has no signal for {', '.join(sorted(absent))}.")
        self._owed = sum(map(tokenizer.signals.count, self.missing))  # positions the missing media will take
        needed = self._prompt_tokens + max(1, self._owed)
        if needed > context:
            raise ContextTooLong(needed, context)
        self._text = TextStream(tokenizer)
        self._stops = StopStrings(options.stop)
        words = tokenizer.role_words
        self._end = None if words is None else EndOfReply(words)
        self._caption: list[str] = []
        self._confidence = 0.0
        self.used: Tensor | None = None  # (V,) bool: the words that a repetition penalty is for
        if options.repetition_penalty != 1:
            self.used = torch.zeros(len(tokenizer), dtype=torch.bool)
            self.used[[token for token in prompt if token not in tokenizer.live_ids]] = True
        self.counts: Tensor | None = None  # (V,): how often the reply has used each word
        if options.presence_penalty or options.frequency_penalty:
            self.counts = torch.zeros(len(tokenizer))

    @property
    def _has_ended(self) -> bool:
        """Whether the words so far ended the reply: with a stop string, or as the model marks its end."""
        return self._stops.hit or (self._end is not None and self._end.reached)

    @property
    def _room(self) -> int:
        """Positions that are left in the context."""
        return self._context - self._prompt_tokens - len(self.ids)

    def open_media(self) -> tuple[Modality, ...]:
        """Return the media whose block fits and is still wanted."""
        most, room = self.options.max_signals, self._room
        count = self._tokenizer.signals.count
        if not self.missing:
            if self.num_signals >= most:
                return ()
            return tuple(modality for modality in self._starts if count(modality) <= room)
        media = []
        for modality in self._starts:
            wanted = modality in self.missing
            others = len(self.missing) - wanted
            owed = self._owed - (count(modality) if wanted else 0)
            if count(modality) + owed <= room and self.num_signals + 1 + others <= most:
                media.append(modality)
        return tuple(media)

    def decide(self, sampled: int) -> int | None:
        """Return the token that is said where ``sampled`` was drawn, or None at the end of the reply.

        An end is put off while media are missing: the first of them comes instead.
        """
        spent = len(self.ids) >= self.options.max_new_tokens or self._room <= self._owed
        token = None if spent or self._has_ended else sampled
        if self.missing and token in (None, self._tokenizer.eos_id):
            token = self._starts[self.missing[0]]
        return token

    def say(self, token: int | None, confidence: float = 0.0) -> list[GenerationEvent]:
        """Note what :meth:`decide` returned; ``confidence`` is that of a block that it starts.

        Afterwards either :attr:`reason` is set, and the last event is the reply's last, or :attr:`ids`
        has grown by what the model must be fed.
        """
        if token is None:
            return self.finish("stop" if self._has_ended else "length")
        if (modality := self._tokenizer.signal_starts.get(token)) is not None:
            self.ids += self._tokenizer.signal_ids(modality)
            self.num_signals += 1
            self.block, self._confidence = modality, confidence
            if modality in self.missing:
                self.missing.remove(modality)
                self._owed -= self._tokenizer.signals.count(modality)
            return self._flushed()
        self.ids.append(token)
        if token == self._tokenizer.eos_id:
            return self.finish("stop")
        if self.used is not None:
            self.used[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        text = self._text.push(token)
        events = self._spoken(self._stops.push(text if self._end is None else self._end.push(text)))
        if self._has_ended and not self.missing:
            return [*events, *self.finish("stop")]
        return events

    def signal(self, hidden: Tensor, embeddings: Tensor) -> SignalReady:
        """Return the event for the block that was fed; both tensors ``(k, D)`` float32."""
        assert self.block is not None
        caption = "".join(self._caption).strip()
        modality, self.block = self.block, None
        self._caption.clear()
        return SignalReady(Signal(modality, caption, hidden, embeddings), self._confidence)

    def finish(self, reason: FinishReason) -> list[GenerationEvent]:
        """End the reply; return the last events of it."""
        self.reason = reason
        usage = Usage(self._prompt_tokens, len(self.ids))
        return [*self._flushed(), Finished(reason, usage, tuple(self.ids))]

    def _flushed(self) -> list[GenerationEvent]:
        text = self._text.flush()
        if self._end is not None:
            text = self._end.push(text) + self._end.flush()
        return self._spoken(self._stops.push(text) + self._stops.flush())

    def _spoken(self, text: str) -> list[GenerationEvent]:
        if not text:
            return []
        self._caption.append(text)
        return [TextDelta(text)]


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.hit = False
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> str:
        """Take some more text; return what may be shown of it now."""
        if not self._strings:
            return text
        if self.hit:
            return ""
        text = self._held + text
        found = [start for string in self._strings if (start := text.find(string)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        kept = max(_overlap(text, string) for string in self._strings)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """Return what was held back: no stop string goes on here."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Return the length of the longest end of ``text`` with which ``string`` begins."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
