"""Tiny towers of the library's own classes with random weights, as published checkpoints lie in folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

VISION_WIDTH, AUDIO_WIDTH = 24, 64


def write_towers(folder: Path) -> Path:
    """Write a SigLIP and a CLAP, text towers and all, with their preprocessing; return ``folder``."""
    torch.manual_seed(0)
    write_vision(folder / "vision")
    write_audio(folder / "audio")
    return folder


def write_vision(folder: Path, **changes: int) -> None:
    trunk = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"hidden_size": VISION_WIDTH, "image_size": 16, "patch_size": 4, **trunk, **changes}
    text = SiglipTextConfig(hidden_size=VISION_WIDTH, vocab_size=32, max_position_embeddings=8, **trunk)
    model = SiglipModel(
        SiglipConfig(text_config=text.to_dict(), vision_config=SiglipVisionConfig(**sizes).to_dict())
    )
    model.save_pretrained(folder)
    side = sizes["image_size"]
    SiglipImageProcessorPil(size={"height": side, "width": side}, resample=2).save_pretrained(folder)


def write_audio(folder: Path) -> None:
    audio = ClapAudioConfig(
        spec_size=32,
        num_mel_bins=8,
        patch_size=2,
        patch_stride=[2, 2],
        patch_embeds_hidden_size=16,
        hidden_size=AUDIO_WIDTH,
        depths=[1, 1, 1],
        num_attention_heads=[2, 2, 2],
        window_size=4,
        projection_dim=12,
    )
    text = ClapTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=12,
    )  # fmt: skip
    ClapModel(
        ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=12)
    ).save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=8, sampling_rate=4000, hop_length=40, max_length_s=1, fft_window_size=128,
        frequency_max=2000, truncation="rand_trunc",
    ).save_pretrained(folder)  # fmt: skip
