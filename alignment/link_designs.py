"""``patchbay train link-designs`` and ``patchbay eval link-designs``: ways to join a language model to media.

The base of a run is joined to its frozen decoders and to its frozen encoder in several ways, each with as
many steps on the same data and with several seeds. What makes media is trained as in stage 2, what reads
them as in stage 1; stage 3, which trains both together, is left out.

Shape letters in this file:
    N signal blocks   Q condition tokens   E condition width   C latent channels
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alignment.embedded.captions import CAPTION_TOKENS, WIDTH
from alignment.embedded.denoisers import ConditionedDenoiser
from alignment.embedded.dialogues import dialogue_of
from alignment.embedded.export import MODALITIES, export_aligned
from alignment.embedded.language import SIGNALS, with_signals
from alignment.evaluation import HELD_OUT_SHARE, SPLITS, ceiling
from alignment.fitting import FitConfig, fit, half_precision, prefer_plain_attention, training_device
from alignment.kept_results import KeptResults
from alignment.samples import all_right, converse, decode, prepare
from alignment.shared_work import share
from alignment.stages import STAGES, Aligned, CaptionTargets, caption_distance
from alignment.step_order import run_in_order
from alignment.system import Folders, LinkName, System
from alignment.toybox.exercises import FreshScenes, make
from alignment.toybox.grammar import caption
from alignment.toybox.media import render
from alignment.toybox.world import Scene
from alignment.training import (
    GRIDS,
    STAGE_BATCHES,
    Run,
    TrainOptions,
    frozen_decoder,
    run_of,
    text_targets,
    train_stage,
)
from decoders.mel import log_mel
from decoders.projection import OutputProjection, OutputProjectionConfig
from encoders.media import Audio, Image, Modality, Video
from llm.model import LanguageModel
from llm.projectors import ProjectorConfig, ProjectorKind
from llm.signals import SignalVocabulary

READING, MAKING, _ = STAGES
MADE = tuple(STAGES[MAKING].directions)
READ = tuple(STAGES[READING].directions)
SEEDS = (0, 1, 2)
NUM_STEPS = 600
DENOISED = 6
"""Media of each kind and step that are denoised; a clip costs as much as a batch of replies."""
CEILING, CAPTIONS = "ceiling", "caption"


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """A way from a reply to the conditions of decoders.

    ``tokens`` is the length of every signal block, None that of the embedded model. ``distance`` and
    ``denoising`` weigh the losses; ``layers`` are those of the connector's encoder and decoder.
    """

    tokens: int | None = None
    distance: float = 1.0
    denoising: float = 0.0
    layers: tuple[int, int] = (1, 2)

    @property
    def signals(self) -> SignalVocabulary:
        """The signal blocks."""
        n = self.tokens
        return SIGNALS if n is None else SignalVocabulary(image=n, video=n, audio=n)


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
    "signal, and denoising": Maker(denoising=0.1),
    "denoising alone": Maker(distance=0.0, denoising=1.0),
    "query": Maker(tokens=32, distance=0.0, denoising=1.0, layers=(2, 4)),
}
READERS: Mapping[str, Reader] = {
    "one linear token": Reader(kind="linear"),
    "resampler, 1 token": Reader(),
    "resampler, 4 tokens": Reader(tokens=4),
    "resampler, 8 tokens": Reader(tokens=8),
    "resampler, 16 tokens": Reader(tokens=16),
}
DESIGNS: Mapping[str, Maker | Reader] = {**MAKERS, **READERS}


# --- training -------------------------------------------------------------------------------------


def train(weights: Path, options: TrainOptions) -> list[Path]:
    """Train every design with every seed, on the parts of a run that is there.

    Args:
        weights: the preset's folder of weights, which names the run; nothing is written there.
        options: of the run; ``num_steps`` is that of every design, ``jobs`` are trained at once.

    Returns:
        Their folders, each with ``llm`` and, where there are any, ``projections``.

    Raises:
        ValueError: the run has no encoder yet, which is the last of the parts that are joined.

    """
    work = run_of(weights, options)
    if not (work.folder / "imagebind" / "encoder").is_dir():
        raise ValueError(
            f"{work.folder} holds no run with all parts to join. First run `patchbay train imagebind`."
        )
    work = replace(work, num_steps=work.num_steps or NUM_STEPS)
    names = [_step(design, seed) for seed in SEEDS for design in DESIGNS]
    needs: dict[str, tuple[str, ...]] = dict.fromkeys(names, ())
    run_in_order(needs, partial(_train_one, work, options.threads), options.jobs, _home(work.folder) / "logs")
    return [_home(work.folder) / name for name in names]


def _train_one(work: Run, threads: int, name: str) -> None:
    torch.set_num_threads(threads)
    design, seed = next((d, s) for d in DESIGNS for s in SEEDS if _step(d, s) == name)
    torch.manual_seed(seed)
    folder, way = _home(work.folder) / name, DESIGNS[design]
    base = work.folder / "language" / "llm"
    if isinstance(way, Reader):
        model = Aligned(_reading(base, way), {})
        train_stage(work, model, STAGES[READING], folder, replace(work.config(READING), seed=seed))
    else:
        model = made_by(way, base)
        denoisers = {m: _denoising(work, m) for m in MODALITIES.values()} if way.denoising else {}
        train_maker(
            way, model, text_targets(work), denoisers, folder, replace(work.config(MAKING), seed=seed)
        )
    export_aligned(model, folder)


def _reading(base: Path, way: Reader) -> LanguageModel:
    llm = LanguageModel.from_pretrained(base)
    llm.add_projectors(
        {
            modality: ProjectorConfig(
                kind=way.kind, encoder_width=128, llm_width=llm.width, num_queries=way.tokens, grid=grid
            )
            for modality, grid in GRIDS.items()
        }
    )
    return llm


def made_by(way: Maker, base: Path) -> Aligned:
    """Return a base with fresh signals and connectors of a design."""
    llm = with_signals(LanguageModel.from_pretrained(base), way.signals)
    encoder_layers, decoder_layers = way.layers
    return Aligned(
        llm,
        {
            modality: OutputProjection(
                OutputProjectionConfig(
                    llm_width=llm.width, out_width=WIDTH, hidden_width=96, ffn_width=256,
                    num_encoder_layers=encoder_layers, num_decoder_layers=decoder_layers,
                    num_queries=1 if modality is Modality.AUDIO else CAPTION_TOKENS,
                )
            )
            for modality in MODALITIES.values()
        },
    )  # fmt: skip


Denoising = Callable[[Sequence[Scene], Tensor, random.Random, torch.Generator], Tensor]
"""(scenes, conditions (N, Q, E), chance, noise) -> how wrong the decoder denoises what the scenes show."""


def train_maker(
    way: Maker,
    model: Aligned,
    targets: CaptionTargets,
    denoisers: Mapping[Modality, Denoising],
    folder: Path,
    config: FitConfig,
) -> None:
    """Train the signals and connectors of a design, in place.

    Args:
        way: the design.
        model: at the end it holds averaged weights if ``config`` asks for an average.
        targets: for each modality, captions -> what its decoder's own text encoder makes of them.
        denoisers: for each modality, how wrong its decoder denoises; unless ``way`` has no weight for that.
        folder: for checkpoints and logs.
        config: length, rates and seed.

    """
    model.train_only(STAGES[MAKING])
    prefer_plain_attention(model.llm.causal_lm)

    def losses(step: int) -> dict[str, Tensor]:
        rng, noise = config.randomness(step), config.noise(step)
        exercises = [make(name, rng, FreshScenes(rng)) for name in rng.choices(MADE, k=STAGE_BATCHES[MAKING])]
        asked = {caption(exercise.scenes[0]): exercise.scenes[0] for exercise in exercises}
        with half_precision():
            words, made = model.speak([dialogue_of(exercise, {}) for exercise in exercises])
        found = {"words": words}
        for modality, (captions, conditions) in made.items():
            if way.distance:
                wanted = targets[modality](captions).to(conditions.device)  # (N, Q, E)
                found[f"{modality} distance"] = way.distance * caption_distance(conditions, wanted)
            if way.denoising:
                scenes = [asked[text] for text in captions[:DENOISED]]
                wrong = denoisers[modality](scenes, conditions[:DENOISED], rng, noise)
                found[f"{modality} denoising"] = way.denoising * wrong
        return found

    fit("link", model, losses, config, folder)
    model.requires_grad_(False)


def _denoising(work: Run, modality: Modality) -> Denoising:
    kind = next(kind for kind, m in MODALITIES.items() if m is modality)
    model, encode = frozen_decoder(work, kind)
    return partial(denoised, model.to(training_device()), encode)


def denoised(
    model: ConditionedDenoiser,
    encode: Callable[[Tensor], Tensor],
    scenes: Sequence[Scene],
    conditions: Tensor,
    rng: random.Random,
    noise: torch.Generator,
) -> Tensor:
    """Return the velocity loss of a frozen denoiser under conditions ``(N, Q, E)``, on fresh renderings."""
    rows = np.stack([_row(scene, rng) for scene in scenes])
    with torch.no_grad():
        latents = encode(torch.from_numpy(rows)).float().to(conditions.device)  # (N, C, ...)
    if model.kind == "sound":
        conditions = F.normalize(conditions[:, 0], dim=-1)  # (N, E)
    return model.velocity_loss(latents, conditions, noise)


def _row(scene: Scene, rng: random.Random) -> np.ndarray[Any, Any]:
    """Return a rendering like a row of its pool: pixels, frames, or mels."""
    medium = render(scene, rng)
    if isinstance(medium, Image):
        return medium.pixels
    if isinstance(medium, Video):
        return medium.frames
    assert isinstance(medium, Audio)
    return log_mel(torch.from_numpy(medium.samples)[None])[0].numpy()


def _home(run: Path) -> Path:
    return run / "link-designs"


def _step(design: str, seed: int) -> str:
    return f"{design.replace(',', '').replace(' ', '-')}-seed-{seed}"


def folder_of(run: Path, design: str, seed: int) -> Path:
    """Return where a design of a run lies."""
    return _home(run) / _step(design, seed)


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wish:
    """One design of one seed, over all that it can do; ``seed`` is of its training and of the scenes."""

    design: str
    seed: int
    samples: int


def main_designs(
    folders: Folders, run: Path, samples: int, jobs: int = 1, keep: Path | None = None
) -> dict[str, Any]:
    """Measure every design of a run with the encoder and the decoders of a preset.

    Args:
        folders: where the parts of the preset lie, which must be those of the run.
        run: of which :func:`train` has made the designs.
        samples: seen samples of each direction and seed; a quarter as many held-out ones are added.
        jobs: processes that share the work; the result is the same for every number.
        keep: a folder for results as they come; a run with the same one goes on where the last was ended.

    Returns:
        ``makers`` and ``readers``: for each design, direction and split the share of right samples by seed.
        Among the makers are the captions of the design ``signal``, read by the decoders' own text encoders,
        and the ceiling: these encoders on the true caption.

    Raises:
        ValueError: a design is missing.

    """
    started = time.monotonic()
    for design in DESIGNS:
        for seed in SEEDS:
            if not ((folder := folder_of(run, design, seed)) / "llm").is_dir():
                raise ValueError(f"{folder} is missing. First run `patchbay train link-designs`.")
    wishes = [Wish(design, seed, samples) for design in DESIGNS for seed in SEEDS]
    kept = KeptResults(keep, [*folders.all, _home(run)], folders.how) if keep is not None else None
    found = share("link designs", wishes, partial(_measurer, folders, run), jobs, kept)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in found:
        for name, row in result.items():
            by_name.setdefault(name, []).append(row)
    merged = {name: _by_seed(rows) for name, rows in by_name.items()}
    return {
        "samples": samples,
        "seeds": list(SEEDS),
        "makers": {name: row for name, row in merged.items() if name not in READERS},
        "readers": {name: row for name, row in merged.items() if name in READERS},
        "seconds": round(kept.seconds if kept is not None else time.monotonic() - started, 1),
    }


def _by_seed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        direction: {split: [row[direction][split] for row in rows] for split in SPLITS}
        for direction in rows[0]
    }


def _measurer(folders: Folders, run: Path) -> Callable[[Wish], dict[str, Any]]:
    return partial(_measure, folders, run)


def _measure(folders: Folders, run: Path, wish: Wish) -> dict[str, Any]:
    """Return the shares of a design, and for the design ``signal`` those of its captions and the ceiling."""
    reads = wish.design in READERS
    folder = folder_of(run, wish.design, wish.seed)
    link: LinkName = "caption" if reads else "signal"
    system = System(
        replace(
            folders,
            language_model=folder / "llm",
            projections={m: folder / "projections" / str(m) for m in folders.projections},
            links=dict.fromkeys(folders.links, link),
            base=None,
            bridge=None,
            second_look=None,
        )
    )
    ways: dict[str, LinkName | None] = {wish.design: link}
    if wish.design == "signal":
        ways |= {CAPTIONS: "caption", CEILING: None}
    found: dict[str, Any] = {way: {} for way in ways}
    for direction in READ if reads else MADE:
        for split in SPLITS:
            number = wish.samples if split == "seen" else max(1, wish.samples // HELD_OUT_SHARE)
            for way, right in _right(system, ways, direction, split, number, wish.seed).items():
                found[way].setdefault(direction, {})[split] = round(right, 4)
    return found


def _right(
    system: System, ways: Mapping[str, LinkName | None], direction: str, split: str, number: int, seed: int
) -> dict[str, float]:
    rng = random.Random(f"link-designs-{seed}-{direction}-{split}")
    scenes = FreshScenes(rng, held_out=split == "held_out")
    exercises = [make(direction, rng, scenes, reserved_wordings=True) for _ in range(number)]
    samples = [prepare(exercise, rng) for exercise in exercises]
    for sample in samples:
        converse(system, sample)
    found = {}
    for way, link in ways.items():
        if link is None:
            found[way] = ceiling(system, samples, seed)
            continue
        copies = [replace(sample, made=[]) for sample in samples]
        decode(system, copies, seed, links=dict.fromkeys(system.links, link), from_noise=True)
        found[way] = sum(map(all_right, copies)) / number
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return two Markdown tables with a line per design: what makes media, and what reads them."""
    told = (
        f"{result['samples']} samples of each direction and seed, a quarter as many held out; seeds "
        f"{', '.join(map(str, result['seeds']))}; ± half the spread over them. {result['seconds']:.0f} s"
    )
    return "\n".join(
        [
            *_lines("what makes media", result["makers"]),
            "",
            *_lines("what reads media", result["readers"]),
            "",
            told,
        ]
    )


def _lines(title: str, designs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    directions = list(next(iter(designs.values())))
    head = [title, *directions, "mean, seen", "mean, held out"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in designs.items():
        cells = [_cell(row[direction]["seen"]) for direction in directions]
        for split in SPLITS:
            seeds = zip(*(row[direction][split] for direction in directions), strict=True)
            cells.append(_cell([statistics.fmean(shares) for shares in seeds]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(shares: Sequence[float]) -> str:
    spread = f" ± {(max(shares) - min(shares)) / 2:.1%}" if len(shares) > 1 else ""
    return f"{statistics.fmean(shares):.1%}{spread}"
