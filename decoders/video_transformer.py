"""A small transformer video pipeline: per-frame latents denoised together, words as conditioning.

Shape letters in this file:
    B batch   C latent channels   F frames   H, W latent height and width   P position channels
    S condition tokens   E condition width
"""

import math
from functools import lru_cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    WanTransformer3DModel,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from decoders.denoising import denoise

NUM_POSITION_CHANNELS = 12
"""Channels that :func:`position_channels` returns."""


@lru_cache(maxsize=8)
def position_channels(frames: int, height: int, width: int) -> Tensor:
    """Return constant channels that tell every cell where it is.

    Rotary embeddings only tell relative positions; "top left" and "moves to the right" need absolute
    ones, so these channels are concatenated to the noisy latents. For each coordinate x, y, t (cell
    centres, in (0, 1)) there are four channels: sin and cos of ``pi * c``, sin and cos of ``2 * pi * c``.

    Returns:
        ``(12, F, H, W)`` float32 in [-1, 1]. The tensor is shared; do not write into it.

    """
    shape = (frames, height, width)
    channels = []
    with torch.inference_mode(False):  # the kept tensor may be made while serving and used in training
        for axis in (2, 1, 0):
            size = shape[axis]
            centres = (torch.arange(size, dtype=torch.float32) + 0.5) / size
            view = [1, 1, 1]
            view[axis] = size
            centres = centres.view(view).expand(shape)  # (F, H, W)
            for turns in (math.pi, 2 * math.pi):
                channels += [torch.sin(turns * centres), torch.cos(turns * centres)]
        return torch.stack(channels)  # (P, F, H, W)


def predict_with_positions(transformer: Any, latents: Tensor, timestep: Tensor, conditions: Tensor) -> Tensor:
    """Run ``transformer`` on latents with the position channels appended.

    Args:
        transformer: a WanTransformer3DModel with ``in_channels`` = C + 12 and ``out_channels`` = C.
        latents: ``(B, C, F, H, W)``.
        timestep: a scalar, or one per row ``(B,)``.
        conditions: ``(B, S, E)`` text states.

    Returns:
        ``(B, C, F, H, W)``, in the scheduler's prediction type.

    """
    positions = position_channels(*latents.shape[2:]).to(latents)  # (P, F, H, W)
    positions = positions.expand(len(latents), -1, -1, -1, -1)
    predicted: Tensor = transformer(
        torch.cat([latents, positions], dim=1),
        timestep.to(latents.device).expand(len(latents)),
        conditions,
        return_dict=False,
    )[0]
    return predicted


class TextToVideoTransformerPipeline(DiffusionPipeline):
    """Text to video with a Wan-style transformer on the latents of an image autoencoder.

    The parts are those of TextToVideoSDPipeline with ``transformer`` in place of ``unet``. The sizes of
    the latents it was trained on are saved in ``model_index.json``.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        transformer: WanTransformer3DModel,
        scheduler: DDIMScheduler | DPMSolverMultistepScheduler | EulerDiscreteScheduler,
        sample_size: int = 8,
        num_frames: int = 8,
        fps: float = 8.0,
    ) -> None:
        super().__init__()
        config: Any = transformer.config  # type: ignore[attr-defined]
        channels, positioned = config.out_channels, config.in_channels
        if positioned != channels + NUM_POSITION_CHANNELS:
            raise ValueError(
                f"The transformer takes {positioned} channels and gives {channels}; expected "
                f"{channels + NUM_POSITION_CHANNELS} in, {NUM_POSITION_CHANNELS} of them position channels."
            )
        self.register_modules(  # type: ignore[no-untyped-call]
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
        )
        sizes = {"sample_size": sample_size, "num_frames": num_frames, "fps": fps}
        self.register_to_config(**sizes)  # type: ignore[no-untyped-call]

    def encode_prompt(self, prompt: list[str]) -> Tensor:
        """Return the last hidden states ``(B, S, E)`` of the text encoder."""
        inputs = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        states: Tensor = self.text_encoder(inputs.input_ids.to(self.device))[0]
        return states

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        num_inference_steps: int = 12,
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        output_type: str = "np",
    ) -> Any:
        """Make one video per prompt.

        Returns:
            ``output_type`` "np": float32 ``(B, F, 8 H, 8 W, 3)`` in [0, 1]; "latent": the scaled latents
            ``(B, C, F, H, W)``.

        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        states = self.encode_prompt([*prompts, ""])  # (B + 1, S, E)
        saved: Any = self.config
        size, frames = saved.sample_size, saved.num_frames
        shape = (len(prompts), self.transformer.config.out_channels, frames, size, size)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(states)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        bar = self.progress_bar(total=num_inference_steps)
        with bar:
            latents = denoise(
                lambda batch, timestep, conditions: predict_with_positions(
                    self.transformer, batch, timestep, conditions
                ),
                scheduler,
                noise,
                states[:-1],
                states[-1],
                steps=num_inference_steps,
                guidance=[guidance_scale] * len(prompts),
                on_step=lambda done, total: bar.update(),
            )
        if output_type == "latent":
            return latents
        flat = latents.transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor  # (B * F, C, H, W)
        images = (self.vae.decode(flat).sample / 2 + 0.5).clamp(0, 1)
        videos = images.permute(0, 2, 3, 1).float().cpu().numpy()
        return videos.reshape(len(prompts), frames, *videos.shape[1:])
