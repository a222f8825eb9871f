"""Training what joins a part of a preset to the rest, after that part was exchanged. Parts stay as they are.

    a decoder            the rows of its signal tokens, and a new output projection to its condition
    the encoder          new projectors from its tokens to those of the language model
    the language model   all rows of added tokens, all projectors and all output projections, anew

As in the stages, words count as cross-entropy, and an output projection by its distance to what the decoder's
own text encoder makes of the caption. A tensor that the decoder masks counts where the mask is 1.

Shape letters in this file:
    N signal blocks   Q condition tokens   E condition width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from alignment.fitting import FitConfig, fit, half_precision
from decoders.condition import Condition, ConditionSpec
from decoders.projection import OutputProjection, OutputProjectionConfig
from encoders.encoder import Encoder
from encoders.media import Modality
from llm.model import LanguageModel, SignalStates
from llm.projectors import ProjectorConfig
from llm.template import Dialogue

BRIDGE_CONFIG = FitConfig(num_steps=700, learning_rate=1.5e-3, warmup_steps=50, weight_decay=0.0)
"""Without weight decay: rows that are not trained must stay as they are, bit for bit."""
QUERIES, HEADS = 32, 4
CACHED_BYTES = 2**30


class CaptionReader(Protocol):
    """What is asked of a decoder here."""

    @property
    def condition_specs(self) -> dict[str, ConditionSpec]:
        """The tensors that it is conditioned on, the main one first."""
        ...

    def encode_caption(self, caption: str) -> Condition:
        """Return what its own text encoder makes of a caption."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """What is trained, and with what.

    ``rows`` are the modalities whose signal tokens are trained, None stands for all added tokens;
    ``projections`` are trained whole, and ``projectors`` says whether those of the model are.
    """

    llm: LanguageModel
    rows: frozenset[Modality] | None = frozenset()
    projectors: bool = False
    projections: Mapping[Modality, OutputProjection]
    decoders: Mapping[Modality, CaptionReader]


def new_projection(
    decoder: CaptionReader, llm_width: int, like: OutputProjectionConfig | None = None
) -> OutputProjection:
    """Return a fresh projection to what ``decoder`` takes, with the inner sizes of ``like``."""
    names = ("hidden_width", "num_encoder_layers", "num_decoder_layers", "num_heads", "ffn_width")
    inner = {} if like is None else {name: getattr(like, name) for name in names}
    return OutputProjection(OutputProjectionConfig.for_decoder(decoder.condition_specs, llm_width, **inner))


def new_projectors(
    encoder: Encoder, llm_width: int, like: Mapping[Modality, ProjectorConfig]
) -> dict[Modality, ProjectorConfig]:
    """Return projectors for all that ``encoder`` reads, of the kinds of ``like``; else resamplers."""
    found = {}
    for modality in sorted(encoder.modalities - {Modality.TEXT}):
        old = like.get(modality)
        found[modality] = ProjectorConfig(
            kind=old.kind if old else "resampler",
            encoder_width=encoder.width_of(modality),
            llm_width=llm_width,
            num_queries=old.num_queries if old else QUERIES,
            num_heads=old.num_heads if old else HEADS,
            grid=encoder.grid_of(modality) if old is None or old.grid else (),
        )
    return found


def train_bridge(
    name: str,
    bridge: Bridge,
    dialogues: Callable[[int], Sequence[Dialogue]],
    folder: Path,
    config: FitConfig = BRIDGE_CONFIG,
) -> None:
    """Train a bridge in place.

    Args:
        name: shown in the progress bar.
        bridge: what is trained.
        dialogues: step -> the dialogues of that step.
        folder: for checkpoints and logs; a run that was broken off goes on there.
        config: length and rates.

    """
    llm = bridge.llm
    module = nn.ModuleDict({"llm": llm})
    module["projections"] = nn.ModuleDict({str(m): p for m, p in bridge.projections.items()})
    module.requires_grad_(False)
    parts = {"signal_rows"} if bridge.rows is None or bridge.rows else set()
    llm.train_only(parts | ({"projectors"} if bridge.projectors else set()))  # type: ignore[arg-type]
    module["projections"].requires_grad_(True)
    targets = {m: _remembered(decoder) for m, decoder in bridge.decoders.items()}

    def losses(step: int) -> dict[str, Tensor]:
        with half_precision():
            batch = llm.collate(dialogues(step)).to(llm.device)
            output = llm(batch)
            found = {"words": output.loss}
            for modality, states in llm.signal_states(output, batch).items():
                if modality in bridge.projections:
                    wanted = [targets[modality](caption) for caption in states.captions]
                    found[f"{modality} distance"] = condition_distance(
                        bridge.projections[modality], states, wanted
                    )
        return found

    hooks = _freeze_other_rows(llm, bridge.rows) if bridge.rows else []
    try:
        fit(name, module, losses, config, folder)
    finally:
        for hook in hooks:
            hook.remove()
    module.requires_grad_(False)


def condition_distance(
    projection: OutputProjection, states: SignalStates, wanted: Sequence[Condition]
) -> Tensor:
    """Return the mean distance of projected conditions to the wanted ones, in units of the latters' length.

    Each tensor of the condition counts as much as any other. Where there is a mask, the main tensor counts
    at the tokens that it shows.
    """
    main, named = projection.project(states.hidden, states.embeddings)  # (N, Q, E)
    others = {
        name: torch.stack([each.named[name].float() for each in wanted]).reshape(made.shape).to(made.device)
        for name, made in named.items()
    }
    shown = [mask[:, 0] for name, mask in others.items() if name.endswith("mask")]  # (N, Q)
    goal = torch.stack([each.embeddings.float() for each in wanted]).to(main.device)
    distances = [_distance(main, goal, shown[0] if shown else None)]
    distances += [_distance(made, others[name], None) for name, made in named.items()]
    return torch.stack(distances).mean()


def _distance(made: Tensor, wanted: Tensor, shown: Tensor | None) -> Tensor:
    weight = torch.ones_like(wanted[..., 0]) if shown is None else shown  # (N, Q)
    apart = ((made - wanted).norm(dim=-1) * weight).sum()
    distance: Tensor = apart / (wanted.norm(dim=-1) * weight).sum().clamp(min=1e-6)
    return distance


def _freeze_other_rows(
    llm: LanguageModel, rows: frozenset[Modality]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Let the gradient through at the signal tokens of ``rows`` alone."""
    ids = [i - llm.tokenizer.base_vocabulary for m in rows for i in llm.tokenizer.signal_ids(m)]
    hooks = []
    for parameter in (llm.signal_rows.embedding, llm.signal_rows.head):
        trained = torch.zeros(len(parameter), 1)
        trained[ids] = 1
        hooks.append(parameter.register_hook(lambda grad, trained=trained: grad * trained.to(grad.device)))
    return hooks


def _remembered(decoder: CaptionReader) -> Callable[[str], Condition]:
    """Return ``encode_caption``, with the latest captions kept as long as they take little memory."""
    each = sum(spec.tokens * spec.width for spec in decoder.condition_specs.values()) * 4
    return lru_cache(maxsize=max(1, CACHED_BYTES // each))(decoder.encode_caption)
