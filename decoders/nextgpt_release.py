"""The output projections' share of NExT-GPT's checkpoints: names, shapes, and our folders from them.

The 2023 code's modules load under their own names; the 2024 rewrite's differ in the names of the two
outer layers. The pictures' width differs too: 768 for Stable Diffusion 1.5, 1024 for 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from decoders.projection import OutputProjection, OutputProjectionConfig
from encoders.media import Modality

RELEASED = {
    Modality.IMAGE: OutputProjectionConfig(llm_width=4096, out_width=768, num_queries=77),
    Modality.VIDEO: OutputProjectionConfig(llm_width=4096, out_width=1024, num_queries=77),
    Modality.AUDIO: OutputProjectionConfig(llm_width=4096, out_width=512, num_queries=1),
}
"""Sizes of ``nextgpt_7b_tiva_v0``: conditions for Stable Diffusion 1.5, Zeroscope v2 and AudioLDM."""

REWRITTEN = RELEASED | {Modality.IMAGE: replace(RELEASED[Modality.IMAGE], out_width=1024)}
"""Sizes of the 2024 rewrite, of which no weights were published."""

_MODULES = {
    "gen_text_hidden_fcs.0": Modality.IMAGE,
    "gen_text_hidden_fcs_video.0": Modality.VIDEO,
    "gen_text_hidden_fcs_audio.0": Modality.AUDIO,
}
_REWRITTEN_MODULES = {
    "mm_output_img_projector": Modality.IMAGE,
    "mm_output_vid_projector": Modality.VIDEO,
    "mm_output_aud_projector": Modality.AUDIO,
}
_REWRITTEN_LAYERS = {"in_fc": "fc", "out_fc": "model"}


def plain_name(name: str) -> str:
    """Return ``<modality>.<name in OutputProjection>`` for a tensor of either code, else ``name`` itself."""
    for module, modality in _MODULES.items():
        if name.startswith(f"{module}."):
            return f"{modality}.{name.removeprefix(f'{module}.')}"
    inner = name.removeprefix("base_model.model.").removeprefix("model.")
    module, _, rest = inner.partition(".")
    if module in _REWRITTEN_MODULES:
        layer, dot, last = rest.partition(".")
        return f"{_REWRITTEN_MODULES[module]}.{_REWRITTEN_LAYERS.get(layer, layer)}{dot}{last}"
    return name


def released_shapes(
    configs: Mapping[Modality, OutputProjectionConfig],
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of all tensors by :func:`plain_name`, in one group per projection."""
    groups = {}
    for modality, config in configs.items():
        with torch.device("meta"):
            state = OutputProjection(config).state_dict()
        groups[f"{modality} output projection"] = {
            f"{modality}.{name}": tuple(value.shape) for name, value in state.items()
        }
    return groups


def write_folders(
    tensors: Mapping[str, Tensor], folder: Path, configs: Mapping[Modality, OutputProjectionConfig]
) -> None:
    """Write one folder per projection that ``tensors`` have, in their dtype.

    ``tensors`` have been checked against :func:`released_shapes`.
    """
    for modality, config in configs.items():
        prefix = f"{modality}."
        state = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
        if state:
            with torch.device("meta"):
                projection = OutputProjection(config)
            projection.load_state_dict(state, assign=True)
            projection.save_pretrained(folder / modality)
