"""How a signal of the language model becomes what a decoder is conditioned on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from decoders.condition import Condition, ConditionSpec
from decoders.latent_decoder import LatentDecoder
from decoders.projection import OutputProjection, OutputProjectionConfig
from decoders.text_readers import round_mask
from decoders.whole_pipeline import WholePipeline
from services.boxes import SpokenSignal
from services.loading import LOADING


class Link(Protocol):
    """Turns a signal into a condition of the shape that its decoder takes."""

    def condition(self, signal: SpokenSignal) -> Condition:
        """Return the condition for one medium."""
        ...


class SignalLink:
    """NExT-GPT's: the hidden states go through a trained output projection."""

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, ConditionSpec],
        device: str = "cpu",
        training: str = "patchbay train bridge",
    ) -> None:
        """Load the projection of ``folder``; ``training`` is the command that makes one for this decoder."""
        self.projection = OutputProjection.from_pretrained(folder, device)
        self.device = device
        self.specs = dict(specs)
        given = self.projection.config
        wanted = OutputProjectionConfig.for_decoder(specs, given.llm_width)
        if _shapes(given) != _shapes(wanted):
            raise ValueError(
                f"{folder} projects to {_shapes(given)}; its decoder expects {_shapes(wanted)}. Put the "
                f"projection there that was trained for it, or train one: `{training}`."
            )

    def condition(self, signal: SpokenSignal) -> Condition:
        """Project the states of the signal block."""
        hidden = torch.tensor(signal.hidden, device=self.device)[None]
        embeddings = torch.tensor(signal.embeddings, device=self.device)[None]
        with torch.inference_mode():
            main, others = self.projection.project(hidden, embeddings)
            copied = bool(self.projection.copy_logits(hidden) > 0)
        named = {name: self._fitted(name, tensor[0].clone()) for name, tensor in others.items()}
        return Condition(main[0].clone(), named, copied=copied)

    def _fitted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("mask"):
            return round_mask(tensor)
        return tensor[0] if self.specs[name].pooled else tensor


def _shapes(config: OutputProjectionConfig) -> str:
    others = "".join(f", {name} ({tokens}, {width})" for name, (tokens, width) in config.named.items())
    return f"({config.num_queries}, {config.out_width}){others}"


class CaptionLink:
    """The baseline: the words before the medium go through the decoder's own text encoder."""

    def __init__(self, decoder: LatentDecoder | WholePipeline) -> None:
        self.decoder = decoder

    def condition(self, signal: SpokenSignal) -> Condition:
        """Encode the caption; the first one may load the text encoder."""
        with LOADING:
            return self.decoder.encode_caption(signal.caption)
