"""What is exported says nothing about the machine that trained it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from alignment.embedded.export import forget_origins


def test_an_exported_configuration_does_not_say_where_its_model_lay(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 2}
    AutoencoderKL(**sizes).save_pretrained(tmp_path / "runs")
    AutoencoderKL.from_pretrained(tmp_path / "runs").save_pretrained(tmp_path / "out" / "vae")
    path = tmp_path / "out" / "vae" / "config.json"
    before = json.loads(path.read_text())
    assert before["_name_or_path"] == str(tmp_path / "runs")

    forget_origins(tmp_path / "out")

    assert json.loads(path.read_text()) == {k: v for k, v in before.items() if k != "_name_or_path"}
    assert AutoencoderKL.from_pretrained(tmp_path / "out" / "vae").config.latent_channels == 2
