"""The generate box in this process, with a thread of its own.

The model is loaded at the first use, or by :meth:`LocalLanguageModel.load`.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict

import torch

from llm.generate import ContextTooLong, GenerationEvent, GenerationOptions, SignalReady, TextDelta, generate
from llm.generate import Finished as ModelFinished
from llm.model import LanguageModel
from llm.template import Dialogue, MediaTokens, SignalPart
from llm.template import Message as TemplateMessage
from services.boxes import (
    Encoded,
    Finished,
    PromptMessage,
    PromptPart,
    Speech,
    SpeechOptions,
    SpokenEarlier,
    SpokenSignal,
    Words,
)
from services.errors import BadRequest
from services.loading import loading
from services.presets import Preset
from services.worker import Emit, Worker


class LocalLanguageModel:
    """Speaks: words, and signals for media."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.worker: Worker[Speech] = Worker("language-model")
        self.model: LanguageModel | None = None

    def load(self) -> None:
        """Load the weights, unless they are loaded, with LoRA merged for speed."""
        if self.model is None:
            with loading("language model"):
                name = self.preset.language_model.dtype
                self.model = LanguageModel.load(
                    self.preset.language_model_folder,
                    self.preset.device,
                    dtype=getattr(torch, name) if name else None,
                )
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
