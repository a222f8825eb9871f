"""LoRA that single requests ask for: rows of one pass may have different ones, or none.

The base stays as it is. Hooks on its linear layers add to each row of a pass what that row's LoRA says; so it
comes on top of whatever such a layer computes: plain, quantised, or with LoRA of the model's own.

Shape letters in this file:
    B rows of a pass   T positions of a pass   I inputs and O outputs of a layer   r rank
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from llm.adapters import is_adapter_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_UNUSUAL = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of peft with which LoRA is more than a low-rank product beside a linear layer."""


@dataclass(frozen=True, eq=False, slots=True)
class RequestLora:
    """Low-rank products by the name of the layer that they are added to.

    ``factors`` are down ``(r, I)`` and up ``(O, r)``, the scale already in ``up``. ``digest`` names the
    content: what was computed with one is not what another would have computed.
    """

    name: str
    digest: str
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return sum(half.nbytes for pair in self.factors.values() for half in pair)

    def to(self, device: torch.device | str) -> RequestLora:
        """Return it on ``device``."""
        moved = {layer: (down.to(device), up.to(device)) for layer, (down, up) in self.factors.items()}
        return replace(self, factors=moved)


def read_request_lora(name: str, folder: Path, lm: nn.Module, dtype: torch.dtype) -> RequestLora:
    """Read LoRA in peft's layout, on the CPU, and hold it against the model that it is for.

    Args:
        name: what requests call it.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        lm: the causal LM. Its linear layers can be adapted, but not its head.
        dtype: of the factors.

    Raises:
        ValueError: a file is missing or broken; it is no plain LoRA; or a layer, a rank or a shape is not
            as this model and the configuration say.

    """
    config = _read_config(folder / CONFIG)
    content = _read(folder / WEIGHTS, "convert a pickle with `patchbay convert pickles`")
    halves = _halves(folder / WEIGHTS, content)
    layers = dict(_adaptable(lm))
    factors = {}
    for layer, (down, up) in halves.items():
        if layer not in layers:
            raise ValueError(
                f"{folder / WEIGHTS} is for {layer}, which this model does not have or which cannot be "
                f"adapted per request. Expected linear layers such as {next(iter(layers), 'none')}, whose "
                f"names end in {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}. Use an "
                f"adapter that was trained on {type(lm).__name__}."
            )
        inputs, outputs = layers[layer]
        rank, alpha = (
            float(config[pattern].get(get_pattern_key(list(config[pattern]), layer), config[usual]))
            for pattern, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        for letter, half, expected in (("A", down, (rank, inputs)), ("B", up, (outputs, rank))):
            if tuple(half.shape) != expected:
                raise ValueError(
                    f"{folder / WEIGHTS}: lora_{letter} of {layer} has shape {tuple(half.shape)}; expected "
                    f"({expected[0]:g}, {expected[1]:g}): rank {rank:g} by {CONFIG}, and this model's layer "
                    f"has {inputs} inputs and {outputs} outputs. Use an adapter that was trained for it."
                )
            if not bool(half.isfinite().all()):
                raise ValueError(f"{folder / WEIGHTS}: lora_{letter} of {layer} holds NaN or infinity.")
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        factors[layer] = down.to(dtype), (up.float() * scale).to(dtype)
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        if not any(layer == target or layer.endswith(f".{target}") for layer in halves):
            raise ValueError(
                f"{folder / WEIGHTS} has no tensors for {target}, which {CONFIG} names in target_modules. "
                f"Copy the whole adapter again."
            )
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + content).hexdigest()
    return RequestLora(name, digest[:16], factors)


