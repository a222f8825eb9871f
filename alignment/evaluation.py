"""``patchbay eval toybox``: how often the outputs are right, direction by direction.

A sample is right when every judged attribute is. Seen and held-out combinations are counted apart, and
so are seeds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from alignment.chains import CHAINS, ONE_CHAIN_FOR, chain_findings, drift, run_chains
from alignment.decision import (
    Decided,
    asking_figures,
    decision_figures,
    malformed_signals,
    media_probabilities,
)
from alignment.embedded.dialogues import MODALITY
from alignment.kept_results import KeptResults
from alignment.samples import (
    TOLERANCES,
    Sample,
    Tally,
    all_right,
    converse,
    decode,
    findings,
    medium_findings,
    prepare,
    right_media,
    source_differences,
)
from alignment.shared_work import share
from alignment.system import Folders, System
from alignment.toybox.cycles import CYCLES, run_cycle
from alignment.toybox.directions import DIRECTIONS, make
from alignment.toybox.exercise import FreshScenes
from alignment.toybox.grammar import caption
from alignment.toybox.media import to_bytes

HELD_OUT_SHARE = 4  # one held-out sample for so many seen ones
CALIBRATION_SHARE = 2  # one dialogue to calibrate the decision on for so many measured ones
CEILINGS = ("text-to-image", "text-to-video", "text-to-audio")
SPLITS = ("seen", "held_out")
UNITS = {"hue": "degrees", "centre": "pixels", "fundamental": "semitones"}
ASKING_KEYS = ("n", "wrong", "asked", "caught")
Wordings = Literal["reserved", "training"]


@dataclass(frozen=True, slots=True)
class Wish:
    """One direction to measure with one seed; ``sheets`` is where pictures of it go, or None."""

    name: str
    samples: int
    seed: int
    sheets: Path | None = None
    wordings: Wordings = "reserved"

    @property
    def reserved(self) -> bool:
        """Whether it is asked in words that training never used."""
        return self.wordings == "reserved"


def main_toybox(
    folders: Folders,
    directions: Sequence[str] | None,
    samples: int,
    seed: int,
    sheets: Path | None = None,
    jobs: int = 1,
    seeds: int = 1,
    wordings: Wordings = "reserved",
    keep: Path | None = None,
) -> dict[str, Any]:
    """Measure a preset on Toybox.

    Args:
        folders: where its parts lie.
        directions: names, or None for all of them.
        samples: seen samples of each direction; a quarter as many held-out ones are added. Chains of
            edits have a fifth as many.
        seed: of scenes, wordings, jitter and decoders.
        sheets: a folder for contact sheets and a gallery of what was made with the first seed, or None.
        jobs: processes that share the work; the result is the same for every number.
        seeds: how many seeds, from ``seed`` on. With several, every figure is their mean, and ``spread``
            is the largest less the smallest share of right samples.
        wordings: ``reserved`` asks in words that training never used, ``training`` in those of training;
            cycles ask in the same words always.
        keep: a folder for results as they come; a run with the same one goes on where the last was ended.

    Returns:
        The object that ``--json`` prints (see the README).

    Raises:
        ValueError: for a direction that does not exist, or a folder of other weights' results.

    """
    known = (*DIRECTIONS, *CYCLES, *CHAINS)
    chosen = list(directions) if directions is not None else list(known)
    for name in chosen:
        if name not in known:
            raise ValueError(f"There is no direction {name!r}; expected some of {', '.join(known)}.")
    started = time.monotonic()
    all_seeds = list(range(seed, seed + seeds))
    wishes = [
        Wish(name, samples, one, sheets if one == seed else None, wordings)
        for name in chosen
        for one in all_seeds
    ]
    kept = KeptResults(keep, folders.all, folders.how) if keep is not None else None
    results = share("directions", wishes, partial(_measurer, folders), jobs, kept)
    by_name = {
        name: [r for wish, r in zip(wishes, results, strict=True) if wish.name == name] for name in chosen
    }
    return {
        "samples": samples,
        "seed": seed,
        "seeds": all_seeds,
        "wordings": wordings,
        "directions": {name: over_seeds(runs) for name, runs in by_name.items()},
        "seconds": round(kept.seconds if kept is not None else time.monotonic() - started, 1),
    }


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of one direction's results, with counts added up and the spread of what was right."""
    if len(runs) == 1:
        return dict(runs[0])
    merged: dict[str, Any] = _mean_of(runs)
    for split in SPLITS:
        right = [run[split]["right"] for run in runs]
        merged[split]["right_by_seed"] = right
        merged[split]["spread"] = round(max(right) - min(right), 4)
    return merged


