import asyncio
import random
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from decoders.condition import Condition
from decoders.denoising import Cancelled
from decoders.engine import EngineConfig, StepDone
from decoders.failures import DecoderOutOfMemory, QueueFull
from decoders.pipeline_engine import PipelineEngine
from decoders.plan import Decoded
from decoders.settings import DecodeSettings
from decoders.whole_pipeline import PipelinePlan, WholePipeline
from tests import tiny_pipelines


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> WholePipeline:
    return WholePipeline.load(
        tiny_pipelines.saved(tiny_pipelines.xl_pipeline(), tmp_path_factory.mktemp("xl"))
    )


@pytest.fixture(scope="module")
def condition(decoder: WholePipeline) -> Condition:
    return decoder.encode_caption("a big red bell")


@pytest.fixture
def engine(decoder: WholePipeline) -> Iterator[PipelineEngine]:
    engine = PipelineEngine(decoder, EngineConfig(max_wait_s=1e6))
    yield engine
    engine.close()


async def made(engine: PipelineEngine, *args: Any, **options: Any) -> Decoded:
    """Read a stream to its end and return the medium."""
    async with aclosing(engine.decode(*args, **options)) as stream:
        heard = [value async for value in stream]
    assert isinstance(heard[-1], Decoded)
    return heard[-1]


def slow_network(decoder: WholePipeline, monkeypatch: pytest.MonkeyPatch, step_s: float) -> list[int]:
    """Make each step last at least ``step_s``; return a list that grows by one per step."""
    steps: list[int] = []
    forward = decoder.pipeline.unet.forward

    def sleeping(*args: Any, **named: Any) -> Any:
        time.sleep(step_s)
        steps.append(1)
        return forward(*args, **named)

    monkeypatch.setattr(decoder.pipeline.unet, "forward", sleeping)
    return steps


async def test_a_request_tells_every_step_and_gives_the_medium_of_the_decoder(
    engine: PipelineEngine, condition: Condition
) -> None:
    settings = DecodeSettings(seed=3, steps=4)
    heard = [value async for value in engine.decode(condition, settings)]

    steps = [(value.step, value.total) for value in heard if isinstance(value, StepDone)]
    assert steps == [(step, 4) for step in range(5)]
    assert isinstance(heard[-1], Decoded)
    expected = engine.decoder.decode(condition, settings)
    np.testing.assert_array_equal(heard[-1].medium.pixels, expected.medium.pixels)
    assert heard[-1].manifest == expected.manifest


