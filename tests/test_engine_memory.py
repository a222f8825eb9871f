import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decoders.denoising import Denoising
from decoders.engine import DenoisingEngine, EngineConfig, is_out_of_memory
from decoders.failures import DecoderOutOfMemory
from decoders.image import ImageDecoder
from decoders.latent_decoder import LatentDecoder
from decoders.plan import Decoded
from decoders.settings import DecodeSettings
from decoders.video import VideoDecoder
from decoders.vocoder import GriffinLimVocoder
from encoders.media import Audio, Image, Medium, Modality, Video
from tests import tiny_pipelines
from tests.tiny_decoders import KINDS, condition, made


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


def short_of_memory(
    decoder: LatentDecoder,
    monkeypatch: pytest.MonkeyPatch,
    most_rows: int,
    error: Exception,
    once_tried: int = 0,
) -> list[int]:
    """Let the network fail for more than ``most_rows`` rows, from a try of ``once_tried`` rows on.

    Returns:
        The sizes it was tried with.

    """
    tried: list[int] = []
    predict = decoder._predict

    def limited(latents: Tensor, *rest: Tensor) -> Tensor:
        tried.append(len(latents))
        if len(latents) > most_rows and max(tried) >= once_tried:
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
    wishes = [DecodeSettings(seed=i, steps=6, guidance_scale=3.0) for i in range(4)]
    expected = [decoder.decode(condition(decoder, i), wish) for i, wish in enumerate(wishes)]
    tried = short_of_memory(decoder, monkeypatch, most_rows, error, once_tried=8)  # when all four are there

    results = await asyncio.gather(
        *(made(engine, condition(decoder, i), wish) for i, wish in enumerate(wishes))
    )

    for result, want in zip(results, expected, strict=True):
        assert np.abs(result.medium.pixels.astype(int) - want.medium.pixels).max() <= 1
    assert max(tried) == 8
    assert tried.count(8) == 1  # the batch stays small afterwards
    assert engine.stats().batch_limit == max(1, most_rows // 2)


async def test_steps_that_reuse_deep_features_are_halved_too_and_nobody_takes_one_twice(
    engine: DenoisingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = engine.decoder
    wishes = [
        DecodeSettings(seed=i, steps=5, guidance_scale=1.0, deep_every=every)
        for i, every in enumerate((2, 3, None, 2))
    ]
    expected = [decoder.decode(condition(decoder, i), wish) for i, wish in enumerate(wishes)]
    run, failed = decoder._run, []

    def limited(network: Any, latents: Tensor, *rest: Tensor) -> Tensor:
        if len(latents) > 1:
            failed.append(network is decoder._network)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(network, latents, *rest)

    monkeypatch.setattr(decoder, "_run", limited)
    monkeypatch.setattr(decoder._quick, "run", limited)

    async def regrown(number: int, wish: DecodeSettings) -> Decoded:
        """Let the whole batch be tried at every step."""
        heard: list[object] = []
        async for value in engine.decode(condition(decoder, number), wish):
            engine._batch_limit = engine.config.max_batch
            heard.append(value)
        assert isinstance(heard[-1], Decoded)
        return heard[-1]

    for _ in range(5):  # on a busy machine the requests may not meet at a step of the shallow twin
        results = await asyncio.gather(*(regrown(i, wish) for i, wish in enumerate(wishes)))
        for result, want in zip(results, expected, strict=True):
            assert np.abs(result.medium.pixels.astype(int) - want.medium.pixels).max() <= 1
        if set(failed) == {True, False}:
            break

    assert set(failed) == {True, False}  # the whole network and its shallow twin


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


def source_of(decoder: LatentDecoder) -> Medium:
    rng = np.random.default_rng(0)
    if decoder.modality is Modality.AUDIO:
        return Audio(rng.normal(scale=0.1, size=8000).astype(np.float32), 16_000)
    pixels = rng.integers(0, 255, (tiny_pipelines.FRAMES, 16, 16, 3), np.uint8)
    return Image(pixels[0]) if decoder.modality is Modality.IMAGE else Video(pixels, 8.0)


@pytest.mark.parametrize("fits", ["one picture at a time", "in tiles", "never"])
@pytest.mark.parametrize("kind", ["image", "video", "audio"])
async def test_a_source_that_does_not_fit_is_encoded_with_more_thrift_and_fails_alone(
    kind: str, fits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocoder = (GriffinLimVocoder(num_iterations=2),) if kind == "audio" else ()  # starts from mel frames
    decoder = KINDS[kind][0].load(tiny_pipelines.saved(KINDS[kind][1](*vocoder), tmp_path))
    if fits == "in tiles":
        decoder.vae.enable_tiling()
    expected = decoder.encode_source(source_of(decoder))
    encode, tried = decoder.vae.encode, []

    def limited(pictures: Tensor) -> Any:
        tried.append((len(pictures), decoder.vae.use_tiling))
        too_many = fits == "one picture at a time" and len(pictures) > 1
        if fits == "never" or too_many or (fits == "in tiles" and not decoder.vae.use_tiling):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(pictures)

    monkeypatch.setattr(decoder.vae, "encode", limited)
    engine = DenoisingEngine(decoder)

    other, found = await asyncio.gather(
        made(engine, condition(decoder), DecodeSettings(seed=1, steps=5)),
        engine.encode_source(source_of(decoder), DecodeSettings()),
        return_exceptions=True,
    )
    engine.close()

    assert isinstance(other, Decoded)
    assert not decoder.vae.use_tiling
    if fits == "never":
        assert isinstance(found, DecoderOutOfMemory)
        assert [tiled for _, tiled in tried] == [False, False, True]
    else:
        assert isinstance(found, Tensor)
        assert tried[-1] == (1, fits == "in tiles")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


async def test_a_condition_that_does_not_fit_into_memory_is_told_like_a_medium(
    engine: DenoisingEngine,
) -> None:
    def encode() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(DecoderOutOfMemory, match="Ask for a smaller size"):
        await engine.call(encode)


def test_errors_of_memory_are_told_from_others() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
