"""What goes into a turn: a conversation, and how the reply is wanted.

These values know nothing of HTTP and hold no media bytes; a medium is named by its artefact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from decoders.settings import MAX_SEED, DecodeSettings
from encoders.media import Modality

MEDIA = (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True)
class TextPart:
    """Words."""

    text: str


@dataclass(frozen=True)
class MediaPart:
    """A medium to be looked at or listened to, by the id of its artefact.

    ``modality`` is what the sender says it is; None leaves it to the content.
    """

    artefact_id: str
    modality: Modality | None = None


@dataclass(frozen=True)
class SpokenPart:
    """A medium that the assistant made earlier: the model is shown its signal, not its pixels."""

    modality: Modality
    caption: str = ""
    artefact_id: str | None = None


Part = TextPart | MediaPart | SpokenPart


@dataclass(frozen=True)
class Message:
    """One turn of one speaker, parts in order."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class TurnOptions:
    """How the reply is wanted. None leaves it to the preset.

    ``modalities`` None allows everything that is up; a list is a promise that must be kept.
    ``adapters`` are names of LoRA, at most one for each box.
    """

    modalities: Sequence[Modality] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    decoders: Mapping[Modality, DecodeSettings] = field(default_factory=dict)
    adapters: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to {MAX_SEED}.")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature is {self.temperature}; it must be from 0 to 2.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_completion_tokens is {self.max_new_tokens}; it must be at least 1.")
