"""The decode box of one modality in this process: a denoising engine, and what comes before and after it.

The model is loaded at the first use, or by :meth:`LocalDecoder.load`, and shared with others that have the
same :class:`services.decoder_pool.DecoderPool`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoders.denoising import steps_run
from decoders.engine import DenoisingEngine, EngineConfig, Heard, StepDone
from decoders.engine import Preview as EnginePreview
from decoders.latent_decoder import LatentDecoder
from decoders.lora import DecoderLora
from decoders.pipeline_engine import PipelineEngine
from decoders.pipeline_folder import PipelineFolder
from decoders.plan import Decoded
from decoders.settings import DecodeSettings
from decoders.whole_pipeline import WholePipeline
from decoders.writing import to_jpeg, to_mp4, to_png, to_wav
from encoders.media import Audio, Image, Medium, Modality, Video, read_media
from services.adapters import AdapterShelf
from services.artefacts import ArtefactStore
from services.boxes import LOCAL, BoxState, Counts, Made, Preview, Progress, SpokenSignal, Step
from services.compiling import compile_if_possible
from services.decoder_pool import DecoderKey, DecoderPool
from services.errors import ServiceError
from services.footprint import decoder_bytes
from services.links import CaptionLink, Link, SignalLink
from services.loading import LOADING, loading
from services.presets import Preset

logger = logging.getLogger(__name__)


class LocalDecoder:
    """Makes media of one kind, several at a time, and stores them."""

    def __init__(
        self, preset: Preset, modality: Modality, store: ArtefactStore, pool: DecoderPool | None = None
    ) -> None:
        self.preset = preset
        self.modality = modality
        self.store = store
        self.pool = pool_for(preset) if pool is None else pool
        self.adapters: AdapterShelf[DecoderLora] = AdapterShelf(preset, modality.value)
        self.chosen = preset.decoders[modality]
        self.key = DecoderKey(
            folder=preset.decoder_folder(modality).resolve(),
            device=preset.device,
            dtype=getattr(torch, self.chosen.dtype or "float32"),
            vae=self.chosen.vae,
            waits_in=self.chosen.waits_in,
            compile=self.chosen.compile,
        )
        self._projecting: SignalLink | None = None

    def load(self) -> None:
        """Load the decoder and the link to it, unless they are loaded."""
        with self.pool.use_now(self.key, self._need, self._engine) as engine:
            self.link(engine)

    def warm_up(self) -> None:
        """Take a few denoising steps, so that the first real ones come fast and their time is known."""
        with self.pool.use_now(self.key, self._need, self._engine) as engine:
            engine.calibrate()

    @property
    def engine(self) -> DenoisingEngine | PipelineEngine | None:
        """The engine, None while the weights are not in memory."""
        return self.pool.engine(self.key)

    @cached_property
    def _need(self) -> int:
        if self.pool.budget is None:
            return 0
        return decoder_bytes(self.preset, self.modality)

    @property
    def _knows_need(self) -> bool:
        return self.pool.budget is None or "_need" in vars(self)

    def _engine(self) -> DenoisingEngine | PipelineEngine:
        config = EngineConfig(max_batch=self.chosen.max_batch, max_wait_s=self.chosen.max_wait_s)
        with loading(f"{self.modality.value} decoder"):
            reads = self.chosen.link == "caption"
            decoder = load_decoder(
                self.modality, self.key.folder, self.key.device, self.key.dtype, reads_captions=reads
            )
            decoder.use_vae(self.chosen.vae)
            compile_if_possible(f"{self.modality.value} decoder", self.chosen.compile, decoder)
            if isinstance(decoder, WholePipeline):
                if self.chosen.edit_strength is not None:
                    raise ValueError(
                        f"edit_strength is {self.chosen.edit_strength:g}; a {decoder.folder.pipeline_class} "
                        f"runs as a whole, and always starts from noise. Leave edit_strength out."
                    )
                if self.chosen.keep_untouched:
                    raise ValueError(
                        f"keep_untouched is true; a {decoder.folder.pipeline_class} runs as a whole, and "
                        f"keeps nothing of an earlier {self.modality.value}. Leave keep_untouched out."
                    )
                return PipelineEngine(decoder, config)
            decoder.forget_text_encoder()
        return DenoisingEngine(decoder, config)

    def link(self, engine: DenoisingEngine | PipelineEngine) -> Link:
        """Return what turns signals into conditions of the decoder of ``engine``."""
        if self.chosen.link == "caption":
            return CaptionLink(engine.decoder)
        if self._projecting is not None:
            return self._projecting
        with LOADING:
            if self._projecting is None:
                with loading(f"{self.modality.value} decoder"):
                    folder = self.preset.projection_folder(self.modality)
                    specs = engine.decoder.condition_specs
                    self._projecting = SignalLink(folder, specs, self.preset.device, self._training)
            return self._projecting

    @property
    def _training(self) -> str:
        return f"patchbay train bridge --part {self.modality.value} --preset {self.preset.as_argument}"

    @property
    def _is_linked(self) -> bool:
        """Whether :meth:`link` has nothing to load."""
        return self.chosen.link == "caption" or self._projecting is not None

    async def state(self) -> BoxState:
        """Say that it is ready: in this process it is loaded when it is needed."""
        return BoxState.READY

    async def counts(self) -> Mapping[str, Counts]:
        """Return what the engine is doing; nothing before the weights are loaded."""
        if self.engine is None:
            return {}
        stats = self.engine.stats()
        counts = {
            "requests": stats.requests,
            "stepping": stats.stepping,
            "most_stepping": stats.most_stepping,
            "batch_limit": stats.batch_limit,
            "queue_seconds": stats.work_s,
        }
        if stats.prediction_error is not None:
            counts["prediction_error"] = stats.prediction_error
        return {LOCAL: counts}

    async def decode(
        self,
        signal: SpokenSignal,
        settings: DecodeSettings,
        *,
        user: str = "",
        previews: int = 0,
        source: str | None = None,
    ) -> AsyncGenerator[Step, None]:
        """Stream progress, previews and the medium."""
        # What is known costs no way to another thread and back.
        need = self._need if self._knows_need else await asyncio.to_thread(lambda: self._need)
        settings = self.chosen.fill(settings)
        name = settings.lora
        async with self.pool.use(self.key, need, self._engine) as engine:
            if signal.is_words:
                link: Link = CaptionLink(engine.decoder)
            else:
                link = self.link(engine) if self._is_linked else await asyncio.to_thread(self.link, engine)
            condition = await engine.call(lambda: link.condition(signal))
            start, original, settings = await self._start(engine, settings, source)
            steps = steps_run(settings.steps or engine.decoder.defaults.steps, settings.strength or 1.0)
            every = math.ceil(steps / (previews + 1)) if previews else 0
            with self.adapters.holding(name) if name else nullcontext():
                read = engine.decoder.read_lora
                lora = await asyncio.to_thread(self.adapters.get, name, read) if name else None
                work = engine.decode(
                    condition,
                    settings,
                    source=start,
                    lora=lora,
                    original=original,
                    user=user,
                    preview_every=every,
                )
                async with aclosing(self._steps(signal, work)) as steps_taken:
                    async for step in steps_taken:
                        yield step

    async def _start(
        self, engine: DenoisingEngine | PipelineEngine, settings: DecodeSettings, source: str | None
    ) -> tuple[Tensor | None, Medium | None, DecodeSettings]:
        """Return the latents to start from, the original to keep pixels of, and the settings for both.

        The latents are of the size that is wanted. What only the preset wants to edit may be gone or unfit:
        then the medium starts from noise, and keeps nothing.
        """
        strength = settings.strength or self.chosen.edit_strength
        keeps = self.chosen.keep_untouched if settings.keep_untouched is None else settings.keep_untouched
        if source is None or (strength is None and not keeps):
            return None, None, settings
        budget = self.preset.limits.media.budget()
        try:
            data = await asyncio.to_thread(self.store.read, source)
            medium = await asyncio.to_thread(read_media, data, budget, self.modality)
            latents = None
            if strength is not None:
                latents = await engine.encode_source(medium, settings)
        except (ServiceError, ValueError) as error:
            if settings.strength is not None or settings.keep_untouched:
                raise
            logger.info("A %s starts from noise: %s", self.modality.value, error)
            return None, None, settings
        return latents, medium if keeps else None, replace(settings, strength=strength)

    async def _steps(
        self, signal: SpokenSignal, work: AsyncGenerator[Heard, None]
    ) -> AsyncGenerator[Step, None]:
        async with aclosing(work) as stream:
            async for value in stream:
                match value:
                    case StepDone(step=step, total=total, left_s=left_s):
                        yield Progress(step, total, None if left_s is None else round(left_s, 2))
                    case EnginePreview(step=step, total=total, image=image):
                        data = await asyncio.to_thread(to_jpeg, image)
                        yield Preview(step, total, data, "image/jpeg")
                    case Decoded():
                        yield await asyncio.to_thread(self._kept, signal, value)

    def _kept(self, signal: SpokenSignal, decoded: Decoded) -> Made:
        """Write a medium to the store."""
        manifest = {
            **decoded.manifest,
            "caption": signal.caption,
            "link": "caption" if signal.is_words else self.chosen.link,
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


def load_decoder(
    modality: Modality,
    folder: Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    reads_captions: bool = True,
) -> LatentDecoder | WholePipeline:
    """Load what makes ``modality`` from a folder: part by part where its pipeline is known, else whole.

    Without ``reads_captions`` a whole pipeline keeps no text encoders; the others load theirs when they
    are needed.
    """
    known = decoder_class(modality)
    if PipelineFolder(folder).pipeline_class in known.pipelines:
        return known.load(folder, device, dtype)
    pipeline = WholePipeline.load(folder, device, dtype, reads_captions=reads_captions)
    if pipeline.modality is not modality:
        raise ValueError(
            f"{folder} holds a {pipeline.folder.pipeline_class}, which makes {pipeline.modality.value}; "
            f"expected one that makes {modality.value}. Name the folder under the modality that it makes."
        )
    return pipeline


def pool_for(preset: Preset) -> DecoderPool:
    """Return a pool with the budget of ``preset``."""
    return DecoderPool(None if preset.decoders_gb is None else int(preset.decoders_gb * 1e9))


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
