"""From the engine's thread to streams in event loops: what is urgent at once, words a few at a time.

Waking an event loop costs the thread more than the waking, as the loop then takes Python's lock. A model that
says a word every other millisecond would be slower by a tenth if each were told alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable

from llm.engine_request import StepEvent
from llm.reply import TextDelta

TOLD_EVERY_S = 0.01
"""The longest that words wait for others to be told with. Where a step takes longer, none wait."""


class Stream:
    """Where the events of one request go; made in the event loop that reads them."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.events: asyncio.Queue[StepEvent] = asyncio.Queue()
        self.has_begun = False  # the engine's thread's own


class Listener:
    """An event loop in which streams are read.

    It is woken for the first event of a stream and for all that is not words. For words it is woken unless
    something was told within :data:`TOLD_EVERY_S`; then it looks by itself when that is over. What it is told
    stays in order.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._held: list[tuple[Stream, StepEvent]] = []
        self._will_look = False
        self._next_look: asyncio.TimerHandle | None = None  # the loop's own

    def tell(self, events: list[tuple[Stream, StepEvent]]) -> bool:
        """Hand events of one step over; return False where the loop is closed, and nobody reads any more."""
        urgent = False
        for stream, event in events:
            urgent = urgent or not (stream.has_begun and isinstance(event, TextDelta))
            stream.has_begun = True
        if self.loop.is_closed():
            return False
        with self._lock:
            self._held += events
            wakes = urgent or not self._will_look
            self._will_look = True
        if wakes:
            try:
                self.loop.call_soon_threadsafe(self._look)
            except RuntimeError:  # it was closed just now
                return False
        return True

    def _look(self) -> None:
        """Put what is held into the streams; look once more later if there was something."""
        if self._next_look is not None:
            self._next_look.cancel()
        with self._lock:
            held, self._held = self._held, []
            self._will_look = bool(held)
        self._next_look = self.loop.call_later(TOLD_EVERY_S, self._look) if held else None
        for stream, event in joined(held):
            stream.events.put_nowait(event)


def joined(events: Iterable[tuple[Stream, StepEvent]]) -> list[tuple[Stream, StepEvent]]:
    """Return the events with words that follow each other in a stream as one event."""
    result: list[tuple[Stream, StepEvent]] = []
    last: dict[Stream, int] = {}
    for stream, event in events:
        place = last.get(stream)
        before = None if place is None else result[place][1]
        if place is not None and isinstance(before, TextDelta) and isinstance(event, TextDelta):
            result[place] = stream, TextDelta(before.text + event.text)
        else:
            last[stream] = len(result)
            result.append((stream, event))
    return result
