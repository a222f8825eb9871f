"""A diffusers autoencoder that works on folded pixels and starts as the best linear one.

Full-resolution convolutions cost most of a small autoencoder's time on a CPU, and its first
thousands of steps go into learning what principal components give for nothing. Here the picture
is folded (pixel unshuffle) before the first convolution, and a linear path runs beside the
convolutions, so that they only learn what is not linear.

Shape letters in this file:
    B batch   C channels   Z latent channels   H, W pixels   h, w latent cells
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin  # diffusers finds the load method by this name
from torch import Tensor, nn

__all__ = ["ModelMixin", "PatchAutoencoderKL"]


_Autoencoder: Any = AutoencoderKL  # diffusers' annotations do not know what its decorators add


class PatchAutoencoderKL(_Autoencoder):  # type: ignore[misc]
    """``AutoencoderKL`` behind a fold of the input, with a linear path beside it.

    ``block_out_channels`` names the channels at each resolution, full resolution first, so that a
    pipeline reads the right scale factor from its length. The first ``num_folds`` of them are what
    folding gives (``in_channels * 4 ** i``) and have no weights.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (3, 12, 64, 96),
        num_folds: int = 2,
        layers_per_block: int = 1,
        latent_channels: int = 16,
        norm_num_groups: int = 16,
        sample_size: int = 64,
        scaling_factor: float = 1.0,
    ) -> None:
        folded = tuple(in_channels * 4**i for i in range(num_folds))
        if tuple(block_out_channels[:num_folds]) != folded or len(block_out_channels) <= num_folds:
            raise ValueError(
                f"block_out_channels is {tuple(block_out_channels)}; with {in_channels} input channels and "
                f"{num_folds} folds it must start with {folded} and go on for at least one more level."
            )
        levels = len(block_out_channels) - num_folds
        super().__init__(
            in_channels=in_channels * 4**num_folds,
            out_channels=out_channels * 4**num_folds,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels[num_folds:]),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            mid_block_add_attention=False,
        )
        self._internal_dict = FrozenDict(
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=tuple(block_out_channels),
            num_folds=num_folds,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
        )  # instead of the inherited sizes, which describe the folded network
        self.fold = 2**num_folds
        self.cell = 2 ** (len(block_out_channels) - 1)
        self.linear_in = nn.Conv2d(in_channels * self.cell**2, latent_channels, 1)
        self.linear_out = nn.Conv2d(latent_channels, out_channels * self.cell**2, 1)

    @torch.no_grad()
    def start_from_components(self, examples: Tensor) -> None:
        """Set the linear path to the principal components of ``examples`` ``(B, C, H, W)``.

        Components are scaled by the square root of their spread, which evens the latent channels
        without making the faintest detail as loud as the mean colour. The convolutions start small.
        """
        Z = self.config.latent_channels
        cells = F.pixel_unshuffle(examples, self.cell)  # (B, C * cell**2, h, w)
        rows = cells.permute(0, 2, 3, 1).flatten(0, 2)  # (N, C * cell**2)
        mean = rows.mean(0)
        _, spread, components = torch.linalg.svd(rows - mean, full_matrices=False)
        components = components[:Z]  # (Z, C * cell**2)
        scale = (spread[:Z] / len(rows) ** 0.5).sqrt()  # (Z,)
        assert self.linear_in.bias is not None
        assert self.linear_out.bias is not None
        self.linear_in.weight.copy_((components / scale[:, None])[..., None, None])
        self.linear_in.bias.copy_(-(components @ mean) / scale)
        self.linear_out.weight.copy_((components * scale[:, None]).T[..., None, None])
        self.linear_out.bias.copy_(mean)
        for last in (self.encoder.conv_out, self.decoder.conv_out):
            last.weight.mul_(0.1)
            last.bias.zero_()
        self.quant_conv.weight[Z:].mul_(0.1)
        self.quant_conv.bias[Z:].fill_(-5.0)  # log variance: nearly exact latents

    @torch.no_grad()
    def level_channels(self, latents: Tensor) -> None:
        """Bring the latent channels halfway to one loudness, without changing what comes out.

        The first components carry the mean colour and are several times as loud as those that carry fine
        detail, which a denoiser's noise therefore hides long before. Where all are as loud, it takes longer
        to learn shapes and leaves the grounds mottled. So each is divided by the square root of its spread,
        once more, by way of the weights.

        Args:
            latents: ``(B, Z, h, w)`` of this autoencoder as it is now, unscaled; their means are 0 then.

        """
        Z = self.config.latent_channels
        mean = latents.mean((0, 2, 3))  # (Z,)
        scale = latents.std((0, 2, 3)).sqrt()
        for name in ("weight", "bias"):
            rows = getattr(self.linear_in, name)
            rows.div_(scale.view(-1, *[1] * (rows.ndim - 1)))
            means = getattr(self.quant_conv, name)[:Z]
            means.div_(scale.view(-1, *[1] * (means.ndim - 1)))
        assert self.linear_in.bias is not None
        assert self.linear_out.bias is not None
        self.linear_in.bias.sub_(mean / scale)
        self.quant_conv.bias[Z:].sub_(2 * scale.log())
        self.post_quant_conv.bias.add_(self.post_quant_conv.weight[..., 0, 0] @ mean)
        self.linear_out.bias.add_(self.linear_out.weight[..., 0, 0] @ mean)
        for layer in (self.post_quant_conv, self.linear_out):
            layer.weight.mul_(scale.view(1, -1, 1, 1))

    def _encode(self, x: Tensor) -> Tensor:
        moments = super()._encode(F.pixel_unshuffle(x, self.fold))  # (B, 2 * Z, h, w)
        mean, log_variance = moments.chunk(2, dim=1)
        return torch.cat([mean + self.linear_in(F.pixel_unshuffle(x, self.cell)), log_variance], dim=1)

    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        inner = super()._decode(z, return_dict=False)[0]
        out = F.pixel_shuffle(inner, self.fold) + F.pixel_shuffle(self.linear_out(z), self.cell)
        return DecoderOutput(sample=out) if return_dict else (out,)
