"""The encode box in this process, with a thread of its own and a cache of what it has encoded.

The model is loaded at the first use, or by :meth:`LocalEncoder.load`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from encoders.media import MediaBudget, Modality, read_media
from services.artefacts import ArtefactStore
from services.boxes import LOCAL, Array, BoxState, Counts, Encoded
from services.encoded_cache import EncodedCache, Key
from services.errors import BadRequest, ServiceError, translate
from services.loading import loading
from services.messages import MediaPart, TextPart
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
        return await self._worked(partial(self._run, artefact_id, key))

    async def _worked(self, work: Callable[[], Encoded]) -> Encoded:
        """Do something in the encoder's thread, when its turn comes."""
        async with aclosing(self.worker.stream(lambda emit, stop: emit(work()))) as out:
            async for encoded in out:
                return encoded
        raise AssertionError("an encoder ended without a result")

    async def embed(self, items: Sequence[TextPart | MediaPart]) -> list[Array]:
        """Return a unit vector for each item, all in one space; texts need an encoder that reads them."""
        encoder = await asyncio.to_thread(self.load) if self.encoder is None else self.encoder
        if not encoder.joint:
            raise BadRequest(
                "The encoder of this model has a space of its own for sounds, which cannot be compared with "
                "that of pictures. Serve a preset whose encoder is an ImageBind, or reads one of both.",
                code="unsupported_model",
                param="model",
            )
        found: list[Array] = []
        for place, item in enumerate(items):
            try:
                if isinstance(item, MediaPart):
                    encoded = await self.encode(item.artefact_id, item.modality)
                else:
                    encoded = await self._worked(partial(self._read, encoder, item.text))
            except (ServiceError, ValueError) as error:
                raise translate(error).at(f"input[{place}]") from error
            found.append(encoded.pooled / max(float(np.linalg.norm(encoded.pooled)), 1e-12))
        return found

    @staticmethod
    def _read(encoder: Encoder, text: str) -> Encoded:
        from encoders.imagebind_encoder import ImageBindEncoder

        if not isinstance(encoder, ImageBindEncoder) or Modality.TEXT not in encoder.modalities:
            raise BadRequest(
                f"The encoder of this model has no text tower; it reads "
                f"{', '.join(sorted(encoder.modalities))}. Embed media, as data URLs or file ids, or serve a "
                "preset whose encoder reads text.",
                code="unsupported_modality",
            )
        pooled: Array = encoder.embed_text([text])[0].numpy()
        return Encoded(Modality.TEXT, np.zeros((0, len(pooled)), np.float32), pooled, ())

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
