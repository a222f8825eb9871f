"""The encode box in this process, with a thread of its own.

The model is loaded at the first use, or by :meth:`LocalEncoder.load`.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from encoders.media import MediaBudget, Modality, read_media
from services.artefacts import ArtefactStore
from services.boxes import Encoded
from services.errors import BadRequest
from services.loading import loading
from services.presets import Preset
from services.worker import Worker

if TYPE_CHECKING:
    from encoders.encoder import Encoder


class LocalEncoder:
    """Reads media from the store and encodes them."""

    def __init__(self, preset: Preset, store: ArtefactStore) -> None:
        self.preset = preset
        self.store = store
        self.budget: MediaBudget = preset.limits.media.budget()
        self.worker: Worker[Encoded] = Worker("encoder")
        self.encoder: Encoder | None = None

    def load(self) -> Encoder:
        """Return the encoder; its weights are loaded unless they are loaded already."""
        import torch

        from encoders.encoder import load_encoder

        if self.encoder is None:
            with loading("encoder"):
                dtype = getattr(torch, self.preset.encoder.dtype or "float32")
                self.encoder = load_encoder(self.preset.encoder_folder, self.preset.device, dtype)
        return self.encoder

    async def encode(self, artefact_id: str, expect: Modality | None) -> Encoded:
        """Read the artefact and encode it."""
        async with aclosing(
            self.worker.stream(lambda emit, stop: emit(self._run(artefact_id, expect)))
        ) as out:
            async for encoded in out:
                return encoded
        raise AssertionError("an encoder ended without a result")

    def _run(self, artefact_id: str, expect: Modality | None) -> Encoded:
        medium = read_media(self.store.read(artefact_id), self.budget, expect)
        readable = self.preset.encoder.modalities
        if medium.modality not in readable:
            raise BadRequest(
                f"This model cannot read {medium.modality.value}; it reads "
                f"{', '.join(('text', *(modality.value for modality in readable)))}. Leave it out.",
                code="unsupported_modality",
            )
        features = self.load().encode(medium)
        return Encoded(
            features.modality, features.tokens.cpu().numpy(), features.pooled.cpu().numpy(), features.grid
        )
