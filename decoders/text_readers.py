"""Captions read as whole pipelines for sound read them, where ``encode_prompt`` returns something else.

A short caption is filled up with zeros that the mask hides, so that all conditions of a decoder have one
shape.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decoders.condition_layouts import MAIN, Layout

Reader = Callable[[Any, str, Layout, torch.device], dict[str, Tensor]]
"""(pipeline, caption, layout, device of its text encoders) -> the tensors of the layout, those of guidance
under ``negative_`` names."""


def _audioldm2(pipeline: Any, caption: str, layout: Layout, device: torch.device) -> dict[str, Tensor]:
    states, mask, spoken = pipeline.encode_prompt(caption, device, 1, False)
    lacking = layout[MAIN].tokens - states.shape[1]
    found = {
        MAIN: F.pad(states[0], (0, 0, 0, lacking)),
        "generated_prompt_embeds": spoken[0],
        "attention_mask": F.pad(mask[0], (0, lacking)),
    }
    return found | {f"negative_{name}": tensor for name, tensor in found.items()}


def _stable_audio(pipeline: Any, caption: str, layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Read the states before the pipeline's projection, which it makes itself; guidance is from zeros."""
    inputs = pipeline.tokenizer(
        caption, padding="max_length", max_length=layout[MAIN].tokens, truncation=True, return_tensors="pt"
    ).to(device)
    states = pipeline.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
    return {MAIN: states[0] * inputs.attention_mask[0][:, None], "attention_mask": inputs.attention_mask[0]}


READERS: Mapping[str, Reader] = {"AudioLDM2Pipeline": _audioldm2, "StableAudioPipeline": _stable_audio}


def round_mask(mask: Tensor) -> Tensor:
    """Return a projected mask ``(1, tokens)`` as a row of 0 and 1 with at least one 1."""
    present = mask[0] > 0.5
    present[0] = True
    return present.to(torch.long)
