"""Files in the layout of ImageBind's release, small."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from encoders.imagebind import ImageBind
from encoders.preprocess import PreprocessConfig
from tests.test_imagebind import TINY


def imagebind_file(path: Path) -> dict[str, Tensor]:
    torch.manual_seed(5)
    state = ImageBind(TINY).state_dict()
    torch.save(state, path)
    return state


def tiny_preprocessing() -> PreprocessConfig:
    return PreprocessConfig(
        image_size=16,
        video_clips=2,
        video_clip_seconds=0.5,
        video_clip_frames=2,
        video_crops=1,
        audio_clips=1,
        audio_clip_seconds=0.16,
        num_mel_bins=10,
        num_mel_frames=16,
    )
