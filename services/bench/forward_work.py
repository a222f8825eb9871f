"""What forward passes take, counted without numbers, and what a device allows: least seconds for each.

Operations are counted as PyTorch's dispatcher sees them, on the meta device where nobody wants results. Bytes
are those of weights and caches, each read once; activations are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decoders.condition import Condition
from decoders.latent_decoder import LatentDecoder
from decoders.settings import DecodeSettings
from encoders.imagebind_encoder import TOWER_OF, ImageBindEncoder
from encoders.media import Modality
from services.working_memory import encoder_work

MEMORY, COMPUTE = "memory-bandwidth limit", "compute limit"


@dataclass(frozen=True)
class Device:
    """What a device can do at most.

    Bytes per second from its own memory and over the link from the host's, operations per second, and how
    many bytes its memory has; None where that is not known.
    """

    name: str
    bytes_per_s: float
    flop_per_s: float
    link_bytes_per_s: float
    memory_bytes: float | None = None


GPUS = {
    "h200": Device("NVIDIA H200 SXM", 4.8e12, 989e12, 64e9, 141e9),
    "h100": Device("NVIDIA H100 SXM", 3.35e12, 989e12, 64e9, 80e9),
    "a100": Device("NVIDIA A100 SXM 80 GB", 2.039e12, 312e12, 32e9, 80e9),
    "l40s": Device("NVIDIA L40S", 0.864e12, 362e12, 32e9, 48e9),
    "l4": Device("NVIDIA L4", 0.3e12, 121e12, 32e9, 24e9),
}
"""From the makers' data sheets: memory bandwidth, dense bfloat16 with sums in float32, PCIe one way."""


@dataclass(frozen=True)
class Work:
    """What something takes: operations, and bytes of weights and cache that must be read."""

    flop: float
    bytes: float

    def times(self, count: int) -> Work:
        """Return what ``count`` of it take in one batch: the operations of all, the weights read once."""
        return Work(count * self.flop, self.bytes)

    def limits(self, device: Device) -> dict[str, float]:
        """Return the seconds that each of the two limits allows, by the limit's name."""
        return {COMPUTE: self.flop / device.flop_per_s, MEMORY: self.bytes / device.bytes_per_s}

    def least_s(self, device: Device) -> float:
        """Return the seconds of the limit that binds."""
        return max(self.limits(device).values())


def step_work(base: Any, streams: int, position: int, fed: int = 1) -> Work:
    """Return what the language model takes to feed ``fed`` tokens to each of ``streams`` replies.

    Weights are read once for all streams, the cache of each reply once; the table of input
    embeddings is not read, but looked up.
    """
    config = base.config
    ids = torch.zeros(1, fed, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, fed, fed, dtype=base.dtype, device="meta")  # transformers would look into it
    flop = _flop(lambda: base(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False))
    table = base.get_input_embeddings().weight
    tied = table is base.get_output_embeddings().weight
    item = table.element_size()
    weights = sum(p.numel() for p in base.parameters()) - (0 if tied else table.numel())
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * shared * head * position * item
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head * position * fed
    return Work(streams * (flop + attention), weights * item + streams * cache)


def medium_work(decoder: LatentDecoder, wish: DecodeSettings) -> Work:
    """Return what one medium takes: all its steps with guidance, and the way from latents to pixels."""
    owner: Any = decoder
    spec = decoder.condition_spec
    plan = decoder.plan(Condition(torch.zeros(spec.tokens, spec.width)), wish)
    device, dtype = decoder.folder.device, decoder.folder.dtype
    rows = int(plan.rows)
    latents = torch.empty(rows, *plan.shape, dtype=dtype, device=device)
    conditions = torch.empty(rows, spec.tokens, spec.width, dtype=dtype, device=device)
    times = torch.empty(rows, device=device)
    a_step = _flop(lambda: owner._predict(latents, times, conditions))
    finish = _flop(lambda: decoder.finish(latents[:1]))
    network = _size(owner._network)
    last = _size(owner.vae.decoder) + (_size(owner.vocoder) if hasattr(owner, "vocoder") else 0)
    return Work(plan.steps * a_step + finish, float(plan.steps * network + last))


def reading_work(encoder: ImageBindEncoder) -> dict[Modality, Work]:
    """Return what the encoder takes to read a picture, a video and a sound."""
    model = encoder.model
    works: dict[Modality, Work] = {}
    passes = encoder_work(model, encoder.preprocessing)
    for modality, read in zip((Modality.IMAGE, Modality.VIDEO, Modality.AUDIO), passes, strict=True):
        tower = TOWER_OF[modality]
        parts = (model.modality_preprocessors, model.modality_trunks, model.modality_heads)
        works[modality] = Work(_flop(read), float(sum(_size(part[tower]) for part in parts)))
    return works


def _flop(work: Callable[[], object]) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
