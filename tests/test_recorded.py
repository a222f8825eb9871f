"""Recorded networks: the same results, plain where a recording would be wrong or cannot be made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decoders.audio import AudioDecoder
from decoders.image import ImageDecoder
from decoders.latent_decoder import LatentDecoder
from decoders.settings import DecodeSettings
from decoders.video import VideoDecoder
from llm.engine import Engine
from llm.generate import GenerationOptions
from llm.request_lora import read_request_lora
from llm.slots import SlotModel
from services.compiling import compile_if_possible
from tests import tiny_pipelines
from tests.lora_files import write_lm_lora, write_unet_lora
from tests.test_compiling import pixels
from tests.test_language_engine import assert_same, run
from tests.tiny_llm import tiny_model, user

KINDS: dict[str, tuple[type[LatentDecoder], Any]] = {
    "image": (ImageDecoder, tiny_pipelines.image_pipeline),
    "video": (VideoDecoder, tiny_pipelines.video_pipeline),
    "audio": (AudioDecoder, tiny_pipelines.audio_pipeline),
}


class Counted:
    """Counts the calls of a module."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self._forward = module.forward
        monkeypatch.setattr(module, "forward", self._counted)

    def _counted(self, *args: Any, **rest: Any) -> Any:
        self.calls += 1
        return self._forward(*args, **rest)


@pytest.fixture
def decoder(tmp_path: Path) -> ImageDecoder:
    return ImageDecoder.load(tiny_pipelines.saved(tiny_pipelines.image_pipeline(), tmp_path / "image"))


def latents(decoder: LatentDecoder, *wishes: DecodeSettings) -> list[Tensor]:
    """Return the clean latents of each wish; all take their steps together."""
    plans = [decoder.plan(decoder.encode_caption("a bell"), wish) for wish in wishes]
    runs = [decoder.begin([plan]) for plan in plans]
    while not runs[0].finished:
        decoder.step(runs, plans)
    return [run.latents for run in runs]


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_decoder_takes_the_same_steps_with_the_same_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, pipeline = KINDS[kind]
    decoder = cls.load(tiny_pipelines.saved(pipeline(), tmp_path / kind))
    guided, plain = (DecodeSettings(seed=1, steps=3, guidance_scale=scale) for scale in (2.0, 1.0))
    companies = [(guided,), (plain,), (guided, plain, guided)]
    expected, weights = [latents(decoder, *wishes) for wishes in companies], decoder.weight_bytes()

    decoder.trace()

    network = Counted(decoder._network, monkeypatch)
    assert decoder.weight_bytes() == weights
    for wishes, wanted in zip(companies, expected, strict=True):
        for ours, theirs in zip(latents(decoder, *wishes), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert network.calls == 0


def test_steps_with_lora_deep_features_or_onlookers_are_not_those_of_the_recording(
    decoder: ImageDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_unet_lora(decoder.unet, tmp_path / "ink", seed=1)
    lora = decoder.read_lora("ink", tmp_path / "ink")
    ways: list[dict[str, Any]] = [{"lora": lora}, {"deep_every": 3}, {}]
    expected = [pixels(decoder, **way) for way in ways]
    decoder.trace()
    network = Counted(decoder.unet, monkeypatch)

    for way, wanted in zip(ways, expected, strict=True):
        assert np.abs(pixels(decoder, **way) - wanted).max() <= 1
    assert network.calls == 3 + 1  # LoRA in each step, and whole features once

    seen: list[int] = []
    with decoder.unet.register_forward_pre_hook(lambda *_: seen.append(1)):
        pixels(decoder)
    assert len(seen) == 3


def test_a_recording_uses_the_weights_that_the_network_has_now(decoder: ImageDecoder) -> None:
    before = pixels(decoder)
    decoder.trace()
    with torch.no_grad():
        for parameter in decoder.unet.parameters():
            parameter.data = parameter.data * 0.5

    changed = pixels(decoder)

    assert np.abs(changed - before).max() > 1
    decoder._quick._recorded = None
    assert np.abs(changed - pixels(decoder)).max() <= 1


def test_latents_of_another_size_than_the_recorded_one_run_plain(decoder: ImageDecoder) -> None:
    side = 2 * decoder.plan(decoder.encode_caption("")).shape[-1] * decoder._factor
    expected = pixels(decoder, width_px=side)
    decoder.trace()
    assert np.abs(pixels(decoder, width_px=side) - expected).max() <= 1


def test_a_recorded_engine_says_the_same_and_runs_plain_where_hooks_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    write_lm_lora(model.causal_lm, tmp_path, seed=1)
    lora = read_request_lora("pirate", tmp_path, model.causal_lm, torch.float32)
    options = GenerationOptions(max_new_tokens=6, temperature=1.5, seed=3)
    plain, recorded = (Engine(model, slots=3, context=128) for _ in range(2))
    recorded.trace()
    base = Counted(model.causal_lm.base_model, monkeypatch)
    for loras in ((None, None, None), (lora, None), (None,)):
        found = []
        for engine in (recorded, plain):
            base.calls = 0
            texts = [f"draw a bell {'and a drum ' * number}" for number in range(len(loras))]
            requests = [
                engine.prepare([user(text)], options, lora) for text, lora in zip(texts, loras, strict=True)
            ]
            found.append(list(run(engine, requests).values()))
            if engine is recorded:
                assert bool(base.calls) == any(loras)
        for ours, theirs in zip(*found, strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 2], [1]])
def test_a_recorded_pass_is_the_plain_one_also_when_the_cache_has_grown(rows: list[int]) -> None:
    model = tiny_model()
    plain, recorded = (SlotModel(model, 3, 300) for _ in range(2))
    recorded.trace()
    for start, length in ((0, 5), (5, 1), (6, 270), (276, 1)):
        embeddings = torch.randn(len(rows), length, model.width)
        starts = [start] * len(rows)
        wanted = plain.run(embeddings, rows, starts)
        for plainly in (False, True):
            again = recorded.run(embeddings, rows, starts, plain=plainly)
            torch.testing.assert_close(again, wanted, atol=1e-5, rtol=0)


def test_what_computes_something_else_when_repeated_is_not_recorded(
    decoder: ImageDecoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_it = decoder._quick.run

    def moody(network: Any, latents: Tensor, *rest: Tensor) -> Tensor:
        return run_it(network, latents, *rest) * len(latents)  # a number that is recorded as it was

    monkeypatch.setattr(decoder._quick, "run", moody)
    expected = pixels(decoder)

    with caplog.at_level("WARNING", "services.compiling"):
        compile_if_possible("image decoder", "trace", decoder)

    np.testing.assert_array_equal(pixels(decoder), expected)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "services.compiling"]
    assert message.startswith("The image decoder could not be recorded and runs as it is: the recording of a")
    assert message.endswith("Take compile out of the preset.")
