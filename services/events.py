"""What a turn emits, in the order in which it happens.

Every event has a sequence number, counted from 0 within its turn. ``index`` is the place of a part
in the reply: text parts and media parts count alike.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from encoders.media import Modality
from services.artefacts import Artefact


def new_turn_id() -> str:
    """Return a name for a turn that nobody can guess: 32 hexadecimal digits."""
    return secrets.token_hex(16)


@dataclass(frozen=True, kw_only=True)
class TurnStarted:
    """The conversation was accepted. ``seed`` makes the turn again; ``id`` names it for its parts."""

    type: ClassVar[str] = "turn.started"
    sequence: int = 0
    seed: int
    id: str = field(default_factory=new_turn_id)


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """Some more words of the text part ``index``."""

    type: ClassVar[str] = "text.delta"
    sequence: int = 0
    index: int
    text: str


@dataclass(frozen=True, kw_only=True)
class PartStarted:
    """The model has spoken a medium; its decoder is at work."""

    type: ClassVar[str] = "part.started"
    sequence: int = 0
    index: int
    modality: Modality
    caption: str


@dataclass(frozen=True, kw_only=True)
class PartAsked:
    """The model has spoken a medium and was less sure of it than it had to be: nothing is made.

    ``confidence`` in [0, 1] is how probable this kind of medium was; ``question`` asks the person. A retry of
    the part makes the medium.
    """

    type: ClassVar[str] = "part.asked"
    sequence: int = 0
    index: int
    modality: Modality
    caption: str
    confidence: float
    question: str


@dataclass(frozen=True, kw_only=True)
class PartProgress:
    """A decoder has done ``step`` of ``total`` steps and needs about ``eta_s`` seconds more."""

    type: ClassVar[str] = "part.progress"
    sequence: int = 0
    index: int
    step: int
    total: int
    eta_s: float | None


@dataclass(frozen=True, kw_only=True)
class PartPreview:
    """Roughly what a medium will be, after ``step`` of ``total`` steps: the bytes of a small picture."""

    type: ClassVar[str] = "part.preview"
    sequence: int = 0
    index: int
    step: int
    total: int
    data: bytes = field(repr=False)
    media_type: str


@dataclass(frozen=True, kw_only=True)
class PartDone:
    """A medium is ready; it is the best of ``attempts``."""

    type: ClassVar[str] = "part.done"
    sequence: int = 0
    index: int
    modality: Modality
    caption: str
    artefact: Artefact
    manifest: Mapping[str, Any]
    attempts: int = 1


@dataclass(frozen=True, kw_only=True)
class PartFailed:
    """A medium could not be made; the rest of the reply goes on."""

    type: ClassVar[str] = "part.failed"
    sequence: int = 0
    index: int
    modality: Modality
    caption: str
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class TurnDone:
    """The reply is complete. Token counts in ``usage``, seconds in ``timings``."""

    type: ClassVar[str] = "turn.done"
    sequence: int = 0
    finish_reason: str
    usage: Mapping[str, int] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TurnFailed:
    """The turn ended early. ``error`` is :meth:`services.errors.ServiceError.to_wire`."""

    type: ClassVar[str] = "turn.failed"
    sequence: int = 0
    error: Mapping[str, Any]


PartEvent = PartStarted | PartAsked | PartProgress | PartPreview | PartDone | PartFailed
Event = TurnStarted | TextDelta | PartEvent | TurnDone | TurnFailed
