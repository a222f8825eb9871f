"""The engine of a whole pipeline: many callers, one request at a time, stopped within one step.

One thread does all the work; a request that runs is stopped by a flag that it looks at after each step. Who
is next is decided as in :mod:`decoders.engine`: by user, by seconds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from decoders.condition import Condition
from decoders.cost import CostModel
from decoders.denoising import Cancelled
from decoders.engine import EngineConfig, EngineStats, Heard, StepDone, is_out_of_memory, telling
from decoders.failures import DecoderOutOfMemory, QueueFull
from decoders.fair_queue import FairQueue, Work
from decoders.lora import DecoderLora
from decoders.plan import Decoded
from decoders.request_stream import RequestStream
from decoders.settings import DecodeSettings
from decoders.thrift import release
from decoders.whole_pipeline import PipelinePlan, WholePipeline
from encoders.media import Medium

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Job:
    """One request on its way."""

    plan: PipelinePlan
    work: Work
    stream: RequestStream[Heard]


class PipelineEngine:
    """Serves one :class:`WholePipeline` to many callers, as :class:`decoders.engine.DenoisingEngine` does.

    Two things differ: ``max_batch`` of the configuration has no effect, and there are no previews.
    """

    def __init__(self, decoder: WholePipeline, config: EngineConfig | None = None) -> None:
        self.decoder = decoder
        self.config = config or EngineConfig()
        self.cost = CostModel()
        self._queue = FairQueue(self.cost)
        self._jobs: dict[Work, _Job] = {}
        self._running: _Job | None = None
        self._most_running = 0
        self._step_began = 0.0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"{decoder.modality.value}-pipeline")
        self._side_pool = ThreadPoolExecutor(1, thread_name_prefix=f"{decoder.modality.value}-captions")
        self._turning = False

    async def decode(
        self,
        condition: Condition,
        settings: DecodeSettings | None = None,
        *,
        source: Tensor | None = None,
        lora: DecoderLora | None = None,
        original: Medium | None = None,
        user: str = "",
        preview_every: int = 0,
    ) -> AsyncGenerator[Heard, None]:
        """Stream progress and, last, the medium; closing the stream stops the request after its step.

        Raises:
            ValueError: as in :meth:`WholePipeline.decode`, or a ``source`` or ``original``, which whole
                pipelines lack.
            QueueFull: too many seconds of work are waiting.
            DecoderOutOfMemory: the request does not fit into memory.

        """
        if source is not None:
            raise ValueError("A source was given; this decoder always starts from noise. Leave it out.")
        if original is not None:
            raise ValueError("An original was given; this decoder keeps nothing of any. Leave it out.")
        plan = self.decoder.plan(condition, settings, lora=lora)
        job = _Job(plan, Work(user, plan.shape, plan.rows, plan.steps), RequestStream())
        self._admit(job)
        async with aclosing(job.stream.listen(partial(self._leave, job))) as heard:
            async for value in heard:
                yield value

    async def call(self, work: Callable[[], T]) -> T:
        """Run ``work``, such as encoding a caption, beside the request that runs; return what it returns.

        Raises:
            DecoderOutOfMemory: ``work`` does not fit into memory.

        """
        return await asyncio.get_running_loop().run_in_executor(self._side_pool, telling(work))

    async def encode_source(self, medium: Medium, settings: DecodeSettings) -> Tensor:
        """Raise ValueError: pipelines that are not taken apart always start from noise."""
        return self.decoder.encode_source(medium, settings)

    def calibrate(self) -> None:
        """Measure what steps and media cost, by making one. Not while requests are under way.

        It is the second one that counts: the first pays for what is made once, in the engine's thread.
        """
        plan = self.decoder.plan(self.decoder.encode_caption(""), DecodeSettings(seed=0, steps=3))
        self._pool.submit(self._rehearse, plan).result()

    def _rehearse(self, plan: PipelinePlan) -> None:
        for _ in range(2):
            self.cost.forget()
            work = Work("", plan.shape, plan.rows, plan.steps)
            self._timed(plan, work, lambda value: None, threading.Event())

    def stats(self) -> EngineStats:
        """Return what the engine is doing now."""
        with self._lock:
            return EngineStats(
                requests=len(self._jobs),
                stepping=int(self._running is not None),
                most_stepping=self._most_running,
                batch_limit=1,
                work_s=max(self._forecast().values(), default=0.0),
                prediction_error=self.cost.error(),
            )

    def close(self) -> None:
        """End every request with :class:`Cancelled`, and the thread after its step."""
        with self._lock:
            for job in list(self._jobs.values()):
                job.stream.end(Cancelled("The decoder was closed."))
                if job is not self._running:
                    self._drop(job)
        self._pool.shutdown(wait=False)
        self._side_pool.shutdown(wait=False)

    def _admit(self, job: _Job) -> None:
        work = job.work
        with self._lock:
            self._queue.add(work)
            done_in_s = self._forecast()[work]
            wait_s = done_in_s - self.cost.request_s(work.shape, work.rows, work.steps_left)
            if self._jobs and wait_s > self.config.max_wait_s:
                self._queue.remove(work)
                raise QueueFull(wait_s, self.config.max_wait_s)
            self._jobs[work] = job
            if not self._turning:
                self._pool.submit(self._turn)
                self._turning = True
            job.stream.say(StepDone(0, work.steps_left, done_in_s if self.cost.known else None))

    def _leave(self, job: _Job) -> None:
        """Let go of a request that has been stopped, unless it runs: then it is dropped after its step."""
        with self._lock:
            if job.work in self._jobs and job is not self._running:
                self._drop(job)

    def _drop(self, job: _Job) -> None:
        """Forget a request that is not running. The lock is held."""
        del self._jobs[job.work]
        self._queue.remove(job.work)
        job.stream.gone.set_result(None)

    def _turn(self) -> None:
        """Serve one request and ask for the next turn."""
        with self._lock:
            picked = self._queue.pick(1)
            job = self._running = self._jobs[picked[0]] if picked else None
            self._most_running = max(self._most_running, len(picked))
        began = time.perf_counter()
        if job is not None:
            try:
                job.stream.say(self._timed(job.plan, job.work, job.stream.say, job.stream.stop))
                job.stream.end()
            except BaseException as error:  # noqa: BLE001  (raised again in the stream of the request)
                job.stream.end(_told(error))
        with self._lock:
            self._running = None
            if job is not None:
                self._queue.charge({job.work: time.perf_counter() - began})
                self._drop(job)
            self._turning = bool(self._jobs)
            if self._turning:
                self._pool.submit(self._turn)

    def _timed(
        self, plan: PipelinePlan, work: Work, say: Callable[[Heard], None], stop: threading.Event
    ) -> Decoded:
        """Make a medium, with less memory if there is not enough, and learn what it cost."""
        try:
            return self._make(plan, work, say, stop, frugal=False)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release(self.decoder.folder.device)
        return self._make(plan, work, say, stop, frugal=True)

    def _make(
        self,
        plan: PipelinePlan,
        work: Work,
        say: Callable[[Heard], None],
        stop: threading.Event,
        *,
        frugal: bool,
    ) -> Decoded:
        began = self._step_began = time.perf_counter()
        stepping_s = 0.0

        def on_step(done: int, total: int) -> None:
            nonlocal stepping_s
            now = time.perf_counter()
            seconds, self._step_began = now - self._step_began, now
            stepping_s += seconds
            with self._lock:
                if done > 1 and not frugal:  # encoding the words is part of the first
                    self.cost.observe_step(work.shape, {"plain": work.rows}, seconds)
                work.advance(done - work.steps_done)
                left_s = self._left_s(work)
            say(StepDone(done, total, left_s))

        decoded = self.decoder.run(plan, on_step, stop, frugal=frugal)
        if not frugal and self.cost.known:
            self.cost.observe_finish(work.shape, 1, max(1e-6, time.perf_counter() - began - stepping_s))
        return decoded

    def _forecast(self) -> dict[Work, float]:
        """Return in how many seconds each request will be done. The lock is held."""
        running = None if self._running is None else self._running.work
        return self._queue.forecast(1, running=running or next(iter(self._queue.works), None))

    def _left_s(self, work: Work) -> float | None:
        """Return the seconds until the running request is done. The lock is held."""
        if not self.cost.known:
            return None
        return self.cost.request_s(work.shape, work.rows, work.steps_left)


def _told(error: BaseException) -> BaseException:
    """Return what a caller is told about an error of its request."""
    if not is_out_of_memory(error):
        return error
    logger.warning("A request did not fit into memory: %s", error)
    return DecoderOutOfMemory(
        "There is not enough memory to make this, not even in slices. Ask for a smaller size or less of it."
    )
