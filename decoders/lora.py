"""LoRA on a denoising network for as long as a request wants it.

The network stays as it is. Hooks on its linear and convolutional layers add the low-rank product of the
LoRA that is worn; who wears one puts it on for a step, and takes it off afterwards.

Shape letters in this file:
    I inputs and O outputs of a layer   r rank   ... kernel of a convolution, nothing for a linear layer
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

DIFFUSERS_WEIGHTS, PEFT_WEIGHTS, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
_METADATA = "lora_adapter_metadata"
_NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


@dataclass(frozen=True, eq=False, slots=True)
class DecoderLora:
    """Low-rank products by the name of the layer that they are added to.

    ``factors`` are down ``(r, I, ...)`` and up ``(O, r, ...)``, the scale already in ``up``. ``digest``
    names the content.
    """

    name: str
    digest: str
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return sum(half.nbytes for pair in self.factors.values() for half in pair)

    def to(self, device: torch.device | str) -> DecoderLora:
        """Return it on ``device``."""
        moved = {layer: (down.to(device), up.to(device)) for layer, (down, up) in self.factors.items()}
        return replace(self, factors=moved)


Renamed = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Gives the tensors of a file the names that diffusers has for them."""


def read_decoder_lora(
    name: str,
    folder: Path,
    network: nn.Module,
    dtype: torch.dtype,
    *,
    part: str = "unet",
    renamed: Renamed | None = None,
) -> DecoderLora:
    """Read LoRA on the CPU, and hold it against the network that it is for.

    Args:
        name: what requests call it.
        folder: with ``pytorch_lora_weights.safetensors`` as diffusers pipelines save it, or with
            ``adapter_model.safetensors`` and ``adapter_config.json`` as peft does.
        network: the denoising network. Its linear and convolutional layers can be adapted.
        dtype: of the factors.
        part: what the network is called in its pipeline.
        renamed: for files of diffusers' layout whose names are those of another program.

    Raises:
        ValueError: a file is missing or broken; it is no plain LoRA of that network; or a layer, a rank or a
            shape is not as this network and the configuration say.

    """
    path, state, config = _read(folder, part, renamed)
    factors = {}
    for layer, pair in _halves(path, state).items():
        module = _layer(path, layer, network)
        rank = len(pair["A"])
        expected_rank = _pattern(config, "rank_pattern", layer, config.get("r", rank))
        if isinstance(module, nn.Linear):
            down: tuple[int, ...] = (expected_rank, module.in_features)
            up: tuple[int, ...] = (module.out_features, expected_rank)
        else:
            down = (expected_rank, *module.weight.shape[1:])
            up = (len(module.weight), expected_rank, *[1] * len(module.kernel_size))
        for letter, expected in (("A", down), ("B", up)):
            given = tuple(pair[letter].shape)
            if given != expected:
                raise ValueError(
                    f"{path}: lora_{letter} of {layer} has shape {given}; expected {expected} for rank "
                    f"{expected_rank} on this network's layer. Use an adapter that was trained for it."
                )
            if not bool(pair[letter].isfinite().all()):
                raise ValueError(f"{path}: lora_{letter} of {layer} holds NaN or infinity.")
        alpha = _pattern(config, "alpha_pattern", layer, config.get("lora_alpha", rank))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        factors[layer] = pair["A"].to(dtype), (pair["B"].float() * scale).to(dtype)
    content = json.dumps(config, sort_keys=True).encode() + path.read_bytes()
    return DecoderLora(name, hashlib.sha256(content).hexdigest()[:16], factors)


