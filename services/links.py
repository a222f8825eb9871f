"""How a signal of the language model becomes what a decoder is conditioned on."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from decoders.condition import Condition, ConditionSpec
from decoders.latent_decoder import LatentDecoder
from decoders.projection import OutputProjection
from decoders.whole_pipeline import WholePipeline
from services.boxes import SpokenSignal


class Link(Protocol):
    """Turns a signal into a condition of the shape that its decoder takes."""

    def condition(self, signal: SpokenSignal) -> Condition:
        """Return the condition for one medium."""
        ...


class SignalLink:
    """NExT-GPT's: the hidden states go through a trained output projection."""

    def __init__(self, folder: Path, spec: ConditionSpec, device: str = "cpu") -> None:
        self.projection = OutputProjection.load(folder, device)
        self.device = device
        config = self.projection.config
        if (config.num_queries, config.out_width) != (spec.tokens, spec.width):
            raise ValueError(
                f"{folder} projects to ({config.num_queries}, {config.out_width}); its decoder expects "
                f"({spec.tokens}, {spec.width}). Put the projection there that was trained for the decoder."
            )

    def condition(self, signal: SpokenSignal) -> Condition:
        """Project the states of the signal block."""
        hidden = torch.tensor(signal.hidden, device=self.device)[None]
        embeddings = torch.tensor(signal.embeddings, device=self.device)[None]
        with torch.inference_mode():
            projected = self.projection(hidden, embeddings)[0]
        return Condition(projected.clone())


class CaptionLink:
    """The baseline: the words before the medium go through the decoder's own text encoder."""

    def __init__(self, decoder: LatentDecoder | WholePipeline) -> None:
        self.decoder = decoder

    def condition(self, signal: SpokenSignal) -> Condition:
        """Encode the caption."""
        return self.decoder.encode_caption(signal.caption)
