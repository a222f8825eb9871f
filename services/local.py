"""The three kinds of boxes in this process, each with a thread of its own.

Models are loaded at the first use, or by :meth:`load`. The deployments of Ray Serve hold the same
objects; nothing here knows of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from decoders.condition import Condition
from decoders.latent_decoder import LatentDecoder
from decoders.settings import DecodeSettings
from decoders.writing import to_mp4, to_png, to_wav
from encoders.media import Audio, Image, MediaBudget, Medium, Modality, Video, read_media
from llm.generate import ContextTooLong, GenerationEvent, GenerationOptions, SignalReady, TextDelta, generate
from llm.generate import Finished as ModelFinished
from llm.model import LanguageModel
from llm.template import Dialogue, MediaTokens, SignalPart
from llm.template import Message as TemplateMessage
from services.agent import Agent
from services.artefacts import ArtefactStore
from services.boxes import (
    Encoded,
    Finished,
    Made,
    Progress,
    PromptMessage,
    PromptPart,
    Speech,
    SpeechOptions,
    SpokenEarlier,
    SpokenSignal,
    Words,
)
from services.errors import BadRequest, PresetProblem
from services.links import CaptionLink, Link, SignalLink
from services.presets import Preset
from services.worker import Emit, Worker

logger = logging.getLogger(__name__)

# While transformers or diffusers build a model, modules that other threads build get no weights.
LOADING = threading.RLock()


class LocalEncoder:
    """Reads media from the store and encodes them."""

    def __init__(self, preset: Preset, store: ArtefactStore) -> None:
        self.preset = preset
        self.store = store
        self.budget: MediaBudget = preset.limits.media.budget()
        self.worker: Worker[Encoded] = Worker("encoder")
        self.encoder: Any = None

    def load(self) -> None:
        """Load the weights, unless they are loaded."""
        if self.encoder is None:
            from encoders.imagebind_encoder import ImageBindEncoder

            with _weights("encoder"):
                self.encoder = ImageBindEncoder.load(self.preset.encoder_folder, self.preset.device)

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
        self.load()
        features = self.encoder.encode(medium)
        return Encoded(
            features.modality, features.tokens.cpu().numpy(), features.pooled.cpu().numpy(), features.grid
        )


class LocalLanguageModel:
    """Speaks: words, and signals for media."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.worker: Worker[Speech] = Worker("language-model")
        self.model: LanguageModel | None = None

    def load(self) -> None:
        """Load the weights, unless they are loaded, with LoRA merged for speed."""
        if self.model is None:
            with _weights("language model"):
                self.model = LanguageModel.load(self.preset.language_model_folder, self.preset.device)
            self.model.merge_adapter()

    def warm_up(self) -> None:
        """Say a few words, so that the first real ones come fast."""
        model = self._loaded()
        wishes = GenerationOptions(max_new_tokens=8, seed=0)
        for _ in generate(model, [TemplateMessage("user", ["hello"])], wishes, threading.Event()):
            pass

    def _loaded(self) -> LanguageModel:
        self.load()
        assert self.model is not None
        return self.model

    async def generate(
        self, prompt: Sequence[PromptMessage], options: SpeechOptions
    ) -> AsyncGenerator[Speech, None]:
        """Stream the reply."""

        def job(emit: Emit[Speech], stop: threading.Event) -> None:
            model = self._loaded()
            wishes = GenerationOptions(
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed,
                allowed=options.allowed,
                max_signals=options.max_signals,
            )
            try:
                events = generate(model, _dialogue(prompt), wishes, stop)
            except ContextTooLong as error:
                raise BadRequest(str(error), code="context_length_exceeded", param="messages") from error
            for said in events:
                emit(_speech(said))

        async with aclosing(self.worker.stream(job)) as stream:
            async for speech in stream:
                yield speech


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
        with _weights(f"{self.modality.value} decoder"):
            self.decoder = _decoder_class(self.modality).load(
                self.preset.decoder_folder(self.modality), self.preset.device
            )
            if self.preset.decoders[self.modality].link == "caption":
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
        settings = replace(
            settings,
            steps=defaults.steps if settings.steps is None else settings.steps,
            guidance_scale=(
                defaults.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
            ),
        )
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


def local_agent(preset: Preset, store: ArtefactStore) -> Agent:
    """Return an agent over models in this process; the language model is loaded at once."""
    language_model = LocalLanguageModel(preset)
    language_model.load()
    return Agent(
        encode=LocalEncoder(preset, store),
        generate=language_model,
        decode={modality: LocalDecoder(preset, modality, store) for modality in preset.decoders},
        store=store,
        inputs=preset.encoder.modalities,
        generation=preset.generation,
        limits=preset.limits,
        cost_limits={modality: decoder.limits for modality, decoder in preset.decoders.items()},
    )


@contextmanager
def _weights(box: str) -> Iterator[None]:
    """Let one box load at a time, and turn what that raises into one error that names the box."""
    transformers_logging.disable_progress_bar()
    try:
        with LOADING:
            yield
    except (FileNotFoundError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError) or "missing" in str(error)
        raise PresetProblem(
            f"The {box} cannot be loaded: {error}",
            code="weights_missing" if missing else "weights_invalid",
        ) from error


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


def _dialogue(prompt: Sequence[PromptMessage]) -> Dialogue:
    return [
        TemplateMessage(message.role.value, [_template_part(part) for part in message.parts])
        for message in prompt
    ]


def _template_part(part: PromptPart) -> str | MediaTokens | SignalPart:
    match part:
        case Encoded():
            return MediaTokens(part.modality, torch.tensor(part.tokens), torch.tensor(part.pooled))
        case SpokenEarlier(modality=modality):
            return SignalPart(modality)
        case _:
            return part


def _speech(said: GenerationEvent) -> Speech:
    match said:
        case TextDelta(text=text):
            return Words(text)
        case SignalReady(signal=signal):
            return SpokenSignal(
                signal.modality,
                signal.caption,
                signal.hidden.float().cpu().numpy(),
                signal.embeddings.float().cpu().numpy(),
            )
        case ModelFinished(reason=reason, usage=usage):
            return Finished(reason, asdict(usage))
