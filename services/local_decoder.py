"""The decode box of one modality in this process, with a thread of its own.

The model is loaded at the first use, or by :meth:`LocalDecoder.load`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import torch

from decoders.condition import Condition
from decoders.latent_decoder import LatentDecoder
from decoders.settings import DecodeSettings
from decoders.writing import to_mp4, to_png, to_wav
from encoders.media import Audio, Image, Medium, Modality, Video
from services.artefacts import ArtefactStore
from services.boxes import Made, Progress, SpokenSignal
from services.links import CaptionLink, Link, SignalLink
from services.loading import loading
from services.presets import Preset
from services.worker import Emit, Worker


class LocalDecoder:
    """Makes media of one kind and stores them."""

    def __init__(self, preset: Preset, modality: Modality, store: ArtefactStore) -> None:
        self.preset = preset
        self.modality = modality
        self.store = store
        self.worker: Worker[Progress | Made] = Worker(f"{modality.value}-decoder")
        self.decoder: LatentDecoder | None = None
        self.link: Link | None = None

    def load(self) -> None:
        """Load the decoder and the link to it, unless they are loaded."""
        if self.link is not None:
            return
        with loading(f"{self.modality.value} decoder"):
            preset = self.preset.decoders[self.modality]
            dtype = getattr(torch, preset.dtype or "float32")
            self.decoder = _decoder_class(self.modality).load(
                self.preset.decoder_folder(self.modality), self.preset.device, dtype
            )
            if preset.link == "caption":
                self.link = CaptionLink(self.decoder)
            else:
                folder = self.preset.projections_folder / self.modality.value
                self.link = SignalLink(folder, self.decoder.condition_spec, self.preset.device)

    def warm_up(self) -> None:
        """Take one denoising step from an empty condition, so that the first real ones come fast."""
        decoder, _ = self._loaded()
        spec = decoder.condition_spec
        empty = Condition(torch.zeros(spec.tokens, spec.width))
        decoder.decode(empty, DecodeSettings(seed=0, steps=1))

    def _loaded(self) -> tuple[LatentDecoder, Link]:
        self.load()
        assert self.decoder is not None
        assert self.link is not None
        return self.decoder, self.link

    async def available(self) -> bool:
        """Whether the decoder can work: in this process it always can."""
        return True

    async def decode(
        self, signal: SpokenSignal, settings: DecodeSettings
    ) -> AsyncGenerator[Progress | Made, None]:
        """Stream progress and the medium."""

        def job(emit: Emit[Progress | Made], stop: threading.Event) -> None:
            emit(self._run(signal, settings, emit, stop))

        async with aclosing(self.worker.stream(job)) as stream:
            async for step in stream:
                yield step

    def _run(
        self,
        signal: SpokenSignal,
        settings: DecodeSettings,
        emit: Emit[Progress | Made],
        stop: threading.Event,
    ) -> Made:
        decoder, link = self._loaded()
        defaults = self.preset.decoders[self.modality]
        settings = defaults.fill(settings)
        began = time.monotonic()

        def on_step(step: int, total: int) -> None:
            spent = time.monotonic() - began
            emit(Progress(step, total, round(spent / step * (total - step), 2) if step else None))

        decoded = decoder.decode(link.condition(signal), settings, on_step, stop)
        manifest = {
            **decoded.manifest,
            "caption": signal.caption,
            "link": defaults.link,
            "preset": self.preset.name,
            "made_by": "patchbay",
        }
        data, media_type, suffix = _file(decoded.medium, manifest)
        artefact = self.store.put(
            data,
            media_type=media_type,
            filename=f"{self.modality.value}.{suffix}",
            purpose="assistants_output",
            modality=self.modality,
            caption=signal.caption,
            manifest=manifest,
        )
        return Made(artefact, manifest)


def _decoder_class(modality: Modality) -> type[LatentDecoder]:
    match modality:
        case Modality.IMAGE:
            from decoders.image import ImageDecoder

            return ImageDecoder
        case Modality.VIDEO:
            from decoders.video import VideoDecoder

            return VideoDecoder
        case Modality.AUDIO:
            from decoders.audio import AudioDecoder

            return AudioDecoder
    raise ValueError(f"There is no decoder for {modality.value}.")


def _file(medium: Medium, manifest: dict[str, Any]) -> tuple[bytes, str, str]:
    """Return the bytes of a medium, their media type and their file suffix."""
    match medium:
        case Image():
            return to_png(medium, manifest), "image/png", "png"
        case Video():
            return to_mp4(medium, manifest), "video/mp4", "mp4"
        case Audio():
            return to_wav(medium, manifest), "audio/wav", "wav"
