import asyncio
import gc
import random
import threading
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decoders.condition import Condition
from decoders.denoising import Cancelled, Denoising, make_scheduler
from decoders.engine import (
    DenoisingEngine,
    EngineConfig,
    Preview,
    StepDone,
)
from decoders.failures import QueueFull
from decoders.image import ImageDecoder
from decoders.latent_decoder import LatentDecoder
from decoders.plan import Decoded
from decoders.settings import SCHEDULER_NAMES, DecodeSettings
from tests import tiny_pipelines
from tests.tiny_decoders import (
    CAPTIONS,
    KINDS,
    ScriptedClock,
    condition,
    kept_latents,
    made,
    network_batches,
    slow_network,
    together,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: tiny_pipelines.saved(make(), tmp_path_factory.mktemp(kind)) for kind, (_, make) in KINDS.items()
    }


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, LatentDecoder]:
    return {kind: decoder.load(folders[kind]) for kind, (decoder, _) in KINDS.items()}


@pytest.fixture
def decoder(folders: dict[str, Path]) -> ImageDecoder:
    return ImageDecoder.load(folders["image"])


@pytest.fixture
def engine(decoder: ImageDecoder) -> Iterator[DenoisingEngine]:
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=4, max_wait_s=1e6))
    yield engine
    engine.close()


def from_pipeline(kind: str, folder: Path, wish: DecodeSettings, caption: str) -> Tensor:
    """Return the latents that the diffusers pipeline makes."""
    pipeline = KINDS[kind][1]()
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, wish.scheduler or "")
    options: dict[str, Any] = {
        "num_inference_steps": wish.steps,
        "guidance_scale": wish.guidance_scale,
        "generator": torch.Generator().manual_seed(wish.seed or 0),
    }
    if kind == "audio":  # this pipeline has no way to ask for latents: catch what goes into its VAE
        caught: list[Tensor] = []
        decode = pipeline.vae.decode
        pipeline.vae.decode = lambda latents, *a, **k: caught.append(latents) or decode(latents, *a, **k)
        pipeline(caption, audio_length_in_s=wish.duration_s, **options)
        return caught[0] * pipeline.vae.config.scaling_factor
    if kind == "video":
        return pipeline(caption, output_type="latent", num_frames=tiny_pipelines.FRAMES, **options).frames
    return pipeline(caption, output_type="latent", **options).images


