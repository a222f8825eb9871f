"""A request with nothing left open, and what comes of it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoders.condition import Condition, digest
from decoders.denoising import steps_run
from decoders.lora import DecoderLora
from decoders.settings import DecodeSettings
from decoders.untouched import values_of
from encoders.media import Medium


@dataclass(frozen=True, eq=False, slots=True)
class Decoded:
    """A medium and how it was made: enough to make it again with the same weights and condition."""

    medium: Medium
    manifest: dict[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """One request with every choice made; made by :meth:`LatentDecoder.plan`.

    ``settings`` have seed, steps, guidance and scheduler, and with a ``source`` a strength; ``shape`` is that
    of the latents, ``source`` and ``lora`` are those of :meth:`LatentDecoder.decode`, and so is ``original``,
    fitted to the size.
    """

    condition: Condition
    settings: DecodeSettings
    shape: tuple[int, ...]
    source: Tensor | None
    lora: DecoderLora | None = None
    original: Medium | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be the same for requests that take every step together."""
        wishes = self.settings
        own = (self.source is None, self.strength, self.deep_every, self.lora)
        return (self.shape, wishes.steps, wishes.scheduler, *own)

    @property
    def strength(self) -> float:
        """The share of the schedule that runs."""
        return self.settings.strength or 1.0

    @property
    def steps(self) -> int:
        """Denoising steps that will run."""
        return steps_run(self.settings.steps or 1, self.strength)

    @property
    def deep_every(self) -> int:
        """In every how many steps deep features are computed; 1 is always."""
        return self.settings.deep_every or 1

    @property
    def rows(self) -> int:
        """Rows that a step takes in the network: 2 with guidance, else 1."""
        return 2 if (self.settings.guidance_scale or 0) > 1 else 1

    def manifest(self) -> dict[str, Any]:
        """Return what of a manifest the request decides."""
        manifest: dict[str, Any] = {
            "seed": self.settings.seed,
            "scheduler": self.settings.scheduler,
            "steps": self.settings.steps,
            "guidance_scale": self.settings.guidance_scale,
            "condition": digest(self.condition.embeddings),
        }
        if self.deep_every > 1:
            manifest["deep_every"] = self.deep_every
        if self.lora is not None:
            manifest["lora"] = {"name": self.lora.name, "digest": self.lora.digest}
        if self.source is not None:
            manifest |= {"source": digest(self.source), "strength": self.strength}
        if self.original is not None:
            manifest["original"] = digest(torch.tensor(values_of(self.original)))
            if self.condition.copied:
                manifest["copied"] = True
        return manifest
