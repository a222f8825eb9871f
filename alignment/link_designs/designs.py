"""The ways that are compared, and the parts that each of them trains.

Shape letters in this file:
    k signal tokens   D width of the language model   Q condition tokens   E condition width
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignment.embedded.captions import CAPTION_TOKENS, WIDTH
from alignment.embedded.export import MODALITIES
from alignment.embedded.language import with_signals
from alignment.stages import STAGES, Aligned
from alignment.training import GRIDS
from decoders.projection import OutputProjection, OutputProjectionConfig
from encoders.media import Modality
from llm.batch import Batch
from llm.model import LanguageModel, Output
from llm.projectors import ProjectorConfig, ProjectorKind
from llm.signals import SignalVocabulary

READING, MAKING, _ = STAGES
MADE = tuple(STAGES[MAKING].directions)
READ = tuple(STAGES[READING].directions)
SEEDS = (0, 1, 2)
USUAL = SignalVocabulary(image=4, video=8, audio=4)
"""The signal blocks of a design that is not about their length."""
LAST_LAYER = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """A way from a reply to the conditions of decoders.

    ``tokens`` is the length of every signal block, None stands for :data:`USUAL`. ``distance`` and
    ``denoising`` weigh the losses; ``connector`` are the layers of the connector's encoder and decoder.
    ``heard`` are the layers of the language model whose states at the signals are averaged, and
    ``learned_null`` has the decoders guide away from a condition that is learned, in place of the empty
    caption's.
    """

    tokens: int | None = None
    distance: float = 1.0
    denoising: float = 0.0
    connector: tuple[int, int] = (1, 2)
    heard: tuple[int, ...] = (LAST_LAYER,)
    learned_null: bool = False

    @property
    def signals(self) -> SignalVocabulary:
        """The signal blocks."""
        n = self.tokens
        return USUAL if n is None else SignalVocabulary(image=n, video=n, audio=n)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A way from the encoder to the language model: a projector, and how many tokens a resampler gives."""

    kind: ProjectorKind = "resampler"
    tokens: int = 1


MAKERS: Mapping[str, Maker] = {
    "signal, 1 token": Maker(tokens=1),
    "signal, 2 tokens": Maker(tokens=2),
    "signal": Maker(),
    "signal, 16 tokens": Maker(tokens=16),
    "signal, three layers": Maker(heard=(3, 5, LAST_LAYER)),
    "signal, and denoising": Maker(denoising=0.1),
    "signal, and a learned null": Maker(denoising=0.1, learned_null=True),
    "denoising alone": Maker(distance=0.0, denoising=1.0),
    "query": Maker(tokens=32, distance=0.0, denoising=1.0, connector=(2, 4)),
}
READERS: Mapping[str, Reader] = {
    "one linear token": Reader(kind="linear"),
    "resampler, 1 token": Reader(),
    "resampler, 4 tokens": Reader(tokens=4),
    "resampler, 8 tokens": Reader(tokens=8),
    "resampler, 16 tokens": Reader(tokens=16),
}
DESIGNS: Mapping[str, Maker | Reader] = {**MAKERS, **READERS}


class Joined(Aligned):
    """A base with fresh signals and connectors; ``nulls`` hold ``(Q, E)`` where a design learns them."""

    def __init__(self, way: Maker, llm: LanguageModel) -> None:
        encoder_layers, decoder_layers = way.connector
        projections = {
            modality: OutputProjection(
                OutputProjectionConfig(
                    llm_width=llm.width, out_width=WIDTH, hidden_width=96, ffn_width=256,
                    num_encoder_layers=encoder_layers, num_decoder_layers=decoder_layers,
                    num_queries=1 if modality is Modality.AUDIO else CAPTION_TOKENS,
                )
            )
            for modality in MODALITIES.values()
        }  # fmt: skip
        super().__init__(llm, projections)
        self.heard = way.heard
        self.nulls = nn.ParameterDict()

    def learn_nulls(self, usual: Mapping[Modality, Tensor]) -> None:
        """Learn what decoders guide away from, beginning with ``usual``, ``(Q, E)`` of each modality."""
        self.nulls.update({str(modality): nn.Parameter(null.clone()) for modality, null in usual.items()})

    def run_batches(self, batches: Sequence[Batch]) -> list[Output]:
        """Run the language model; ``hidden`` of the outputs is what the connectors get."""
        return [run_heard(self.llm, batch, self.heard) for batch in batches]


def made_by(way: Maker, base: Path) -> Joined:
    """Return a base with fresh signals and connectors of a design."""
    return Joined(way, with_signals(LanguageModel.from_pretrained(base), way.signals))


def read_by(way: Reader, base: Path) -> Aligned:
    """Return a base with fresh projectors of a design, which makes nothing."""
    llm = LanguageModel.from_pretrained(base)
    llm.add_projectors(
        {
            modality: ProjectorConfig(
                kind=way.kind, encoder_width=128, llm_width=llm.width, num_queries=way.tokens, grid=grid
            )
            for modality, grid in GRIDS.items()
        }
    )
    return Aligned(llm, {})


def run_heard(llm: LanguageModel, batch: Batch, heard: Sequence[int]) -> Output:
    """Run a batch; ``hidden`` ``(B, T, D)`` of the output is the mean over the layers ``heard``.

    Layers count from 1; the last one's states are those after the final norm, the others are brought to
    unit variance, without a scale of their own.
    """
    if tuple(heard) == (LAST_LAYER,):
        return llm(batch)  # type: ignore[no-any-return]
    with _all_states(llm) as kept:
        output: Output = llm(batch)
    states = kept[0]  # the embeddings, then every layer's, each (B, T, D)
    mixed = [
        output.hidden if layer == LAST_LAYER else F.rms_norm(states[layer].float(), states[layer].shape[-1:])
        for layer in heard
    ]
    return replace(output, hidden=torch.stack([state.float() for state in mixed]).mean(dim=0))


@contextmanager
def _all_states(llm: LanguageModel) -> Iterator[list[tuple[Tensor, ...]]]:
    """Keep the states of all layers, of every pass while the context lasts."""
    kept: list[tuple[Tensor, ...]] = []

    def ask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_hidden_states": True}

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        kept.append(output.hidden_states)

    base = llm.causal_lm.base_model
    handles = [base.register_forward_pre_hook(ask, with_kwargs=True), base.register_forward_hook(keep)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
