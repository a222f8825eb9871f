"""The denoising engine: many requests, one network, one thread, batched by step.

The thread takes turns. In a turn it gives one denoising step to as many requests of one latent shape and
LoRA as the batch may hold, or makes the media of those whose latents are clean. Between two turns requests
join, leave, and are cancelled; which of them are served next is the business of
:class:`decoders.fair_queue.FairQueue`. Knows asyncio and threads; knows nothing of HTTP or Ray.
"""

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from decoders.condition import Condition
from decoders.cost import CostModel, StepKind
from decoders.denoising import Cancelled, Denoising
from decoders.failures import DecoderOutOfMemory, QueueFull
from decoders.fair_queue import FairQueue, Work, rows_by_kind
from decoders.latent_decoder import LatentDecoder
from decoders.lora import DecoderLora
from decoders.plan import Decoded, Plan
from decoders.request_stream import RequestStream
from decoders.settings import DecodeSettings
from decoders.thrift import Thrift, release
from encoders.media import Image, Medium

logger = logging.getLogger(__name__)

CALIBRATION_ROWS = (1, 4)
REHEARSED_STEPS = 6
FORECAST_KEPT_S = 0.5
TURNS_TO_REGROW = 64
"""Turns without a lack of memory after which a batch that was made smaller may grow by one."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much a :class:`DenoisingEngine` takes on. Immutable; checked when made.

    ``max_batch`` is the number of requests in one step (with guidance each takes two rows of the
    network's batch). ``max_wait_s`` bounds the queue in seconds of work: a request that would be done
    later than that after the time it would take alone is refused.
    """

    max_batch: int = 16
    max_wait_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}; it must be at least 1.")
        if not self.max_wait_s > 0:
            raise ValueError(f"max_wait_s is {self.max_wait_s}; it must be above 0.")


@dataclass(frozen=True, slots=True)
class StepDone:
    """``step`` of ``total`` denoising steps are done; ``left_s`` seconds are left, None if not known yet."""

    step: int
    total: int
    left_s: float | None


@dataclass(frozen=True, eq=False, slots=True)
class Preview:
    """Roughly what the medium will be, after ``step`` of ``total`` steps."""

    step: int
    total: int
    image: Image