def _mean_of(values: Sequence[Any], key: str = "") -> Any:
    there = [value for value in values if value is not None]
    if not there:
        return None
    if key == "gallery":
        return there[0]
    if isinstance(there[0], Mapping):
        keys = dict.fromkeys(k for value in there for k in value)
        inner = "count" if key in ("found", "count", "asking", "second_look") else ""
        return {k: _mean_of([v[k] for v in there if k in v], inner or k) for k in keys}
    if key in ("n", "malformed", "count"):
        return sum(there)
    return round(sum(there) / len(there), 4) if isinstance(there[0], int | float) else there[0]


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table with a line per direction, and what is measured besides."""
    lines = ["| direction | seen | held out | ceiling | attributes (seen) |", "|---|---|---|---|---|"]
    for name, row in result["directions"].items():
        ceiling = "" if row["ceiling"] is None else f"{row['ceiling']:.1%}"
        attributes = ", ".join(f"{key} {value:.1%}" for key, value in row["seen"]["attributes"].items())
        seen, held_out = (_share_of(row[split]) for split in SPLITS)
        lines.append(f"| {name} | {seen} | {held_out} | {ceiling} | {attributes} |")
    rows = result["directions"].values()
    means = " | ".join(f"{sum(row[split]['right'] for row in rows) / len(rows):.1%}" for split in SPLITS)
    lines.append(f"| **mean of {len(rows)}** | {means} | | |")
    for row in rows:
        if "decision" in row:
            lines += ["", decision_table(row["decision"])]
    if asking := asking_of(result["directions"]):
        lines += ["", asking_table(asking)]
    if chains := {name: row for name, row in result["directions"].items() if "drift" in row}:
        lines += ["", drift_table(chains)]
    lines += [apart_table(row["apart"]) for row in rows if row.get("apart")]
    if looked := [row["second_look"] for row in rows if "second_look" in row]:
        seen, again = (sum(one[key] for one in looked) for key in ("looked", "retries"))
        lines += ["", f"The system looked at {seen} media once more, and had {again} made again."]
    seeds = ", ".join(map(str, result["seeds"]))
    plural = "s" if len(result["seeds"]) > 1 else ""
    return "\n".join([*lines, f"\n{result['seconds']:.0f} s, seed{plural} {seeds}"])


def _share_of(split: Mapping[str, Any]) -> str:
    spread = f" ± {split['spread'] / 2:.1%}" if "spread" in split else ""
    return f"{split['right']:.1%}{spread} of {split['n']}"


def decision_table(figures: Mapping[str, Any]) -> str:
    """Return what is measured of the decision."""
    names = ["image", "video", "audio"]
    ece, calibrated = figures["ece"], figures["ece_calibrated"]
    lines = ["| decision | image | video | audio | words alone | mean |", "|---|---|---|---|---|---|"]
    f1 = [f"{figures['f1'][name]:.4f}" for name in (*names, "words alone")]
    lines.append(f"| F1 | {' | '.join(f1)} | {figures['macro_f1']:.4f} |")
    for title, errors in (("as it comes", ece), ("calibrated", calibrated)):
        cells = [f"{errors[name]:.4f}" for name in names]
        lines.append(
            f"| expected calibration error, {title} | {' | '.join(cells)} | | {errors['mean']:.4f} |"
        )
    lines += [
        "",
        f"Of {figures['n']} replies: a medium where words alone were wanted "
        f"{figures['false_generation']:.1%}, malformed signals {figures['malformed']}.",
    ]
    return "\n".join(lines)


def asking_of(directions: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the counts of asking back of all directions together, and of those with wrong media."""
    measured = {name: row["asking"] for name, row in directions.items() if "asking" in row}
    if not measured:
        return {}
    together = {key: _sum_of([row[key] for row in measured.values()]) for key in ASKING_KEYS}
    return {"all": together} | {name: row for name, row in measured.items() if row["wrong"]}


def _sum_of(counts: Sequence[Any]) -> Any:
    if isinstance(counts[0], Mapping):
        return {key: sum(count[key] for count in counts) for key in counts[0]}
    return sum(counts)


