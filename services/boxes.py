"""What the agent needs from the three kinds of boxes, and the values that travel to and from them.

The values hold numpy arrays and ids: small, and readable in a process that never loads torch.
There are two sets of implementations, :mod:`services.local` in this process and
:mod:`services.remote_boxes` behind Ray Serve handles.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.artefacts import Artefact
from services.errors import Unavailable
from services.messages import MediaPart, Role, TextPart

Array = NDArray[np.float32]

LOCAL = "local"
"""The name of a box in this process, where boxes have no replicas."""

Counts = Mapping[str, float]
"""What one replica of a box counts and measures, by the names that ``services.metrics`` knows."""


RETRY_LOADING_S = 5


class BoxState(StrEnum):
    """Whether a box can work: not yet, now, or not any more until it has been started again."""

    LOADING = "loading"
    READY = "ready"
    GONE = "gone"


def not_ready(box: str, state: BoxState, way_out: str = "") -> Unavailable:
    """Return the error for a request that needs a box which is not ready."""
    how = "is still being loaded" if state is BoxState.LOADING else "has stopped and is being started again"
    return Unavailable(
        f"The {box} {how}. Try again in {RETRY_LOADING_S} s{way_out}; GET /health tells what is ready.",
        code="model_loading",
        retry_after_s=RETRY_LOADING_S,
    )


@dataclass(frozen=True, eq=False)
class Encoded:
    """One medium as the encoder sees it: ``tokens`` ``(n, width)``, ``pooled`` ``(width,)``.

    ``blocks`` is how the tokens of an image that was cut are laid out; ``()`` is one block.
    """

    modality: Modality
    tokens: Array
    pooled: Array
    grid: tuple[int, ...]
    blocks: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class SpokenEarlier:
    """A medium that the assistant made in an earlier turn."""

    modality: Modality


PromptPart = str | Encoded | SpokenEarlier


@dataclass(frozen=True, eq=False)
class PromptMessage:
    """One turn as the language model reads it."""

    role: Role
    parts: tuple[PromptPart, ...]


@dataclass(frozen=True, kw_only=True)
class SpeechOptions:
    """How the language model speaks. ``allowed`` are the media it may choose to make.

    ``adapter`` names LoRA of the preset. ``user`` is who shares the model with others: where slots are short,
    the user for whom least was done is next.
    """

    allowed: frozenset[Modality]
    max_signals: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int
    adapter: str | None = None
    user: str = ""


@dataclass(frozen=True)
class Words:
    """Some more text."""

    text: str


@dataclass(frozen=True, eq=False)
class SpokenSignal:
    """A medium the model chose to make: its caption and its signal block.

    ``hidden`` are the states at the signal tokens and ``embeddings`` their input embeddings, both
    ``(k, llm_width)``. ``confidence`` in [0, 1] is how probable this kind of medium was. Where nobody
    spoke, there are no states, and the decoder's own text encoder reads the caption.
    """

    modality: Modality
    caption: str
    hidden: Array
    embeddings: Array
    confidence: float = 1.0

    @classmethod
    def of_words(cls, modality: Modality, caption: str) -> Self:
        """Return what asks for a medium with words alone."""
        return cls(modality, caption, np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32))

    @property
    def is_words(self) -> bool:
        """Whether there are no states of a language model."""
        return self.hidden.size == 0


@dataclass(frozen=True)
class Finished:
    """The model has ended its reply."""

    reason: str
    usage: Mapping[str, int] = field(default_factory=dict)


Speech = Words | SpokenSignal | Finished


@dataclass(frozen=True)
class Progress:
    """``step`` of ``total`` denoising steps are done; about ``eta_s`` seconds are left."""

    step: int
    total: int
    eta_s: float | None


@dataclass(frozen=True)
class Preview:
    """What a medium looks like after ``step`` of ``total`` steps: a small picture, also for a sound."""

    step: int
    total: int
    data: bytes = field(repr=False)
    media_type: str


@dataclass(frozen=True)
class Made:
    """A finished medium and how it was made; it is the best of ``attempts``."""

    artefact: Artefact
    manifest: Mapping[str, Any]
    attempts: int = 1


Step = Progress | Preview | Made


class Box(Protocol):
    """What all boxes can say of themselves."""

    async def state(self) -> BoxState:
        """Return whether it can work now."""
        ...

    async def counts(self) -> Mapping[str, Counts]:
        """Return what each replica counts, by the name of the replica."""
        ...


class EncodeBox(Box, Protocol):
    """Reads media."""

    async def encode(self, artefact_id: str, expect: Modality | None) -> Encoded:
        """Read the artefact and encode it; a :class:`ServiceError` says why not."""
        ...

    async def embed(self, items: Sequence[TextPart | MediaPart]) -> list[Array]:
        """Return a vector ``(width,)`` of length 1 for each item, all in one space.

        A :class:`ServiceError` says why not, its ``param`` for which item.
        """
        ...


class GenerateBox(Box, Protocol):
    """Thinks: continues a conversation with words and signals."""

    def generate(
        self, prompt: Sequence[PromptMessage], options: SpeechOptions
    ) -> AsyncGenerator[Speech, None]:
        """Stream the reply; closing the stream stops the model."""
        ...

    async def score(self, prompt: Sequence[PromptMessage], reply: str, user: str = "") -> Sequence[float]:
        """Return how probable ``reply`` is in a conversation: the logarithm for each token, and for its end.

        ``user`` is who shares the model with others.
        """
        ...


class DecodeBox(Box, Protocol):
    """Makes one kind of media."""

    def decode(
        self,
        signal: SpokenSignal,
        settings: DecodeSettings,
        *,
        user: str = "",
        previews: int = 0,
        source: str | None = None,
    ) -> AsyncGenerator[Step, None]:
        """Stream progress and, last, the medium; closing the stream stops within one step.

        Users share the box fairly: those who ask for equally much get equally much of it. At most
        ``previews`` previews come, evenly spread. ``source`` is the artefact of a medium of the same kind to
        start from, as far from it as the strength of ``settings`` says, or that of the preset, and to keep
        untouched pixels of, where either of them wants that; else it is left alone.
        """
        ...
