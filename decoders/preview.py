"""What latents show, without their autoencoder: a linear map from the channels of one latent to its pixels.

Shape letters in this file:
    N latents   C latent channels   h, w latent height and width   p pixels per latent, each way   c colours
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SAMPLES = 24
SIDE = 8
SHARED = 0.7
"""Standard deviation of the part of a sample's latents that is the same all over it; media are smooth."""


class LinearPreview:
    """A map fitted to one autoencoder by least squares: each latent becomes a patch of pixels."""

    def __init__(self, weights: Tensor, colours: int) -> None:
        """Hold a map ``(C + 1, c * p * p)``; the last row is the constant."""
        self.weights = weights
        self.colours = colours
        self.patch = round((weights.shape[1] // colours) ** 0.5)

    @classmethod
    @torch.inference_mode()
    def fit(
        cls, decode: Callable[[Tensor], Tensor], channels: int, device: torch.device | str = "cpu"
    ) -> "LinearPreview":
        """Fit the map to decodes of random latents.

        Args:
            decode: scaled latents ``(N, C, h, w)`` to pixels ``(N, c, h * p, w * p)``.
            channels: C.
            device: where ``decode`` wants its latents.

        Source: the linear previews that users of Stable Diffusion know ("latent to RGB"), there with
        fixed factors for one autoencoder and one colour per latent.

        """
        generator = torch.Generator().manual_seed(0)
        shared = torch.randn(SAMPLES, channels, 1, 1, generator=generator)
        own = torch.randn(SAMPLES, channels, SIDE, SIDE, generator=generator)
        latents = SHARED * shared + (1 - SHARED**2) ** 0.5 * own  # (N, C, h, w), variance 1
        pixels = torch.cat([decode(part[None].to(device)).float().cpu() for part in latents])
        patch = pixels.shape[2] // SIDE
        known = _with_constant(latents)  # (N * h * w, C + 1)
        cut = pixels.unflatten(3, (SIDE, patch)).unflatten(2, (SIDE, patch))  # (N, c, h, p, w, p)
        wanted = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)  # (N * h * w, c * p * p)
        return cls(torch.linalg.lstsq(known, wanted).solution, pixels.shape[1])

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> NDArray[np.float32]:
        """Return pixels ``(h * p, w * p, c)`` float32 in the autoencoder's own range.

        Args:
            latents: scaled, ``(C, h, w)``, on any device.

        """
        h, w = latents.shape[1:]
        patches = _with_constant(latents[None].float().cpu()) @ self.weights  # (h * w, c * p * p)
        cut = patches.view(h, w, self.colours, self.patch, self.patch)
        image = cut.permute(0, 3, 1, 4, 2).reshape(h * self.patch, w * self.patch, self.colours)
        pixels: NDArray[np.float32] = image.numpy()
        return pixels


def _with_constant(latents: Tensor) -> Tensor:
    """Return ``(N * h * w, C + 1)``: one row per latent, ending in 1."""
    rows = latents.movedim(1, -1).flatten(0, 2)
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
