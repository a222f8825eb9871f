"""A file of weights that is not whole is noticed before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.weight_files import absent_shards, damage, read_header


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(2).half()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_header_tells_names_and_shapes(weights: Path) -> None:
    assert {name: value["shape"] for name, value in read_header(weights).items()} == {"a": [3, 4], "b": [2]}
    assert list(damage([weights.parent])) == []


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_file_that_is_cut_off_is_damaged(weights: Path, kept: int) -> None:
    weights.write_bytes(weights.read_bytes()[:kept])

    ((path, found),) = damage([weights.parent])

    assert path == weights
    assert found.startswith(str(weights))
    assert found.endswith("Copy or download it again.")


def test_a_file_that_is_too_long_is_damaged_too(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"has [0-9,]+ bytes; its header says"):
        read_header(weights)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "data_offsets": [0, 0]}}',
        b'{"a": 3}',
    ],
)
def test_a_beginning_that_makes_no_sense_is_damage(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)

    ((_, found),) = damage([tmp_path])

    assert found.endswith("model.safetensors is no safetensors file. Copy or download it again.")


def test_a_configuration_that_is_no_json_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{oops")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')

    first, deep, second = dict(damage([tmp_path])).values()

    assert "config.json is no JSON" in first
    assert "deep.json is no JSON" in deep
    assert "expected weight_map and metadata" in second


def test_a_shard_that_only_the_index_knows_is_absent(weights: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "c": "model-2.safetensors"}}
    (weights.parent / "model.safetensors.index.json").write_text(json.dumps(index))

    assert absent_shards(weights.parent) == [weights.parent / "model-2.safetensors"]
