"""The three stages that join frozen encoder, language model and frozen decoders.

    1 encoder side   media in, captions out: projectors learn to speak the model's language
    2 decoder side   captions in, signals out: signal rows and output projections learn to ask
    3 instruction    every direction: LoRA, projectors, signal rows and output projections together

Method: NExT-GPT (Wu et al. 2023, arXiv 2309.05519), sections 4 and 5. Here only the rows of added
tokens are trained, never the whole tables, and stage 2 works on captions alone: what the decoders'
text encoders make of them is the target, and no diffusion model is in memory.

Shape letters in this file:
    N signal blocks   Q condition tokens   E condition width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignment.fitting import FitConfig, fit, half_precision, prefer_plain_attention
from decoders.projection import OutputProjection
from encoders.media import Modality
from llm.batch import Batch
from llm.model import LanguageModel, ModelPart, Output, SignalStates, mean_loss
from llm.template import Dialogue

Dialogues = Callable[[int], Sequence[Dialogue]]
CaptionTargets = Mapping[Modality, Callable[[Sequence[str]], Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What one stage trains, and on which directions of Toybox.

    ``directions`` gives each direction its share of the data. ``words`` and ``distance`` weigh the
    cross-entropy of the reply and the caption distance; ``copying`` that of the copy gates, where there are
    any.
    """

    name: str
    parts: frozenset[ModelPart]
    trains_projections: bool
    directions: Mapping[str, float]
    words: float = 1.0
    distance: float = 1.0
    copying: float = 0.0


_MAKES = {"text-to-image": 1.0, "text-to-video": 1.0, "text-to-audio": 1.0}
_READS = {"image-to-text": 3.0, "video-to-text": 3.0, "audio-to-text": 2.0}
STAGES: Mapping[str, Stage] = {
    "encoder-side": Stage(
        name="encoder-side",
        parts=frozenset({"projectors", "signal_rows"}),
        trains_projections=False,
        directions=_READS,
        distance=0.0,
    ),
    "decoder-side": Stage(
        name="decoder-side",
        parts=frozenset({"signal_rows"}),
        trains_projections=True,
        directions=_MAKES,
    ),
    "instruction": Stage(
        name="instruction",
        parts=frozenset({"lora", "projectors", "signal_rows"}),
        trains_projections=True,
        directions={
            "text-to-image": 1.5, "text-to-video": 2, "text-to-audio": 1.5,
            "image-to-text": 5, "video-to-text": 5, "audio-to-text": 5,
            "image-to-audio": 2.5, "audio-to-image": 2, "image-to-video": 2, "video-to-image": 3,
            "video-to-audio": 3, "audio-to-video": 2, "image+audio-to-video": 2,
            "text+image-to-image": 6, "text+audio-to-audio": 4, "text+video-to-video": 5,
            "text-to-many": 7, "conversation": 7, "new-subject": 3, "talk": 10, "decision": 6,
            "beyond-words": 4,
        },
        copying=0.3,
    ),
}  # fmt: skip