Heard = StepDone | Preview | Decoded


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing.

    ``requests`` are not done, ``stepping`` of them are in the hands of the thread now; ``most_stepping``
    is the most there ever were. ``work_s`` is when all of them will be done, in seconds from now.
    ``prediction_error`` is the median of ``|predicted - actual| / actual`` over the last steps.
    ``batch_limit`` is below the configuration after a lack of memory.
    """

    requests: int
    stepping: int
    most_stepping: int
    batch_limit: int
    work_s: float
    prediction_error: float | None


@dataclass(eq=False, slots=True)
class _Request:
    """One request on its way."""

    plan: Plan
    work: Work
    preview_every: int
    stream: RequestStream[Heard]
    run: Denoising | None = None
    error: BaseException | None = None

    def state(self) -> Denoising:
        assert self.run is not None
        return self.run


_Deed = Callable[[Sequence[_Request], Thrift], None]
"""Something done for several requests at once, as sparing of memory as is asked for."""


class DenoisingEngine:
    """Serves one :class:`LatentDecoder` to many callers.

    Media are those of :meth:`LatentDecoder.decode` for the same seed and settings, up to the rounding of
    floating point: the company a request has in a batch may change the last bits of its latents.
    """

    def __init__(self, decoder: LatentDecoder, config: EngineConfig | None = None) -> None:
        self.decoder = decoder
        self.config = config or EngineConfig()
        self.cost = CostModel()
        self._queue = FairQueue(self.cost)
        self._requests: dict[Work, _Request] = {}
        self._in_hand: list[_Request] = []
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"{decoder.modality.value}-engine")
        self._turning = False
        self._batch_limit = self.config.max_batch
        self._good_turns = 0
        self._most_stepping = 0
        self._forecast: dict[Work, float] = {}
        self._forecast_at = float("-inf")

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
        """Stream progress, previews and, last, the medium.

        Closing the stream, or cancelling the task that reads it, stops the request before its next step;
        the close returns when the thread is rid of it.

        Args:
            condition, settings, source, lora, original: as in :meth:`LatentDecoder.decode`.
            user: whose request it is; users share the engine fairly.
            preview_every: steps from one preview to the next, 0 for none.

        Raises:
            ValueError: as in :meth:`LatentDecoder.decode`, or ``preview_every`` below 0.
            QueueFull: too many seconds of work are waiting.
            DecoderOutOfMemory: the request does not fit into memory, not even alone.

        """
        if preview_every < 0:
            raise ValueError(f"preview_every is {preview_every}; it must be 0 (no previews) or more.")
        plan = self.decoder.plan(condition, settings, source=source, lora=lora, original=original)
        work = Work(user, plan.shape, plan.rows, plan.steps, plan.settings.lora, plan.deep_every)
        request = _Request(plan, work, preview_every, RequestStream())
        self._admit(request)
        async with aclosing(request.stream.listen(partial(self._leave, request))) as heard:
            async for value in heard:
                yield value

    async def encode_source(self, medium: Medium, settings: DecodeSettings) -> Tensor:
        """Return what :meth:`LatentDecoder.encode_source` does, with more thrift where memory is short.

        Raises:
            ValueError: a medium of another modality.
            DecoderOutOfMemory: there is not enough memory, not even so.

        """
        return await self.call(partial(self._encode_source, medium, settings))

    def _encode_source(
        self, medium: Medium, settings: DecodeSettings, thrift: Thrift = Thrift.NONE
    ) -> Tensor:
        try:
            return self.decoder.encode_source(medium, settings, thrift=thrift)
        except Exception as error:
            if not is_out_of_memory(error) or thrift == max(Thrift):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors that did not fit
        release(self.decoder.folder.device)
        return self._encode_source(medium, settings, Thrift(thrift + 1))

    async def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the engine's thread, between two turns, and return what it returns.

        Raises:
            DecoderOutOfMemory: ``work`` does not fit into memory.

        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, telling(work))

    def calibrate(self) -> None:
        """Measure what steps and media cost, by taking some, and make ready to show previews.

        Not while requests are under way. It happens in the engine's thread, whose own memory and plans the
        first request then finds in place. What there is no memory for is left to be learnt from requests,
        which have ways to do with less.
        """
        self._pool.submit(self._calibrate_if_it_fits).result()

    def _calibrate_if_it_fits(self) -> None:
        try:
            self._calibrate()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("There was not enough memory to measure what media cost; requests will show it.")
            error = error.with_traceback(None)  # its frames hold the tensors that did not fit
            release(self.decoder.folder.device)

    def _calibrate(self) -> None:
        usual = DecodeSettings(seed=0, steps=3, guidance_scale=1.0)
        plan = self.decoder.plan(self._empty(), usual)
        step_s: dict[StepKind, list[tuple[int, float]]] = {"plain": []}
        deep = None
        if self.decoder.has_deep_features:
            deep = self.decoder.plan(self._empty(), replace(usual, steps=4, deep_every=2))
            step_s |= {"keeping": [], "reusing": []}
        for rows in CALIBRATION_ROWS:
            run = self.decoder.begin([plan] * rows)
            step_s["plain"].append((rows, min(self._seconds_of_steps(run, plan))))
            if deep is not None:
                seconds = self._seconds_of_steps(self.decoder.begin([deep] * rows), deep)
                step_s["keeping"].append((rows, min(seconds[::2])))
                step_s["reusing"].append((rows, min(seconds[1::2])))
        complete = partial(self.decoder.complete, run.latents[:1], [plan])
        finish_s = min(self._seconds(complete) for _ in range(2))
        self.cost.calibrate(plan.shape, step_s, finish_s)
        self.decoder.preview(run.latents[0])
        self._rehearse()

    def _rehearse(self) -> None:
        """Correct what was measured piece by piece, at its best, by what a usual request takes."""
        plan = self.decoder.plan(self._empty(), DecodeSettings(seed=0, steps=REHEARSED_STEPS))
        run = self.decoder.begin([plan])
        for seconds in self._seconds_of_steps(run, plan)[1:]:
            self.cost.observe_step(plan.shape, {"plain": plan.rows}, seconds)
        complete = partial(self.decoder.complete, run.latents, [plan])
        self.cost.observe_finish(plan.shape, 1, self._seconds(complete))

    def _seconds_of_steps(self, run: Denoising, plan: Plan) -> list[float]:
        """Return what each step of a run takes. The first of a shape and kind pays for plans and caches."""
        return [self._seconds(partial(self.decoder.step, [run], [plan])) for _ in range(plan.steps)]

    def stats(self) -> EngineStats:
        """Return what the engine is doing now."""
        with self._lock:
            return EngineStats(
                requests=len(self._requests),
                stepping=len(self._in_hand),
                most_stepping=self._most_stepping,
                batch_limit=self._batch_limit,
                work_s=max(self._queue.forecast(self._batch_limit).values(), default=0.0),
                prediction_error=self.cost.error(),
            )

    def close(self) -> None:
        """End every request with :class:`Cancelled`, and the thread after its turn."""
        with self._lock:
            for request in list(self._requests.values()):
                request.error = Cancelled("The decoder was closed.")
                if request not in self._in_hand:
                    self._drop(request)
        self._pool.shutdown(wait=False)

    def _empty(self) -> Condition:
        spec = self.decoder.condition_spec
        return Condition(torch.zeros(spec.tokens, spec.width))

    def _admit(self, request: _Request) -> None:
        work, plan = request.work, request.plan
        with self._lock:
            self._queue.add(work)
            done_in_s = self._foresee(anew=True).get(work, 0.0)
            wait_s = done_in_s - self.cost.request_s(plan.shape, plan.rows, plan.steps, plan.deep_every)
            if self._requests and wait_s > self.config.max_wait_s:
                self._queue.remove(work)
                raise QueueFull(wait_s, self.config.max_wait_s)
            self._requests[work] = request
            if not self._turning:
                self._pool.submit(self._turn)
                self._turning = True
            request.stream.say(StepDone(0, plan.steps, self._left_s(work)))

    def _leave(self, request: _Request) -> None:
        """Let go of a request that has been stopped, unless the thread is at it: then it does."""
        with self._lock:
            if request.work in self._requests and request not in self._in_hand:
                self._drop(request)

    def _drop(self, request: _Request) -> None:
        """Forget a request that nobody works on. The lock is held."""
        del self._requests[request.work]
        self._queue.remove(request.work)
        request.run = None
        if request.error is not None:
            request.stream.end(request.error)
        request.stream.gone.set_result(None)

    def _turn(self) -> None:
        """Do one turn and ask for the next, so that :meth:`call` and new requests get in between."""
        with self._lock:
            works = self._queue.pick(self._batch_limit)
            prices = self._queue.prices(works, self._batch_limit)
            self._in_hand = [self._requests[work] for work in works]
            self._most_stepping = max(self._most_stepping, len(works))
        batch, began = self._in_hand, time.perf_counter()
        foreseen = False
        if batch:
            try:
                foreseen = self._serve(batch) and any(prices.values())
            except BaseException as error:  # noqa: BLE001  (no stream may hang)
                for request in batch:
                    request.error = request.error or error
        with self._lock:
            self._queue.charge(prices, None if foreseen else time.perf_counter() - began)
            self._in_hand = []
            for request in batch:
                if request.stream.stop.is_set() or request.error is not None:
                    self._drop(request)
            self._foresee()
            for request in batch:
                if (run := request.run) is not None:
                    request.stream.say(StepDone(run.done, run.total, self._left_s(request.work)))
            self._turning = bool(self._requests)
            if self._turning:
                self._pool.submit(self._turn)

    def _serve(self, batch: list[_Request]) -> bool:
        """Give a batch its turn, and learn what it cost. Return whether that worked at once."""
        shape = batch[0].work.shape
        is_last = not batch[0].work.steps_left
        for request in batch:
            if request.run is None:
                self._begin(request)
        batch = [request for request in batch if request.error is None]
        if not batch:
            return False
        rows = rows_by_kind(request.work for request in batch)
        began = time.perf_counter()
        whole = self._attempt(self._make if is_last else self._step, batch)
        seconds = time.perf_counter() - began
        for request in batch:
            run = request.state()
            request.work.advance(run.done - request.work.steps_done)
            if request.preview_every and run.done % request.preview_every == 0 and not run.finished:
                self._show(request, run)
        if not whole:
            return False
        if is_last:
            self.cost.observe_finish(shape, len(batch), seconds)
        else:
            self.cost.observe_step(shape, rows, seconds)
        self._good_turns += 1
        if self._good_turns >= TURNS_TO_REGROW and self._batch_limit < self.config.max_batch:
            self._batch_limit += 1
            self._good_turns = 0
        return True

    def _show(self, request: _Request, run: Denoising) -> None:
        try:
            request.stream.say(Preview(run.done, run.total, self.decoder.preview(run.estimate[0])))
        except Exception:  # a medium is worth more than a look at it
            logger.warning("A preview failed; its request goes on without.", exc_info=True)
            request.preview_every = 0

    def _begin(self, request: _Request) -> None:
        try:
            request.run = self.decoder.begin([request.plan])
        except Exception as error:  # noqa: BLE001  (handed to the stream of the request that caused it)
            request.error = _told(error)

    def _attempt(self, do: _Deed, batch: list[_Request], thrift: Thrift = Thrift.NONE) -> bool:
        """Do something for a batch; if it fails, for its halves, so that only the guilty are lost.

        Returns whether it worked at once. A request that lacks memory alone is tried again with more thrift.
        """
        before = [request.state().done for request in batch]
        error = _error_of(do, batch, thrift)
        if error is None:
            return True
        lacks_memory = is_out_of_memory(error)
        if lacks_memory:
            error = error.with_traceback(None)  # its frames hold the tensors that did not fit
            release(self.decoder.folder.device)
        batch = [r for r, done in zip(batch, before, strict=True) if r.state().done == done]
        if len(batch) > 1:
            middle = len(batch) // 2
            if lacks_memory and middle < self._batch_limit:
                self._batch_limit, self._good_turns = max(1, middle), 0
            self._attempt(do, batch[:middle])
            self._attempt(do, batch[middle:])
        elif batch and lacks_memory and thrift < max(Thrift):
            self._attempt(do, batch, Thrift(thrift + 1))
        elif batch:
            batch[0].error = _told(error)
        return False

    def _step(self, batch: Sequence[_Request], thrift: Thrift) -> None:
        runs, plans = [request.state() for request in batch], [request.plan for request in batch]
        self.decoder.step(runs, plans, thrift=thrift)
        self._settle()

    def _make(self, batch: Sequence[_Request], thrift: Thrift) -> None:
        latents = torch.cat([request.state().latents for request in batch])
        plans = [request.plan for request in batch]
        for request, decoded in zip(batch, self.decoder.complete(latents, plans, thrift=thrift), strict=True):
            request.stream.say(decoded)
            request.stream.end()

    def _settle(self) -> None:
        """Wait for the device, so that a step that is counted has been done."""
        if self.decoder.folder.device.type != "cpu":
            torch.accelerator.synchronize()

    def _seconds(self, work: Callable[[], object]) -> float:
        self._settle()
        began = time.perf_counter()
        work()
        self._settle()
        return time.perf_counter() - began

    def _foresee(self, *, anew: bool = False) -> dict[Work, float]:
        """Return when each request will be done, in seconds from :attr:`_forecast_at`. The lock is held."""
        now = time.perf_counter()
        if (
            anew
            or now - self._forecast_at > FORECAST_KEPT_S
            or self._forecast.keys() != self._requests.keys()
        ):
            self._forecast = self._queue.forecast(self._batch_limit)
            self._forecast_at = now
        return self._forecast

    def _left_s(self, work: Work) -> float | None:
        if not self.cost.known or work not in self._forecast:
            return None
        return max(0.0, self._forecast_at + self._forecast[work] - time.perf_counter())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "not enough memory" in text or "can't allocate memory" in text
    )


def _error_of(do: _Deed, batch: Sequence[_Request], thrift: Thrift) -> Exception | None:
    try:
        do(batch, thrift)
    except Exception as error:  # noqa: BLE001  (handed to the stream of the request that caused it)
        return error
    return None


def telling(work: Callable[[], T]) -> Callable[[], T]:
    """Return ``work`` with errors as callers are told them: lack of memory as ``DecoderOutOfMemory``."""

    def told() -> T:
        try:
            return work()
        except Exception as error:
            raise _told(error) from error

    return told


def _told(error: Exception) -> Exception:
    """Return what a caller is told about an error of its request."""
    if not is_out_of_memory(error):
        return error
    logger.warning("A request did not fit into memory: %s", error)
    return DecoderOutOfMemory(
        "There is not enough memory to make this, not even alone. Ask for a smaller size or less of it."
    )
