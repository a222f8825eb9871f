import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from decoders.latent_decoder import LatentDecoder
from decoders.preview import LinearPreview
from decoders.settings import DecodeSettings
from decoders.video import VideoDecoder
from decoders.writing import to_jpeg
from services.local_decoder import decoder_class
from services.presets import load_preset
from tests import tiny_pipelines

FACTOR = 4


def linear_autoencoder(channels: int = 5) -> tuple[Tensor, Tensor]:
    """Return the factors and the constant of an autoencoder that is linear, ``(C, 3 * p * p)``."""
    generator = torch.Generator().manual_seed(3)
    size = 3 * FACTOR**2
    return torch.randn(channels, size, generator=generator), torch.randn(size, generator=generator)


def decoded(latents: Tensor) -> Tensor:
    """Decode ``(N, C, h, w)`` into ``(N, 3, h * p, w * p)`` with it."""
    factors, constant = linear_autoencoder()
    patches = latents.movedim(1, -1) @ factors + constant  # (N, h, w, 3 * p * p)
    cut = patches.unflatten(3, (3, FACTOR, FACTOR))  # (N, h, w, 3, p, p)
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def test_the_map_of_a_linear_autoencoder_is_found_exactly() -> None:
    preview = LinearPreview.fit(decoded, channels=5)
    latents = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(1))

    pixels = preview(latents)

    assert pixels.shape == (24, 36, 3)
    expected = decoded(latents[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(pixels, expected, atol=1e-3)


def test_the_fit_draws_the_same_latents_every_time() -> None:
    def curved(latents: Tensor) -> Tensor:
        return decoded(latents).sin()  # no linear map fits this, so which latents are drawn matters

    one, other = (LinearPreview.fit(curved, channels=5) for _ in range(2))

    torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=list(load_preset("toybox").decoders))
def embedded(request: pytest.FixtureRequest) -> LatentDecoder:
    return decoder_class(request.param).load(load_preset("toybox").decoder_folder(request.param))


def test_the_preview_of_an_embedded_decoder_resembles_what_its_autoencoder_makes(
    embedded: LatentDecoder,
) -> None:
    latents = kept_latents(embedded)
    still = embedded._still(latents)
    with torch.inference_mode():
        exact = embedded._shown(embedded._pictures(still[None])[0].permute(1, 2, 0).numpy())

    image = embedded.preview(latents)

    assert image.pixels.shape == exact.shape
    assert image.pixels.dtype == np.uint8
    likeness = np.corrcoef(image.pixels.ravel(), exact.ravel())[0, 1]
    assert likeness > 0.75


def test_a_preview_after_each_step_costs_less_than_a_fiftieth_of_the_request(embedded: LatentDecoder) -> None:
    condition = embedded.encode_caption("a big red bell")
    latents = kept_latents(embedded)
    embedded.preview(latents)

    preview_s = min(seconds_of(lambda: to_jpeg(embedded.preview(latents))) for _ in range(20))
    request_s = min(seconds_of(lambda: embedded.decode(condition)) for _ in range(2))

    assert embedded.defaults.steps * preview_s < 0.02 * request_s


def seconds_of(work: Callable[[], object]) -> float:
    """Return the processor's seconds, which other programs on the machine do not lengthen."""
    began = time.process_time()
    work()
    return time.process_time() - began


def kept_latents(decoder: LatentDecoder) -> Tensor:
    """Return the clean latents of one medium."""
    plan = decoder.plan(decoder.encode_caption("a big red bell"), DecodeSettings(seed=1))
    run = decoder.begin([plan])
    while not run.finished:
        decoder.step([run])
    return run.latents[0]


def test_a_video_shows_its_middle_frame(tmp_path: Path) -> None:
    decoder = VideoDecoder.load(tiny_pipelines.saved(tiny_pipelines.video_pipeline(), tmp_path))
    latents = torch.zeros(4, 5, 8, 8)
    blank = decoder.preview(latents).pixels
    changed = latents.clone()
    changed[:, 2] = 2.0
    others = torch.full_like(latents, 2.0)
    others[:, 2] = 0.0

    assert (decoder.preview(changed).pixels != blank).any()
    np.testing.assert_array_equal(decoder.preview(others).pixels, blank)
