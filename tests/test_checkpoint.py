"""The folder of a language model: what is saved comes back, and what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm.lora import LoraOptions
from llm.model import LanguageModel
from tests.test_language_model import tied
from tests.tiny_llm import mixed_dialogue, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    model = tiny_model(tied)
    model.add_lora(LoraOptions(rank=2, alpha=2))
    with torch.no_grad():
        for parameter in model.parameters_of("lora").values():
            parameter.normal_(std=0.1)
    model.save_pretrained(folder, torch.float16)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    for source in folder.rglob("*"):
        if source.is_file():
            path = target / source.relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read_bytes())
    return target


def test_a_saved_model_comes_back_in_float32(saved: Path, tmp_path: Path) -> None:
    model = LanguageModel.from_pretrained(saved)
    batch = model.collate([mixed_dialogue()])
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)

    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    torch.testing.assert_close(again(batch).logits, model(batch).logits)
    assert again(batch).logits.dtype == torch.float32
    assert load_file(saved / "bridge.safetensors")["signal_rows.head"].dtype == torch.float16


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21's
def test_the_libraries_read_the_folders_themselves(saved: Path) -> None:
    model = LanguageModel.from_pretrained(saved)
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    tokenizer = AutoTokenizer.from_pretrained(saved / "base")
    adapted = PeftModel.from_pretrained(base.float(), saved / "adapter")
    ids = torch.tensor([tokenizer("a red bell").input_ids])

    with torch.no_grad():
        logits, _ = model.forward_embeddings(model.embed(ids))
        expected = adapted(input_ids=ids).logits

    assert base.config.dtype == torch.float16
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, atol=1e-5, rtol=1e-5)


def test_the_folder_holds_no_path_of_the_machine_that_wrote_it(saved: Path, tmp_path: Path) -> None:
    LanguageModel.from_pretrained(saved).save_pretrained(tmp_path)

    for path in tmp_path.rglob("*.json"):
        assert str(saved) not in path.read_text(), path
        assert str(tmp_path) not in path.read_text(), path


def test_the_same_model_is_written_the_same_in_every_process(saved: Path) -> None:
    targets = json.loads((saved / "adapter" / "adapter_config.json").read_text())["target_modules"]

    assert targets == sorted(targets)
    assert len(targets) > 1


@pytest.mark.parametrize(
    "name",
    [
        "bridge.json",
        "bridge.safetensors",
        "base/config.json",
        "base/model.safetensors",
        "base/tokenizer.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ],
)
def test_a_missing_file_is_named(saved: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(saved, tmp_path)
    (folder / name).unlink()

    with pytest.raises(ValueError, match=rf"{Path(name).name} is missing"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("bridge.safetensors", "signal_rows.head"),
        ("bridge.safetensors", "projectors.image.queries"),
        ("base/model.safetensors", "model.layers.0.mlp.up_proj.weight"),
        (
            "adapter/adapter_model.safetensors",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        ),
    ],
)
def test_a_wrong_shape_is_told_with_what_was_expected(
    saved: Path, tmp_path: Path, file: str, tensor: str
) -> None:
    folder = copy_of(saved, tmp_path)
    tensors = load_file(folder / file)
    rows, columns = tensors[tensor].shape
    tensors[tensor] = torch.zeros(rows + 1, columns)
    save_file(tensors, folder / file, metadata={"format": "pt"})

    message = rf"{tensor} has shape \({rows + 1}, {columns}\); expected \({rows}, {columns}\)"
    with pytest.raises(ValueError, match=message):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("file", ["bridge.safetensors", "base/model.safetensors"])
def test_a_missing_tensor_is_named(saved: Path, tmp_path: Path, file: str) -> None:
    folder = copy_of(saved, tmp_path)
    tensors = load_file(folder / file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, folder / file, metadata={"format": "pt"})

    with pytest.raises(ValueError, match=rf"lacks? .*{name}|lack {name}"):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("file", ["bridge.safetensors", "base/model.safetensors"])
def test_a_truncated_file_is_refused(saved: Path, tmp_path: Path, file: str) -> None:
    folder = copy_of(saved, tmp_path)
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])

    with pytest.raises(ValueError, match=r"not (a )?whole safetensors"):
        LanguageModel.from_pretrained(folder)


def test_the_bridge_of_another_base_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))

    with pytest.raises(ValueError, match=r"Put the base there that the bridge was trained on"):
        LanguageModel.from_pretrained(folder)


def test_a_malformed_manifest_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    (folder / "bridge.json").write_text('{"format": 1}')

    with pytest.raises(ValueError, match=r"bridge\.json is not a bridge manifest"):
        LanguageModel.from_pretrained(folder)
