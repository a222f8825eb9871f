"""Text to video with a U-Net of pictures that sees all frames of a clip at once, stacked as channels.

Shape letters in this file:
    B batch   C latent channels   F frames   H, W latent height and width
    S condition tokens   E condition width
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from decoders.denoising import denoise


def predict_stacked(
    unet: Any, latents: Tensor, timestep: Tensor, conditions: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Predict the clean clip.

    The network only adds to what it is given: ``skip(t) * latents`` passes by it, as in Karras et al.
    2022 (arXiv 2206.00364, section 5), since so many stacked channels do not fit through a narrow network.
    But what passes by is noise, too, and taking it away again means carrying it through. So this
    skip falls off much faster than theirs: ``a (1 - s)**6`` for signal ``a`` and noise ``s``. It keeps
    what is almost clean, and lets no grain through where a ground is the same all over.

    Args:
        unet: a UNet2DConditionModel with ``in_channels`` = ``out_channels`` = C * F.
        latents: ``(B, C, F, H, W)`` at noise level ``timestep``.
        timestep: a scalar, or one per row ``(B,)``.
        conditions: ``(B, S, E)`` text states.
        alphas_cumprod: the noise schedule, one value per training timestep.

    Returns:
        ``(B, C, F, H, W)``: the predicted clean latents (prediction type ``sample``).

    """
    B, C, F = latents.shape[:3]
    steps = timestep.to(latents.device).expand(B)
    made = unet(latents.flatten(1, 2), steps, conditions, return_dict=False)[0].unflatten(1, (C, F))
    signal = alphas_cumprod.to(latents)[steps.long()]  # (B,)
    skip = signal.sqrt() * (1 - (1 - signal).sqrt()) ** 6
    predicted: Tensor = made + skip.view(-1, 1, 1, 1, 1) * latents
    return predicted


class TextToStackedVideoPipeline(DiffusionPipeline):
    """Text to video of a fixed number of frames on the latents of an image autoencoder.

    The parts are those of TextToVideoSDPipeline, with a picture's U-Net over C * F stacked channels. The
    sizes of the latents it was trained on are saved in ``model_index.json``.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"  # type: ignore[assignment]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler | DPMSolverMultistepScheduler | EulerDiscreteScheduler,
        sample_size: int = 8,
        num_frames: int = 8,
        fps: float = 8.0,
    ) -> None:
        super().__init__()
        parts: tuple[Any, Any, Any] = (unet, vae, scheduler)
        stacked, latent, schedule = (part.config for part in parts)
        expected = latent.latent_channels * num_frames
        if (stacked.in_channels, stacked.out_channels) != (expected, expected):
            raise ValueError(
                f"The U-Net takes {stacked.in_channels} channels and gives {stacked.out_channels}; expected "
                f"{expected} of both: {num_frames} frames of {latent.latent_channels} latent channels."
            )
        if schedule.prediction_type != "sample":
            raise ValueError(
                f"The scheduler expects {schedule.prediction_type!r}; expected 'sample', which is what "
                f"the U-Net predicts here."
            )
        self.register_modules(  # type: ignore[no-untyped-call]
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
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
        shape = (len(prompts), self.vae.config.latent_channels, frames, size, size)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(states)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        bar = self.progress_bar(total=num_inference_steps)
        with bar:
            latents = denoise(
                lambda batch, timestep, conditions: predict_stacked(
                    self.unet, batch, timestep, conditions, scheduler.alphas_cumprod
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
