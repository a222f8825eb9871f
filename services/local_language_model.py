"""The generate box in this process: an engine that all turns share, with a thread of its own.

The model is loaded at the first use, or by :meth:`LocalLanguageModel.from_pretrained`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from encoders.media import Modality
from llm.async_engine import AsyncEngine
from llm.engine import Engine, EngineStats
from llm.generate import ContextTooLong, GenerationEvent, GenerationOptions, SignalReady, TextDelta
from llm.generate import Finished as ModelFinished
from llm.model import LanguageModel
from llm.quantization import quantize
from llm.request_lora import RequestLora, read_request_lora
from llm.template import Dialogue, MediaTokens, SignalPart
from llm.template import Message as TemplateMessage
from services.adapters import AdapterShelf
from services.boxes import (
    LOCAL,
    BoxState,
    Counts,
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
from services.compiling import compile_if_possible
from services.errors import BadRequest
from services.loading import loading
from services.presets import Preset


class LocalLanguageModel:
    """Speaks: words, and signals for media. A large pass on a CPU takes up to ``most_threads``."""

    def __init__(self, preset: Preset, most_threads: int = 1) -> None:
        self.preset, self.most_threads = preset, most_threads
        self.engine: AsyncEngine | None = None
        self.adapters: AdapterShelf[RequestLora] = AdapterShelf(preset, "language_model")
        self._lm: PreTrainedModel | None = None

    def load(self) -> None:
        """Load the weights, unless they are loaded, with LoRA merged for speed."""
        with loading("language model"):
            if self.engine is None:
                options, device = self.preset.language_model, self.preset.device
                model = LanguageModel.from_pretrained(
                    self.preset.language_model_folder,
                    "cpu" if options.quantization else device,
                    dtype=getattr(torch, self.preset.language_model_dtype),
                    base=self.preset.base_folder,
                    bridge=self.preset.bridge_folder,
                )
                image = Modality.IMAGE
                if self.preset.tiling and image in model.readable and model.reads_pooled(image):
                    raise ValueError(
                        f"the preset {self.preset.name!r} cuts pictures ({self.preset.tiling.name}), and its "
                        f"projector reads the global vector of a whole one alone. Leave encoder.tiling out, "
                        f"or train a bridge with another projector."
                    )
                model.merge_adapter()
                if options.quantization:
                    quantize(model.causal_lm, options.quantization, device)
                    model.to(device)
                self._lm = model.causal_lm
                engine = Engine(
                    model,
                    slots=options.slots,
                    context=options.context,
                    step_tokens=options.step_tokens,
                    most_threads=self.most_threads,
                )
                compile_if_possible("language model", options.compile, engine)
                self.engine = AsyncEngine(engine, "language-model")

    def warm_up(self) -> None:
        """Say a few words, so that the first real ones come fast."""

        async def say() -> None:
            wishes = GenerationOptions(max_new_tokens=8, seed=0)
            async for _ in self._loaded().stream([TemplateMessage("user", ["hello"])], wishes):
                pass

        with ThreadPoolExecutor(1) as thread:  # the caller may have an event loop that runs
            thread.submit(asyncio.run, say()).result()

    async def state(self) -> BoxState:
        """Say that it is ready: in this process it is loaded when it is needed."""
        return BoxState.READY

    async def counts(self) -> Mapping[str, Counts]:
        """Return what the engine counts; nothing before the weights are loaded."""
        if (stats := self.stats) is None:
            return {}
        counts: Counts = {
            "slots": self.preset.language_model.slots,
            "slots_in_use": stats.running,
            "waiting": stats.waiting,
            "requests_total": stats.requests,
            "steps_total": stats.steps,
            "prompt_tokens_total": stats.prompt_tokens,
            "reused_prompt_tokens_total": stats.reused_tokens,
            "prefix_hit_rate": stats.hit_rate,
        }
        return {LOCAL: counts}

    @property
    def stats(self) -> EngineStats | None:
        """Counts of the engine, or None before the weights are loaded."""
        return None if self.engine is None else self.engine.stats

    def _loaded(self) -> AsyncEngine:
        self.load()
        assert self.engine is not None
        return self.engine

    async def generate(
        self, prompt: Sequence[PromptMessage], options: SpeechOptions
    ) -> AsyncGenerator[Speech, None]:
        """Stream the reply."""
        engine = await asyncio.to_thread(self._loaded) if self.engine is None else self.engine
        wishes = GenerationOptions(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            stop=options.stop,
            seed=options.seed,
            allowed=options.allowed,
            max_signals=options.max_signals,
        )
        name = options.adapter
        with self.adapters.holding(name) if name else nullcontext():
            lora = await asyncio.to_thread(self.adapters.get, name, self._read) if name else None
            try:
                async with aclosing(engine.stream(_dialogue(prompt), wishes, lora, options.user)) as stream:
                    async for said in stream:
                        yield _speech(said)
            except ContextTooLong as error:
                raise BadRequest(str(error), code="context_length_exceeded", param="messages") from error

    async def score(self, prompt: Sequence[PromptMessage], reply: str, user: str = "") -> Sequence[float]:
        """Return how probable each token of a reply is, and its end."""
        engine = await asyncio.to_thread(self._loaded) if self.engine is None else self.engine
        dialogue = [*_dialogue(prompt), TemplateMessage("assistant", [reply])]
        try:
            return (await engine.score(dialogue, user)).log_probabilities
        except ContextTooLong as error:
            raise BadRequest(str(error), code="context_length_exceeded", param="messages") from error

    def _read(self, name: str, folder: Path) -> RequestLora:
        assert self._lm is not None
        return read_request_lora(name, folder, self._lm, self._lm.dtype)


def _dialogue(prompt: Sequence[PromptMessage]) -> Dialogue:
    return [
        TemplateMessage(message.role.value, [_template_part(part) for part in message.parts])
        for message in prompt
    ]


def _template_part(part: PromptPart) -> str | MediaTokens | SignalPart:
    match part:
        case Encoded():
            return MediaTokens(
                part.modality, torch.tensor(part.tokens), torch.tensor(part.pooled), part.blocks
            )
        case SpokenEarlier(modality=modality):
            return SignalPart(modality)
        case _:
            return part


def _speech(said: GenerationEvent) -> Speech:
    match said:
        case TextDelta(text=text):
            return Words(text)
        case SignalReady(signal=signal, confidence=confidence):
            return SpokenSignal(
                signal.modality,
                signal.caption,
                signal.hidden.float().cpu().numpy(),
                signal.embeddings.float().cpu().numpy(),
                confidence,
            )
        case ModelFinished(reason=reason, usage=usage):
            return Finished(reason, asdict(usage))
