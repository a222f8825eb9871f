"""One reply, token by token: text, whole signal blocks, an end.

This is the plain engine: one conversation, one cache. What a step is, is in :class:`Session`; what may
be said next is in :class:`Reply`. A batching engine brings its own sessions and keeps the replies.

Shape letters in this file:
    T positions   D LLM width   V vocabulary   k tokens of a block
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from encoders.media import Modality
from llm.batch import collate_rows
from llm.model import LanguageModel
from llm.role_words import EndOfReply
from llm.signals import Signal
from llm.template import Dialogue
from llm.tokenizer import TextStream

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

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 leave all tokens in. ``seed`` None draws
    another reply each time. Only ``allowed`` media are made, at most ``max_signals``. Each medium in
    ``required`` comes (twice if it is named twice); where the model would end without them, they follow
    in this order. ``max_new_tokens`` counts text, the end and the tokens of blocks; a block that has
    begun and the required ones are made whole beyond it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
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

    ``confidence`` in [0, 1] is the probability, at temperature 1 and among all that could have come, of
    this medium at this place.
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

    ``length`` is the token limit or the context's end. A cancelled reply may end in a block of which
    no signal came out.
    """

    reason: FinishReason
    usage: Usage
    ids: tuple[int, ...]


GenerationEvent = TextDelta | SignalReady | Finished


class Session:
    """One conversation inside the base: its cache, and one forward pass at a time."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.causal_lm.config)

    @torch.no_grad()
    def step(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Feed ``embeddings`` ``(T, D)``; return logits ``(V,)`` after the last and hidden states ``(T, D)``.

        Both are float32; the logits are on the CPU, where sampling is.
        """
        hidden = self._model.run(embeddings[None], cache=self._cache)[0]  # (T, D)
        return self._model.logits(hidden[-1]).cpu(), hidden.float()


@dataclass(eq=False)
class Reply:
    """What has been said so far, and what may be said next."""

    model: LanguageModel
    options: GenerationOptions
    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    num_signals: int = 0
    caption: list[int] = field(default_factory=list)
    has_ended: bool = False  # in words; an end token ends the reply by itself

    def __post_init__(self) -> None:
        tokenizer, options = self.model.tokenizer, self.options
        self.missing = list(options.required)
        self._starts = {
            modality: start
            for start, modality in tokenizer.signal_starts.items()
            if modality in options.allowed
        }
        if absent := set(options.required) - self._starts.keys():
            raise ValueError(f"This model has no signal for {', '.join(sorted(absent))}.")
        self._never = torch.zeros(len(tokenizer), dtype=torch.bool)
        self._never[list(tokenizer.unspeakable_ids | tokenizer.signal_starts.keys())] = True
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)
        needed = self.prompt_tokens + max(1, self._owed)
        if needed > self.model.context_length:
            raise ContextTooLong(needed, self.model.context_length)

    @property
    def _room(self) -> int:
        """Positions that are left in the context."""
        return self.model.context_length - self.prompt_tokens - len(self.ids)

    @property
    def _owed(self) -> int:
        """Positions that the missing media will take."""
        return sum(self.model.tokenizer.signals.count(modality) for modality in self.missing)

    def choose(self, logits: Tensor) -> tuple[int | None, float]:
        """Return the next token and its probability at temperature 1, or None at the limit.

        An end is put off while media are missing: the first of them comes instead.
        """
        spent = len(self.ids) >= self.options.max_new_tokens or self._room <= self._owed
        masked = logits.masked_fill(~self._speakable(), float("-inf"))
        token = None if spent else _sample(masked, self.options, self._generator)
        if self.missing and (self.has_ended or token in (None, self.model.tokenizer.eos_id)):
            token = self._starts[self.missing[0]]
        return token, 0.0 if token is None else float(masked.softmax(dim=-1)[token])

    def _speakable(self) -> Tensor:
        """Return ``(V,)`` bool: text, the end, and the signals whose block fits and is still wanted."""
        speakable = ~self._never
        for modality, start in self._starts.items():
            missing = list(self.missing)
            if modality in missing:
                missing.remove(modality)
            counts = self.model.tokenizer.signals.count
            fits = counts(modality) + sum(counts(other) for other in missing) <= self._room
            speakable[start] = fits and self.num_signals + 1 + len(missing) <= self.options.max_signals
        return speakable

    def take(self, token: int) -> Modality | None:
        """Note that ``token`` was said; return the modality whose block it starts."""
        modality = self.model.tokenizer.signal_starts.get(token)
        if modality is None:
            self.ids.append(token)
            self.caption.append(token)
            return None
        self.ids += self.model.tokenizer.signal_ids(modality)
        self.num_signals += 1
        self.has_ended = False
        if modality in self.missing:
            self.missing.remove(modality)
        return modality

    def take_caption(self) -> str:
        """Return the text since the previous medium, and start the next."""
        text = self.model.tokenizer.decode_text(self.caption)
        self.caption.clear()
        if (words := self.model.tokenizer.role_words) is not None:
            text = text.partition(words.mark)[0]
        return text.strip()

    def finished(self, reason: FinishReason) -> Finished:
        """Return the last event."""
        return Finished(reason, Usage(self.prompt_tokens, len(self.ids)), tuple(self.ids))


