"""The two autoencoders: pictures (and video frames), and log-mel spectrograms.

Shape letters in this file:
    B batch   H, W pixels   T mel frames   M mel bins   C latent channels
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.embedded import pools
from alignment.fitting import FitConfig, fit, training_device
from decoders.patch_autoencoder import PatchAutoencoderKL

PICTURE = {"in_channels": 3, "out_channels": 3, "block_out_channels": (3, 12, 64, 96), "num_folds": 2,
           "latent_channels": 16, "sample_size": 64}  # fmt: skip
SPECTROGRAM = {"in_channels": 1, "out_channels": 1, "block_out_channels": (1, 4, 16, 64, 96), "num_folds": 3,
               "latent_channels": 16, "sample_size": 256}  # fmt: skip
KL_WEIGHT = 1e-6
MEL_SPREAD = 4.0  # only for the loss; the autoencoder reads and writes plain log-mels


def as_pixels(batch: Tensor) -> Tensor:
    """Turn uint8 ``(B, H, W, 3)`` into float ``(B, 3, H, W)`` in [-1, 1]."""
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1


def as_mels(batch: Tensor) -> Tensor:
    """Turn log-mels ``(B, T, M)`` into float ``(B, 1, T, M)``."""
    return batch[:, None].float()


def train_picture_autoencoder(
    cache: Path, folder: Path, config: FitConfig, sizes: pools.PoolSizes, batch_size: int = 8
) -> PatchAutoencoderKL:
    """Train on half drawings, half video frames; weights of the result are the averaged ones."""
    looks = pools.look_pixels(cache, sizes.looks)
    clips = pools.clip_pixels(cache, sizes.clips)
    model = PatchAutoencoderKL(**PICTURE)
    model.start_from_components(as_pixels(torch.from_numpy(np.array(looks[:1000]))))

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((config.seed, 1, step))
        half = batch_size // 2
        still = looks[np.sort(rng.integers(len(looks), size=half))]
        which = rng.integers(len(clips), size=batch_size - half)
        frames = np.stack([clips[i, rng.integers(clips.shape[1])] for i in which])
        pixels = as_pixels(torch.from_numpy(np.concatenate([still, frames])))  # (B, 3, H, W)
        return _reconstruction(model, pixels, config.noise(step))

    fit("picture autoencoder", model, losses, config, folder)
    latents = [_mean_latents(model, as_pixels(torch.from_numpy(np.asarray(looks[:512]))))]
    return _levelled(model, torch.cat(latents))


def train_spectrogram_autoencoder(
    cache: Path, folder: Path, config: FitConfig, sizes: pools.PoolSizes, batch_size: int = 8
) -> PatchAutoencoderKL:
    """Train on plain log-mels; weights of the result are the averaged ones."""
    mels = pools.sound_mels(cache, sizes.sounds)
    model = PatchAutoencoderKL(**SPECTROGRAM)
    model.start_from_components(as_mels(torch.from_numpy(np.array(mels[:1000]))))

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((config.seed, 2, step))
        batch = as_mels(torch.from_numpy(mels[np.sort(rng.integers(len(mels), size=batch_size))]))
        return _reconstruction(model, batch, config.noise(step), 1 / MEL_SPREAD)

    fit("spectrogram autoencoder", model, losses, config, folder)
    with torch.inference_mode():
        latents = _mean_latents(model, as_mels(torch.from_numpy(np.asarray(mels[:256]))))
    return _levelled(model, latents)


def encoder_of(model: PatchAutoencoderKL, kind: str) -> LatentFunction:
    """Return the function from a batch of a pool to scaled latents ``(B, C, h, w)``."""
    return LatentFunction(model, kind)


class LatentFunction:
    """Pool rows to latents of unit scale, as the denoisers are trained on."""

    def __init__(self, model: PatchAutoencoderKL, kind: str) -> None:
        self.model, self.prepare = model.eval(), {"pixels": as_pixels, "mels": as_mels}[kind]

    def __call__(self, batch: Tensor) -> Tensor:
        """Encode one batch; clips ``(B, F, H, W, 3)`` come back as ``(B, C, F, h, w)``."""
        factor: float = self.model.config["scaling_factor"]
        if batch.ndim == 5:
            B, F_ = batch.shape[:2]
            flat = _mean_latents(self.model, self.prepare(batch.flatten(0, 1)))  # (B*F, C, h, w)
            frames: Tensor = flat.unflatten(0, (B, F_))  # (B, F, C, h, w)
            return (frames * factor).transpose(1, 2)
        return _mean_latents(self.model, self.prepare(batch)) * factor


def _reconstruction(
    model: PatchAutoencoderKL, batch: Tensor, generator: torch.Generator, scale: float = 1.0
) -> dict[str, Tensor]:
    batch = batch.to(training_device())
    posterior = model.encode(batch).latent_dist
    rebuilt = model.decode(posterior.sample(generator)).sample
    error = (rebuilt - batch) * scale
    return {
        "absolute": error.abs().mean(),
        "squared": 2 * error.square().mean(),
        "edges": 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()),
        "kl": KL_WEIGHT * posterior.kl().mean(),
    }


@torch.no_grad()
def _mean_latents(model: PatchAutoencoderKL, batch: Tensor) -> Tensor:
    return model.encode(batch).latent_dist.mode()  # type: ignore[no-any-return]


def _levelled(model: PatchAutoencoderKL, latents: Tensor) -> PatchAutoencoderKL:
    model.level_channels(latents)
    spread = latents.std((0, 2, 3)).mean().sqrt()  # of levelled ones, of all channels together
    model.register_to_config(scaling_factor=round(1 / spread.item(), 5))
    model.eval()
    return model


def rebuilt_pixels(model: PatchAutoencoderKL, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encode and decode uint8 ``(B, H, W, 3)``: what the autoencoder leaves of a picture."""
    with torch.inference_mode():
        out: Tensor = model.decode(_mean_latents(model, as_pixels(torch.from_numpy(pixels)))).sample
    return ((out.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
