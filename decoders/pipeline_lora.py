"""LoRA for pipelines that run as a whole: which network wears it, and what diffusers calls its layers.

Pipelines of many classes know LoRA that other programs saved under names of their own. How those are spelled
in diffusers, the pipeline's own class says; nothing is loaded into the pipeline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from decoders.lora import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS, DecoderLora, read_decoder_lora

NETWORKS = ("unet", "transformer", "transformer_2")
"""What the denoising networks of a pipeline are called; few have a second, for the last of the noise."""


def denoising_networks(pipeline: Any) -> dict[str, nn.Module]:
    """Return the networks that take the steps of ``pipeline``, by name; none where it has none of ours."""
    found = ((name, getattr(pipeline, name, None)) for name in NETWORKS)
    return {name: network for name, network in found if isinstance(network, nn.Module)}


def wearer(networks: Mapping[str, nn.Module]) -> nn.Module:
    """Return what wears the LoRA of :func:`read_pipeline_lora`: the one network, or all of them by name."""
    return nn.ModuleDict(networks) if len(networks) > 1 else next(iter(networks.values()))


def read_pipeline_lora(name: str, folder: Path, pipeline: Any, dtype: torch.dtype) -> DecoderLora:
    """Read LoRA for the denoising networks of a pipeline; see :func:`decoders.lora.read_decoder_lora`.

    ``pytorch_lora_weights.safetensors`` may have the names of any program that diffusers' own loader of the
    class knows; the layout of peft has the network's own. Of a pipeline with two networks, one file may hold
    LoRA for both, under the names that the networks have there, or each lies in a folder of such a name; what
    has neither is for the first.

    Raises:
        ValueError: as there; or the class has no such loader, or no network that could wear it.

    """
    kind, networks = type(pipeline).__name__, denoising_networks(pipeline)
    if not networks:
        raise ValueError(
            f"the LoRA {name!r} in {folder} is for a {kind}, which has none of {', '.join(NETWORKS)} to wear "
            f"it. Merge it into the pipeline's folder instead."
        )
    read = {}
    for part, (own, called) in _places(folder, networks).items():
        if (own / DIFFUSERS_WEIGHTS).is_file() and not hasattr(pipeline, "lora_state_dict"):
            raise ValueError(
                f"{own / DIFFUSERS_WEIGHTS} is for a {kind}, for which diffusers has no LoRA loader; "
                f"expected {PEFT_WEIGHTS} beside adapter_config.json, as peft saves it for the {part} alone."
            )
        renamed = partial(_renamed, pipeline, called, [*networks] if own == folder else [called])
        read[part] = read_decoder_lora(name, own, networks[part], dtype, part=called, renamed=renamed)
    return next(iter(read.values())) if len(networks) == 1 else _joined(name, read)


def _places(folder: Path, networks: Mapping[str, nn.Module]) -> dict[str, tuple[Path, str]]:
    """Return, by network, the folder of its LoRA and what the file there calls the network."""
    first, *others = networks
    if apart := [part for part in networks if others and (folder / part).is_dir()]:
        return {part: (folder / part, first) for part in apart}
    named = [part for part in networks if part in _parts_named(folder / DIFFUSERS_WEIGHTS)]
    return {part: (folder, part) for part in named or [first]}


def _parts_named(path: Path) -> set[str]:
    """Return how the names of tensors begin; nothing where the file cannot be read, which reading it says."""
    try:
        with safe_open(path, "pt") as file:
            return {name.split(".")[0] for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return set()


def _joined(name: str, read: Mapping[str, DecoderLora]) -> DecoderLora:
    """Return the LoRA of several networks as one, for :func:`wearer`."""
    factors = {f"{part}.{layer}": pair for part, lora in read.items() for layer, pair in lora.factors.items()}
    digests = ",".join(f"{part}:{lora.digest}" for part, lora in read.items())
    return DecoderLora(name, hashlib.sha256(digests.encode()).hexdigest()[:16], factors)


def _renamed(pipeline: Any, part: str, parts: Sequence[str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under diffusers' names, with the scales that the file told apart from them.

    Those of other ``parts`` are left out.
    """
    of_a_unet = {"unet_config": pipeline.unet.config} if part == "unet" else {}
    named, *alphas, _ = type(pipeline).lora_state_dict(dict(state), return_lora_metadata=True, **of_a_unet)
    found: dict[str, Tensor] = dict(named)
    for key, alpha in ((alphas[0] if alphas else None) or {}).items():
        down = key.removesuffix(".alpha")
        up = down.replace("down.weight", "up.weight")
        found[up] = found[up] * (float(alpha) / len(found[down]))
    others = tuple(f"{other}." for other in parts if other != part)
    return {key: value for key, value in found.items() if not key.startswith(others)}
