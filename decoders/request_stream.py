"""The stream of one request, between an engine's thread that works and an event loop that listens.

Whoever listens may vanish at any moment, but a thread cannot be killed. So closing the stream asks the thread
to stop, and returns when the thread is rid of the request, however often the one who waits is cancelled; a
cancel that comes meanwhile is passed on then.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    """The stream is over; ``error`` is raised on the other side."""

    error: BaseException | None


class RequestStream(Generic[T]):
    """Made in the event loop that listens.

    ``stop`` is set when nobody wants to hear more; ``gone`` is done when the thread will not touch the
    request again.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.gone: Future[None] = Future()
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[T | _End] = asyncio.Queue()

    def say(self, value: T) -> None:
        """Tell the listener something, from any thread."""
        self._put(value)

    def end(self, error: BaseException | None = None) -> None:
        """Say that it was all, or what went wrong, and stop."""
        self._put(_End(error))
        self.stop.set()

    def _put(self, value: T | _End) -> None:
        if not self.stop.is_set():
            try:
                self._loop.call_soon_threadsafe(self._heard.put_nowait, value)
            except RuntimeError:  # the loop is closed, and the listener gone with it
                self.stop.set()

    async def listen(self, leave: Callable[[], None]) -> AsyncGenerator[T, None]:
        """Yield what is said until the end; ``leave`` has the engine drop the request, now or soon."""
        try:
            while True:
                value = await self._heard.get()
                if isinstance(value, _End):
                    if value.error is not None:
                        raise value.error
                    return
                yield value
        finally:
            self.stop.set()
            leave()
            gone = asyncio.wrap_future(self.gone)
            cancelled: asyncio.CancelledError | None = None
            while not gone.done():
                try:
                    await asyncio.shield(gone)
                except asyncio.CancelledError as error:
                    cancelled = error
            if cancelled is not None:
                raise cancelled
