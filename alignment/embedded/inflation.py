"""A video's U-Net born from a picture's: what a frame looks like is known, and only movement is to be learnt.

The layers of :class:`UNet3DConditionModel` that work on single frames have the names that they have in
:class:`UNet2DConditionModel`, so they take its weights. The layers between frames begin by passing on what
they are given, as in Blattmann et al. 2023 (arXiv 2304.08818).
"""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel
from torch import Tensor

BETWEEN_FRAMES = ("transformer_in.", "temp_convs.", "temp_attentions.")


@torch.no_grad()
def inflate(pictures: UNet2DConditionModel, videos: UNet3DConditionModel) -> None:
    """Give ``videos`` the layers of ``pictures``; its frames are then those of ``pictures``, one by one.

    An inner level of ``videos`` may be narrower. It then keeps the first channels of every eight, so that the
    groups of the norms and the heads of the attention stay together.

    Raises:
        ValueError: the networks do not have the same layers, or their widths do not divide so.

    """
    inner, outer = (int(net.config["block_out_channels"][1]) for net in (videos, pictures))
    if inner > outer or inner * 8 % outer:
        raise ValueError(
            f"The inner level is {inner} channels wide and that of the pictures {outer}; expected some "
            f"eighths of that."
        )
    own, given = videos.state_dict(), pictures.state_dict()
    for name, target in own.items():
        if name in given:
            target.copy_(_narrowed(name, given[name], target.shape, outer, inner * 8 // outer))
        elif not any(layer in name for layer in BETWEEN_FRAMES):
            raise ValueError(f"The U-Net of pictures has no {name}. Build both of the same blocks.")
        elif name.endswith(("proj_out.weight", "proj_out.bias")):
            target.zero_()


def _narrowed(name: str, weights: Tensor, shape: torch.Size, outer: int, kept: int) -> Tensor:
    """Keep ``kept`` of every eight channels along the dimensions that are too long."""
    if weights.ndim == len(shape) + 2:  # a convolution of single pixels, where the other has a linear layer
        weights = weights.flatten(1)
    for dim, wanted in enumerate(shape):
        extra = weights.shape[dim] - wanted
        if not extra:
            continue
        # Where a skip connection of another level is appended, the inner level's channels come first.
        levels, rest = divmod(extra * 8, outer * (8 - kept)) if kept < 8 else (0, 1)
        cut = levels * outer
        if rest or not 0 < cut <= weights.shape[dim]:
            raise ValueError(f"{name} is {tuple(weights.shape)} for pictures and {tuple(shape)} for videos.")
        index = torch.arange(weights.shape[dim])
        weights = weights.index_select(dim, index[(index >= cut) | (index % 8 < kept)])
    return weights.reshape(shape)