async def test_a_hundred_random_cancels_never_let_two_requests_work_at_once(
    engine: PipelineEngine, condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, inside, most_inside = random.Random(0), 0, 0
    run = engine.decoder.run

    def counted(*args: Any, **named: Any) -> Decoded:
        nonlocal inside, most_inside
        inside += 1
        most_inside = max(most_inside, inside)
        try:
            return run(*args, **named)
        finally:
            inside -= 1

    monkeypatch.setattr(engine.decoder, "run", counted)
    outcomes = {"cancelled": 0, "closed": 0}

    async def one(number: int) -> None:
        stream = engine.decode(condition, DecodeSettings(steps=500), user=str(number % 3))
        leave_after = rng.randrange(3)
        try:
            async with aclosing(stream):
                async for value in stream:
                    if number % 2 and isinstance(value, StepDone) and value.step >= leave_after:
                        outcomes["closed"] += 1
                        return
        except asyncio.CancelledError:
            outcomes["cancelled"] += 1
            raise

    tasks = [asyncio.create_task(one(number)) for number in range(100)]
    for number in rng.sample(range(0, 100, 2), 50):
        await asyncio.sleep(rng.random() * 0.02)
        tasks[number].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert outcomes == {"cancelled": 50, "closed": 50}
    assert most_inside == engine.stats().most_stepping == 1
    assert (engine.stats().requests, engine.stats().stepping, inside) == (0, 0, 0)
    assert (await made(engine, condition, DecodeSettings(steps=1))).manifest["steps"] == 1


async def test_a_closed_stream_stops_the_pipeline_within_a_step(
    engine: PipelineEngine, condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = slow_network(engine.decoder, monkeypatch, 0.005)
    stream = engine.decode(condition, DecodeSettings(steps=500))
    async for value in stream:
        if isinstance(value, StepDone) and value.step == 2:
            break
    at_close = len(steps)
    await stream.aclose()
    taken = len(steps)
    await asyncio.sleep(0.03)

    assert taken <= at_close + 1
    assert len(steps) == taken


async def test_users_are_served_in_turn_whoever_asked_for_more(
    engine: PipelineEngine, condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_network(engine.decoder, monkeypatch, 0.002)
    finished: list[str] = []

    async def run(user: str) -> None:
        await made(engine, condition, DecodeSettings(steps=3), user=user)
        finished.append(user)

    many = [asyncio.create_task(run("ann")) for _ in range(4)]
    await asyncio.sleep(0)
    await asyncio.gather(run("ben"), *many)

    assert "ben" in finished[:2]


async def test_a_queue_that_is_full_in_seconds_refuses(
    engine: PipelineEngine, condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_network(engine.decoder, monkeypatch, 0.02)
    engine.calibrate()
    settings = DecodeSettings(steps=20)
    plan = engine.decoder.plan(condition, settings)
    alone_s = engine.cost.request_s(plan.shape, plan.rows, plan.steps)
    engine.config = EngineConfig(max_wait_s=1.5 * alone_s)
    streams = [engine.decode(condition, settings) for _ in range(3)]

    first, second = await anext(streams[0]), await anext(streams[1])
    with pytest.raises(QueueFull, match="at most"):
        await anext(streams[2])
    for stream in streams:
        await stream.aclose()

    assert alone_s > 0.4
    assert isinstance(first, StepDone)
    assert isinstance(second, StepDone)
    assert first.left_s == pytest.approx(alone_s, rel=0.5)
    assert second.left_s == pytest.approx(2 * alone_s, rel=0.5)


async def test_what_only_the_first_medium_of_a_thread_pays_for_is_not_foreseen_for_the_next(
    engine: PipelineEngine, condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, met, now_s = engine.decoder.run, set(), 0.0

    def look_at_the_clock() -> float:
        nonlocal now_s
        now_s += 0.001
        return now_s

    def paying_once(*args: Any, **named: Any) -> Decoded:
        nonlocal now_s
        decoded = run(*args, **named)
        if threading.get_ident() not in met:
            now_s += 2.0
        met.add(threading.get_ident())
        return decoded

    monkeypatch.setattr("decoders.pipeline_engine.time", SimpleNamespace(perf_counter=look_at_the_clock))
    monkeypatch.setattr(engine.decoder, "run", paying_once)
    engine.calibrate()
    plan = engine.decoder.plan(condition, DecodeSettings(seed=1))
    began = now_s
    await made(engine, condition, DecodeSettings(seed=1))

    assert engine.cost.known
    assert engine.cost.request_s(plan.shape, plan.rows, plan.steps) < 1.0
    assert now_s - began < 1.0


async def test_a_request_without_enough_memory_is_tried_in_slices_and_fails_alone(
    engine: PipelineEngine, condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tried = engine.decoder.run, []

    def limited(plan: PipelinePlan, *args: Any, frugal: bool) -> Decoded:
        tried.append((plan.settings.seed, frugal))
        if plan.settings.seed == 2 or (plan.settings.seed == 1 and not frugal):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(plan, *args, frugal=frugal)

    monkeypatch.setattr(engine.decoder, "run", limited)

    results = await asyncio.gather(
        *(made(engine, condition, DecodeSettings(seed=seed, steps=2)) for seed in range(4)),
        return_exceptions=True,
    )

    assert isinstance(results[2], DecoderOutOfMemory)
    assert [result.manifest["seed"] for result in results if isinstance(result, Decoded)] == [0, 1, 3]
    assert tried == [(0, False), (1, False), (1, True), (2, False), (2, True), (3, False)]


async def test_a_pipeline_that_breaks_ends_its_own_request_only(
    engine: PipelineEngine, condition: Condition
) -> None:
    results = await asyncio.gather(
        made(engine, condition, DecodeSettings(steps=2, width_px=25)),
        made(engine, condition, DecodeSettings(steps=2)),
        return_exceptions=True,
    )

    assert isinstance(results[0], ValueError)
    assert isinstance(results[1], Decoded)


async def test_captions_are_encoded_while_a_request_runs(
    engine: PipelineEngine, condition: Condition
) -> None:
    stream = engine.decode(condition, DecodeSettings(steps=500))
    await anext(stream)

    caption = await engine.call(lambda: engine.decoder.encode_caption("a small blue drum"))
    still_running = engine.stats().requests
    await stream.aclose()

    assert caption.embeddings.shape == condition.embeddings.shape
    assert still_running == 1


async def test_a_caption_that_does_not_fit_is_told_like_a_medium(engine: PipelineEngine) -> None:
    def encode() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    with pytest.raises(DecoderOutOfMemory, match="Ask for a smaller size"):
        await engine.call(encode)


async def test_a_source_is_refused(engine: PipelineEngine, condition: Condition) -> None:
    with pytest.raises(ValueError, match="this decoder always starts from noise"):
        await made(engine, condition, source=torch.zeros(4, 8, 8))


async def test_closing_the_engine_ends_its_requests(decoder: WholePipeline, condition: Condition) -> None:
    engine = PipelineEngine(decoder)
    running, waiting = (engine.decode(condition, DecodeSettings(steps=500)) for _ in range(2))
    await anext(running)
    await anext(waiting)
    engine.close()

    for stream in (running, waiting):
        with pytest.raises(Cancelled):
            async for _ in stream:
                pass
