"""Pickles are opened as tensors alone, and become safetensors."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.cli import main
from services.pickles import convert_pickles, read_pickle


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("harm-was-done"),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "b": Harmful()}, "p.pt")

    with pytest.raises(ValueError, match=r"p.pt cannot be read as tensors alone.*may run code"):
        read_pickle(Path("p.pt"))
    assert not Path("harm-was-done").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_are_read(tmp_path: Path, zipped: bool) -> None:
    state = OrderedDict(a=torch.nn.Parameter(torch.randn(3, 2).half()))
    torch.save(state, tmp_path / "p.pt", _use_new_zipfile_serialization=zipped)

    (value,) = read_pickle(tmp_path / "p.pt").values()

    assert torch.equal(value, state["a"])
    assert value.dtype == torch.float16
    assert not value.requires_grad


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.zeros(1)], r"holds a list; expected a table of tensors"),
        ({}, r"holds a dict; expected a table"),
        ({"state": {"a": torch.zeros(1)}, "epoch": 3}, r"other things than tensors under state, epoch"),
    ],
)
def test_anything_but_a_flat_table_is_named(tmp_path: Path, content: object, complaint: str) -> None:
    torch.save(content, tmp_path / "p.pt")
    with pytest.raises(ValueError, match=complaint):
        read_pickle(tmp_path / "p.pt")


@pytest.mark.parametrize("junk", [b"hi\n", b"(]i", b"", b"PK\x03\x04 cut off", b"<html>not found</html>"])
def test_what_is_no_pickle_is_named(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "p.pt").write_bytes(junk)
    with pytest.raises(ValueError, match=r"p.pt"):
        read_pickle(tmp_path / "p.pt")
    with pytest.raises(ValueError, match=r"q.pt is not a file"):
        read_pickle(tmp_path / "q.pt")


def test_shards_and_their_index_become_safetensors_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = torch.randn(4)
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": shared, "c": shared}, tmp_path / "pytorch_model-00002-of-00002.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "unet").mkdir()
    torch.save({"d": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    torch.save({"e": torch.zeros(1)}, tmp_path / "training_args.bin")

    assert main(["convert", "pickles", str(tmp_path)]) == 0

    assert len(capsys.readouterr().out.splitlines()) == 4
    assert torch.equal(load_file(tmp_path / "model-00001-of-00002.safetensors")["a"], torch.ones(2, 3))
    second = load_file(tmp_path / "model-00002-of-00002.safetensors")
    assert torch.equal(second["b"], shared)
    assert torch.equal(second["c"], shared)
    written = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == {"a": "model-00001-of-00002.safetensors"}
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert not (tmp_path / "training_args.safetensors").exists()
    assert convert_pickles(tmp_path) == []


def test_a_folder_without_pickles_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds none of pytorch_model"):
        convert_pickles(tmp_path)
    with pytest.raises(ValueError, match=r"none is not a folder"):
        convert_pickles(tmp_path / "none")
