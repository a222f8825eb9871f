"""A pipeline's folder of which only the configurations are read: its networks hold random numbers, or none.

For what depends on shapes alone: counting on the meta device, and measuring speed.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from decoders.pipeline_folder import AUTOENCODERS, PipelineFolder

USUAL_CAPTION_TOKENS = 77

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
"""The noise schedule that Stable Diffusion 1.5, Zeroscope and AudioLDM share."""


class ConfiguredFolder(PipelineFolder):
    """Builds what :class:`PipelineFolder` loads."""

    def model(self, part: str, model_class: Any) -> Any:
        """Build the part ``part`` with random weights; on the meta device, with none."""
        values = self.json(f"{part}/config.json")
        usual = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                if hasattr(model_class, "config_class") and model_class.config_class is not None:
                    built = model_class(model_class.config_class.from_dict(values))
                else:
                    built = model_class.from_config(values)
        finally:
            torch.set_default_dtype(usual)
        module = nn.Module.to(built, self.dtype)  # that of diffusers has something to say about dtypes
        return module.eval().requires_grad_(False)

    def autoencoder(self) -> Any:
        """Build the part ``vae``."""
        return self.model("vae", AUTOENCODERS[self.class_of("vae")])

    def scheduler_config(self) -> dict[str, Any]:
        """Return the schedule that the published pipelines share."""
        scheduler: Any = DDIMScheduler(**SCHEDULE)
        return dict(scheduler.config)

    def saved_null(self) -> Tensor | None:
        """Return an unconditional embedding of zeros, of the shape that the text encoder would give."""
        config = self.json("unet/config.json")
        is_audio = self.pipeline_class == "AudioLDMPipeline"
        width = config["projection_class_embeddings_input_dim" if is_audio else "cross_attention_dim"]
        tokens = 1 if is_audio else self._caption_tokens()
        return torch.zeros(tokens, int(width), dtype=self.dtype, device=self.device)

    def digest(self, part: str = "") -> str:
        """Return no digest: random weights are different every time."""
        return "random"

    def _caption_tokens(self) -> int:
        if not (self.path / "text_encoder" / "config.json").is_file():
            return USUAL_CAPTION_TOKENS
        return int(self.json("text_encoder/config.json").get("max_position_embeddings", USUAL_CAPTION_TOKENS))