def generate(
    model: LanguageModel,
    dialogue: Dialogue,
    options: GenerationOptions | None = None,
    stop: threading.Event | None = None,
) -> Iterator[GenerationEvent]:
    """Reply to ``dialogue``, one event after another; the last is :class:`Finished`.

    The model chooses a block's first token; the rest is fed with it in one forward pass, and the states
    at these tokens are the signal's. ``stop`` is looked at before every pass.

    Raises:
        ContextTooLong: the dialogue does not fit. This and what follows comes from the call itself.
        ValueError: a medium that the model cannot read or make, or a model in training mode.

    """
    if model.training:
        raise ValueError("The model is in training mode; call model.eval() before it speaks.")
    row = model.encode(dialogue, open_reply=True)
    reply = Reply(model, options or GenerationOptions(), prompt_tokens=len(row.ids))
    with torch.no_grad():
        prompt = model.embed_batch(collate_rows([row], model.tokenizer.pad_id).to(model.device))[0]
    return _replies(model, reply, prompt, stop or threading.Event())


def _replies(
    model: LanguageModel, reply: Reply, embeddings: Tensor, stop: threading.Event
) -> Iterator[GenerationEvent]:
    session, text = Session(model), _Text(model)
    block: Modality | None = None
    reason: FinishReason = "cancelled"
    confidence = 0.0
    while not stop.is_set():
        logits, hidden = session.step(embeddings)
        if block is not None:
            yield SignalReady(Signal(block, reply.take_caption(), hidden, embeddings), confidence)
        token, confidence = reply.choose(logits)
        if token is None:
            reason = "length"
            break
        block = reply.take(token)
        if block is not None:
            if held := text.flush():
                yield TextDelta(held)
            embeddings = _embed(model, model.tokenizer.signal_ids(block))
            continue
        if token == model.tokenizer.eos_id:
            reason = "stop"
            break
        if delta := text.push(token):
            yield TextDelta(delta)
        reply.has_ended = text.has_ended
        if reply.has_ended and not reply.missing:
            reason = "stop"
            break
        embeddings = _embed(model, (token,))
    if held := text.flush():
        yield TextDelta(held)
    yield reply.finished(reason)


class _Text:
    """The text of a reply as it becomes certain, up to the end that the model says in words, if it does."""

    def __init__(self, model: LanguageModel) -> None:
        self._stream = TextStream(model.tokenizer)
        words = model.tokenizer.role_words
        self._end = None if words is None else EndOfReply(words)

    @property
    def has_ended(self) -> bool:
        return self._end is not None and self._end.reached

    def push(self, token: int) -> str:
        delta = self._stream.push(token)
        return delta if self._end is None else self._end.push(delta)

    def flush(self) -> str:
        delta = self._stream.flush()
        return delta if self._end is None else self._end.push(delta) + self._end.flush()


def _embed(model: LanguageModel, ids: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return model.embed(torch.tensor(ids, device=model.device))


def _sample(logits: Tensor, options: GenerationOptions, generator: torch.Generator) -> int:
    """Draw from ``logits`` ``(V,)`` float32 on the CPU; forbidden tokens are -inf."""
    if options.temperature == 0:
        return int(logits.argmax())
    values, ids = (logits / options.temperature).sort(descending=True, stable=True)
    if options.top_k:
        values, ids = values[: options.top_k], ids[: options.top_k]
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities * (before < options.top_p)  # the most likely one is always kept
    return int(ids[torch.multinomial(kept, 1, generator=generator)])