def _read(folder: Path, part: str, renamed: Renamed | None) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Return the file of weights, its tensors by layer, and what is known of rank and scale."""
    paths = [folder / DIFFUSERS_WEIGHTS, folder / PEFT_WEIGHTS]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"{folder} holds neither {DIFFUSERS_WEIGHTS} nor {PEFT_WEIGHTS}; expected LoRA in one of "
            f"them. Convert a pickle with `patchbay convert pickles`."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if path.name == PEFT_WEIGHTS:
        if not (folder / PEFT_CONFIG).is_file():
            raise ValueError(f"{folder / PEFT_CONFIG} is missing; expected it beside {PEFT_WEIGHTS}.")
        config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        prefix = "base_model.model."
    else:
        packed = json.loads(metadata.get(_METADATA, "{}"))
        prefix = f"{part}."
        config = {key.removeprefix(prefix): value for key, value in packed.items()}
        if renamed is not None:
            state = renamed(state)
    if foreign := sorted(name for name in state if not name.startswith(prefix)):
        raise ValueError(
            f"{path} holds {foreign[0]}; expected names that begin with {prefix}: here the {part} alone is "
            f"adapted, and what conditions it comes from the language model. Load other forms into "
            f"diffusers' pipeline, and save that part's LoRA with save_lora_weights({part}_lora_layers=...)."
        )
    state = {name.removeprefix(prefix).replace(".processor.", "."): tensor for name, tensor in state.items()}
    if not any(".lora_A" in name for name in state):
        state = convert_unet_state_dict_to_peft(state)
    unusual = [key for key in ("use_dora", "lora_bias", "modules_to_save") if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA" or unusual:
        raise ValueError(
            f"{folder} asks for {', '.join(unusual) or config['peft_type']}; expected plain LoRA, which is "
            f"all that can be added per request. Train it without."
        )
    return path, state, {key: value for key, value in config.items() if value is not None}


def _halves(path: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if (found := _NAME.fullmatch(name)) is None:
            raise ValueError(
                f"{path} holds {name}; expected <layer>.lora_A.weight and <layer>.lora_B.weight only. Load "
                f"it into diffusers' pipeline and save it again with save_lora_weights."
            )
        halves.setdefault(found["layer"], {})[found["half"]] = tensor
    for layer, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(
                f"{path} has only lora_{''.join(pair)} of {layer}; expected A and B of each layer."
            )
    if not halves:
        raise ValueError(f"{path} is empty; expected lora_A and lora_B of at least one layer.")
    return halves


def _layer(path: Path, name: str, network: nn.Module) -> Any:
    module = dict(network.named_modules()).get(name)
    if isinstance(module, nn.Linear) or (type(module) in _CONVOLUTIONS and cast(Any, module).groups == 1):
        return module
    kind = "nothing" if module is None else f"a {type(module).__name__}"
    usual = [layer for layer, module in network.named_modules() if layer.endswith(".to_q")]
    raise ValueError(
        f"{path} is for {name}, and this {type(network).__name__} has {kind} there; expected linear or "
        f"convolutional layers, such as {next(iter(usual), 'those of its blocks')}. Use an adapter that was "
        f"trained for this decoder."
    )


def _pattern(config: Mapping[str, Any], pattern: str, layer: str, usual: Any) -> Any:
    values: dict[str, Any] = config.get(pattern) or {}
    return values.get(get_pattern_key(list(values), layer), usual)


def expect_named(named: str | None, lora: DecoderLora | None) -> None:
    """Raise ValueError unless the settings of a request name the LoRA that is given."""
    given = lora.name if lora else None
    if named != given:
        raise ValueError(
            f"The settings name the LoRA {named!r}, and {given!r} was given; expected the same. Give what "
            f"read_lora() returns for it."
        )


class WornLora:
    """Lets a network wear LoRA. One thread at a time."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._hooked: set[str] = set()
        self._worn: DecoderLora | None = None

    @property
    def nothing(self) -> bool:
        """Whether the network is as it is without LoRA."""
        return self._worn is None

    @contextmanager
    def wearing(self, lora: DecoderLora | None) -> Iterator[None]:
        """Let every call of the network in this context have ``lora``."""
        if lora is not None:
            for name in lora.factors.keys() - self._hooked:
                self._network.get_submodule(name).register_forward_hook(partial(self._added, name))
                self._hooked.add(name)
        self._worn = lora
        try:
            yield
        finally:
            self._worn = None

    def _added(self, name: str, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._worn is None or name not in self._worn.factors:
            return output
        down, up = self._worn.factors[name]
        x = args[0].to(down.dtype)
        if isinstance(layer, nn.Linear):
            product = F.linear(F.linear(x, down), up)
        else:
            convolve = _CONVOLUTIONS[type(layer)]
            shape = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            product = convolve(convolve(x, down, **shape), up)
        return output + product.to(output.dtype)
