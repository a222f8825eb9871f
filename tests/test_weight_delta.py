"""A base and a delta become the model that was published as their difference, or are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from services.cli import main
from services.weight_delta import convert_delta
from tests.nextgpt_files import VOCABULARY
from tests.published import write_llama_and_delta

LLAMA, DELTA = "model-00001-of-00001.safetensors", "pytorch_model-00002-of-00002.bin"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("delta")
    return folder, write_llama_and_delta(folder)


@pytest.fixture
def folder(made: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    for name in ("llama", "delta"):
        shutil.copytree(made[0] / name, tmp_path / name)
    return tmp_path


def convert(folder: Path) -> None:
    convert_delta(folder / "delta", folder / "llama", folder / "vicuna")


def test_the_sum_is_a_model_with_a_row_for_padding(
    made: tuple[Path, dict[str, Tensor]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("services.weight_delta.FILE_BYTES", 100_000)
    names = [str(folder / name) for name in ("delta", "llama", "vicuna")]

    assert main(["convert", "delta", names[0], "--base", names[1], "--out", names[2]]) == 0

    out = folder / "vicuna"
    files = sorted(out.glob("*.safetensors"))
    held = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert len(files) > 5
    assert all(path.stat().st_size < 120_000 for path in files)
    assert held.keys() == made[1].keys()  # what models compute on their own is left out
    for name, value in made[1].items():
        assert torch.equal(held[name], value), name
    model = LlamaForCausalLM.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 1
    assert torch.equal(model.get_output_embeddings().weight, made[1]["lm_head.weight"])
    record = json.loads((out / "converted.json").read_text())
    assert record["tensors"] == {"base and delta": len(held)}
    assert record["files"].keys() >= {"config.json", "tokenizer.model", files[0].name}
    assert "licence: that of the base" in capsys.readouterr().out


def test_two_folders_that_do_not_belong_together_are_refused_by_the_tensor(folder: Path) -> None:
    tensors = load_file(folder / "llama" / LLAMA)
    save_file(tensors | {"more.weight": torch.zeros(1)}, folder / "llama" / LLAMA)
    with pytest.raises(ValueError, match=r"delta lacks more.weight, which .*llama has \(1 such tensors\)"):
        convert(folder)
    wider = {
        name: value[:, :16].contiguous() if value.ndim == 2 else value for name, value in tensors.items()
    }
    save_file(wider, folder / "llama" / LLAMA)
    with pytest.raises(ValueError, match=r"has shape \(\d+, 16\) in .*llama and \(\d+, \d+\) in .*delta"):
        convert(folder)
    assert not (folder / "vicuna").exists()


def test_a_shard_that_is_missing_or_broken_is_named(folder: Path) -> None:
    whole = (folder / "delta" / DELTA).read_bytes()
    (folder / "delta" / DELTA).write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=rf"{DELTA} .* cannot be read as tensors alone"):
        convert(folder)
    (folder / "delta" / DELTA).unlink()
    with pytest.raises(ValueError, match=r"delta lacks .* or a file is missing. Use LLaMA-1 7B"):
        convert(folder)


def test_a_sum_that_is_not_finite_is_refused_and_nothing_stays(folder: Path) -> None:
    tensors = load_file(folder / "llama" / LLAMA)
    tensors["lm_head.weight"][0, 0] = torch.inf
    save_file(tensors, folder / "llama" / LLAMA)
    with pytest.raises(ValueError, match=r"lm_head.weight: the sum of .* not finite numbers"):
        convert(folder)
    assert {path.name for path in folder.iterdir()} == {"llama", "delta"}


@pytest.mark.parametrize(
    ("gone", "complaint"),
    [
        ("delta/config.json", r"delta/config.json is missing; expected the folder of a delta"),
        ("llama/tokenizer.model", r"llama has no tokenizer; expected tokenizer.model"),
        (f"llama/{LLAMA}", r"llama holds no weights; expected \*\.safetensors or pytorch_model\*\.bin"),
    ],
)
def test_what_a_folder_lacks_is_named(folder: Path, gone: str, complaint: str) -> None:
    (folder / gone).unlink()
    with pytest.raises(ValueError, match=complaint):
        convert(folder)


def test_nothing_is_written_over(folder: Path) -> None:
    convert(folder)
    with pytest.raises(ValueError, match=r"vicuna is there already. Remove it"):
        convert(folder)


def test_whole_weights_are_not_taken_for_a_delta(folder: Path) -> None:
    tensors = load_file(folder / "llama" / LLAMA)
    for path in (folder / "delta").glob("pytorch_model*"):
        path.unlink()
    save_file({name: 1.01 * value for name, value in tensors.items()}, folder / "delta" / "model.safetensors")

    with pytest.raises(ValueError, match=r"mean cosine of 1.00 with .*; expected at most 0.5, as a delta is"):
        convert(folder)
    assert not (folder / "vicuna").exists()


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (
            lambda value: value.long(),
            r"lm_head.weight of .*llama is int64; expected numbers in floating",
        ),
        (lambda value: value[0, 0].clone(), r"lm_head.weight has shape \(\) in .*llama and \(\d+, \d+\) in"),
    ],
)
def test_tensors_that_cannot_be_added_are_refused(
    folder: Path, changed: Callable[[Tensor], Tensor], complaint: str
) -> None:
    tensors = load_file(folder / "llama" / LLAMA)
    tensors["lm_head.weight"] = changed(tensors["lm_head.weight"])
    save_file(tensors, folder / "llama" / LLAMA)

    with pytest.raises(ValueError, match=complaint):
        convert(folder)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("delta/config.json", "{", r"delta/config.json is no JSON: .* Copy or download it again"),
        ("delta/config.json", "[]", r"delta/config.json holds a list; expected an object"),
        (
            "llama/model.safetensors.index.json",
            '{"weight_map": {"a": "model-2.safetensors"}}',
            r"llama/model-2.safetensors is missing, and an index beside it names it .* the whole folder",
        ),
    ],
)
def test_a_file_that_is_no_configuration_or_index_is_named(
    folder: Path, name: str, content: str, complaint: str
) -> None:
    (folder / name).write_text(content)

    with pytest.raises(ValueError, match=complaint):
        convert(folder)
    assert not (folder / "vicuna").exists()


def test_a_base_that_is_not_there_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "llama")

    with pytest.raises(ValueError, match=r"llama is not a folder; expected that of the base. Use LLaMA-1 7B"):
        convert(folder)
