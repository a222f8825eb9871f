"""The shipped preset ``nextgpt-7b`` as it would be published, with tiny weights, on a hub of our own."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.convert import convert_imagebind, convert_nextgpt
from services.presets import SHIPPED
from tests import tiny_pipelines
from tests.fake_hub import FakeHub, sha256
from tests.imagebind_files import imagebind_file, tiny_preprocessing
from tests.nextgpt_files import (
    SIZES,
    VOCABULARY,
    llama_pieces,
    save_pt,
    small_tensors,
    write_base,
    write_sentencepiece,
)
from tests.test_imagebind import TINY

LLAMA, DELTA = "huggyllama/llama-7b", "lmsys/vicuna-7b-delta-v0"
NEXTGPT = "ChocoWu/nextgpt_7b_tiva_v0"
PIPELINES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny_pipelines.image_pipeline,
    "cerspense/zeroscope_v2_576w": tiny_pipelines.video_pipeline,
    "cvssp/audioldm-l-full": tiny_pipelines.audio_pipeline,
}
IMAGEBIND = "/imagebind/imagebind_huge.pth"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def write_llama_and_delta(folder: Path) -> dict[str, Tensor]:
    """Write ``llama`` and ``delta`` as the hub has them; return the tensors of their sum, of Vicuna."""
    write_base(folder / "vicuna")
    vicuna = load_file(folder / "vicuna" / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    delta = {name: 0.01 * torch.randn(value.shape, generator=generator) for name, value in vicuna.items()}
    llama = {}
    for name, value in vicuna.items():
        rows = VOCABULARY if name in TABLES else len(value)
        llama[name] = (value - delta[name])[:rows].contiguous()
        delta[name][rows:] = value[rows:]
    folder.joinpath("llama").mkdir()
    folder.joinpath("delta").mkdir()
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(
        llama | computed, folder / "llama" / "model-00001-of-00001.safetensors", metadata={"format": "pt"}
    )
    names = sorted(delta)
    half = len(names) // 2
    for number, some in enumerate((names[:half], names[half:]), 1):
        torch.save(
            {name: delta[name] for name in some} | (computed if number == 1 else {}),
            folder / "delta" / f"pytorch_model-{number:05}-of-00002.bin",
        )
    words = [f"piece{i}" for i in range(VOCABULARY - len(llama_pieces([])))]
    write_sentencepiece(folder / "llama" / "tokenizer.model", llama_pieces(words))
    config = json.loads((folder / "vicuna" / "config.json").read_text())
    (folder / "delta" / "config.json").write_text(json.dumps(config))
    (folder / "llama" / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY}))
    for name in ("llama/model.safetensors.index.json", "delta/pytorch_model.bin.index.json"):
        (folder / name).write_text('{"metadata": {}, "weight_map": {}}')
    return {
        name: torch.cat(
            [llama[name], llama[name].new_zeros(len(delta[name]) - len(llama[name]), *llama[name].shape[1:])]
        )
        + delta[name]
        for name in llama
    }


def publish(hub: FakeHub, folder: Path) -> dict[str, Tensor]:
    """Put all that the preset is made of on ``hub``, and more beside it; return Vicuna's tensors."""
    vicuna = write_llama_and_delta(folder)
    hub.add(LLAMA, folder / "llama")
    hub.repositories[LLAMA] |= {"pytorch_model-00001-of-00002.bin": b"too much", "README.md": b"terms"}
    hub.add(DELTA, folder / "delta")
    save_pt(small_tensors(vicuna["model.embed_tokens.weight"]), folder / "pytorch_model.pt")
    hub.repositories[NEXTGPT] = {
        "pytorch_model.pt": (folder / "pytorch_model.pt").read_bytes(),
        "tokenizer.model": b"its own",
    }
    for repository, pipeline in PIPELINES.items():
        hub.add(repository, tiny_pipelines.saved(pipeline(), folder / repository))
        beside = (
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.bin",
            "v1.ckpt",
        )
        hub.repositories[repository] |= dict.fromkeys(beside, b"too much")
    first = next(iter(PIPELINES))
    hub.repositories[first] |= {
        "feature_extractor/preprocessor_config.json": b"{}",
        "safety_checker/model.safetensors": b"too much",
        "unet/diffusion_pytorch_model.non_ema.safetensors": b"too much",
    }
    imagebind_file(folder / "imagebind_huge.pth")
    hub.at_address[IMAGEBIND] = (folder / "imagebind_huge.pth").read_bytes()
    return vicuna


def write_preset(hub: FakeHub, path: Path) -> Path:
    """Write the shipped preset with its address on ``hub``, on the CPU, with weights beside ``path``."""
    values = yaml.safe_load((SHIPPED / "nextgpt-7b.yaml").read_text())
    origin = values["encoder"]["origins"][0]
    data = hub.at_address[IMAGEBIND]
    origin["source"] = hub.url + IMAGEBIND
    origin["download"] |= {"size_bytes": len(data), "sha256": sha256(data)}
    values |= {"weights": "w", "device": "cpu"}
    del values["sizes"]
    values["encoder"]["dtype"] = "float32"
    path.write_text(yaml.safe_dump(values))
    return path


def expect_small_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the converters expect the sizes of what :func:`publish` publishes."""
    imagebind = functools.partial(convert_imagebind, release=TINY, preprocessing=tiny_preprocessing())
    monkeypatch.setattr("services.convert.convert_nextgpt", functools.partial(convert_nextgpt, **SIZES))
    monkeypatch.setattr("services.convert.convert_imagebind", imagebind)
