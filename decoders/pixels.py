"""Pictures through the autoencoder of a Stable Diffusion pipeline, in both directions.

Shape letters in this file:
    N pictures   C latent channels   h, w latent height and width   H, W height and width in pixels
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoders.settings import WrongSetting

VAE_BATCH_PIXELS = 2**21
"""Pixels that go through the VAE's decoder at once; more are split, to bound its memory."""


def decode_pictures(vae: Any, latents: Tensor, *, sliced: bool = False) -> Tensor:
    """Decode latents ``(N, C, h, w)`` of a StableDiffusion VAE into uint8 ``(N, 3, H, W)`` on its device.

    ``sliced`` decodes one picture at a time.
    """
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    pixels_each = latents.shape[2] * latents.shape[3] * scale**2
    at_once = 1 if sliced else max(1, VAE_BATCH_PIXELS // pixels_each)
    images = torch.cat(
        [vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(at_once)]
    )  # (N, 3, H, W)
    images = (images / 2 + 0.5).clamp(0, 1) * 255
    return images.round().to(torch.uint8)


def to_arrays(pictures: Tensor) -> NDArray[np.uint8]:
    """Return pictures ``(N, 3, H, W)`` as arrays ``(N, H, W, 3)`` in main memory."""
    pixels: NDArray[np.uint8] = pictures.permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def from_pixels(
    vae: Any, frames: Sequence[NDArray[np.uint8]], width_px: int, height_px: int, *, sliced: bool = False
) -> Tensor:
    """Encode pictures ``(H, W, 3)`` uint8, resized to one size, into latents ``(N, C, h, w)``.

    ``sliced`` encodes one picture at a time.
    """
    pixels = torch.from_numpy(resized(frames, width_px, height_px)).permute(0, 3, 1, 2)  # (N, 3, H, W)
    images = pixels.to(vae.device, vae.dtype) / 127.5 - 1
    at_once = 1 if sliced else max(1, VAE_BATCH_PIXELS // (width_px * height_px))
    with torch.inference_mode():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(at_once)])
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled.clone()


def resized(frames: Sequence[NDArray[np.uint8]], width_px: int, height_px: int) -> NDArray[np.uint8]:
    """Return pictures ``(H, W, 3)`` in one size, ``(N, height_px, width_px, 3)``."""
    size = (width_px, height_px)
    return np.stack(
        [np.asarray(PIL.Image.fromarray(f).resize(size, PIL.Image.Resampling.LANCZOS)) for f in frames]
    )


def check_multiple(name: str, value: int, factor: int) -> int:
    """Return ``value`` divided by ``factor``; raise WrongSetting when it does not divide."""
    if value % factor:
        raise WrongSetting(
            name,
            f"{name} is {value}; this decoder makes multiples of {factor}. "
            f"Ask for {max(factor, round(value / factor) * factor)}.",
        )
    return value // factor
