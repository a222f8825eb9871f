"""Low-rank adaptation of the base, by peft."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from llm.adapters import is_adapter_name
from llm.checkpoint import load_tensors, save_tensors

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BASE_FROM_HERE = "../base"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraOptions:
    """Low-rank adaptation of the base (Hu et al. 2021, arXiv 2106.09685), by peft.

    The defaults are NExT-GPT's: rank 32, scale ``alpha / rank`` of 1, the four attention projections.
    ``targets`` are ends of module names and differ between architectures.
    """

    rank: int = 32
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


def put_lora(base: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """Put fresh LoRA on ``base``, in place. Modules of adapters are left alone.

    Raises:
        ValueError: a target is no module of the base.

    """
    config = _config(options)
    config.exclude_modules = [name for name, _ in base.named_modules() if is_adapter_name(name)] or None
    return _wrapped(base, config)


def _config(options: LoraOptions) -> LoraConfig:
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        task_type="CAUSAL_LM",
    )


def _wrapped(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():
        # peft 0.21 asks for a property under the name that it had before transformers 5.23.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return cast(PeftModel, get_peft_model(base, config))


def save_lora(model: PeftModel, folder: Path, dtype: torch.dtype) -> None:
    """Write the LoRA of ``model`` in peft's layout."""
    config = cast(LoraConfig, model.peft_config["default"])
    _write(get_peft_model_state_dict(model, save_embedding_layers=False), config, folder, dtype)


def write_lora(state: Mapping[str, Tensor], options: LoraOptions, folder: Path) -> None:
    """Write LoRA that no model holds, in its own dtypes.

    ``state`` has peft's names, ``base_model.model.*.lora_A.weight``.
    """
    _write(state, _config(options), folder, None)


def _write(state: Mapping[str, Tensor], config: LoraConfig, folder: Path, dtype: torch.dtype | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = _BASE_FROM_HERE
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    config.save_pretrained(str(folder))
    save_tensors(state, folder / _WEIGHTS, dtype)


def load_lora(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the LoRA of ``folder`` on ``base``.

    Raises:
        ValueError: a file is missing, or a tensor is missing, foreign or of another shape.

    """
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"{folder / _CONFIG} is missing; the manifest says that this model has LoRA.")
    config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
    config.base_model_name_or_path = base.name_or_path
    config.inference_mode = False
    model = _wrapped(base, config)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    set_peft_model_state_dict(model, load_tensors(folder / _WEIGHTS, expected))
    return model
