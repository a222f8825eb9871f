"""What a box needs while it works is counted from shapes, and is what it really allocates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from decoders.configured_pipeline import ConfiguredPipeline
from decoders.settings import DecodeSettings
from decoders.whole_pipeline import WholePipeline
from encoders.encoder import load_encoder
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Modality
from llm.model import LanguageModel
from services import working_memory
from services.allocations import peak_bytes
from services.local_decoder import load_decoder
from services.presets import Preset, load_preset
from services.working_memory import Work
from tests.tiny_current import klein_pipeline, stable_audio_pipeline, wan_pipeline
from tests.tiny_pipelines import saved

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO
WITHIN = 0.1
"""Of what is really allocated on the CPU, by the measure of PyTorch's profiler."""


def allocated(work: Work) -> int:
    """Return the most bytes that PyTorch's allocator has given out at a time for ``work``."""
    with torch.inference_mode():
        work()  # what is made once and kept does not count
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = most = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.fixture(scope="module")
def toybox() -> Preset:
    return load_preset("toybox")


def test_reading_takes_what_was_predicted(toybox: Preset) -> None:
    encoder = load_encoder(toybox.encoder_folder)
    assert isinstance(encoder, ImageBindEncoder)

    found = max(map(allocated, working_memory.encoder_work(encoder.model, encoder.preprocessing)))

    assert working_memory.encoder_bytes(toybox) == pytest.approx(found, rel=WITHIN)


def test_speaking_takes_what_was_predicted(toybox: Preset) -> None:
    model = LanguageModel.from_pretrained(toybox.language_model_folder)
    model.merge_adapter()
    options = toybox.language_model
    work = working_memory.language_model_work(model, options.slots, model.context_length, options.step_tokens)

    found = max(map(allocated, work))

    shape = model.causal_lm.config
    place = shape.num_key_value_heads * shape.head_dim * 4  # bytes of one position's keys in one layer
    together = 2 * options.slots * model.context_length * place  # made once and kept: not among what is found
    assert working_memory.language_model_bytes(toybox) == pytest.approx(found + together, rel=WITHIN)


@pytest.mark.parametrize("modality", [IMAGE, VIDEO, AUDIO])
def test_making_takes_what_was_predicted(toybox: Preset, modality: Modality) -> None:
    decoder = load_decoder(modality, toybox.decoder_folder(modality))

    found = max(map(allocated, working_memory.decoder_work(decoder, DecodeSettings())))

    assert working_memory.decoder_bytes(toybox, modality) == pytest.approx(found, rel=WITHIN)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("modality", "pipeline", "wish"),
    [
        (IMAGE, klein_pipeline, DecodeSettings(seed=0, steps=1, width_px=64, height_px=32)),
        (VIDEO, wan_pipeline, DecodeSettings(seed=0, steps=1, width_px=64, height_px=64, num_frames=9)),
        (AUDIO, stable_audio_pipeline, DecodeSettings(seed=0, steps=1, duration_s=0.2)),
    ],
)
def test_a_whole_pipeline_is_counted_without_numbers_as_it_is_with_them(
    modality: Modality, pipeline: Callable[[], Any], wish: DecodeSettings, tmp_path: Path
) -> None:
    folder = saved(pipeline(), tmp_path / "pipeline")
    decoder = load_decoder(modality, folder)
    assert isinstance(decoder, WholePipeline)
    plan = decoder.plan(decoder.encode_caption("bell"), wish)

    counted = peak_bytes(ConfiguredPipeline(folder, torch.float32).work(plan.settings))

    assert counted == pytest.approx(peak_bytes(lambda: decoder.run(plan)), rel=WITHIN)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_that_repeat_are_counted_each_time(device: str) -> None:
    def work() -> list[torch.Tensor]:
        numbers = torch.zeros(1000, dtype=torch.int8, device=device)
        kept = [numbers + 1, numbers + 1, numbers + 1.0]  # the last is of another dtype, of four bytes
        ends = [part for _ in range(2) for part in torch.std_mean(kept[2].reshape(10, 100), dim=1)]
        views = [numbers[:10], numbers[:10], numbers.add_(1), numbers.add_(1)]
        return [*kept, *ends, *views]

    assert peak_bytes(work) == 1000 + 1000 + 1000 + 4000 + 4 * 40
