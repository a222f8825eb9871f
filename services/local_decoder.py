"""The decode box of one modality in this process: a denoising engine, and what comes before and after it.

The model is loaded at the first use, or by :meth:`LocalDecoder.load`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import torch

from decoders.engine import DenoisingEngine, EngineConfig, StepDone
from decoders.latent_decoder import Decoded, LatentDecoder
from decoders.settings import DecodeSettings
from decoders.writing import to_mp4, to_png, to_wav
from encoders.media import Audio, Image, Medium, Modality, Video
from services.artefacts import ArtefactStore
from services.boxes import Made, Progress, SpokenSignal
from services.links import CaptionLink, Link, SignalLink
from services.loading import LOADING, loading
from services.presets import Preset


class LocalDecoder:
    """Makes media of one kind, several at a time, and stores them."""

    def __init__(self, preset: Preset, modality: Modality, store: ArtefactStore) -> None:
        self.preset = preset
        self.modality = modality
        self.store = store
        self.engine: DenoisingEngine | None = None
        self.link: Link | None = None

    def load(self) -> None:
        """Load the decoder and the link to it, unless they are loaded."""
        if self.engine is not None:
            return
        with LOADING:
            if self.engine is not None:
                return
            chosen = self.preset.decoders[self.modality]
            with loading(f"{self.modality.value} decoder"):
                decoder = decoder_class(self.modality).load(
                    self.preset.decoder_folder(self.modality),
                    self.preset.device,
                    getattr(torch, chosen.dtype or "float32"),
                )
                if chosen.link == "caption":
                    self.link = CaptionLink(decoder)
                else:
                    folder = self.preset.projections_folder / self.modality.value
                    self.link = SignalLink(folder, decoder.condition_spec, self.preset.device)
            config = EngineConfig(max_batch=chosen.max_batch, max_wait_s=chosen.max_wait_s)
            self.engine = DenoisingEngine(decoder, config)

    def warm_up(self) -> None:
        """Take a few denoising steps, so that the first real ones come fast and their time is known."""
        engine, _ = self._loaded()
        engine.calibrate()

    def _loaded(self) -> tuple[DenoisingEngine, Link]:
        self.load()
        assert self.engine is not None
        assert self.link is not None
        return self.engine, self.link

    async def available(self) -> bool:
        """Whether the decoder can work: in this process it always can."""
        return True

    async def decode(
        self, signal: SpokenSignal, settings: DecodeSettings
    ) -> AsyncGenerator[Progress | Made, None]:
        """Stream progress and the medium."""
        engine, link = await asyncio.to_thread(self._loaded)
        condition = await engine.call(lambda: link.condition(signal))
        settings = self.preset.decoders[self.modality].fill(settings)
        async with aclosing(engine.decode(condition, settings)) as stream:
            async for value in stream:
                match value:
                    case StepDone(step=step, total=total, left_s=left_s):
                        yield Progress(step, total, None if left_s is None else round(left_s, 2))
                    case Decoded():
                        yield await asyncio.to_thread(self._kept, signal, value)

    def _kept(self, signal: SpokenSignal, decoded: Decoded) -> Made:
        """Write a medium to the store."""
        manifest = {
            **decoded.manifest,
            "caption": signal.caption,
            "link": self.preset.decoders[self.modality].link,
            "preset": self.preset.name,
            "made_by": "patchbay",
        }
        data, media_type, suffix = file_of(decoded.medium, manifest)
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


def decoder_class(modality: Modality) -> type[LatentDecoder]:
    """Return the class that makes ``modality``; importing it loads diffusers."""
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


def file_of(medium: Medium, manifest: dict[str, Any]) -> tuple[bytes, str, str]:
    """Return the bytes of a medium, their media type and their file suffix."""
    match medium:
        case Image():
            return to_png(medium, manifest), "image/png", "png"
        case Video():
            return to_mp4(medium, manifest), "video/mp4", "mp4"
        case Audio():
            return to_wav(medium, manifest), "audio/wav", "wav"
