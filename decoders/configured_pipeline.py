"""A whole pipeline of which only the configurations are read, to count what it takes to make one medium.

Its networks are on the meta device; text encoders are left out, as conditions come from elsewhere, and
instead of its scheduler there is one that takes one step and computes next to nothing.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from decoders.condition import ConditionSpec
from decoders.condition_layouts import condition_layout
from decoders.pipeline_arguments import argument_names
from decoders.settings import DecodeSettings


class ConfiguredPipeline:
    """Runs a pipeline without weights.

    Raises:
        ValueError: the installed diffusers has no such pipeline, or it is conditioned on words.

    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        index = self._json("model_index.json")
        name = str(index.get("_class_name"))
        kind = getattr(diffusers, name, None)
        if kind is None:
            raise ValueError(f"{folder} holds a {name}; diffusers {diffusers.__version__} has none such.")
        self._layout = condition_layout(name, self._json)
        if not self._layout:
            raise ValueError(f"A {name} is conditioned on words; what its text encoders take is not counted.")
        self._takes = inspect.signature(kind.__call__).parameters
        wanted = inspect.signature(kind.__init__).parameters
        self._pipeline = kind(**{part: self._part(part, index[part]) for part in wanted if part in index})
        self._pipeline.set_progress_bar_config(disable=True)

    def use_vae(self, how: str) -> None:
        """Choose how latents become pictures, as :meth:`WholePipeline.use_vae` does."""
        for name, wanted in (("enable_slicing", how != "whole"), ("enable_tiling", how == "tiled")):
            if wanted and not hasattr(self._pipeline.vae, name):
                raise ValueError(f"{self.folder}: the VAE of this pipeline knows no {name}.")
            if wanted:
                getattr(self._pipeline.vae, name)()

    def work(self, settings: DecodeSettings) -> Callable[[], None]:
        """Return what makes one medium in one step, once its conditions are there.

        It raises ValueError where the pipeline looks into numbers, as there are none.
        """
        arguments: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        guided = (settings.guidance_scale or 0) > 1
        for name, spec in self._layout.items():
            arguments[name] = self._condition(name, spec)
            if guided and f"negative_{name}" in self._takes:
                arguments[f"negative_{name}"] = self._condition(name, spec)
        for setting, argument in argument_names(self._takes).items():
            value = 1 if setting == "steps" else getattr(settings, setting, None)
            if argument is not None and value is not None:
                arguments[argument] = value

        def make() -> None:
            try:
                self._pipeline(**arguments)
            except (RuntimeError, NotImplementedError) as error:
                raise ValueError(
                    f"{self.folder}: a {type(self._pipeline).__name__} looks into its numbers and cannot be "
                    f"counted without them: {error}"
                ) from error

        return make

    def _part(self, name: str, entry: Any) -> Any:
        if not isinstance(entry, list):
            return entry
        if name == "scheduler":
            return OneStep()
        if not entry[1] or name.startswith(("text_encoder", "tokenizer")):
            return None
        kind = getattr(diffusers, entry[1], None)
        if kind is None or not hasattr(kind, "from_config"):
            raise ValueError(f"{self.folder} has a {entry[1]} as {name}, which is not counted.")
        with torch.device("meta"):
            return nn.Module.to(kind.from_config(self._json(f"{name}/config.json")), self.dtype).eval()

    def _condition(self, name: str, spec: ConditionSpec) -> Tensor:
        if name.endswith("mask"):
            return torch.ones(1, spec.width, dtype=torch.long, device="meta")
        shape = (spec.width,) if spec.pooled else (spec.tokens, spec.width)
        return torch.zeros(1, *shape, dtype=self.dtype, device="meta")

    def _json(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        return values


class OneStep:
    """Stands for any scheduler: one step, from noise to what the network says."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self) -> None:
        self.config = _Config(num_train_timesteps=1000, prediction_type="epsilon")
        self.timesteps = self.sigmas = torch.zeros(1)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        """Plan the step."""
        self.timesteps, self.sigmas = torch.zeros(1, device=device), torch.zeros(2)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Do nothing: there is one step to begin with."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the latents as they are."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        """Take the step."""
        latents = sample - model_output
        return SimpleNamespace(prev_sample=latents) if return_dict else (latents,)


class _Config(SimpleNamespace):
    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)
