"""LoRA for pipelines that run as a whole: which network wears it, and what diffusers calls its layers.

Pipelines of many classes know LoRA that other programs saved under names of their own. How those are spelled
in diffusers, the pipeline's own class says; nothing is loaded into the pipeline.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decoders.lora import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS, DecoderLora, read_decoder_lora

NETWORKS = ("unet", "transformer")
"""What the denoising network of a pipeline is called."""


def denoising_network(pipeline: Any) -> tuple[str, nn.Module] | None:
    """Return the network that takes the steps of ``pipeline``, and its name; None if it has none of ours."""
    found = ((name, getattr(pipeline, name, None)) for name in NETWORKS)
    return next(((name, network) for name, network in found if isinstance(network, nn.Module)), None)


def read_pipeline_lora(name: str, folder: Path, pipeline: Any, dtype: torch.dtype) -> DecoderLora:
    """Read LoRA for the denoising network of a pipeline; see :func:`decoders.lora.read_decoder_lora`.

    ``pytorch_lora_weights.safetensors`` may have the names of any program that diffusers' own loader of the
    class knows; the layout of peft has the network's own.

    Raises:
        ValueError: as there; or the class has no such loader, or no network that could wear it.

    """
    kind = type(pipeline).__name__
    found = denoising_network(pipeline)
    if found is None:
        raise ValueError(
            f"the LoRA {name!r} in {folder} is for a {kind}, which has none of {', '.join(NETWORKS)} to wear "
            f"it. Merge it into the pipeline's folder instead."
        )
    part, network = found
    if (folder / DIFFUSERS_WEIGHTS).is_file() and not hasattr(pipeline, "lora_state_dict"):
        raise ValueError(
            f"{folder / DIFFUSERS_WEIGHTS} is for a {kind}, for which diffusers has no LoRA loader; expected "
            f"{PEFT_WEIGHTS} beside adapter_config.json, as peft saves it for the {part} alone."
        )
    renamed = partial(_renamed, pipeline, part)
    return read_decoder_lora(name, folder, network, dtype, part=part, renamed=renamed)


def _renamed(pipeline: Any, part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under diffusers' names, with the scales that the file told apart from them."""
    of_a_unet = {"unet_config": pipeline.unet.config} if part == "unet" else {}
    named, *alphas, _ = type(pipeline).lora_state_dict(dict(state), return_lora_metadata=True, **of_a_unet)
    found: dict[str, Tensor] = dict(named)
    for key, alpha in ((alphas[0] if alphas else None) or {}).items():
        down = key.removesuffix(".alpha")
        up = down.replace("down.weight", "up.weight")
        found[up] = found[up] * (float(alpha) / len(found[down]))
    return found
