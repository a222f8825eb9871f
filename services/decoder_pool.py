"""The decoders of a process: loaded when they are first used, shared, and put aside for each other.

Two presets that name the same weights, device and dtype use one decoder. With a budget, decoders that
nobody uses make room, the one that was used longest ago first; one that is in use stays, and who needs its
room waits. Knows asyncio and threads; what a decoder is loaded from is its caller's business.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from decoders.engine import DenoisingEngine
from decoders.pipeline_engine import PipelineEngine
from services.compiling import Compile
from services.errors import PresetProblem

logger = logging.getLogger(__name__)

WaitsIn = Literal["device", "cpu", "disk"]
AnyEngine = DenoisingEngine | PipelineEngine


@dataclass(frozen=True, kw_only=True)
class DecoderKey:
    """What makes two decoders the same one.

    ``waits_in`` is where weights go that are put aside: to the memory of the ``cpu``, else they are only on
    the disk. Without a budget that is as soon as nobody uses them, unless they wait on the ``device``.
    ``vae`` is how the VAE is used, ``compile`` how the network is made faster.
    """

    folder: Path
    device: str
    dtype: torch.dtype
    vae: str = "whole"
    waits_in: WaitsIn = "device"
    compile: Compile = False


@dataclass(eq=False)
class _Entry:
    key: DecoderKey
    need: int
    """Bytes of its weights."""
    load: Callable[[], AnyEngine]
    engine: AnyEngine | None = None
    ready: bool = False
    """Whether it is on its device."""
    users: int = 0
    used_at: int = 0


@dataclass(eq=False)
class _Ticket:
    entry: _Entry
    granted: Future[None] = field(default_factory=Future)


class DecoderPool:
    """Decoders by :class:`DecoderKey`. Every method may be called from any thread and any event loop.

    Who comes first loads a decoder, with its own limits on batch and queue. ``budget`` is the most bytes that
    the weights of decoders on one device may take; None is no limit.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self._entries: dict[DecoderKey, _Entry] = {}
        self._waiting: deque[_Ticket] = deque()
        self._lock = threading.Lock()
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="decoder-pool")
        self._moving = False
        self._clock = 0

    @asynccontextmanager
    async def use(
        self, key: DecoderKey, need: int, load: Callable[[], AnyEngine]
    ) -> AsyncIterator[AnyEngine]:
        """Give a decoder that stays where it is until the block ends.

        ``need`` are the bytes of its weights, and ``load`` makes it where there is none yet.

        Raises:
            PresetProblem: it needs more than the budget.
            Whatever ``load`` raises.

        """
        ticket = self._queued(key, need, load)
        try:
            if ticket.granted.done():
                ticket.granted.result()
            else:
                await asyncio.wrap_future(ticket.granted)
        except BaseException:  # cancelled too: who does not wait any more must give its ticket back
            self._leave(ticket)
            raise
        try:
            yield _there(ticket.entry)
        finally:
            self._release(ticket.entry)

    @contextmanager
    def use_now(self, key: DecoderKey, need: int, load: Callable[[], AnyEngine]) -> Iterator[AnyEngine]:
        """Do what :meth:`use` does, for who may block."""
        ticket = self._queued(key, need, load)
        try:
            ticket.granted.result()
        except BaseException:  # an interrupt too: who does not wait any more must give its ticket back
            self._leave(ticket)
            raise
        try:
            yield _there(ticket.entry)
        finally:
            self._release(ticket.entry)

    def on_device(self) -> list[DecoderKey]:
        """Return what is where it can be used: the one used longest ago first, those in use last."""
        with self._lock:
            ready = [entry for entry in self._entries.values() if entry.ready]
            return [entry.key for entry in sorted(ready, key=lambda e: (e.users > 0, e.used_at))]

    def in_memory(self) -> list[DecoderKey]:
        """Return what is loaded, on its device or in the memory of the CPU."""
        with self._lock:
            return [entry.key for entry in self._entries.values() if entry.engine is not None]

    def engine(self, key: DecoderKey) -> AnyEngine | None:
        """Return what is loaded for ``key``."""
        with self._lock:
            entry = self._entries.get(key)
            return None if entry is None else entry.engine

    def settle(self) -> None:
        """Return when everything that is on its way has arrived. Not while requests come in."""
        while True:
            self._mover.submit(lambda: None).result()
            with self._lock:
                if not self._moving:
                    return

    def _queued(self, key: DecoderKey, need: int, load: Callable[[], AnyEngine]) -> _Ticket:
        if self.budget is not None and need > self.budget:
            raise PresetProblem(
                f"The decoder in {key.folder} needs {need / 1e9:.2f} GB, and all decoders together may take "
                f"{self.budget / 1e9:.2f} GB. Raise decoders_gb in the preset, or give the decoder the dtype "
                "float16.",
                code="weights_too_large",
            )
        with self._lock:
            entry = self._entries.setdefault(key, _Entry(key, need, load))
            ticket = _Ticket(entry)
            self._waiting.append(ticket)
            self._advance()
        return ticket

    def _leave(self, ticket: _Ticket) -> None:
        """Take back a ticket, whether it was granted in the meantime or not."""
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._advance()
                return
        granted = ticket.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            self._release(ticket.entry)

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            self._clock += 1
            entry.used_at = self._clock
            self._advance()

    def _advance(self) -> None:
        """Grant what can be granted, and move what must be moved. The lock is held."""
        for ticket in list(self._waiting):
            entry = ticket.entry
            if entry.ready:
                self._waiting.remove(ticket)
                if ticket.granted.set_running_or_notify_cancel():
                    entry.users += 1
                    ticket.granted.set_result(None)
            elif not self._moving:
                leaving = self._room_for(entry)
                if leaving is None:
                    return  # nobody overtakes who waits for room
                self._move(leaving, entry)
        if not self._moving and self.budget is None:
            wanted = {ticket.entry.key for ticket in self._waiting}
            leaving = [
                entry
                for entry in self._entries.values()
                if entry.ready and not entry.users and entry.key.waits_in != "device"
                if entry.key not in wanted
            ]
            if leaving:
                self._move(leaving, None)

    def _room_for(self, coming: _Entry) -> list[_Entry] | None:
        """Return which decoders must leave for one more, None while too many are in use."""
        if self.budget is None:
            return []
        here = [e for e in self._entries.values() if e.ready and e.key.device == coming.key.device]
        idle = sorted((entry for entry in here if not entry.users), key=lambda entry: entry.used_at)
        free, leaving = self.budget - sum(entry.need for entry in here), []
        while free < coming.need and idle:
            leaving.append(idle.pop(0))
            free += leaving[-1].need
        return leaving if free >= coming.need else None

    def _move(self, leaving: list[_Entry], coming: _Entry | None) -> None:
        self._moving = True
        for entry in leaving:
            entry.ready = False
        self._mover.submit(self._moved, leaving, coming)

    def _moved(self, leaving: list[_Entry], coming: _Entry | None) -> None:
        """Put some aside and bring one, in the mover's thread."""
        problem: BaseException | None = None
        try:
            for entry in leaving:
                _put_aside(entry)
            if coming is not None:
                _bring(coming)
        # Whatever it is: everybody who waits for the decoder is told, and this thread goes on for the others.
        except BaseException as error:  # noqa: BLE001
            problem = error
        with self._lock:
            self._moving = False
            if coming is not None and problem is None:
                coming.ready = True
            elif coming is not None:
                for ticket in [ticket for ticket in self._waiting if ticket.entry is coming]:
                    self._waiting.remove(ticket)
                    if ticket.granted.set_running_or_notify_cancel():
                        ticket.granted.set_exception(problem)
            elif problem is not None:
                logger.error("A decoder could not be put aside.", exc_info=problem)
            self._advance()


def _there(entry: _Entry) -> AnyEngine:
    assert entry.engine is not None
    return entry.engine


def _bring(entry: _Entry) -> None:
    if entry.engine is None:
        entry.engine = entry.load()
    else:
        entry.engine.decoder.move(entry.key.device)


def _put_aside(entry: _Entry) -> None:
    engine = _there(entry)
    if entry.key.waits_in == "cpu":
        engine.decoder.move("cpu")
    else:
        engine.close()
        entry.engine = None
        del engine
        gc.collect()  # a network and what listens to it hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