@pytest.mark.parametrize("kind", KINDS)
async def test_requests_that_join_and_leave_between_steps_equal_the_diffusers_pipeline(
    kind: str,
    loaded: dict[str, LatentDecoder],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = loaded[kind]
    kept, batches = kept_latents(decoder, monkeypatch), network_batches(decoder, monkeypatch)
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=6, max_wait_s=1e6))
    sizes = {"duration_s": 0.05} if kind == "audio" else {}
    wishes = [
        DecodeSettings(seed=10 + i, steps=6 + i, guidance_scale=g, scheduler=SCHEDULER_NAMES[i % 3], **sizes)
        for i, g in enumerate((3.0, 1.0, 4.5, 2.0, 7.0, 0.0))
    ]
    joined = [asyncio.Event() for _ in wishes]
    joined[0].set()

    async def run(number: int) -> None:
        """Join when the request before this one has taken a step."""
        await joined[number].wait()
        async for value in engine.decode(condition(decoder, number), wishes[number]):
            if isinstance(value, StepDone) and value.step == 1 and number + 1 < len(wishes):
                joined[number + 1].set()

    async def leave_early() -> None:
        await joined[1].wait()
        stream = engine.decode(condition(decoder), replace(wishes[0], seed=99, guidance_scale=2.0))
        async with aclosing(stream):
            async for value in stream:
                if isinstance(value, StepDone) and value.step == 2:
                    return

    await asyncio.gather(leave_early(), *(run(number) for number in range(len(wishes))))
    engine.close()

    for number, wish in enumerate(wishes):
        expected = from_pipeline(kind, folders[kind], wish, CAPTIONS[number])[0]
        assert wish.seed is not None
        torch.testing.assert_close(kept[wish.seed], expected, atol=1e-4, rtol=0)
    assert 99 not in kept
    assert max(batches) > 4
    assert len(set(batches)) > 3


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
async def test_a_start_from_a_source_equals_the_decoder_alone(
    kind: str, loaded: dict[str, LatentDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = loaded[kind]
    shape = decoder.plan(condition(decoder)).shape
    sources = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    wishes = [
        DecodeSettings(seed=i, steps=8, guidance_scale=2.0, scheduler=name)
        for i, name in enumerate(SCHEDULER_NAMES)
    ]
    kept = kept_latents(decoder, monkeypatch)
    expected = []
    for wish, source in zip(wishes, sources, strict=True):
        manifest = decoder.decode(condition(decoder), replace(wish, strength=0.5), source=source).manifest
        expected.append((kept.pop(wish.seed or 0), manifest))
    engine = DenoisingEngine(decoder)

    results = await asyncio.gather(
        *(
            made(engine, condition(decoder), replace(wish, strength=0.5), source=source)
            for wish, source in zip(wishes, sources, strict=True)
        )
    )
    engine.close()

    for result, wish, (latents, manifest) in zip(results, wishes, expected, strict=True):
        torch.testing.assert_close(kept[wish.seed or 0], latents, atol=1e-4, rtol=0)
        assert result.manifest == manifest
        assert result.manifest["strength"] == 0.5


LEFT = {
    "alone": [("ann", {"steps": 10})],
    "alone, every third step whole": [("ann", {"steps": 10, "deep_every": 3})],
    "alone, every fifth step whole": [("ann", {"steps": 12, "deep_every": 5, "guidance_scale": 3.0})],
    "one queue": [("ann", {"steps": 4 + number}) for number in range(9)],
    "two people": [("ann", {"steps": 30}), ("ann", {"steps": 30}), ("ben", {"steps": 12})],
    "many and few": [*[("ann", {"steps": 10})] * 8, ("ben", {"steps": 10}), ("cat", {"steps": 20})],
    "two sizes": [("ann", {"steps": 10}), ("ann", {"steps": 10}), ("ben", {"steps": 10, "width_px": 32})],
    "fast and exact": [
        ("ann", {"steps": 15, "deep_every": 5}),
        ("ben", {"steps": 10, "guidance_scale": 3.0}),
    ],
}


@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("case", LEFT)
async def test_the_time_left_is_true_at_every_step(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch, case: str, max_batch: int
) -> None:
    clock = ScriptedClock(decoder, monkeypatch)
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=max_batch, max_wait_s=1e6))
    engine.calibrate()
    began = clock.now_s
    wishes = [
        (user, DecodeSettings(seed=seed + 1, **{"guidance_scale": 1.0, **wish}))
        for seed, (user, wish) in enumerate(LEFT[case])
    ]

    heard = await together(engine, *wishes)
    engine.close()

    for (_, wish), values in zip(wishes, heard, strict=True):
        told = [value for value in values if isinstance(value, StepDone)]
        steps = wish.steps or 0
        assert [(value.step, value.total) for value in told] == [(step, steps) for step in range(steps + 1)]
        times = [began, *clock.steps_at[wish.seed or 0]]
        for at_s, value in list(zip(times, told, strict=True))[1:]:  # before the first, others are to come
            assert value.left_s == pytest.approx(clock.done_at[wish.seed or 0] - at_s, rel=0.1)


async def test_the_time_left_of_a_request_that_waits_holds_the_wait_until_it_is_over(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ScriptedClock(decoder, monkeypatch)
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=1, max_wait_s=1e6))
    engine.calibrate()
    gate = threading.Event()
    held = asyncio.create_task(engine.call(gate.wait))
    await asyncio.sleep(0)
    first = engine.decode(condition(decoder), DecodeSettings(steps=40, guidance_scale=1.0))
    second = engine.decode(condition(decoder), DecodeSettings(steps=10, guidance_scale=1.0))

    one, other = await anext(first), await anext(second)
    await first.aclose()
    gate.set()
    after = [value async for value in second]
    await held
    engine.close()

    assert one.left_s == pytest.approx(40 * 0.03 + 0.05)
    assert other.left_s == pytest.approx(one.left_s + 10 * 0.03 + 0.05)
    assert after[0].left_s == pytest.approx(9 * 0.03 + 0.05)
    assert clock.steps_at


