"""A run that begins with the shipped weights: what it would export is what it began with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from alignment.embedded.language import LAYERS, SIGNALS, build_base, grown
from alignment.training import TrainOptions, run
from llm.tokenizer import ConversationTokenizer

SHIPPED = Path(__file__).resolve().parent.parent / "deploy" / "weights" / "toybox"


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    run("adopt", SHIPPED, TrainOptions(runs=runs))
    return runs / "toybox"


@pytest.mark.parametrize(
    ("step", "prefix", "shipped"),
    [
        ("sound-denoiser", "denoiser.", "audio/unet/diffusion_pytorch_model.safetensors"),
        ("clip-captions", "encoder.model.", "video/text_encoder/model.safetensors"),
        ("instruction", "projections.image.", "projections/image/model.safetensors"),
    ],
)
def test_every_step_goes_on_from_what_is_shipped(adopted: Path, step: str, prefix: str, shipped: str) -> None:
    state = torch.load(adopted / step / "checkpoint.pt", weights_only=True)
    expected = load_file(SHIPPED / shipped)

    found = {name: value for name, value in state["weights"].items() if name.startswith(prefix)}

    assert found
    for name, value in found.items():
        assert torch.equal(value, expected[name.removeprefix(prefix)].float()), name
    assert state["step"] == 1
    assert state["optimizer"] is None


def test_the_third_stage_goes_on_with_the_adapter(adopted: Path) -> None:
    weights = torch.load(adopted / "instruction" / "checkpoint.pt", weights_only=True)["weights"]
    adapter = load_file(SHIPPED / "llm" / "adapter" / "adapter_model.safetensors")

    found = [value for name, value in weights.items() if "lora_" in name]

    assert len(found) == len(adapter)
    assert sum(value.double().sum() for value in found).item() == pytest.approx(
        sum(value.double().sum() for value in adapter.values()).item(), rel=1e-6
    )
    assert any("projectors" in name for name in weights)


def test_a_step_of_an_adopted_run_trains_on(adopted: Path) -> None:
    before = torch.load(adopted / "look-captions" / "checkpoint.pt", weights_only=True)["weights"]

    run("look-captions", SHIPPED, TrainOptions(runs=adopted.parent, num_steps=3))

    state = torch.load(adopted / "look-captions" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    moved = [(state["weights"][name] - value).abs().max().item() for name, value in before.items()]
    assert 0 < max(moved) < 0.05


def test_a_run_that_has_begun_is_left_alone(adopted: Path) -> None:
    with pytest.raises(FileExistsError, match=r"holds .*instruction.* already\. Choose another folder"):
        run("adopt", SHIPPED, TrainOptions(runs=adopted.parent))


def base_with(layers: int, folder: Path) -> LlamaForCausalLM:
    tokenizer = ConversationTokenizer.load(SHIPPED / "llm" / "base", SIGNALS)
    config = build_base(tokenizer).causal_lm.config
    config.num_hidden_layers = layers
    torch.manual_seed(layers)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_smaller_base_grows_layers_that_change_nothing_before_they_are_trained(tmp_path: Path) -> None:
    smaller = base_with(LAYERS - 2, tmp_path)
    tokens = torch.arange(12).reshape(1, 12) + 40

    model = grown(tmp_path, ConversationTokenizer.load(SHIPPED / "llm" / "base", SIGNALS))
    larger = model.causal_lm.eval()

    assert len(larger.model.layers) == LAYERS
    with torch.no_grad():
        torch.testing.assert_close(larger(tokens).logits, smaller(tokens).logits)
    model.train_only({"base"})
    larger(tokens, labels=tokens).loss.backward()
    new = larger.model.layers[-1]
    assert new.mlp.down_proj.weight.grad.abs().max() > 0
    assert new.self_attn.o_proj.weight.grad.abs().max() > 0


def test_a_larger_base_than_ours_is_refused(tmp_path: Path) -> None:
    base_with(LAYERS + 1, tmp_path)
    with pytest.raises(ValueError, match=rf"9 weights beside those of a base with {LAYERS} layers"):
        grown(tmp_path, ConversationTokenizer.load(SHIPPED / "llm" / "base", SIGNALS))
