"""Pickles are opened as tensors alone, and become safetensors."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

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

    Path("plain.pt").write_bytes(pickle.dumps({"b": Harmful()}))

    with pytest.raises(ValueError, match=r"p.pt asks for .*, so it may run code when it is opened") as caught:
        read_pickle(Path("p.pt"))
    assert "weights_only" not in str(caught.value)  # PyTorch's advice is to run the code
    with pytest.raises(ValueError, match=r"plain.pt .* would run code when it is opened, which it was not"):
        read_pickle(Path("plain.pt"))
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
        ({}, r"holds an empty dict"),
        (
            {"state": {"a": torch.zeros(1)}, "epoch": 3},
            r"other things than tensors under state, epoch.*weights_only=True\)\['state'\], 'tensors.pt'\)",
        ),
        ({"a": torch.zeros(2).to_sparse()}, r"a is sparse, quantised or without numbers"),
        ({"a": torch.zeros(2, device="meta")}, r"a is sparse, quantised or without numbers"),
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
    with pytest.raises(ValueError, match=r"q.pt is not there; expected a file of torch.save"):
        read_pickle(tmp_path / "q.pt")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a pointer of Git LFS"),
        (save({"a": torch.zeros(3)}), "is a safetensors file"),
    ],
)
def test_what_people_take_for_a_checkpoint_is_called_by_its_name(
    tmp_path: Path, content: bytes, what: str
) -> None:
    (tmp_path / "p.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"p.pt {what}.*; expected a file of torch.save"):
        read_pickle(tmp_path / "p.pt")


def test_numbers_that_were_damaged_on_the_way_are_noticed(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(10_000)}, tmp_path / "p.pt")
    content = bytearray((tmp_path / "p.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "p.pt").write_bytes(content)

    with pytest.raises(ValueError, match=r"p.pt is damaged: p/data/0 in it has another checksum"):
        read_pickle(tmp_path / "p.pt")


def test_an_archive_that_holds_more_than_its_bytes_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("p/data.pkl", b"")
        archive.writestr("p/data/0", bytes(50_000_000))
    assert (tmp_path / "p.pt").stat().st_size < 100_000

    with pytest.raises(ValueError, match=r"p.pt .* cannot be read as tensors alone"):
        read_pickle(tmp_path / "p.pt")


def test_a_tensor_that_claims_more_numbers_than_there_are_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "p.pt")

    with pytest.raises(ValueError, match=r"a is sparse, quantised or without numbers of its own"):
        read_pickle(tmp_path / "p.pt")


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    index = {"metadata": {}, "weight_map": {"b": "pytorch_model-00002-of-00002.bin"}}
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps(index))

    with pytest.raises(ValueError, match=r"names pytorch_model-00002-of-00002.bin, which is not beside it"):
        convert_pickles(tmp_path)
    for content in ("{oops", '{"weight_map": {"a": 3}}', '{"weight_map": 3}', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"index.json is no index of a saved model"):
            convert_pickles(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"index.json is no index of a saved model"):
        convert_pickles(tmp_path)


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
