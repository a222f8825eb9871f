"""``patchbay train ablations`` and ``patchbay eval ablations``: what each part of the method is worth.

The language model of a run is joined to its encoder and its decoders again, each time with one part of the
method left out or exchanged, and with as many steps of the last stage. Stages that come out the same are
taken from the run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignment import ability
from alignment.embedded.export import export_aligned
from alignment.evaluation import SPLITS, main_toybox
from alignment.shared_work import share
from alignment.stages import STAGES, Stage
from alignment.step_order import run_in_order
from alignment.system import Folders
from alignment.toybox.directions import DIRECTIONS
from alignment.training import LORA, Run, TrainOptions, restore, run_of, train_stage, unaligned

READING, MAKING, LAST = STAGES
WHOLE_RATE = 1 / 3
"""Of LoRA's learning rate, where the whole language model is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """The stages that are run, and whether the last one trains the whole language model or LoRA."""

    stages: tuple[str, ...] = tuple(STAGES)
    whole_base: bool = False


VARIANTS: Mapping[str, Variant] = {
    "all three stages": Variant(),
    "no stage 1": Variant(stages=(MAKING, LAST)),
    "no stage 2": Variant(stages=(READING, LAST)),
    "no stage 3": Variant(stages=(READING, MAKING)),
    "full fine-tuning": Variant(whole_base=True),
}
CAPTIONS = "captions only"
"""The first variant once more, with decoders that read the captions in place of the signals."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    "making": tuple(name for name in DIRECTIONS if name.startswith("text-to") and name != "text-to-many"),
    "reading": tuple(name for name in DIRECTIONS if name.endswith("-to-text")),
    "turning": tuple(name for name in DIRECTIONS if "-to-" in name and "text" not in name),
    "edits": tuple(name for name in DIRECTIONS if name.startswith("text+")),
    "conversations": ("text-to-many", "conversation", "new-subject"),
    "talk": ("talk",),
    "decision": ("decision",),
    "beyond words": ("beyond-words",),
}
"""Columns of the table, each the mean of some directions."""


def train(weights: Path, options: TrainOptions) -> list[Path]:
    """Train every variant of a run that is there already, and write what belongs to its language model.

    Args:
        weights: the preset's folder of weights, which names the run; nothing is written there.
        options: of the run; ``num_steps`` counts for the last stage alone, ``jobs`` variants are trained
            at once.

    Returns:
        The folders of the variants, each with ``llm`` and ``projections``.

    Raises:
        ValueError: the run has not come to its end.

    """
    torch.set_num_threads(options.threads)
    work = run_of(weights, options)
    if not (work.folder / LAST / "checkpoint.pt").is_file():
        raise ValueError(
            f"{work.folder} holds no whole run, of which parts could be left out. "
            "First run `patchbay train all`."
        )
    needs: dict[str, tuple[str, ...]] = dict.fromkeys(VARIANTS, ())
    run_in_order(needs, partial(_train_one, work, options.threads), options.jobs, _home(work.folder) / "logs")
    return [folder_of(work.folder, name) for name in VARIANTS]


def _train_one(work: Run, threads: int, name: str) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(work.seed)
    variant, folder = VARIANTS[name], folder_of(work.folder, name)
    full = replace(work, num_steps=None)
    model = unaligned(work)
    for place, step in enumerate(variant.stages):
        last = step == LAST
        same_so_far = variant.stages[: place + 1] == tuple(STAGES)[: place + 1]
        if same_so_far and (not last or (work.num_steps is None and not variant.whole_base)):
            if last:
                model.llm.add_lora(LORA)
            restore(model, work.folder / step)
            continue
        stage, config = STAGES[step], (work if last else full).config(step)
        if last and variant.whole_base:
            stage = _of_whole_base(stage)
            config = replace(config, learning_rate=config.learning_rate * WHOLE_RATE)
        elif last:
            model.llm.add_lora(LORA)
        train_stage(work, model, stage, folder / step, config)
    export_aligned(model, folder)


def _of_whole_base(stage: Stage) -> Stage:
    return replace(stage, parts=(stage.parts - {"lora"}) | {"base"})


def _home(run: Path) -> Path:
    return run / "ablations"


def folder_of(run: Path, variant: str) -> Path:
    """Return where a variant of a run lies."""
    return _home(run) / variant.replace(" ", "-")


def main_ablations(
    folders: Folders, run: Path, samples: int, seed: int, jobs: int = 1, keep: Path | None = None
) -> dict[str, Any]:
    """Measure every variant of a run with the encoder and the decoders of a preset.

    Args:
        folders: where the parts of the preset lie, which must be those of the run.
        run: of which :func:`train` has made variants.
        samples: seen samples of each direction and dialogues of each topic; a quarter as many held out.
        seed: of scenes, wordings, jitter and decoders.
        jobs: processes that share the work; the result is the same for every number.
        keep: a folder for results as they come; a run with the same one goes on where the last was ended.

    Returns:
        ``variants``: for each the share of right samples in every direction, by split, and what it gets
        right in ``words`` alone.

    Raises:
        ValueError: a variant is missing.

    """
    started = time.monotonic()
    ways = {name: _folders_of(folders, run, name) for name in VARIANTS}
    first = next(iter(ways.values()))
    ways[CAPTIONS] = replace(first, links=dict.fromkeys(first.links, "caption"))
    variants: dict[str, Any] = {}
    for name, way in ways.items():
        place = None if keep is None else keep / name.replace(" ", "-")
        found = main_toybox(way, list(DIRECTIONS), samples, seed, jobs=jobs, keep=place)
        words = share(
            f"words, {name}",
            [ability.Wish(topic, samples, seed) for topic in ability.TOPICS],
            partial(ability.reader, way),
            jobs,
        )
        variants[name] = {
            "directions": {
                direction: {split: row[split]["right"] for split in SPLITS}
                for direction, row in found["directions"].items()
            },
            "words": {topic: row["right"] for topic, row in zip(ability.TOPICS, words, strict=True)},
        }
    seconds = round(time.monotonic() - started, 1)
    return {"samples": samples, "seed": seed, "variants": variants, "seconds": seconds}


def _folders_of(folders: Folders, run: Path, name: str) -> Folders:
    folder = folder_of(run, name)
    if not (folder / "llm").is_dir():
        raise ValueError(f"{folder} is missing. First run `patchbay train ablations`.")
    return replace(
        folders,
        language_model=folder / "llm",
        projections={modality: folder / "projections" / str(modality) for modality in folders.projections},
        base=None,
        bridge=None,
    )


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table with a line per variant."""
    titles = ["variant", *GROUPS, "mean, seen", "held out", "words alone"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, row in result["variants"].items():
        seen, held_out = (
            {direction: found[split] for direction, found in row["directions"].items()} for split in SPLITS
        )
        cells = [_mean([seen[direction] for direction in group]) for group in GROUPS.values()]
        cells += [_mean([*seen.values()]), _mean([*held_out.values()]), _mean([*row["words"].values()])]
        lines.append(f"| {name} | {' | '.join(f'{cell:.1%}' for cell in cells)} |")
    told = f"{result['samples']} samples of each direction, a quarter as many held out"
    return "\n".join([*lines, f"\n{told}; {result['seconds']:.0f} s, seed {result['seed']}"])


def _mean(shares: list[float]) -> float:
    return sum(shares) / len(shares)