async def test_the_first_request_is_foreseen_although_all_that_is_new_to_a_thread_takes_longer(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ScriptedClock(decoder, monkeypatch)
    run, complete, met = decoder._quick.run, decoder.complete, set()

    def pay_once(what: object) -> None:
        known = (threading.get_ident(), what)
        clock.now_s += 0.0 if known in met else 1.0
        met.add(known)

    def running(network: Any, latents: Tensor, *rest: Tensor) -> Tensor:
        pay_once(len(latents))
        return run(network, latents, *rest)

    def completing(latents: Tensor, plans: Any, **options: Any) -> list[Decoded]:
        pay_once("medium")
        return complete(latents, plans, **options)

    monkeypatch.setattr(decoder._quick, "run", running)
    monkeypatch.setattr(decoder, "complete", completing)
    engine = DenoisingEngine(decoder, EngineConfig(max_wait_s=1e6))
    engine.calibrate()
    began = clock.now_s

    heard = [value async for value in engine.decode(condition(decoder), DecodeSettings(seed=1, steps=10))]
    engine.close()

    assert decoder.defaults.guidance_scale > 1
    assert clock.now_s - began == pytest.approx(10 * (0.02 + 2 * 0.01) + 0.05)
    assert isinstance(heard[0], StepDone)
    assert heard[0].left_s == pytest.approx(clock.now_s - began, rel=0.02)


async def test_two_users_get_equal_service_also_from_a_machine_that_hesitates(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ScriptedClock(decoder, monkeypatch)
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=1, max_wait_s=1e6))
    engine.calibrate()
    step = decoder.step

    def hesitating(runs: Any, plans: Any, **options: Any) -> None:
        step(runs, plans, **options)
        if (plans[0].settings.seed, runs[0].done) == (1, 3):
            clock.now_s += 20 * 0.03

    monkeypatch.setattr(decoder, "step", hesitating)
    wish = DecodeSettings(seed=1, steps=40, guidance_scale=1.0)

    await together(engine, ("ann", wish), ("ben", replace(wish, seed=2)))
    engine.close()

    for number, at_s in enumerate(clock.steps_at[1], 1):
        assert abs(number - sum(other <= at_s for other in clock.steps_at[2])) <= 1


async def test_one_picture_is_not_held_up_by_many_of_another_person(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ScriptedClock(decoder, monkeypatch, step_s=0.0)
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=8, max_wait_s=1e6))
    engine.calibrate()
    wish = DecodeSettings(steps=30, guidance_scale=1.0)
    began = clock.now_s
    many = [("ann", replace(wish, seed=seed)) for seed in range(1, 13)]

    await together(engine, *many, ("ben", replace(wish, seed=0)))
    engine.close()

    alone_s = 30 * 0.01 + 0.05
    assert clock.done_at[0] - began < 1.2 * 2 * alone_s
    assert clock.now_s - began == pytest.approx(13 * alone_s)


