"""A whole preset in one thread, for measuring: the serving objects, with decoders run in batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from alignment.second_look import SecondLook, likeness, next_seed
from alignment.toybox.media import to_bytes
from decoders.audio import AudioDecoder
from decoders.condition import Condition
from decoders.image import ImageDecoder
from decoders.latent_decoder import LatentDecoder
from decoders.projection import OutputProjection
from decoders.settings import DecodeSettings
from decoders.video import VideoDecoder
from encoders.encoder import load_encoder
from encoders.media import Medium, Modality, read_media
from encoders.tiler import Tiling
from llm.generate import ALL_MEDIA, Finished, GenerationOptions, SignalReady, TextDelta, generate
from llm.model import LanguageModel
from llm.scoring import score
from llm.signals import Signal
from llm.template import Dialogue, MediaTokens, Message

LinkName = Literal["signal", "caption"]
Spoken = str | Signal
DECODE_BATCH = 32
MAX_NEW_TOKENS = 160
DECODERS: Mapping[Modality, type[LatentDecoder]] = {
    Modality.IMAGE: ImageDecoder,
    Modality.VIDEO: VideoDecoder,
    Modality.AUDIO: AudioDecoder,
}


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where the parts of a preset lie, and what it asks of its decoders where nobody asks otherwise.

    ``base`` and ``bridge`` take the place of those in ``language_model``; ``tiling`` is how pictures are
    cut. A medium whose modality is in ``edit_strengths`` starts from the newest one of its kind, so far away
    from it; one whose modality is in ``keep_untouched`` gets the pixels of that one where they agree.
    ``second_look`` says which media are made again.
    """

    encoder: Path
    language_model: Path
    projections: Mapping[Modality, Path]
    decoders: Mapping[Modality, Path]
    links: Mapping[Modality, LinkName]
    base: Path | None = None
    bridge: Path | None = None
    tiling: Tiling | None = None
    settings: Mapping[Modality, DecodeSettings] = field(default_factory=dict)
    edit_strengths: Mapping[Modality, float] = field(default_factory=dict)
    keep_untouched: frozenset[Modality] = frozenset()
    second_look: SecondLook | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """Every folder of weights."""
        others = [folder for folder in (self.base, self.bridge) if folder is not None]
        parts = [*self.projections.values(), *self.decoders.values()]
        return (self.encoder, self.language_model, *others, *(part for part in parts if part.is_dir()))

    @property
    def how(self) -> str:
        """How the weights are used, in words that are the same whenever it is the same."""
        ways: dict[str, Mapping[Modality, object]] = {
            "links": self.links,
            "settings": self.settings,
            "edit strengths": self.edit_strengths,
            "kept": dict.fromkeys(self.keep_untouched, "untouched"),
        }
        told = [f"{name} {sorted((str(m), str(v)) for m, v in way.items())}" for name, way in ways.items()]
        if (look := self.second_look) is not None:
            told.append(
                f"second look {sorted(look.modalities)} {look.question!r} {look.below:g} {look.retries}"
            )
        return "; ".join(told)

    @classmethod
    def of_weights(cls, weights: Path, link: LinkName = "signal") -> Folders:
        """Return the usual layout below one folder of weights."""
        return cls(
            encoder=weights / "encoder",
            language_model=weights / "llm",
            projections={modality: weights / "projections" / str(modality) for modality in DECODERS},
            decoders={modality: weights / str(modality) for modality in DECODERS},
            links=dict.fromkeys(DECODERS, link),
        )


@dataclass(frozen=True, eq=False)
class Answer:
    """One reply: its texts and signals in order, and its token ids as they were said.

    ``confidence`` is that of each signal, in order, as :class:`llm.generate.SignalReady` has it.
    """

    parts: list[Spoken]
    ids: tuple[int, ...]
    confidence: tuple[float, ...]


