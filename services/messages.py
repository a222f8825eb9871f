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
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_PREVIEWS = 32
MAX_USER_CHARACTERS = 256


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


class InvalidOption(ValueError):
    """A wish that cannot be granted; ``param`` is its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True)
class TurnOptions:
    """How the reply is wanted. None leaves it to the preset.

    ``modalities`` None allows everything that is up; a list is a promise that must be kept. A medium of which
    the model is less sure than ``ask_below`` is asked about instead of made; 0 never asks. ``previews``
    of each medium come while it is made. ``user`` is whose request it is: users share the models
    fairly, and a turn of nobody known is a user of its own. ``adapters`` are names of LoRA, at most one
    for each box. ``verify`` False takes media as they come where the preset lets the agent look at them
    again.
    """

    modalities: Sequence[Modality] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    ask_below: float | None = None
    verify: bool | None = None
    decoders: Mapping[Modality, DecodeSettings] = field(default_factory=dict)
    previews: int = 0
    user: str | None = None
    adapters: Sequence[str] = ()

    def __post_init__(self) -> None:
        in_range = {
            "seed": (0, MAX_SEED),
            "temperature": (0, 2),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
            "previews": (0, MAX_PREVIEWS),
        }
        for name, (least, most) in in_range.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InvalidOption(name, f"{name} is {value}; it must be from {least} to {most}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidOption("top_p", f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if self.ask_below is not None and not 0 <= self.ask_below < 1:
            raise InvalidOption(
                "ask_below",
                f"ask_below is {self.ask_below}; it must be at least 0 (never ask) and below 1.",
            )
        if self.top_k is not None and self.top_k < 0:
            raise InvalidOption("top_k", f"top_k is {self.top_k}; it must be 0 (no limit) or more.")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty <= 2:
            raise InvalidOption(
                "repetition_penalty",
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0 and at most 2. "
                "1 changes nothing.",
            )
        if len(self.stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in self.stop):
            raise InvalidOption(
                "stop",
                f"stop holds strings of {', '.join(str(len(text)) for text in self.stop)} characters; "
                f"expected at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters.",
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InvalidOption(
                "max_completion_tokens",
                f"max_completion_tokens is {self.max_new_tokens}; it must be at least 1.",
            )
        if self.user is not None and len(self.user) > MAX_USER_CHARACTERS:
            raise InvalidOption(
                "user",
                f"user has {len(self.user)} characters; expected at most {MAX_USER_CHARACTERS}. Send a hash.",
            )
