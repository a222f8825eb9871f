"""A server as it is written first: one request at a time, ``generate()``, then one pipeline after another.

It speaks and makes the same replies as the agent, with the same weights, rules, seeds and settings, and
writes the same files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoders.latent_decoder import LatentDecoder
from decoders.pipeline_folder import PipelineFolder
from decoders.settings import DecodeSettings
from encoders.media import Medium, Modality
from llm.model import LanguageModel
from llm.plain import WholeBlocks, plain_model
from llm.template import Message
from services.bench.pipelines import Call, Parts, medium_of, parts_from_disk, parts_of, pipeline
from services.boxes import SpokenSignal
from services.links import Link
from services.local_decoder import file_of


@dataclass(frozen=True, eq=False)
class Said:
    """A reply before its media are made: all ids, prompt and reply, and the signals."""

    prompt: list[int]
    reply: list[int]
    signals: list[SpokenSignal]


@dataclass(frozen=True, eq=False)
class Maker:
    """What makes one kind of media: a decoder, the link to it, and the settings of the preset."""

    decoder: LatentDecoder
    link: Link
    settings: DecodeSettings


class NaiveServer:
    """Answers a request when the one before it is done.

    Args:
        model: the language model, LoRA merged.
        makers: of each kind of media.
        max_new_tokens: of one reply.
        reload: read the pipeline from disk for every medium, as NExT-GPT's code does.

    """

    def __init__(
        self,
        model: LanguageModel,
        makers: Mapping[Modality, Maker],
        *,
        max_new_tokens: int,
        reload: bool = False,
    ) -> None:
        self.model = model
        self.plain = plain_model(model)
        self.blocks = WholeBlocks(model.tokenizer)
        self.makers = makers
        self.max_new_tokens = max_new_tokens
        self.reload = reload
        self.parts: dict[Modality, Parts] = {m: parts_of(maker.decoder) for m, maker in makers.items()}
        self.pipelines: dict[Modality, Call] = {
            m: pipeline(maker.decoder, self.parts[m], maker.settings) for m, maker in makers.items()
        }

    def answer(self, text: str, seed: int) -> list[bytes]:
        """Return the files of the media of a reply, in the order spoken."""
        said = self.say(text)
        media = []
        for place, signal in enumerate(said.signals):
            nth = sum(earlier.modality is signal.modality for earlier in said.signals[:place])
            media.append(file_of(self.make(signal, seed + nth), {"caption": signal.caption})[0])
        return media

    @torch.inference_mode()
    def say(self, text: str) -> Said:
        """Let ``generate()`` reply, and pick the signals out of what it said."""
        tokenizer = self.model.tokenizer
        prompt = self.model.encode([Message("user", [text])], open_reply=True).ids
        ids = torch.tensor([prompt], device=self.plain.device)
        generator: Any = self.plain
        said = generator.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            logits_processor=[self.blocks],
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        reply: list[int] = said.sequences[0, len(prompt) :].tolist()
        # What comes out of feeding reply token i is in step i + 1; the last token is never fed.
        states: list[Tensor] = [step[-1][0, -1] for step in said.hidden_states[1:]]
        return Said(prompt, reply, list(self._signals(reply, states)))

    def _signals(self, reply: list[int], states: list[Tensor]) -> Iterator[SpokenSignal]:
        tokenizer, caption_from = self.model.tokenizer, 0
        for start, modality in self.blocks_in(reply):
            block = tokenizer.signal_ids(modality)
            end = start + len(block)
            if end > len(states):
                return  # the reply ended within the block, at its limit
            rows = self.model.embed(torch.tensor(block, device=self.model.device))
            yield SpokenSignal(
                modality,
                tokenizer.decode_text(reply[caption_from:start]).strip(),
                torch.stack(states[start:end]).float().cpu().numpy(),
                rows.float().cpu().numpy(),
            )
            caption_from = end

    def blocks_in(self, reply: list[int]) -> Iterator[tuple[int, Modality]]:
        """Yield where signal blocks begin."""
        tokenizer = self.model.tokenizer
        firsts = {tokenizer.signal_ids(modality)[0]: modality for modality in tokenizer.signals.modalities}
        for place, token in enumerate(reply):
            if token in firsts:
                yield place, firsts[token]

    def make(self, signal: SpokenSignal, seed: int) -> Medium:
        """Make one medium with the pipeline of its kind."""
        maker = self.makers[signal.modality]
        decoder, call = maker.decoder, self.pipelines[signal.modality]
        if self.reload:
            folder = PipelineFolder(decoder.folder.path, str(decoder.folder.device), decoder.folder.dtype)
            parts = parts_from_disk(folder, self.parts[signal.modality])
            call = pipeline(decoder, parts, maker.settings)
        return medium_of(signal.modality, call(maker.link.condition(signal), seed), decoder)