def asking_table(asking: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how often the agent would ask back, and how much of what is wrong that would catch."""
    thresholds = list(next(iter(asking.values()))["asked"])
    lines = [
        f"| ask back when less sure than | wrong media | {' | '.join(thresholds)} |",
        f"|---|---|{'---|' * len(thresholds)}",
    ]
    for name, row in asking.items():
        asked = [f"{row['asked'][t] / row['n']:.1%}" for t in thresholds]
        caught = [f"{row['caught'][t] / row['wrong']:.1%}" if row["wrong"] else "" for t in thresholds]
        lines += [
            f"| {name}: asked | | {' | '.join(asked)} |",
            f"| of the wrong | {row['wrong']} of {row['n']} | {' | '.join(caught)} |",
        ]
    return "\n".join(lines)


def apart_table(apart: Mapping[str, Mapping[str, float]]) -> str:
    """Return how far media of beyond-words are from what was shown."""
    lines = ["", "| beyond words: apart from what was shown | median | 90th percentile | right up to |"]
    lines.append("|---|---|---|---|")
    for name, found in apart.items():
        lines.append(
            f"| {name}, {UNITS[name]} | {found['median']:.2f} | {found['p90']:.2f} | {TOLERANCES[name]:g} |"
        )
    return "\n".join(lines)


def drift_table(chains: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what becomes of chains of edits, turn by turn."""
    lines = ["| chain of edits | after | 1 | 3 | 5 | 10 turns | 10 to 1 |", "|---|---|---|---|---|---|---|"]
    for name, row in chains.items():
        found = row["drift"]
        right = " | ".join(f"{share:.1%}" for share in found["right"].values())
        lines.append(f"| {name} | right | {right} | |")
        for measure, words in (("untouched", "untouched"), ("regained", "as at first")):
            apart = found[measure]
            cells = " | ".join(f"{apart[t]:.4f}" if t in apart else "" for t in ("1", "3", "5", "10"))
            ratio = f"{apart['10'] / apart['1']:.2f}" if apart.get("1") and "10" in apart else ""
            lines.append(f"| | {words}, {found['unit']} | {cells} | {ratio} |")
    return "\n".join(lines)


def _measurer(folders: Folders) -> Callable[[Wish], dict[str, Any]]:
    return partial(measure, System(folders))


def measure(system: System, wish: Wish) -> dict[str, Any]:
    """Measure one direction: its two splits, and what is asked of it besides."""
    result: dict[str, Any] = {"ceiling": None}
    looks_before, retries_before = system.num_looks, system.num_retries
    for split, number in (("seen", wish.samples), ("held_out", max(1, wish.samples // HELD_OUT_SHARE))):
        rng = random.Random(f"evaluation-{wish.seed}-{wish.name}-{split}")
        scenes = FreshScenes(rng, held_out=split == "held_out")
        tally = Tally()
        if wish.name in CYCLES:
            for index in range(number):
                tally.add(run_cycle(wish.name, system, rng, scenes, wish.seed + index))
        elif wish.name in CHAINS:
            few = max(1, number // ONE_CHAIN_FOR)
            chains = run_chains(
                wish.name, system, rng, scenes, few, wish.seed, reserved_wordings=wish.reserved
            )
            for chain in chains:
                tally.add(chain_findings(chain))
            if split == "seen":
                result["drift"] = drift(chains)
        else:
            done = _asked(system, wish, rng, scenes, number, reserved=wish.reserved)
            decode(system, done, wish.seed)
            for sample in done:
                tally.add(findings(sample))
            if split == "seen":
                result |= _besides(system, wish, done)
                result["asking"] = asking_figures(
                    [sample.confidence for sample in done], [not right_media(sample) for sample in done]
                )
        result[split] = tally.summary()
    if system.second_look is not None:
        result["second_look"] = {
            "looked": system.num_looks - looks_before,
            "retries": system.num_retries - retries_before,
        }
    return result


def _asked(
    system: System, wish: Wish, rng: random.Random, scenes: FreshScenes, number: int, *, reserved: bool
) -> list[Sample]:
    """Draw exercises and hold their conversations."""
    done = []
    for _ in range(number):
        exercise = make(wish.name, rng, scenes, reserved_wordings=reserved)
        done.append(prepare(exercise, rng))
    for sample in done:
        converse(system, sample)
    return done


def _besides(system: System, wish: Wish, done: Sequence[Sample]) -> dict[str, Any]:
    """Measure what is asked of one direction only, and keep what people look at."""
    result: dict[str, Any] = {}
    if wish.name in CEILINGS:
        result["ceiling"] = ceiling(system, done, wish.seed)
    if wish.name == "beyond-words":
        result["apart"] = source_differences(done)
    if wish.name == "decision":
        rng = random.Random(f"calibration-{wish.seed}")
        scenes = FreshScenes(rng)
        number = max(1, wish.samples // CALIBRATION_SHARE)
        others = _asked(system, wish, rng, scenes, number, reserved=wish.reserved)
        result["decision"] = decision_figures(
            *([_decided(system, s) for s in part] for part in (done, others))
        )
    if wish.sheets is not None:
        from alignment.sheets import write_gallery, write_sheet

        write_sheet(wish.sheets / f"{wish.name}.png", done, [all_right(sample) for sample in done])
        result["gallery"] = write_gallery(wish.sheets / "gallery", wish.name, done)
    return result


def _decided(system: System, sample: Sample) -> Decided:
    return Decided(
        wanted=tuple(MODALITY[type(scene)] for scene in sample.exercise.scenes),
        made=tuple(signal.modality for signal in sample.signals),
        probability=media_probabilities(system.llm, sample.heard, sample.ids),
        malformed=malformed_signals(system.llm.tokenizer, sample.ids),
    )


def ceiling(system: System, samples: Sequence[Sample], seed: int) -> float:
    """Return how often the decoder is right when its own text encoder reads the true caption."""
    right: list[bool] = [False] * len(samples)
    for modality in system.decoders:
        mine = [i for i, s in enumerate(samples) if MODALITY[type(s.exercise.scenes[0])] == modality]
        scenes = [samples[i].exercise.scenes[0] for i in mine]
        conditions = [system.decoders[modality].encode_caption(caption(scene)) for scene in scenes]
        for i, scene, medium in zip(mine, scenes, system.make(modality, conditions, seed), strict=True):
            found = medium_findings(samples[i], scene, samples[i].exercise.judged[0], to_bytes(medium))
            right[i] = all(finding.right for finding in found.values())
    return round(sum(right) / len(samples), 4)