class Aligned(nn.Module):
    """The language model with the output projections of its signals: everything that stages train."""

    def __init__(self, llm: LanguageModel, projections: Mapping[Modality, OutputProjection]) -> None:
        super().__init__()
        self.llm = llm
        self.projections = nn.ModuleDict({str(m): projection for m, projection in projections.items()})

    def train_only(self, stage: Stage) -> None:
        """Let exactly the parts of ``stage`` have gradients."""
        self.llm.train_only(stage.parts)
        self.projections.requires_grad_(stage.trains_projections)

    def losses(
        self, dialogues: Sequence[Dialogue], stage: Stage, targets: CaptionTargets
    ) -> dict[str, Tensor]:
        """Return the weighted losses of a batch by name."""
        outputs, spoken = self._run(dialogues)
        losses = {"words": stage.words * mean_loss(outputs)}
        if stage.distance:
            for modality, (captions, made) in self._asked(spoken).items():
                with torch.no_grad():
                    wanted = targets[modality](captions).to(self.llm.device)  # (N, Q, E)
                losses[f"{modality} distance"] = stage.distance * caption_distance(made, wanted)
        gated = [modality for modality in spoken if self._projection(modality).config.copy_gate]
        if stage.copying and gated:
            losses["copying"] = stage.copying * self._copying({m: spoken[m] for m in gated})
        return losses

    def _copying(self, spoken: Mapping[Modality, Sequence[SignalStates]]) -> Tensor:
        """Return the cross-entropy of all copy gates."""
        logits: list[Tensor] = []
        wanted: list[bool] = []
        for modality, parts in spoken.items():
            for states in parts:
                logits.append(self._projection(modality).copy_logits(states.hidden))  # (N,)
                wanted += states.copied
        given = torch.cat(logits).float()
        return F.binary_cross_entropy_with_logits(given, given.new_tensor(wanted))

    def _projection(self, modality: Modality) -> OutputProjection:
        return cast(OutputProjection, self.projections[str(modality)])

    def speak(self, dialogues: Sequence[Dialogue]) -> tuple[Tensor, dict[Modality, tuple[list[str], Tensor]]]:
        """Return the mean loss of the replies' words, and what their signals ask of the decoders.

        For each modality that is asked for: the captions, and the conditions ``(N, Q, E)``.
        """
        outputs, spoken = self._run(dialogues)
        return mean_loss(outputs), self._asked(spoken)

    def _run(self, dialogues: Sequence[Dialogue]) -> tuple[list[Output], dict[Modality, list[SignalStates]]]:
        batches = [batch.to(self.llm.device) for batch in self.llm.collate_by_length(dialogues)]
        outputs = self.run_batches(batches)
        spoken: dict[Modality, list[SignalStates]] = {}
        for output, batch in zip(outputs, batches, strict=True):
            for modality, states in self.llm.signal_states(output, batch).items():
                spoken.setdefault(modality, []).append(states)
        return outputs, spoken

    def _asked(
        self, spoken: Mapping[Modality, Sequence[SignalStates]]
    ) -> dict[Modality, tuple[list[str], Tensor]]:
        asked: dict[Modality, tuple[list[str], Tensor]] = {}
        for modality, parts in spoken.items():
            captions = [caption for states in parts for caption in states.captions]
            hidden = torch.cat([states.hidden for states in parts])  # (N, k, D)
            embeddings = torch.cat([states.embeddings for states in parts])
            asked[modality] = captions, self.projections[str(modality)](hidden, embeddings)
        return asked

    def run_batches(self, batches: Sequence[Batch]) -> list[Output]:
        """Run the language model; the outputs' ``hidden`` states are what output projections get."""
        return [self.llm(batch) for batch in batches]


def caption_distance(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean Euclidean distance of condition tokens ``(N, Q, E)`` in units of the wanted tokens' length.

    NExT-GPT's loss is the same without the unit; it makes a sound's unit vector count like the long
    states of the picture decoder.
    """
    distance: Tensor = (made - wanted).norm(dim=-1).mean() / wanted.norm(dim=-1).mean()
    return distance


def run_stage(
    stage: Stage,
    model: Aligned,
    dialogues: Dialogues,
    targets: CaptionTargets,
    folder: Path,
    config: FitConfig,
) -> None:
    """Train one stage.

    Args:
        stage: what is trained.
        model: changed in place; at the end it holds averaged weights if ``config`` asks for an average.
        dialogues: step -> the dialogues of that step.
        targets: for each modality, captions -> what its decoder's own text encoder makes of them.
        folder: for checkpoints and logs.
        config: length and rates.

    """
    model.train_only(stage)
    prefer_plain_attention(model.llm.causal_lm)

    def losses(step: int) -> dict[str, Tensor]:
        with half_precision():
            return model.losses(dialogues(step), stage, targets)

    fit(stage.name, model, losses, config, folder)
    model.requires_grad_(False)
