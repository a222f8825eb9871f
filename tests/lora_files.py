"""LoRA with random numbers, in the layouts of peft and of diffusers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel


def write_lm_lora(base: PreTrainedModel, folder: Path, seed: int, **changes: Any) -> dict[str, Tensor]:
    """Write LoRA for ``base``, which gets none itself; return what it adds to each weight."""
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    wrapped, added = fresh_lora(base, LoraConfig(task_type="CAUSAL_LM", **{**settings, **changes}), seed)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    wrapped.unload()
    return added


def write_unet_lora(
    unet: nn.Module, folder: Path, seed: int, peft_layout: bool = False, **changes: Any
) -> dict[str, Tensor]:
    """Write LoRA for ``unet``, which gets none itself; return what it adds to each weight."""
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_out.0", "conv1"]}
    config = LoraConfig(**{**settings, **changes})
    wrapped, added = fresh_lora(unet, config, seed)
    if peft_layout:
        wrapped.save_pretrained(folder)
    else:
        state = get_peft_model_state_dict(wrapped)
        layers = {name.removeprefix("base_model.model."): value for name, value in state.items()}
        metadata = {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "target_modules": sorted(config.target_modules or ()),
        }
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
        )
    wrapped.unload()
    return added


def add_to(module: nn.Module, added: dict[str, Tensor]) -> None:
    """Add what LoRA adds into the weights themselves."""
    with torch.no_grad():
        for name, delta in added.items():
            module.get_parameter(name).add_(delta)


def change_tensors(path: Path, change: Any) -> None:
    """Let ``change`` edit the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def fresh_lora(module: nn.Module, config: LoraConfig, seed: int) -> tuple[Any, dict[str, Tensor]]:
    """Wrap ``module`` with random LoRA; return it, and what that adds to each weight."""
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped: Any = get_peft_model(module, config)  # type: ignore[arg-type]
    added = {}
    for name, layer in wrapped.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            for half in (layer.lora_A, layer.lora_B):
                weight = half["default"].weight.data
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
            added[f"{name}.weight"] = layer.get_delta_weight("default").detach().clone()
    return wrapped, added
