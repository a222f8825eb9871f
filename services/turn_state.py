"""What a turn knows of itself while it runs: the words so far, the media under way, what may be told next."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from encoders.media import Modality
from services.boxes import Made, SpokenSignal
from services.errors import ServiceError
from services.events import Event, PartDone, PartFailed, TextDelta, new_turn_id
from services.making import PartFailure


@dataclass(frozen=True)
class SpeechEnded:
    """The language model is done; ``error`` says why if it was not its own choice."""

    error: ServiceError | None


@dataclass
class MediumState:
    """A medium that was spoken: what it is, and its last event once there is one."""

    modality: Modality
    caption: str
    started_s: float
    done_s: float | None = None
    outcome: PartDone | PartFailed | None = None

    def settle(self, index: int, item: Made | PartFailure, now_s: float = 0.0) -> None:
        """Note how it ended."""
        self.done_s = now_s
        if isinstance(item, Made):
            self.outcome = PartDone(
                index=index,
                modality=self.modality,
                caption=self.caption,
                artefact=item.artefact,
                manifest=item.manifest,
                attempts=item.attempts,
            )
        else:
            self.outcome = PartFailed(
                index=index,
                modality=self.modality,
                caption=self.caption,
                code=item.error.code,
                message=item.error.message,
            )


@dataclass
class TurnState:
    """The state of one turn while it runs."""

    turn: str = field(default_factory=new_turn_id)
    began: float = field(default_factory=time.monotonic)
    queue: asyncio.Queue[tuple[int, Any]] = field(default_factory=asyncio.Queue)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    media: dict[int, MediumState] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)  # media not yet told of, in the order spoken
    num_parts: int = 0
    text_index: int | None = None
    held_space: str = ""

    def now(self) -> float:
        """Seconds since the turn began."""
        return round(time.monotonic() - self.began, 4)

    def tell(self, index: int, item: object) -> None:
        """Hand something to the turn: of the medium ``index``, or -1 for the language model."""
        self.queue.put_nowait((index, item))

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
        self.media[index] = MediumState(signal.modality, signal.caption, self.now())
        return index

    def expect(self, index: int) -> None:
        """Wait for the outcome of a medium: the turn does not end before it is told."""
        self.waiting.append(index)

    def ready(self) -> list[Event]:
        """Return the outcomes that may be told now: those with no unfinished medium before them."""
        events: list[Event] = []
        while self.waiting and (outcome := self.media[self.waiting[0]].outcome) is not None:
            self.waiting.pop(0)
            events.append(outcome)
        return events
