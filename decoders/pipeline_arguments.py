"""What the ``__call__`` of a diffusers pipeline calls the things that are asked of it."""

import inspect
from collections.abc import Mapping, Sequence

from encoders.media import Modality

Parameters = Mapping[str, inspect.Parameter]

ENCODED: Mapping[str, tuple[str, ...]] = {
    "AnimateDiffPipeline": ("prompt_embeds", "negative_prompt_embeds"),
    "CogVideoXPipeline": ("prompt_embeds", "negative_prompt_embeds"),
    "Flux2KleinPipeline": ("prompt_embeds", "text_ids"),
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", "text_ids"),
    "LTXPipeline": (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ),
    "PixArtSigmaPipeline": (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ),
    "StableDiffusion3Pipeline": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "StableDiffusionPipeline": ("prompt_embeds", "negative_prompt_embeds"),
    "StableDiffusionXLPipeline": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "WanPipeline": ("prompt_embeds", "negative_prompt_embeds"),
}
"""What ``encode_prompt`` of a class returns, mostly by the names that its ``__call__`` takes.

A class that is neither here nor in :mod:`decoders.text_readers` is conditioned on words: it encodes them anew
for each request.
"""

WITHOUT_TEXT_ENCODERS = (*ENCODED, "StableAudioPipeline")
"""Classes whose ``__call__`` needs no text encoder where it is given all embeddings.

AudioLDM 2 is none of them: it asks its text encoders for their dtype and kind even then.
"""

SELF_GUIDED = ("Flux2KleinPipeline",)
"""Classes that encode the empty caption anew for each guided medium, unless they are given its embeddings."""

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "steps": ("num_inference_steps",),
    "guidance_scale": ("guidance_scale", "true_cfg_scale"),
    "width_px": ("width",),
    "height_px": ("height",),
    "num_frames": ("num_frames", "video_length"),
    "duration_s": ("audio_length_in_s", "audio_end_in_s", "audio_duration", "duration"),
    "fps": ("frame_rate", "fps"),
}
"""What the settings are called in diffusers.

Of the names that a pipeline has, the first with a number for its default counts, or else the first.
"""


def argument_names(takes: Parameters) -> dict[str, str | None]:
    """Return what each setting is called among the parameters ``takes``; None if there is nothing like it."""
    return {setting: _name_of(names, takes) for setting, names in ARGUMENTS.items()}


def modality_of(names: Mapping[str, str | None]) -> Modality:
    """Return what a pipeline with these :func:`argument_names` makes."""
    if names["num_frames"]:
        return Modality.VIDEO
    return Modality.AUDIO if names["duration_s"] else Modality.IMAGE


def _name_of(names: Sequence[str], takes: Parameters) -> str | None:
    known = [name for name in names if name in takes]
    numbers = [name for name in known if isinstance(takes[name].default, int | float)]
    return next(iter(numbers or known), None)
