"""What a diffusers pipeline is conditioned on, from the configurations in its folder alone.

No weights are read: a projection can be sized, and its memory known, before a pipeline is downloaded.
The first tensor of a layout is the main one. A mask has one row: 1 where the main tensor has a real token.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from decoders.condition import ConditionSpec

ReadJson = Callable[[str], Mapping[str, Any]]
"""Returns the JSON object in a file of the pipeline's folder."""

MAIN = "prompt_embeds"
KLEIN_LAYERS = 3
"""Layers of the text encoder whose states FLUX.2 klein puts side by side."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """The configurations of one pipeline."""

    name: str
    read: ReadJson

    def number(self, file: str, *names: str) -> int:
        """Return the first of ``names`` that the JSON in ``file`` has as a whole number above 0."""
        values = self.read(file)
        for name in names:
            value = values.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9:
                return value
        raise ValueError(
            f"{file} of this {self.name} gives no number for {' or '.join(names)}. Copy the file again."
        )

    def width(self, part: str) -> int:
        """Return the width of the states of a text encoder."""
        return self.number(f"{part}/config.json", "hidden_size", "d_model", "n_embd")

    def projected(self, part: str) -> int:
        """Return the width of the vector of a CLIP with a projection."""
        return self.number(f"{part}/config.json", "projection_dim")

    def length(self, tokenizer: str = "tokenizer") -> int:
        """Return to how many tokens a tokenizer fills up."""
        return self.number(f"{tokenizer}/tokenizer_config.json", "model_max_length")

    def usual_length(self) -> int:
        """Return to how many tokens the pipeline fills up, unless it is told another number."""
        pipeline = getattr(importlib.import_module("diffusers"), self.name)
        default = inspect.signature(pipeline.__call__).parameters["max_sequence_length"].default
        return int(default)


Layout = dict[str, ConditionSpec]


def _tokens(tokens: int, width: int) -> Layout:
    return {MAIN: ConditionSpec(tokens=tokens, width=width)}


def _pooled(width: int) -> Layout:
    return {"pooled_prompt_embeds": ConditionSpec(tokens=1, width=width, pooled=True)}


def _mask(name: str, tokens: int) -> Layout:
    return {name: ConditionSpec(tokens=1, width=tokens)}


def _clip(parts: _Parts) -> Layout:
    return _tokens(parts.length(), parts.width("text_encoder"))


def _two_clips(parts: _Parts) -> Layout:
    width = parts.width("text_encoder") + parts.width("text_encoder_2")
    return _tokens(parts.length(), width) | _pooled(parts.projected("text_encoder_2"))


def _two_clips_and_t5(parts: _Parts) -> Layout:
    tokens = parts.length() + parts.usual_length()
    pooled = parts.projected("text_encoder") + parts.projected("text_encoder_2")
    width = parts.number("transformer/config.json", "joint_attention_dim")  # T5 may have been left out
    return _tokens(tokens, width) | _pooled(pooled)


def _clip_vector_and_t5(parts: _Parts) -> Layout:
    return _tokens(parts.usual_length(), parts.width("text_encoder_2")) | _pooled(parts.width("text_encoder"))


def _t5(parts: _Parts) -> Layout:
    return _tokens(parts.usual_length(), parts.width("text_encoder"))


def _t5_and_mask(parts: _Parts) -> Layout:
    return _t5(parts) | _mask("prompt_attention_mask", parts.usual_length())


def _layers_of_a_language_model(parts: _Parts) -> Layout:
    return _tokens(parts.usual_length(), KLEIN_LAYERS * parts.width("text_encoder"))


def _short_t5(parts: _Parts) -> Layout:
    return _tokens(parts.length(), parts.width("text_encoder")) | _mask("attention_mask", parts.length())


def _t5_and_gpt2(parts: _Parts) -> Layout:
    tokens = parts.length("tokenizer_2")
    said = parts.number("language_model/config.json", "max_new_tokens")
    spoken = ConditionSpec(tokens=said, width=parts.width("language_model"))
    return (
        _tokens(tokens, parts.width("text_encoder_2"))
        | {"generated_prompt_embeds": spoken}
        | _mask("attention_mask", tokens)
    )


_LAYOUTS: Mapping[str, Callable[[_Parts], Layout]] = {
    "AnimateDiffPipeline": _clip,
    "AudioLDM2Pipeline": _t5_and_gpt2,
    "CogVideoXPipeline": _t5,
    "Flux2KleinPipeline": _layers_of_a_language_model,
    "FluxPipeline": _clip_vector_and_t5,
    "LTXPipeline": _t5_and_mask,
    "StableAudioPipeline": _short_t5,
    "StableDiffusion3Pipeline": _two_clips_and_t5,
    "StableDiffusionPipeline": _clip,
    "StableDiffusionXLPipeline": _two_clips,
    "TextToVideoSDPipeline": _clip,
    "WanPipeline": _t5,
}

_WANTED: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "AnimateDiffPipeline": {MAIN: ("unet", "cross_attention_dim")},
    "CogVideoXPipeline": {MAIN: ("transformer", "text_embed_dim")},
    "Flux2KleinPipeline": {MAIN: ("transformer", "joint_attention_dim")},
    "FluxPipeline": {
        MAIN: ("transformer", "joint_attention_dim"),
        "pooled_prompt_embeds": ("transformer", "pooled_projection_dim"),
    },
    "LTXPipeline": {MAIN: ("transformer", "caption_channels")},
    "StableAudioPipeline": {MAIN: ("projection_model", "text_encoder_dim")},
    "StableDiffusion3Pipeline": {"pooled_prompt_embeds": ("transformer", "pooled_projection_dim")},
    "StableDiffusionPipeline": {MAIN: ("unet", "cross_attention_dim")},
    "StableDiffusionXLPipeline": {MAIN: ("unet", "cross_attention_dim")},
    "TextToVideoSDPipeline": {MAIN: ("unet", "cross_attention_dim")},
    "WanPipeline": {MAIN: ("transformer", "text_dim")},
}
"""Where the networks say which width they take, for holding the text encoders against them."""


def condition_layout(pipeline_class: str, read: ReadJson) -> Layout:
    """Return the tensors that a pipeline is conditioned on, by the names of its arguments.

    Args:
        pipeline_class: the name in ``model_index.json``.
        read: gives the JSON object in a file of the folder, such as ``text_encoder/config.json``.

    Returns:
        The main tensor first; nothing for a class whose layout is not known here, such as one that takes
        words alone.

    Raises:
        ValueError: a configuration lacks a number, or text encoder and network disagree about the width.

    """
    found = _LAYOUTS.get(pipeline_class)
    if found is None:
        return {}
    parts = _Parts(pipeline_class, read)
    layout = found(parts)
    for name, (part, key) in _WANTED.get(pipeline_class, {}).items():
        wanted = parts.number(f"{part}/config.json", key)
        if layout[name].width != wanted:
            raise ValueError(
                f"The text encoders of this {pipeline_class} give {name} of width {layout[name].width}, "
                f"its {part} takes {wanted}. The parts do not belong together; copy the whole pipeline again."
            )
    return layout