async def test_a_hundred_random_cancels_leave_nothing_behind(
    engine: DenoisingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, rng = engine.decoder, random.Random(0)
    inside, most_inside = 0, 0
    predict = decoder._predict

    def counted(latents: Tensor, *rest: Tensor) -> Tensor:
        nonlocal inside, most_inside
        inside += len(latents)
        most_inside = max(most_inside, inside)
        try:
            return predict(latents, *rest)
        finally:
            inside -= len(latents)

    monkeypatch.setattr(decoder, "_predict", counted)
    outcomes = {"cancelled": 0, "closed": 0}
    late: list[int] = []

    async def one(number: int) -> None:
        """Leave by closing the stream or by being cancelled, at a random moment."""
        settings = DecodeSettings(seed=number, steps=200, guidance_scale=rng.choice([1.0, 3.0]))
        leave_after = rng.randrange(6)
        seen = 0
        stream = engine.decode(conditions[number], settings)
        try:
            async with aclosing(stream):
                async for value in stream:
                    seen = value.step if isinstance(value, StepDone) else seen
                    if number % 2 and seen >= leave_after:
                        outcomes["closed"] += 1
                        return
        except asyncio.CancelledError:
            outcomes["cancelled"] += 1
            raise
        finally:
            requests = [r for r in engine._requests.values() if r.plan.settings.seed == number]
            late.append(len(requests))

    def alive() -> tuple[int, int]:
        """Return how many runs and how many tensor values are in memory."""
        gc.collect()
        things = gc.get_objects()
        values = sum(thing.numel() for thing in things if type(thing) is Tensor)
        return sum(type(thing) is Denoising for thing in things), values

    conditions = [condition(decoder, number) for number in range(20)]
    before = alive()
    for _ in range(5):
        tasks = [asyncio.create_task(one(number)) for number in range(20)]
        for number in rng.sample(range(0, 20, 2), 10):
            await asyncio.sleep(rng.random() * 0.02)
            tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    assert outcomes == {"cancelled": 50, "closed": 50}
    assert late == [0] * 100  # when a stream is closed its request is gone
    assert most_inside <= 2 * engine.config.max_batch
    stats = engine.stats()
    assert (stats.requests, stats.stepping) == (0, 0)
    assert stats.most_stepping == engine.config.max_batch
    await asyncio.sleep(0)
    assert alive() == before
    settings = DecodeSettings(seed=7, steps=3)
    after = await made(engine, condition(decoder), settings)
    np.testing.assert_array_equal(
        after.medium.pixels, decoder.decode(condition(decoder), settings).medium.pixels
    )


async def test_a_cancelled_request_takes_no_further_step(
    engine: DenoisingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = network_batches(engine.decoder, monkeypatch)
    stream = engine.decode(condition(engine.decoder), DecodeSettings(steps=500, guidance_scale=1.0))
    async for value in stream:
        if isinstance(value, StepDone) and value.step == 3:
            break
    at_close = len(batches)
    await stream.aclose()
    taken = len(batches)
    await asyncio.sleep(0.05)

    assert taken <= at_close + 1
    assert len(batches) == taken


async def test_a_cancel_that_comes_while_a_stream_closes_is_neither_early_nor_lost(
    engine: DenoisingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, gate = threading.Event(), threading.Event()
    step, went_on = engine.decoder.step, []

    def stuck(runs: Any, plans: Any, **options: Any) -> None:
        if runs[0].done:
            inside.set()
            gate.wait(10)
        step(runs, plans, **options)

    monkeypatch.setattr(engine.decoder, "step", stuck)

    async def read() -> None:
        stream = engine.decode(condition(engine.decoder), DecodeSettings(steps=500))
        async with aclosing(stream):
            await anext(stream)
            await asyncio.to_thread(inside.wait, 10)
        went_on.append(True)

    task = asyncio.create_task(read())
    await asyncio.to_thread(inside.wait, 10)
    await asyncio.sleep(0.02)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    waited = not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert (waited, went_on, engine.stats().requests) == (True, [], 0)


async def test_a_short_request_of_another_person_overtakes_a_long_queue(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_network(decoder, monkeypatch, 0.002)
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=2, max_wait_s=1e6))
    finished: list[str] = []

    async def run(name: str, user: str, steps: int) -> None:
        await made(engine, condition(decoder), DecodeSettings(steps=steps), user=user)
        finished.append(name)

    long = [asyncio.create_task(run(f"long {i}", "ann", 60)) for i in range(4)]
    await asyncio.sleep(0.02)
    await run("short", "ben", 5)
    await asyncio.gather(*long)
    engine.close()

    assert finished[0] == "short"


async def test_a_queue_that_is_full_in_seconds_refuses_and_says_when_to_come_back(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_network(decoder, monkeypatch, 0.05)
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=1))
    engine.calibrate()
    settings = DecodeSettings(steps=20, guidance_scale=1.0)
    alone_s = engine.cost.request_s((4, 8, 8), 1, 20)
    engine.config = EngineConfig(max_batch=1, max_wait_s=1.5 * alone_s)
    streams = [engine.decode(condition(decoder), settings) for _ in range(4)]

    await anext(streams[0])
    await anext(streams[1])
    with pytest.raises(QueueFull, match=r"at most .* s are allowed. Try again in \d+ s") as refused:
        await anext(streams[2])
    kept = engine.stats().requests
    await streams[0].aclose()
    await anext(streams[3])  # there is room again
    for stream in streams:
        await stream.aclose()
    engine.close()

    assert kept == 2
    assert refused.value.retry_after_s in (1, 2)
    assert alone_s > 1.0
    assert engine.stats().requests == 0


async def test_a_request_longer_than_the_queue_is_served_when_nothing_waits(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DenoisingEngine(decoder, EngineConfig(max_wait_s=1e-9))
    engine.calibrate()

    assert (await made(engine, condition(decoder), DecodeSettings(steps=5))).manifest["steps"] == 5
    engine.close()


async def test_another_error_of_one_request_does_not_touch_the_others(
    engine: DenoisingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = engine.decoder
    predict = decoder._predict

    def picky(latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        if (conditions == 99).any():
            raise ZeroDivisionError("broken")
        return predict(latents, timesteps, conditions)

    monkeypatch.setattr(decoder, "_predict", picky)

    results = await asyncio.gather(
        made(engine, condition(decoder), DecodeSettings(steps=3)),
        made(engine, Condition(torch.full((8, 16), 99.0)), DecodeSettings(steps=3)),
        return_exceptions=True,
    )

    assert isinstance(results[0], Decoded)
    assert isinstance(results[1], ZeroDivisionError)


async def test_previews_come_only_when_asked_for_and_look_like_the_end(
    loaded: dict[str, LatentDecoder],
) -> None:
    for kind, decoder in loaded.items():
        engine = DenoisingEngine(decoder)
        settings = DecodeSettings(steps=6, seed=1)

        heard = [v async for v in engine.decode(condition(decoder), settings, preview_every=2)]
        silent = [v async for v in engine.decode(condition(decoder), settings)]
        engine.close()

        previews = [value for value in heard if isinstance(value, Preview)]
        assert [(value.step, value.total) for value in previews] == [(2, 6), (4, 6)], kind
        assert previews[0].image.pixels.dtype == np.uint8
        assert not any(isinstance(value, Preview) for value in silent)


async def test_a_preview_that_fails_does_not_cost_the_medium(
    engine: DenoisingEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(latents: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine.decoder, "preview", broken)

    result = await made(engine, condition(engine.decoder), DecodeSettings(steps=4), preview_every=1)

    assert result.manifest["steps"] == 4
    assert caplog.text.count("A preview failed") == 1


async def test_calls_run_between_the_steps_of_a_long_request(engine: DenoisingEngine) -> None:
    stream = engine.decode(condition(engine.decoder), DecodeSettings(steps=1000))
    await anext(stream)

    name = await engine.call(lambda: threading.current_thread().name)
    progress = await anext(stream)
    await stream.aclose()

    assert name.startswith("image-engine")
    assert progress.step < 1000


async def test_a_request_that_does_not_fit_the_decoder_is_refused_before_it_waits(
    engine: DenoisingEngine,
) -> None:
    with pytest.raises(ValueError, match="width_px is 25"):
        await made(engine, condition(engine.decoder), DecodeSettings(width_px=25))
    with pytest.raises(ValueError, match="strength is 0"):
        await made(engine, condition(engine.decoder), DecodeSettings(strength=0.0))
    with pytest.raises(ValueError, match="there is no source to keep anything of"):
        await made(engine, condition(engine.decoder), DecodeSettings(strength=0.5))
    with pytest.raises(ValueError, match="preview_every is -1"):
        await made(engine, condition(engine.decoder), preview_every=-1)


async def test_requests_of_other_sizes_take_turns(engine: DenoisingEngine) -> None:
    decoder = engine.decoder
    wishes = [DecodeSettings(seed=i, steps=4, width_px=8 + 8 * (i % 2)) for i in range(4)]

    results = await asyncio.gather(*(made(engine, condition(decoder), wish) for wish in wishes))

    for result, wish in zip(results, wishes, strict=True):
        expected = decoder.decode(condition(decoder), wish).medium.pixels
        assert np.abs(result.medium.pixels.astype(int) - expected).max() <= 1


async def test_closing_the_engine_ends_its_requests(engine: DenoisingEngine) -> None:
    stream = engine.decode(condition(engine.decoder), DecodeSettings(steps=1000))
    await anext(stream)
    engine.close()

    with pytest.raises(Cancelled):
        async for _ in stream:
            pass


@pytest.mark.parametrize("values", [{"max_batch": 0}, {"max_wait_s": 0.0}])
def test_limits_that_let_nothing_through_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        EngineConfig(**values)
