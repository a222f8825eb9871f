"""What tests of the denoising engine share: tiny decoders of every kind, and looks into their work."""

import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from torch import Tensor

from decoders.audio import AudioDecoder
from decoders.condition import Condition
from decoders.engine import DenoisingEngine
from decoders.image import ImageDecoder
from decoders.latent_decoder import LatentDecoder
from decoders.plan import Decoded
from decoders.video import VideoDecoder
from tests import tiny_pipelines

CAPTIONS = ["a big red bell", "a small blue drum", "bell", "a red drum", "big blue bell", "small"]

KINDS: dict[str, tuple[type[LatentDecoder], Callable[[], Any]]] = {
    "image": (ImageDecoder, tiny_pipelines.image_pipeline),
    "video": (VideoDecoder, tiny_pipelines.video_pipeline),
    "audio": (AudioDecoder, tiny_pipelines.audio_pipeline),
}


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
