"""What is exported: no trace of the machine that trained it, and nothing that the service does not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from alignment.embedded.export import export_encoder, forget_origins
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Modality
from tests.test_imagebind_encoder import made_encoder


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


def test_an_exported_encoder_has_the_towers_that_read_media_and_nothing_of_an_older_export(
    tmp_path: Path,
) -> None:
    encoder = made_encoder()
    encoder.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()

    export_encoder(encoder, tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    written = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[1] for name in written} == {"vision", "audio"}
    assert {value.dtype for value in written.values()} == {torch.float16}
    assert ImageBindEncoder.from_pretrained(tmp_path).modalities == {
        Modality.IMAGE,
        Modality.VIDEO,
        Modality.AUDIO,
    }
