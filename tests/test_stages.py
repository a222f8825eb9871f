from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.fitting import FitConfig
from alignment.stages import STAGES, Aligned, caption_distance, run_stage
from decoders.projection import OutputProjection, OutputProjectionConfig
from encoders.media import Modality
from llm.lora import LoraOptions
from llm.template import Dialogue, MediaTokens, Message, SignalPart
from tests.tiny_llm import WIDTH, tiny_model

MEDIA = (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)
TRAINED = {
    "encoder-side": ("llm.projectors.", "llm.signal_rows."),
    "decoder-side": ("llm.signal_rows.", "projections."),
    "instruction": ("llm.projectors.", "llm.signal_rows.", "projections.", "lora_"),
}


def aligned() -> Aligned:
    llm = tiny_model()
    llm.add_lora(LoraOptions(rank=2, alpha=2))
    config = OutputProjectionConfig(
        llm_width=WIDTH, out_width=6, num_queries=3, hidden_width=8, ffn_width=8, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip
    return Aligned(llm, {modality: OutputProjection(config) for modality in MEDIA})


def dialogues(step: int) -> list[Dialogue]:
    generator = torch.Generator().manual_seed(step)
    shown = MediaTokens(Modality.IMAGE, torch.randn(4, 12, generator=generator), torch.randn(12))
    answers = [SignalPart(modality) for modality in MEDIA]
    return [
        [Message("user", [shown, "what is it?"]), Message("assistant", ["a big red bell", answer])]
        for answer in answers
    ]


def target(captions: Sequence[str]) -> Tensor:
    return torch.ones(len(captions), 3, 6)


TARGETS = dict.fromkeys(MEDIA, target)


@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_changes_what_it_declares_and_nothing_else(name: str, tmp_path: Path) -> None:
    model = aligned()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    config = FitConfig(num_steps=2, learning_rate=0.01, warmup_steps=1)

    run_stage(STAGES[name], model, dialogues, TARGETS, tmp_path, config)

    changed = {key for key, value in model.named_parameters() if not torch.equal(before[key], value)}
    assert changed
    assert all(any(part in key for part in TRAINED[name]) for key in changed)
    for part in TRAINED[name]:
        assert any(part in key for key in changed), f"{part} did not move"


def test_the_base_tables_never_move(tmp_path: Path) -> None:
    model = aligned()
    table = model.llm.causal_lm.get_input_embeddings().weight.detach().clone()
    config = FitConfig(num_steps=2, learning_rate=0.1, warmup_steps=1)

    run_stage(STAGES["instruction"], model, dialogues, TARGETS, tmp_path, config)

    assert torch.equal(model.llm.causal_lm.get_input_embeddings().weight, table)


def test_the_caption_distance_is_zero_at_the_target_and_one_at_the_origin() -> None:
    wanted = torch.randn(4, 3, 6)
    assert caption_distance(wanted, wanted).item() == 0
    assert caption_distance(torch.zeros_like(wanted), wanted).item() == pytest.approx(1)


def test_stage_one_needs_no_decoder_and_stage_two_no_medium() -> None:
    assert set(STAGES["encoder-side"].directions) == {"image-to-text", "video-to-text", "audio-to-text"}
    assert set(STAGES["decoder-side"].directions) == {"text-to-image", "text-to-video", "text-to-audio"}
