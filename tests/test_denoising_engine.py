import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decoders.audio import AudioDecoder
from decoders.condition import Condition
from decoders.denoising import Cancelled, Denoising, make_scheduler
from decoders.engine import (
    DenoisingEngine,
    EngineConfig,
    Preview,
    StepDone,
    is_out_of_memory,
)
from decoders.failures import DecoderOutOfMemory, QueueFull
from decoders.image import ImageDecoder
from decoders.latent_decoder import LatentDecoder
from decoders.plan import Decoded
from decoders.settings import SCHEDULER_NAMES, DecodeSettings
from decoders.video import VideoDecoder
from tests import tiny_pipelines

CAPTIONS = ["a big red bell", "a small blue drum", "bell", "a red drum", "big blue bell", "small"]

KINDS: dict[str, tuple[type[LatentDecoder], Callable[[], Any]]] = {
    "image": (ImageDecoder, tiny_pipelines.image_pipeline),
    "video": (VideoDecoder, tiny_pipelines.video_pipeline),
    "audio": (AudioDecoder, tiny_pipelines.audio_pipeline),
}


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


def condition(decoder: LatentDecoder, number: int = 0) -> Condition:
    return decoder.encode_caption(CAPTIONS[number % len(CAPTIONS)])


async def made(engine: DenoisingEngine, *args: Any, **options: Any) -> Decoded:
    """Read a stream to its end and return the medium."""
    async with aclosing(engine.decode(*args, **options)) as stream:
        heard = [value async for value in stream]
    assert isinstance(heard[-1], Decoded)
    return heard[-1]