class System:
    """Encoder, language model, projections and decoders of a preset, loaded."""

    def __init__(self, folders: Folders) -> None:
        self.links = folders.links
        self.settings = folders.settings
        self.edit_strengths = folders.edit_strengths
        self.keep_untouched = folders.keep_untouched
        self.second_look = folders.second_look
        self.num_looks = self.num_retries = 0
        self.encoder = load_encoder(folders.encoder, tiling=folders.tiling)
        self.llm = LanguageModel.from_pretrained(
            folders.language_model, base=folders.base, bridge=folders.bridge
        )
        self.llm.merge_adapter()
        self.decoders = {m: DECODERS[m].load(folder) for m, folder in folders.decoders.items()}
        self.projections = {
            m: OutputProjection.from_pretrained(folders.projections[m])
            for m, link in folders.links.items()
            if link == "signal"
        }

    def read(self, medium: Medium) -> MediaTokens:
        """Encode a medium as the language model reads it."""
        features = self.encoder.encode(medium)
        return MediaTokens(features.modality, features.tokens, features.pooled, features.blocks)

    def speak(self, dialogue: Dialogue) -> list[Spoken]:
        """Return the reply to a dialogue, greedily: texts and signals in order."""
        return self.answer(dialogue).parts

    def answer(self, dialogue: Dialogue, allowed: frozenset[Modality] = ALL_MEDIA) -> Answer:
        """Reply to a dialogue, greedily, with no media but the allowed ones."""
        options = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS, allowed=allowed)
        parts: list[Spoken] = []
        text = ""
        ids: tuple[int, ...] = ()
        confidence: tuple[float, ...] = ()
        for event in generate(self.llm, dialogue, options, threading.Event()):
            if isinstance(event, TextDelta):
                text += event.text
            elif isinstance(event, SignalReady):
                parts += [text.strip()] if text.strip() else []
                parts.append(event.signal)
                confidence += (event.confidence,)
                text = ""
            elif isinstance(event, Finished):
                ids = event.ids
        return Answer([*parts, text.strip()] if text.strip() else parts, ids, confidence)

    @property
    def edits(self) -> frozenset[Modality]:
        """The modalities whose media depend on the newest one of their kind."""
        return self.keep_untouched | frozenset(self.edit_strengths)

    def condition(self, signal: Signal, link: LinkName | None = None) -> Condition:
        """Turn a signal into its decoder's condition over a link; None stands for the preset's."""
        if (link or self.links[signal.modality]) == "caption":
            return self.decoders[signal.modality].encode_caption(signal.caption)
        with torch.inference_mode():
            projection = self.projections[signal.modality]
            projected = projection(signal.hidden[None], signal.embeddings[None])
            copied = bool(projection.copy_logits(signal.hidden[None]) > 0)
        return Condition(projected[0].clone(), copied=copied)

    def make(
        self,
        modality: Modality,
        conditions: Sequence[Condition],
        seed: int | Sequence[int],
        settings: DecodeSettings | None = None,
        sources: Sequence[Medium | None] | None = None,
        captions: Sequence[str] | None = None,
    ) -> list[Medium]:
        """Decode conditions of one modality in batches, by default as the preset asks.

        Medium i has the seed ``seed + i``, or ``seed[i]`` where there is one for each. Where there is one, it
        starts from ``sources[i]`` if the preset has an edit strength for the modality, and keeps what is
        untouched of it if the preset says so. With ``captions``, what each was to be, the system looks at
        it again if the preset asks for that.
        """
        wish = settings or self.settings.get(modality, DecodeSettings())
        seeds = [seed + i for i in range(len(conditions))] if isinstance(seed, int) else list(seed)
        strength = self.edit_strengths.get(modality)
        nothing: list[Medium | None] = [None] * len(conditions)
        starts = list(sources) if sources and strength is not None else nothing
        originals = list(sources) if sources and modality in self.keep_untouched else nothing
        decoder = self.decoders[modality]
        media: dict[int, Medium] = {}
        for begins in (False, True):  # a batch has sources or none
            mine = [i for i, start in enumerate(starts) if (start is not None) is begins]
            for first in range(0, len(mine), DECODE_BATCH):
                part = mine[first : first + DECODE_BATCH]
                wishes = [replace(wish, seed=seeds[i], strength=strength if begins else None) for i in part]
                latents = [decoder.encode_source(medium, wish) for i in part if (medium := starts[i])]
                made = decoder.decode_batch(
                    [conditions[i] for i in part],
                    wishes,
                    sources=latents or None,
                    originals=[originals[i] for i in part],
                )
                media |= {i: one.medium for i, one in zip(part, made, strict=True)}
        bare = [media[i] for i in range(len(conditions))]
        if captions is None or self.second_look is None:
            return bare
        places = [i for i, words in enumerate(captions) if self.second_look.looks_at(modality, words)]

        def again(which: Sequence[int], attempt: int) -> list[Medium]:
            return self.make(
                modality,
                [conditions[i] for i in which],
                [next_seed(seeds[i], attempt) for i in which],
                settings,
                None if sources is None else [sources[i] for i in which],
            )

        return self._best(bare, captions, places, self.second_look, again)

    def _best(
        self,
        media: list[Medium],
        captions: Sequence[str],
        places: Sequence[int],
        look: SecondLook,
        again: Callable[[Sequence[int], int], list[Medium]],
    ) -> list[Medium]:
        """Look at the media at some places, and let those be made again that are not what they were to be."""
        best = dict.fromkeys(places, -1.0)
        others = [media[i] for i in places]
        for attempt in range(1, look.retries + 2):
            found = self._likeness(others, [captions[i] for i in places], look)
            for i, other, like in zip(places, others, found, strict=True):
                if like > best[i]:
                    media[i], best[i] = other, like
            places = [i for i in places if look.asks_again(best[i], attempt)]
            if not places:
                break
            self.num_retries += len(places)
            others = again(places, attempt)
        return media

    def _likeness(self, media: Sequence[Medium], captions: Sequence[str], look: SecondLook) -> list[float]:
        self.num_looks += len(media)
        found: list[float] = []
        for first in range(0, len(media), DECODE_BATCH):
            dialogues = [
                [
                    Message("user", [self.read(read_media(to_bytes(medium))), look.question]),
                    Message("assistant", [words]),
                ]
                for medium, words in zip(media[first : first + DECODE_BATCH], captions[first:], strict=False)
            ]
            found += [likeness(scored.log_probabilities) for scored in score(self.llm, dialogues)]
        return found
