"""Every folder of the shipped weights loads with ``from_pretrained`` of the class that it is for."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import decoders.patch_autoencoder
import decoders.vocoder  # noqa: F401  (diffusers takes foreign classes from modules that are imported already)
from decoders.projection import OutputProjection
from encoders.imagebind_encoder import ImageBindEncoder
from llm.model import LanguageModel
from services.presets import SHIPPED

WEIGHTS = SHIPPED.parent / "weights" / "toybox"
SAVED = ["encoder", "llm", "projections/image", "projections/audio", "projections/video"]
KNOWN = {"encoder": ImageBindEncoder, "llm": LanguageModel}
FOLDERS = sorted(
    str(folder.relative_to(WEIGHTS))
    for folder in {path.parent for path in WEIGHTS.rglob("*.json")} | {WEIGHTS / "video" / "vae"}
)


def class_of(folder: Path) -> Any:
    """Return the class that a folder says it is for, or that its place says."""
    place = str(folder.relative_to(WEIGHTS))
    if place in KNOWN:
        return KNOWN[place]
    if place.startswith("projections/"):
        return OutputProjection
    if place == "llm/base":
        return AutoModelForCausalLM
    if (index := folder / "model_index.json").is_file():
        return getattr(importlib.import_module("diffusers"), json.loads(index.read_text())["_class_name"])
    module, name = json.loads((folder.parent / "model_index.json").read_text())[folder.name]
    return getattr(importlib.import_module(module), name)


def test_no_folder_is_forgotten() -> None:
    weighty = {str(path.parent.relative_to(WEIGHTS)) for path in WEIGHTS.rglob("*.safetensors")}

    assert weighty <= set(FOLDERS)
    assert {"image", "image/vae", "video/unet", "audio/vocoder", "llm/adapter"} <= set(FOLDERS)


@pytest.mark.filterwarnings("ignore")  # of deprecated pipelines, which is known
@pytest.mark.parametrize("place", FOLDERS)
def test_the_folder_loads_with_from_pretrained(place: str) -> None:
    folder = WEIGHTS / place
    if place == "llm/adapter":
        base = AutoModelForCausalLM.from_pretrained(WEIGHTS / "llm" / "base", local_files_only=True)
        loaded: Any = PeftModel.from_pretrained(base, folder)
    else:
        loaded = class_of(folder).from_pretrained(folder)

    assert loaded is not None
    if place == "llm/base":
        assert len(AutoTokenizer.from_pretrained(folder, local_files_only=True)) > 1000
    module = loaded.model if place == "encoder" else loaded
    if isinstance(module, torch.nn.Module):
        assert all(parameter.isfinite().all() for parameter in module.parameters())
        assert not module.training or place == "llm/adapter"


@pytest.mark.parametrize("place", SAVED)
def test_what_is_saved_again_is_what_was_shipped(place: str, tmp_path: Path) -> None:
    shipped = class_of(WEIGHTS / place).from_pretrained(WEIGHTS / place)

    if place.startswith("projections"):
        shipped.half().save_pretrained(tmp_path)
    else:
        shipped.save_pretrained(tmp_path, torch.float16)

    written = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    assert any(name.endswith(".safetensors") for name in written)
    for name, path in written.items():
        if name.endswith((".safetensors", "bridge.json")) or name == "config.json":
            assert path.read_bytes() == (WEIGHTS / place / name).read_bytes(), name
