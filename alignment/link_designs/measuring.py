"""How well every design does: right samples by direction, split and seed, and a table of them."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from alignment.evaluation import HELD_OUT_SHARE, SPLITS, ceiling
from alignment.kept_results import KeptResults
from alignment.link_designs.designs import (
    DESIGNS,
    LAST_LAYER,
    MADE,
    READ,
    READERS,
    SEEDS,
    Maker,
    Reader,
    run_heard,
)
from alignment.link_designs.folders import NULLS_FILE, folder_of, home
from alignment.samples import Sample, all_right, converse, decode, prepare
from alignment.shared_work import share
from alignment.system import Folders, LinkName, System
from alignment.toybox.directions import make
from alignment.toybox.exercise import FreshScenes
from decoders.pipeline_folder import NULL_FILE, PipelineFolder
from encoders.media import Modality
from llm.model import LanguageModel
from llm.signals import Signal
from llm.template import Message, SignalPart
from llm.template import Part as DialoguePart

CEILING, CAPTIONS = "ceiling", "caption"


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
    kept = KeptResults(keep, [*folders.all, home(run)], folders.how) if keep is not None else None
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
    folder = folder_of(run, wish.design, wish.seed)
    way = DESIGNS[wish.design]
    reads = isinstance(way, Reader)
    link: LinkName = "caption" if reads else "signal"
    links: dict[str, LinkName | None] = {wish.design: link}
    if wish.design == "signal":
        links |= {CAPTIONS: "caption", CEILING: None}
    found: dict[str, Any] = {name: {} for name in links}
    with tempfile.TemporaryDirectory() as scratch:
        system = System(
            replace(
                folders,
                language_model=folder / "llm",
                projections={m: folder / "projections" / str(m) for m in folders.projections},
                decoders=guided_away(folders.decoders, folder / NULLS_FILE, Path(scratch)),
                links=dict.fromkeys(folders.links, link),
                base=None,
                bridge=None,
                second_look=None,
            )
        )
        for direction in READ if reads else MADE:
            for split in SPLITS:
                number = wish.samples if split == "seen" else max(1, wish.samples // HELD_OUT_SHARE)
                samples = _conversations(system, direction, split, number, wish.seed)
                if isinstance(way, Maker) and way.heard != (LAST_LAYER,):
                    samples = [heard_again(system.llm, sample, way.heard) for sample in samples]
                for name, right in _right(system, samples, links, wish.seed).items():
                    found[name].setdefault(direction, {})[split] = round(right, 4)
    return found


def guided_away(decoders: Mapping[Modality, Path], nulls: Path, scratch: Path) -> Mapping[Modality, Path]:
    """Return folders of decoders that guide away from what lies in ``nulls``; the same if nothing does."""
    if not nulls.is_file():
        return decoders
    found = dict(decoders)
    for name, null in load_file(nulls).items():
        modality = Modality(name)
        found[modality] = scratch / name
        found[modality].mkdir()
        for part in decoders[modality].iterdir():
            if part.name != NULL_FILE:
                (found[modality] / part.name).symlink_to(part.resolve())
        PipelineFolder(found[modality]).write_null(null)
    return found


def _conversations(system: System, direction: str, split: str, number: int, seed: int) -> list[Sample]:
    rng = random.Random(f"link-designs-{seed}-{direction}-{split}")
    scenes = FreshScenes(rng, held_out=split == "held_out")
    exercises = [make(direction, rng, scenes, reserved_wordings=True) for _ in range(number)]
    samples = [prepare(exercise, rng) for exercise in exercises]
    for sample in samples:
        converse(system, sample)
    return samples


@torch.inference_mode()
def heard_again(llm: LanguageModel, sample: Sample, heard: Sequence[int]) -> Sample:
    """Return a sample whose last signals have the states of the layers ``heard``, at the same places.

    The reply is put through the language model once more, whole, as in training; that gives the states that
    it had when it was said.
    """
    if not sample.signals:
        return sample
    said: list[DialoguePart] = [
        SignalPart(part.modality) if isinstance(part, Signal) else part for part in sample.spoken
    ]
    batch = llm.collate([[*sample.heard, Message("assistant", said)]])
    blocks = {
        modality: list(zip(states.hidden, states.embeddings, strict=True))
        for modality, states in llm.signal_states(run_heard(llm, batch, heard), batch).items()
    }
    spoken = [
        replace(part, hidden=state[0].clone(), embeddings=state[1].clone())
        if isinstance(part, Signal) and (state := blocks[part.modality].pop(0))
        else part
        for part in sample.spoken
    ]
    again = replace(sample, spoken=spoken)
    return replace(again, replies=[*sample.replies[:-1], again.signals])


def _right(
    system: System, samples: Sequence[Sample], links: Mapping[str, LinkName | None], seed: int
) -> dict[str, float]:
    """Return the share of right samples for each name of a link; None stands for the ceiling."""
    found = {}
    for name, link in links.items():
        if link is None:
            found[name] = ceiling(system, samples, seed)
            continue
        copies = [replace(sample, made=[]) for sample in samples]
        decode(system, copies, seed, links=dict.fromkeys(system.links, link), from_noise=True)
        found[name] = sum(map(all_right, copies)) / len(samples)
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