def kept_latents(decoder: LatentDecoder, monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """Return a dictionary that will hold, by seed, the latents of what is completed."""
    kept: dict[int, Tensor] = {}
    complete = decoder.complete

    def keeping(latents: Tensor, plans: Any, **options: Any) -> list[Decoded]:
        kept.update({plan.settings.seed: row for plan, row in zip(plans, latents, strict=True)})
        return complete(latents, plans, **options)

    monkeypatch.setattr(decoder, "complete", keeping)
    return kept


def network_batches(decoder: LatentDecoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that will hold the rows of each call of the network."""
    sizes: list[int] = []
    predict = decoder._predict

    def counting(latents: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(len(latents))
        return predict(latents, *rest)

    monkeypatch.setattr(decoder, "_predict", counting)
    return sizes


def slow_network(decoder: LatentDecoder, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    predict = decoder._predict

    def sleeping(*args: Tensor) -> Tensor:
        time.sleep(step_s)
        return predict(*args)

    monkeypatch.setattr(decoder, "_predict", sleeping)


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


async def test_progress_counts_every_step_and_the_time_left_shrinks_to_the_truth(
    engine: DenoisingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_network(engine.decoder, monkeypatch, 0.05)
    engine.calibrate()
    began = time.monotonic()
    heard: list[tuple[float, StepDone]] = []

    async for value in engine.decode(condition(engine.decoder), DecodeSettings(steps=10, seed=1)):
        if isinstance(value, StepDone):
            heard.append((time.monotonic() - began, value))
    total_s = time.monotonic() - began

    assert [(value.step, value.total) for _, value in heard] == [(step, 10) for step in range(11)]
    assert total_s / 3 < heard[0][1].left_s < total_s * 3
    for at_s, value in heard[4:]:
        assert value.left_s == pytest.approx(total_s - at_s, abs=0.35 * total_s)
    assert heard[0][1].left_s > 4 * heard[-1][1].left_s


async def test_the_time_left_of_a_request_that_waits_holds_the_wait(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_network(decoder, monkeypatch, 0.02)
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=1, max_wait_s=1e6))
    engine.calibrate()
    first = engine.decode(condition(decoder), DecodeSettings(steps=40))
    second = engine.decode(condition(decoder), DecodeSettings(steps=10))

    one, other = await anext(first), await anext(second)
    await first.aclose()
    rest = [value async for value in second]
    after = next(value for value in rest if isinstance(value, StepDone))
    engine.close()

    assert other.left_s > one.left_s > 0.6
    assert other.left_s == pytest.approx(one.left_s * 5 / 4, rel=0.3)
    assert after.left_s < one.left_s / 2


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


def short_of_memory(
    decoder: LatentDecoder, monkeypatch: pytest.MonkeyPatch, most_rows: int, error: Exception
) -> list[int]:
    """Let the network fail for more than ``most_rows`` rows; return the sizes it was tried with."""
    tried: list[int] = []
    predict = decoder._predict

    def limited(latents: Tensor, *rest: Tensor) -> Tensor:
        tried.append(len(latents))
        if len(latents) > most_rows:
            raise error
        return predict(latents, *rest)

    monkeypatch.setattr(decoder, "_predict", limited)
    return tried


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
)
@pytest.mark.parametrize("most_rows", [4, 2, 1])
async def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(
    engine: DenoisingEngine, monkeypatch: pytest.MonkeyPatch, error: Exception, most_rows: int
) -> None:
    decoder = engine.decoder
    wishes = [DecodeSettings(seed=i, steps=3, guidance_scale=3.0) for i in range(4)]
    expected = [decoder.decode(condition(decoder, i), wish) for i, wish in enumerate(wishes)]
    tried = short_of_memory(decoder, monkeypatch, most_rows, error)

    results = await asyncio.gather(
        *(made(engine, condition(decoder, i), wish) for i, wish in enumerate(wishes))
    )

    for result, want in zip(results, expected, strict=True):
        assert np.abs(result.medium.pixels.astype(int) - want.medium.pixels).max() <= 1
    assert max(tried) == 8
    assert tried.count(8) == 1  # the batch stays small afterwards
    assert engine.stats().batch_limit == max(1, most_rows // 2)


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


@pytest.mark.parametrize("tiled", [False, True])
async def test_media_that_do_not_fit_together_are_made_alone_in_slices_and_then_in_tiles(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tiled: bool
) -> None:
    decoder = VideoDecoder.load(folders["video"])
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=4))
    wishes = [DecodeSettings(seed=i, steps=2) for i in range(2)]
    expected = [decoder.decode(condition(decoder), wish).medium.frames for wish in wishes]
    decode, tried = decoder.vae.decode, []

    def limited(latents: Tensor) -> Any:
        tried.append((len(latents), decoder.vae.use_tiling))
        if len(latents) > 1 or (tiled and not decoder.vae.use_tiling):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(latents)

    monkeypatch.setattr(decoder.vae, "decode", limited)

    results = await asyncio.gather(*(made(engine, condition(decoder), wish) for wish in wishes))
    engine.close()

    for result, frames in zip(results, expected, strict=True):
        assert np.abs(result.medium.frames.astype(int) - frames).max() <= 1
    assert tried.count((1, tiled)) == 2 * tiny_pipelines.FRAMES
    assert tried.count((1, not tiled)) == (2 if tiled else 0)
    assert not decoder.vae.use_tiling


async def test_with_the_last_memory_networks_that_rest_go_to_main_memory_and_come_back(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: dict[str, str] = {}

    def watch(name: str) -> None:
        module = getattr(decoder, name)
        move = module.to

        def noted(place: Any) -> Any:
            where[name] = "aside" if place == "cpu" else "back"
            return move(place)

        monkeypatch.setattr(module, "to", noted)

    watch("vae")
    watch("unet")
    seen: list[dict[str, str]] = []
    predict, decode = decoder._predict, decoder.vae.decode

    def short(work: Callable[..., Any], idle: str) -> Callable[..., Any]:
        def limited(*args: Any) -> Any:
            if where.get(idle) != "aside":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            seen.append(dict(where))
            return work(*args)

        return limited

    monkeypatch.setattr(decoder, "_predict", short(predict, "vae"))
    monkeypatch.setattr(decoder.vae, "decode", short(decode, "unet"))
    engine = DenoisingEngine(decoder)

    result = await made(engine, condition(decoder), DecodeSettings(seed=1, steps=2, guidance_scale=1.0))
    engine.close()

    assert seen == [{"vae": "aside"}, {"vae": "aside"}, {"vae": "back", "unet": "aside"}]
    assert where == {"vae": "back", "unet": "back"}
    monkeypatch.undo()
    expected = decoder.decode(condition(decoder), DecodeSettings(seed=1, steps=2, guidance_scale=1.0))
    np.testing.assert_array_equal(result.medium.pixels, expected.medium.pixels)


@pytest.mark.parametrize("point", ["begin", "step", "media"])
@pytest.mark.parametrize("kind", ["image", "video", "audio"])
async def test_a_request_that_never_fits_fails_alone_wherever_it_fails(
    kind: str, point: str, loaded: dict[str, LatentDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, error = loaded[kind], torch.OutOfMemoryError("CUDA out of memory.")
    begin, predict, complete = decoder.begin, decoder._predict, decoder.complete

    def beginning(plans: Any) -> Denoising:
        if any(plan.settings.seed == 1 for plan in plans):
            raise error
        return begin(plans)

    def stepping(latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        if (conditions == marked).flatten(1).all(1).any():
            raise error
        return predict(latents, timesteps, conditions)

    def completing(latents: Tensor, plans: Any, **options: Any) -> list[Decoded]:
        if any(plan.settings.seed == 1 for plan in plans):
            raise error
        return complete(latents, plans, **options)

    change = {"begin": beginning, "step": stepping, "media": completing}[point]
    name = {"begin": "begin", "step": "_predict", "media": "complete"}[point]
    monkeypatch.setattr(decoder, name, change)
    conditions = [condition(decoder, i) for i in range(4)]
    marked = decoder._prepared(conditions[1].embeddings)
    engine = DenoisingEngine(decoder)

    results = await asyncio.gather(
        *(
            made(engine, given, DecodeSettings(seed=seed, steps=3, guidance_scale=1.0))
            for seed, given in enumerate(conditions)
        ),
        return_exceptions=True,
    )
    stats = engine.stats()
    engine.close()

    assert isinstance(results[1], DecoderOutOfMemory)
    assert [result.manifest["seed"] for result in results if isinstance(result, Decoded)] == [0, 2, 3]
    assert (stats.requests, stats.stepping) == (0, 0)


async def test_an_engine_without_memory_to_measure_learns_from_its_requests(
    engine: DenoisingEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    short_of_memory(engine.decoder, monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory."))

    engine.calibrate()
    known = engine.cost.known
    await made(engine, condition(engine.decoder), DecodeSettings(steps=3, guidance_scale=3.0))

    assert "not enough memory to measure" in caplog.text
    assert (known, engine.cost.known) == (False, True)


async def test_a_condition_that_does_not_fit_into_memory_is_told_like_a_medium(
    engine: DenoisingEngine,
) -> None:
    def encode() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(DecoderOutOfMemory, match="Ask for a smaller size"):
        await engine.call(encode)


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


def test_errors_of_memory_are_told_from_others() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