def _read_config(path: Path) -> dict[str, Any]:
    content = _read(path, "an adapter in peft's layout has one")
    try:
        config = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(
            f"{path} describes {kind!r}; expected peft_type LORA. Only LoRA is added per request."
        )
    usual = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}
    config = usual | {key: value for key, value in config.items() if value is not None}
    unusual = [key for key in _UNUSUAL if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        unusual.append(f"init_lora_weights {start!r}")  # these begin by changing the base
    if config.get("bias", "none") != "none":
        unusual.append(f"bias {config['bias']!r}")
    if unusual:
        raise ValueError(
            f"{path} asks for {', '.join(unusual)}; expected plain LoRA on linear layers, which is all that "
            f"can be added per request. Train it without, or merge it into the base."
        )
    return config


def _read(path: Path, hint: str) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path} is missing; {hint}.")
    return path.read_bytes()


def _halves(path: Path, content: bytes) -> dict[str, tuple[Tensor, Tensor]]:
    try:
        tensors: dict[str, Tensor] = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (found := _NAME.fullmatch(name)) is None:
            raise ValueError(
                f"{path} holds {name}; expected base_model.model.<layer>.lora_A.weight and lora_B.weight "
                f"only. Save it again with peft's save_pretrained."
            )
        halves.setdefault(found["layer"], {})[found["half"]] = tensor
    for layer, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(
                f"{path} has only lora_{''.join(pair)} of {layer}; expected A and B of each layer."
            )
    if not halves:
        raise ValueError(f"{path} is empty; expected lora_A and lora_B of at least one layer.")
    return {layer: (pair["A"], pair["B"]) for layer, pair in halves.items()}


def _adaptable(lm: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name, inputs and outputs of the linear layers in the blocks of ``lm``, whatever their class."""
    blocks = getattr(lm, "base_model", lm)
    inside = {id(module) for module in blocks.modules()}
    for name, module in lm.named_modules():
        if id(module) not in inside or is_adapter_name(name) or re.search(r"\.(base_layer|lora_\w+)\b", name):
            continue
        inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if inputs is None:  # GPT-2's linear layer
            inputs, outputs = getattr(module, "nx", None), getattr(module, "nf", None)
        if isinstance(inputs, int) and isinstance(outputs, int):
            yield name, (inputs, outputs)


class LoraRows:
    """Adds to each row of a pass what its LoRA says. One thread at a time."""

    def __init__(self, lm: nn.Module) -> None:
        self._lm = lm
        self._hooked: set[str] = set()
        self._plan: list[tuple[RequestLora, Tensor | None]] = []
        self._num_rows = 0

    @contextmanager
    def over(self, rows: Sequence[RequestLora | None]) -> Iterator[None]:
        """Let the passes in this context have ``rows``, one entry per row of theirs."""
        places: dict[RequestLora, list[int]] = {}
        for row, lora in enumerate(rows):
            if lora is not None:
                places.setdefault(lora, []).append(row)
        for lora, at in places.items():
            self._hook(lora)
            device = next(iter(lora.factors.values()))[0].device
            index = None if len(at) == len(rows) else torch.tensor(at, device=device)
            self._plan.append((lora, index))
        self._num_rows = len(rows)
        try:
            yield
        finally:
            self._plan = []

    def _hook(self, lora: RequestLora) -> None:
        for name in lora.factors.keys() - self._hooked:
            self._lm.get_submodule(name).register_forward_hook(partial(self._added, name))
            self._hooked.add(name)

    def _added(self, name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for lora, rows in self._plan:
            if name not in lora.factors:
                continue
            if len(args[0]) != self._num_rows:  # experts, for instance, see tokens and not rows
                raise ValueError(
                    f"The adapter {lora.name!r} is for {name}, which sees {len(args[0])} entries in a pass "
                    f"of {self._num_rows} rows; expected one entry per row. Train it without that layer."
                )
            down, up = lora.factors[name]
            x = args[0] if rows is None else args[0].index_select(0, rows)  # (B, T, I)
            product = F.linear(F.linear(x.to(down.dtype), down), up).to(output.dtype)  # (B, T, O)
            output = output + product if rows is None else output.index_add(0, rows, product)
        return output
