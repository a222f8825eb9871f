"""The encode box in this process, with a thread of its own and a cache of what it has encoded.

The model is loaded at the first use, or by :meth:`LocalEncoder.load`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from encoders.media import MediaBudget, Modality, read_media
from services.artefacts import ArtefactStore
from services.boxes import LOCAL, BoxState, Counts, Encoded
from services.encoded_cache import EncodedCache, Key
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
        self.cache = EncodedCache(preset.encoder.cache_mb * 2**20)

    def load(self) -> Encoder:
        """Return the encoder; its weights are loaded unless they are loaded already."""
        import torch

        from encoders.encoder import load_encoder

        if self.encoder is None:
            with loading("encoder"):
                dtype = getattr(torch, self.preset.encoder.dtype or "float32")
                preset = self.preset
                self.encoder = load_encoder(preset.encoder_folder, preset.device, dtype, preset.tiling)
        return self.encoder

    async def encode(self, artefact_id: str, expect: Modality | None) -> Encoded:
        """Read the artefact and encode it, unless its content has been encoded and is still known."""
        artefact = await asyncio.to_thread(self.store.get, artefact_id)
        key = artefact.sha256, expect
        if (known := self.cache.find(key)) is not None:
            return known
        async with aclosing(self.worker.stream(lambda emit, stop: emit(self._run(artefact_id, key)))) as out:
            async for encoded in out:
                return encoded
        raise AssertionError("an encoder ended without a result")

    async def state(self) -> BoxState:
        """Say that it is ready: in this process it is loaded when it is needed."""
        return BoxState.READY

    async def counts(self) -> Mapping[str, Counts]:
        """Return what the cache counts."""
        return {LOCAL: self.cache.counts()}

    def _run(self, artefact_id: str, key: Key) -> Encoded:
        if (known := self.cache.find(key)) is not None:  # it came while this request waited
            return known
        _, expect = key
        medium = read_media(self.store.read(artefact_id), self.budget, expect)
        readable = self.preset.encoder.modalities
        if medium.modality not in readable:
            raise BadRequest(
                f"This model cannot read {medium.modality.value}; it reads "
                f"{', '.join(('text', *(modality.value for modality in readable)))}. Leave it out.",
                code="unsupported_modality",
            )
        features = self.load().encode(medium)
        encoded = Encoded(
            features.modality,
            features.tokens.cpu().numpy(),
            features.pooled.cpu().numpy(),
            features.grid,
            features.blocks,
        )
        self.cache.keep(key, encoded)
        return encoded
