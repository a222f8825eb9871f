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


def aligned(*, copy_gate: bool = False) -> Aligned:
    llm = tiny_model()
    llm.add_lora(LoraOptions(rank=2, alpha=2))
    config = OutputProjectionConfig(
        llm_width=WIDTH, out_width=6, num_queries=3, hidden_width=8, ffn_width=8, num_encoder_layers=1,
        num_decoder_layers=1, copy_gate=copy_gate,
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


def test_the_third_stage_teaches_when_a_copy_is_wanted(tmp_path: Path) -> None:
    """Of two requests for a picture, one is for the very picture that is shown."""
    torch.manual_seed(0)
    model = aligned(copy_gate=True)
    shown = MediaTokens(Modality.IMAGE, torch.randn(4, 12), torch.randn(12))

    def asked(step: int) -> list[Dialogue]:
        return [
            [
                Message("user", [shown, text]),
                Message("assistant", ["a bell", SignalPart(Modality.IMAGE, copied)]),
            ]
            for text, copied in (("what is it?", True), ("a big red", False))
        ]

    config = FitConfig(num_steps=150, learning_rate=0.03, warmup_steps=1)
    run_stage(STAGES["instruction"], model, asked, TARGETS, tmp_path, config)

    batch = model.llm.collate(asked(0))
    states = model.llm.signal_states(model.llm(batch), batch)[Modality.IMAGE]
    projection = model.projections[str(Modality.IMAGE)]
    assert states.copied == [True, False]
    logits = projection.copy_logits(states.hidden)  # type: ignore[operator]
    assert logits[0] > 0 > logits[1]


def test_where_no_copy_gate_is_there_is_nothing_to_teach_it() -> None:
    names = aligned().losses(dialogues(0), STAGES["instruction"], TARGETS)
    gated = aligned(copy_gate=True).losses(dialogues(0), STAGES["instruction"], TARGETS)
    assert gated.keys() - names.keys() == {"copying"}
    early = aligned(copy_gate=True).losses(dialogues(0), STAGES["decoder-side"], TARGETS)
    assert "copying" not in early
