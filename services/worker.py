"""One thread for one model: a job at a time, progress out, stopped within one step.

Whoever waits for a job may vanish at any moment, but a thread cannot be killed. So a job holds the
lock until its thread has really ended, and closing its stream sets the stop flag and waits.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")

Emit = Callable[[T], None]
Job = Callable[[Emit[T], threading.Event], None]


class _End:
    """Says that a job is over, and how."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Worker(Generic[T]):
    """Runs jobs one after the other in a thread of its own.

    A job is called with ``emit``, which puts a value into the stream, and ``stop``, which it must
    look at between its steps.
    """

    def __init__(self, name: str) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.lock = asyncio.Lock()

    async def stream(self, job: Job[T]) -> AsyncGenerator[T, None]:
        """Run ``job`` when its turn comes and yield what it emits; its error is raised here."""
        async with self.lock:
            loop = asyncio.get_running_loop()
            values: asyncio.Queue[T | _End] = asyncio.Queue()
            stop = threading.Event()

            def emit(value: T) -> None:
                loop.call_soon_threadsafe(values.put_nowait, value)

            def work() -> None:
                error: BaseException | None = None
                try:
                    job(emit, stop)
                except BaseException as caught:  # noqa: BLE001  (raised again on the other side)
                    error = caught
                loop.call_soon_threadsafe(values.put_nowait, _End(error))

            running = loop.run_in_executor(self.pool, work)
            try:
                while True:
                    value = await values.get()
                    if isinstance(value, _End):
                        if value.error is not None:
                            raise value.error
                        return
                    yield value
            finally:
                stop.set()
                cancelled: asyncio.CancelledError | None = None
                while not running.done():
                    try:
                        await asyncio.shield(running)
                    except asyncio.CancelledError as error:
                        cancelled = error  # not before the job has ended
                if cancelled is not None:
                    raise cancelled

    def close(self) -> None:
        """Let the thread end when its job does."""
        self.pool.shutdown(wait=False, cancel_futures=True)
