"""The three denoisers of the embedded model, each trained on cached latents under a frozen text encoder.

Pictures: the U-Net of Stable Diffusion. Sounds: the U-Net of AudioLDM, conditioned by one vector.
Videos: the 3-D U-Net of text-to-video Stable Diffusion, born from the trained one of pictures.

Shape letters in this file:
    B batch   C latent channels   F frames   h, w latent cells
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn

from alignment.embedded import pools
from alignment.embedded.captions import CAPTION_TOKENS, WIDTH, CaptionEncoder, Kind, spoken
from alignment.embedded.inflation import inflate
from alignment.embedded.late_sounds import SHARE, LateSounds
from alignment.fitting import FitConfig, fit, half_precision, prefer_plain_attention, training_device
from alignment.toybox.world import Scene

LATENT_CHANNELS = 16
CAPTION_DROPOUT = 0.1
BATCHES: Mapping[Kind, int] = {"look": 64, "clip": 16, "sound": 64}
# The mean of the logit of the noise level: most steps are spent on noisy latents. Frames of a clip are much
# alike, so that more noise is needed to hide what they show.
NOISE_SHIFT: Mapping[Kind, float] = {"look": 0.8, "clip": 1.2, "sound": 0.8}
# These are spent on any level alike, or else a grain stays that the last steps never learnt to remove.
EVEN_SHARE: Mapping[Kind, float] = {"look": 0.3, "clip": 0.5, "sound": 0.3}
# Of a clip's loss, beside the plain one: how much of its own movement is wrong. What a harp's strings do is a
# fortieth of what crossing the picture does, and was not learnt.
MOVEMENT_WEIGHT = 0.1
_LEAST_MOVEMENT = 0.005  # mean squared, of latents of unit spread
SCHEDULE: Mapping[str, object] = {
    "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction",
    "clip_sample": False, "timestep_spacing": "trailing", "steps_offset": 1,
}  # fmt: skip
CLASS_GAIN = WIDTH**0.5
_HEADS = 4
_BLOCKS = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "norm_num_groups": 16,
           "layers_per_block": 1}  # fmt: skip
_FLAT = {**_BLOCKS, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": _HEADS}  # fmt: skip
_DEEP = {**_BLOCKS, "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
         "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"), "attention_head_dim": 12}  # fmt: skip

Denoiser = UNet2DConditionModel | UNet3DConditionModel


def build(kind: Kind) -> Denoiser:
    """Return the untrained denoiser of a kind of scene."""
    if kind == "look":
        denoiser = UNet2DConditionModel(
            sample_size=8, block_out_channels=(80, 128), cross_attention_dim=WIDTH, **_FLAT
        )
    elif kind == "sound":
        denoiser = UNet2DConditionModel(
            sample_size=16, block_out_channels=(48, 96), cross_attention_dim=(48, 96),
            class_embed_type="simple_projection", projection_class_embeddings_input_dim=WIDTH,
            class_embeddings_concat=True, **_FLAT,
        )  # fmt: skip
        with torch.no_grad():  # a unit vector of this width would be a whisper beside the time embedding
            denoiser.get_parameter("class_embedding.weight").mul_(CLASS_GAIN)
    else:
        denoiser = UNet3DConditionModel(
            sample_size=8, block_out_channels=(80, 96), cross_attention_dim=WIDTH, **_DEEP
        )
    return cast(Denoiser, denoiser)


class ConditionedDenoiser(nn.Module):
    """A denoiser and the frozen text encoder that conditions it."""

    def __init__(self, kind: Kind, captions: CaptionEncoder, denoiser: nn.Module) -> None:
        super().__init__()
        self.kind, self.captions, self.denoiser = kind, captions.requires_grad_(False), denoiser
        self.scheduler: Any = DDPMScheduler(**SCHEDULE)

    @torch.no_grad()
    def _condition(self, texts: list[str]) -> Tensor:
        return self.captions(texts)  # type: ignore[no-any-return]

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Run the denoiser on noisy latents ``(B, C, ...)`` at integer timesteps ``(B,)``."""
        with half_precision():
            if self.kind == "sound":
                out = self.denoiser(noisy, timesteps, None, class_labels=condition).sample
            else:
                out = self.denoiser(noisy, timesteps, condition).sample
        prediction: Tensor = out.float()
        return prediction

    def loss(
        self,
        latents: Tensor,
        texts: list[str],
        generator: torch.Generator,
        marks: Tensor | None = None,
    ) -> Tensor:
        """Velocity loss of one batch of clean latents ``(B, C, ...)`` (Salimans and Ho 2022, appendix D).

        ``marks`` ``(B, E)`` are added to what the captions of sounds give.
        """
        condition = self._condition(texts)
        if marks is not None:
            condition = F.normalize(condition + marks.to(condition.device), dim=-1)
        return self.velocity_loss(latents, condition, generator)

    def velocity_loss(self, latents: Tensor, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Return the same for conditions ``(B, L, E)``, or ``(B, E)`` of sounds, wherever they came from."""
        B = len(latents)
        level = torch.sigmoid(torch.randn(B, generator=generator) + NOISE_SHIFT[self.kind])
        even = torch.rand(B, generator=generator)
        level = torch.where(torch.rand(B, generator=generator) < EVEN_SHARE[self.kind], even, level)
        timesteps = (level * 1000).long().clamp(0, 999).to(latents.device)  # (B,)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        predicted = self.predict(noisy, timesteps, condition)
        target: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
        error = predicted - target
        loss = error.square().mean()
        if self.kind == "clip":
            loss = loss + MOVEMENT_WEIGHT * _movement_missed(error, latents)
        return loss


def _movement_missed(error: Tensor, latents: Tensor) -> Tensor:
    """Return what of an error ``(B, C, F, h, w)`` differs between frames, by what moves in a clip."""
    wrong, moving = ((x - x.mean(2, keepdim=True)).square().flatten(1).mean(1) for x in (error, latents))
    missed: Tensor = (wrong / (moving + _LEAST_MOVEMENT)).mean()
    return missed


def train_denoiser(
    kind: Kind, captions: CaptionEncoder, latents: NDArray[np.float16], folder: Path, config: FitConfig,
    pictures: UNet2DConditionModel | None = None, late: LateSounds | None = None,
) -> ConditionedDenoiser:  # fmt: skip
    """Train a denoiser; the result holds the averaged weights.

    Args:
        kind: which denoiser.
        captions: its text encoder, trained before (see :mod:`alignment.embedded.captions`).
        latents: scaled latents of the whole pool of this kind, ``(N, C, ...)``.
        folder: for checkpoints and logs.
        config: length and rates; it should ask for an average.
        pictures: the trained denoiser of pictures, from which that of clips is born.
        late: for that of sounds, a share of every batch.

    """
    denoiser = build(kind)
    if pictures is not None:
        assert isinstance(denoiser, UNet3DConditionModel)
        inflate(pictures, denoiser)
    prefer_plain_attention(denoiser)
    model = ConditionedDenoiser(kind, captions, denoiser)
    listed: list[Scene] = pools.scenes(kind, len(latents))
    shares = pools.shares(listed)
    num_late = 0 if late is None else round(SHARE * BATCHES[kind])

    def losses(step: int) -> dict[str, Tensor]:
        rng = config.randomness(step)
        chosen = sorted(rng.choices(range(len(listed)), cum_weights=shares, k=BATCHES[kind] - num_late))
        rows, met, marks = latents[chosen], [listed[i] for i in chosen], None
        if late is not None:
            delayed = sorted(rng.choices(range(len(late.scenes)), k=num_late))
            rows = np.concatenate([rows, late.latents[delayed]])
            met += [late.scenes[i] for i in delayed]
            marks = torch.cat([late.marks.new_zeros(len(chosen), late.marks.shape[1]), late.marks[delayed]])
        texts = ["" if rng.random() < CAPTION_DROPOUT else spoken(scene, rng) for scene in met]
        if marks is not None:  # without a caption, nothing is said at all
            marks[[i for i, text in enumerate(texts) if not text]] = 0
        batch = torch.from_numpy(rows.astype(np.float32)).to(training_device())
        return {"velocity": model.loss(batch, texts, config.noise(step), marks)}

    fit(f"{kind} denoiser", model, losses, config, folder)
    return model


__all__ = ["CAPTION_TOKENS", "ConditionedDenoiser", "build", "train_denoiser"]
