"""What tests of the denoising engine share: tiny decoders of every kind, looks into their work, a clock."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from torch import Tensor

from decoders.audio import AudioDecoder
from decoders.condition import Condition
from decoders.engine import DenoisingEngine, Heard
from decoders.image import ImageDecoder
from decoders.latent_decoder import LatentDecoder
from decoders.plan import Decoded
from decoders.settings import DecodeSettings
from decoders.video import VideoDecoder
from tests import tiny_pipelines

CAPTIONS = ["a big red bell", "a small blue drum", "bell", "a red drum", "big blue bell", "small"]

KINDS: dict[str, tuple[type[LatentDecoder], Callable[..., Any]]] = {
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


class ScriptedClock:
    """The time of the denoising engine, in which only the work of one decoder takes any.

    A call of the network takes ``step_s``, and ``row_s`` per row of the usual size; a tenth more while deep
    features are recorded, and half of it in the shallow twin. A medium of the usual size takes ``medium_s``.
    """

    def __init__(
        self,
        decoder: LatentDecoder,
        monkeypatch: pytest.MonkeyPatch,
        *,
        step_s: float = 0.02,
        row_s: float = 0.01,
        medium_s: float = 0.05,
    ) -> None:
        self.now_s = 0.0
        self.steps_at: dict[int, list[float]] = {}
        """By seed, when each step was done."""
        self.done_at: dict[int, float] = {}
        """By seed, when the medium was made."""
        run, step, complete = decoder._run, decoder.step, decoder.complete
        usual = math.prod(decoder.plan(condition(decoder)).shape)

        def running(network: Any, latents: Tensor, *rest: Tensor) -> Tensor:
            deep = decoder._deep
            share = 1.0
            if deep is not None:
                share = 0.5 if network is deep.shallow else 1.1 if deep.is_recording else 1.0
            self.now_s += share * (step_s + row_s * latents.numel() / usual)
            return run(network, latents, *rest)

        def stepping(runs: Any, plans: Any = None, **options: Any) -> None:
            step(runs, plans, **options)
            for plan in plans or ():
                self.steps_at.setdefault(plan.settings.seed, []).append(self.now_s)

        def completing(latents: Tensor, plans: Any, **options: Any) -> list[Decoded]:
            self.now_s += medium_s * latents.numel() / usual
            self.done_at |= {plan.settings.seed: self.now_s for plan in plans}
            return complete(latents, plans, **options)

        monkeypatch.setattr(decoder, "_run", running)
        monkeypatch.setattr(decoder._quick, "run", running)
        monkeypatch.setattr(decoder, "step", stepping)
        monkeypatch.setattr(decoder, "complete", completing)
        monkeypatch.setattr("decoders.engine.time", self)

    def perf_counter(self) -> float:
        """Return the time."""
        return self.now_s


async def together(engine: DenoisingEngine, *requests: tuple[str, DecodeSettings]) -> list[list[Heard]]:
    """Return what is heard of requests, each of a user, that all wait before the first is served."""
    gate = threading.Event()
    held = asyncio.create_task(engine.call(gate.wait))
    await asyncio.sleep(0)
    streams = [engine.decode(condition(engine.decoder), wish, user=user) for user, wish in requests]
    first = [await anext(stream) for stream in streams]
    gate.set()

    async def rest(stream: AsyncGenerator[Heard, None]) -> list[Heard]:
        return [value async for value in stream]

    heard = await asyncio.gather(*(rest(stream) for stream in streams))
    await held
    return [[one, *others] for one, others in zip(first, heard, strict=True)]
