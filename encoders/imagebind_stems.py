"""The first step of each ImageBind tower: from an input to tokens with positions.

Shape letters in this file:
    N items   L tokens   D tower width   C channels   F frames   P patch side   Y, X rows, columns
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.imagebind_config import (
    AudioConfig,
    ImuConfig,
    PlaneConfig,
    TextConfig,
    TrunkConfig,
    VisionConfig,
)


def make_stem(name: str, config: TrunkConfig) -> nn.Module:
    """Build the stem of tower ``name``. Its parameters carry the names of the release."""
    match config:
        case VisionConfig():
            return ClipStem(config)
        case TextConfig():
            return TextStem(config)
        case AudioConfig():
            return PlaneStem("rgbt_stem", config, (config.num_mel_bins, config.num_frames), config.stride)
        case PlaneConfig():
            stem = "depth_stem" if name == "depth" else "rgbt_stem"
            return PlaneStem(stem, config, (config.image_size, config.image_size), config.patch_size)
        case ImuConfig():
            return ImuStem(config)
    raise AssertionError(f"no stem for {config!r}")


class ClipStem(nn.Module):
    """Images and short clips. An image is a clip that stands still."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        kernel = (config.num_frames, config.patch_size, config.patch_size)
        projection = nn.Conv3d(3, config.width, kernel, stride=kernel, bias=False)
        self.cls_token = _class_token(config.width)
        self.rgbt_stem = nn.ModuleDict({"proj": nn.Sequential(nn.Identity(), projection)})
        self.pos_embedding_helper = _positions(config.grid[0] * config.grid[1] + 1, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 3, height, width)`` or ``(N, 3, F, height, width)`` to ``(N, 1 + Y * X, D)``."""
        size, P = self.config.image_size, self.config.patch_size
        image, clip = (3, size, size), (3, self.config.num_frames, size, size)
        _check_shape("vision", x, image, clip)
        weight: Tensor = self.rgbt_stem.get_parameter("proj.1.weight")  # (D, 3, F, P, P)
        if x.ndim == 4:
            weight, x = weight.sum(dim=2, keepdim=True), x.unsqueeze(2)  # F becomes 1
        patches = x.unfold(3, P, P).unfold(4, P, P)  # (N, 3, F, Y, X, P, P)
        patches = patches.permute(0, 3, 4, 1, 2, 5, 6).flatten(3).flatten(1, 2)  # (N, Y * X, 3 * F * P * P)
        tokens = F.linear(patches, weight.flatten(1))  # (N, Y * X, D)
        return _with_class_token(tokens, self.cls_token) + self.pos_embedding_helper.get_parameter(
            "pos_embed"
        )


class PlaneStem(nn.Module):
    """Inputs with one channel: filter banks, depth, thermal."""

    def __init__(
        self, stem: str, config: AudioConfig | PlaneConfig, size: tuple[int, int], stride: int
    ) -> None:
        super().__init__()
        self.size, self.stem = size, stem
        projection = nn.Conv2d(1, config.width, config.patch_size, stride=stride, bias=False)
        self.cls_token = _class_token(config.width)
        self.add_module(stem, nn.ModuleDict({"proj": projection, "norm_layer": nn.LayerNorm(config.width)}))
        self.pos_embedding_helper = _positions(config.grid[0] * config.grid[1] + 1, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 1, height, width)`` to ``(N, 1 + Y * X, D)``."""
        _check_shape("audio, depth or thermal", x, (1, *self.size))
        stem = self.get_submodule(self.stem)
        tokens = stem.get_submodule("proj")(x).flatten(2).transpose(1, 2)  # (N, Y * X, D)
        tokens = stem.get_submodule("norm_layer")(tokens)
        return _with_class_token(tokens, self.cls_token) + self.pos_embedding_helper.get_parameter(
            "pos_embed"
        )


class ImuStem(nn.Module):
    """Motion sensors, cut along time."""

    def __init__(self, config: ImuConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = _class_token(config.width)
        projection = nn.Linear(config.num_channels * config.patch_size, config.width, bias=False)
        self.imu_stem = nn.ModuleDict({"proj": projection, "norm_layer": nn.LayerNorm(config.width)})
        count = config.num_samples // config.patch_size + 1
        self.pos_embed = nn.Parameter(torch.randn(1, count, config.width) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, samples)`` to ``(N, 1 + samples / P, D)``."""
        _check_shape("imu", x, (self.config.num_channels, self.config.num_samples))
        P = self.config.patch_size
        pieces = x.unfold(2, P, P).transpose(1, 2).flatten(2)  # (N, samples / P, C * P)
        tokens = self.imu_stem["norm_layer"](self.imu_stem["proj"](pieces))  # (N, samples / P, D)
        return _with_class_token(tokens, self.cls_token) + self.pos_embed


class TextStem(nn.Module):
    """Token ids. What follows the last end token of the batch is cut off, for it can change nothing."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, config.context_length, config.width) * 0.01)
        future = torch.full((config.context_length, config.context_length), float("-inf")).triu(1)
        self.register_buffer("mask", future)  # part of the release's file; attention here is told `causal`

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``(N, context_length)`` to ``(N, L, D)``, L being the longest text of the batch."""
        _check_shape("text", ids, (self.config.context_length,))
        longest = int(ids.argmax(dim=-1).max()) + 1
        tokens: Tensor = self.token_embedding(ids[:, :longest])  # (N, L, D)
        return tokens + self.pos_embed[:, :longest]


def _class_token(width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(1, 1, width) * width**-0.5)


def _positions(count: int, width: int) -> nn.ParameterDict:
    return nn.ParameterDict({"pos_embed": nn.Parameter(torch.randn(1, count, width) * width**-0.5)})


def _with_class_token(tokens: Tensor, class_token: Tensor) -> Tensor:
    return torch.cat([class_token.expand(len(tokens), -1, -1), tokens], dim=1)


def _check_shape(tower: str, value: Tensor, *expected: tuple[int, ...]) -> None:
    if tuple(value.shape[1:]) not in expected:
        shapes = " or ".join(f"(N, {', '.join(map(str, shape))})" for shape in expected)
        raise ValueError(
            f"The {tower} input has shape {tuple(value.shape)}; expected {shapes}. "
            "Prepare it with encoders.preprocess."
        )
