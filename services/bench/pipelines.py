"""The diffusers pipelines that decoders are held against, over the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AudioLDMPipeline, StableDiffusionPipeline, TextToVideoSDPipeline

from decoders.condition import Condition
from decoders.denoising import make_scheduler
from decoders.latent_decoder import LatentDecoder
from decoders.pipeline_folder import PipelineFolder
from decoders.settings import DecodeSettings
from decoders.video import USUAL_FPS
from encoders.media import Audio, Image, Medium, Modality, Video

CAPTION = "a big red bell"

Call = Callable[[Condition, int], Any]
"""A pipeline with its settings: (condition, seed) -> what the pipeline returns."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What a pipeline is put together from; ``vocoder`` is for sounds alone."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    vocoder: Any


def parts_of(decoder: LatentDecoder) -> Parts:
    """Return the very networks of a decoder."""
    decoder.embed_captions([""])  # loads the text encoder
    owner: Any = decoder
    tokenizer, text_encoder = owner._text
    return Parts(owner._network, owner.vae, text_encoder, tokenizer, getattr(owner, "vocoder", None))


def parts_from_disk(folder: PipelineFolder, like: Parts) -> Parts:
    """Read all networks again, as ``from_pretrained`` of a pipeline does."""
    vocoder = None if like.vocoder is None else folder.model("vocoder", type(like.vocoder))
    return Parts(
        folder.model("unet", type(like.unet)),
        folder.autoencoder(),
        folder.model("text_encoder", type(like.text_encoder)),
        folder.tokenizer(),
        vocoder,
    )


def pipeline(decoder: LatentDecoder, parts: Parts, settings: DecodeSettings | None = None) -> Call:
    """Put the pipeline of a decoder's folder together; it is given text states, like the decoder.

    What ``settings`` leave open follows the decoder's defaults.
    """
    null = decoder.embed_captions([""])
    plan = decoder.plan(Condition(null[0].cpu()), settings)
    chosen = plan.settings
    made: Any
    options: dict[str, Any] = {
        "num_inference_steps": chosen.steps,
        "guidance_scale": chosen.guidance_scale,
    }
    sizes = {"width": chosen.width_px, "height": chosen.height_px}
    shared: dict[str, Any] = {
        "unet": parts.unet,
        "vae": parts.vae,
        "text_encoder": parts.text_encoder,
        "tokenizer": parts.tokenizer,
        "scheduler": make_scheduler(decoder.folder.scheduler_config(), chosen.scheduler or ""),
    }
    match decoder.modality:
        case Modality.IMAGE:
            rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            made = StableDiffusionPipeline(**shared, **rest)
            options |= sizes
        case Modality.AUDIO:
            made = AudioLDMPipeline(**shared, vocoder=parts.vocoder)
            options["audio_length_in_s"] = chosen.duration_s or decoder.defaults.duration_s
        case _:
            made = TextToVideoSDPipeline(**shared)
            options |= {**sizes, "num_frames": plan.shape[1]}
    made.set_progress_bar_config(disable=True)

    def call(condition: Condition, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        prompt = condition.embeddings[None].to(null)
        negative = null
        if decoder.modality is Modality.AUDIO:
            prompt, negative = torch.nn.functional.normalize(prompt[:, 0], dim=-1), null[:, 0]
        return made(prompt_embeds=prompt, negative_prompt_embeds=negative, generator=generator, **options)

    return call


def medium_of(modality: Modality, output: Any, decoder: LatentDecoder) -> Medium:
    """Return what a pipeline made as the value that is written to a file."""
    owner: Any = decoder
    match modality:
        case Modality.IMAGE:
            return Image(np.asarray(output.images[0]))
        case Modality.AUDIO:
            return Audio(output.audios[0].clip(-1, 1), int(owner.vocoder.config.sampling_rate))
        case _:
            pixels = (np.asarray(output.frames[0]) * 255).round().astype(np.uint8)
            return Video(pixels, decoder.defaults.fps or USUAL_FPS)
