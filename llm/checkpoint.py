"""The files of a language model folder, and what is wrong with them when something is.

base/                 the causal LM and its tokenizer, as ``from_pretrained`` reads them
adapter/              LoRA, in peft's layout (absent without LoRA)
bridge.safetensors    projectors, signal rows, parameters of adapters
bridge.json           what the bridge was trained for
tables.safetensors    embedding and head of the base's own tokens, in place of those in base/ (seldom there)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from encoders.media import Modality
from llm.adapters import is_adapter_name
from llm.projectors import ProjectorConfig
from llm.role_words import RoleWords
from llm.signals import SignalVocabulary

BASE, ADAPTER = "base", "adapter"
MANIFEST, BRIDGE, TABLES = "bridge.json", "bridge.safetensors", "tables.safetensors"
_UNTRUE_OF_THE_MODEL = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")


class Manifest(BaseModel):
    """``bridge.json``: which base the bridge belongs to, and the sizes of its parts.

    ``base_config_sha256`` is None where the base was not at hand when the bridge was converted; then
    ``base_config``, what is known of its ``config.json``, tells a wrong one. ``base_tables`` says that there
    is a ``tables.safetensors``. ``role_words`` None stands for role tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    base_config_sha256: str | None
    base_config: dict[str, int | str] = Field(default_factory=dict, exclude_if=lambda known: not known)
    llm_width: int
    base_vocabulary: int
    added_tokens: list[str]
    signals: dict[str, int]
    projectors: dict[Modality, dict[str, Any]]
    lora: bool
    base_tables: bool = False
    role_words: RoleWords | None = None

    @property
    def signal_vocabulary(self) -> SignalVocabulary:
        """The signal vocabulary."""
        return SignalVocabulary(**self.signals)

    @property
    def projector_configs(self) -> dict[Modality, ProjectorConfig]:
        """The configuration of each projector."""
        return {modality: ProjectorConfig(**config) for modality, config in self.projectors.items()}

    @staticmethod
    def describe(projectors: Mapping[Modality, ProjectorConfig]) -> dict[Modality, dict[str, Any]]:
        """Return the form in which projectors are written down."""
        return {modality: asdict(config) for modality, config in projectors.items()}


def config_digest(base: Path) -> str:
    """Return the SHA-256 of a base's ``config.json``, but for what may differ between equal models."""
    path = base / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected the folder of a causal language model.")
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in _UNTRUE_OF_THE_MODEL}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path, base: Path | None = None) -> Manifest:
    """Read ``bridge.json`` and hold it against the base: the one beside it, or ``base``.

    Raises:
        ValueError: the file is missing or malformed, or was written for another base.

    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected a language model folder with {BASE}/ and {MANIFEST}.")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is not a bridge manifest: {error}") from error
    base = base or folder / BASE
    digest = config_digest(base)
    if manifest.base_config_sha256 not in (None, digest):
        raise ValueError(
            f"{path} was written for a base whose config has SHA-256 {manifest.base_config_sha256}; "
            f"{base} has {digest}. Put the base there that the bridge was trained on, or train a bridge to "
            f"this one with `patchbay train bridge --part language_model`."
        )
    given = json.loads((base / "config.json").read_text())
    for name, expected in manifest.base_config.items():
        if given.get(name) != expected:
            raise ValueError(
                f"{base / 'config.json'} has {name} {given.get(name)}; {path} was written for a base with "
                f"{expected}. Put the base there that the bridge was trained on, or convert again with "
                f"--base, which also compares the weights."
            )
    return manifest


def load_base(base: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal LM from a local folder of safetensors.

    Raises:
        ValueError: no weights, or a tensor that is missing or has another shape than the config says.

    """
    if not any(base.glob("*.safetensors")):
        raise ValueError(f"{base / 'model.safetensors'} is missing; expected the weights of the base there.")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # so that the message below is ours
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"The weights in {base} are not whole safetensors: {error}") from error
    model: PreTrainedModel
    info: dict[str, Any]
    model, info = loaded
    for name, given, expected in sorted(info["mismatched_keys"]):
        raise ValueError(_shape_message(base, name, tuple(given), tuple(expected)))
    if info["missing_keys"]:
        raise ValueError(f"The weights in {base} lack {', '.join(sorted(info['missing_keys']))}.")
    return model


def replace_tables(model: PreTrainedModel, path: Path, num_rows: int) -> None:
    """Put the first ``num_rows`` rows of embedding and head from ``path``, as safetensors, into ``model``.

    Raises:
        ValueError: the file is missing or broken, or holds tensors of other names or shapes.

    """
    embedding = cast(Tensor, model.get_input_embeddings().weight)
    head = cast(Tensor, model.get_output_embeddings().weight)
    rows = {"embedding": embedding[:num_rows], "head": head[:num_rows]}
    tables = load_tensors(path, rows)
    with torch.no_grad():
        for name, table in tables.items():
            rows[name].copy_(table)


def save_base(model: PreTrainedModel, base: Path, dtype: torch.dtype) -> None:
    """Write ``model`` without LoRA and adapters as ``from_pretrained`` reads it, floats in ``dtype``."""
    converted: dict[int, Tensor] = {}  # tied tensors stay tied

    def convert(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return converted.setdefault(tensor.data_ptr(), tensor.detach().to(dtype))

    state = {
        name.replace(".base_layer.", "."): convert(tensor)
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name and not is_adapter_name(name)
    }
    model.save_pretrained(base, state_dict=state)
    path = base / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    """Write ``tensors`` as safetensors, in ``dtype``; None keeps that of each."""
    save_file({name: t.detach().to(dtype or t.dtype).contiguous().cpu() for name, t in tensors.items()}, path)


def load_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read safetensors that must have exactly the names and shapes of ``expected``; floats become its dtypes.

    Raises:
        ValueError: the file is missing or broken, or a tensor is missing, foreign or of another shape.

    """
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{path} lacks the tensors {', '.join(missing)}.")
    if foreign := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{path} holds the tensors {', '.join(foreign)}, which this model has no place for.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(_shape_message(path, name, tuple(tensor.shape), tuple(expected[name].shape)))
    return {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}


def _shape_message(path: Path, name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return f"{path}: {name} has shape {given}; expected {expected}. The file belongs to another model."
