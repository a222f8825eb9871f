"""``patchbay eval links``: does the learned link earn its keep?

Every reply is decoded over each link that there is, from noise, the same words and the same seeds; as the
preset does it, which may keep something of what was shown; over captions keeping as much as the preset does;
and with the decoder's own text encoder reading the true caption: the decoder's ceiling.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from alignment.evaluation import CEILINGS, HELD_OUT_SHARE, SPLITS, ceiling
from alignment.samples import Sample, all_right, converse, decode, prepare
from alignment.shared_work import share
from alignment.system import Folders, LinkName, System
from alignment.toybox.directions import make
from alignment.toybox.exercise import FreshScenes

DIRECTIONS = (*CEILINGS, "beyond-words")
LINKS: tuple[LinkName, ...] = ("signal", "caption")


@dataclass(frozen=True, slots=True)
class Wish:
    """One direction and split to measure with one seed."""

    name: str
    split: str
    samples: int
    seed: int


def main_links(folders: Folders, samples: int, seed: int, jobs: int = 1, seeds: int = 1) -> dict[str, Any]:
    """Measure every link of a preset.

    Args:
        folders: where its parts lie; ``links`` says which link is chosen for each modality.
        samples: seen samples of each direction; a quarter as many held-out ones are added.
        seed: of scenes, wordings, jitter and decoders.
        jobs: processes that share the work; the result is the same for every number.
        seeds: how many seeds, from ``seed`` on; figures are over all their samples.

    Returns:
        ``directions``: for each split ``n``, the share of right samples as the preset makes them
        (``chosen``), over each one in ``links``, over captions where as much is kept as by the preset
        (``caption_keeping``), and the ``ceiling``; ``chosen`` names the preset's link for each modality.

    """
    started = time.monotonic()
    wishes = [
        Wish(name, split, samples if split == "seen" else max(1, samples // HELD_OUT_SHARE), one)
        for name in DIRECTIONS
        for split in SPLITS
        for one in range(seed, seed + seeds)
    ]
    found = share("links", wishes, partial(_measurer, folders), jobs)
    directions: dict[str, Any] = {}
    for name in DIRECTIONS:
        directions[name] = {
            split: _mean_of(
                [f for w, f in zip(wishes, found, strict=True) if (w.name, w.split) == (name, split)]
            )
            for split in SPLITS
        }
    return {
        "samples": samples,
        "seed": seed,
        "seeds": list(range(seed, seed + seeds)),
        "chosen": {str(modality): link for modality, link in folders.links.items()},
        "directions": directions,
        "seconds": round(time.monotonic() - started, 1),
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table."""
    others = list(next(iter(result["directions"].values()))["seen"]["links"])
    lines = [
        f"| direction | samples | chosen | {' | '.join(others)} | caption, keeping | ceiling | link's loss "
        "| chosen over caption |",
        f"|---|---|---|{'---|' * len(others)}---|---|---|---|",
    ]
    for name, row in result["directions"].items():
        for split, title in (("seen", "seen"), ("held_out", "held out")):
            found = row[split]
            cells = " | ".join(f"{found['links'][link]:.1%}" for link in others)
            loss, gain = found["ceiling"] - found["chosen"], found["chosen"] - found["links"]["caption"]
            lines.append(
                f"| {name} | {title}, {found['n']} | {found['chosen']:.1%} | {cells} "
                f"| {found['caption_keeping']:.1%} "
                f"| {found['ceiling']:.1%} | {100 * loss:+.1f} | {100 * gain:+.1f} |"
            )
    chosen = ", ".join(f"{modality} {link}" for modality, link in result["chosen"].items())
    return "\n".join([*lines, f"\nChosen: {chosen}. {result['seconds']:.0f} s, seeds {result['seeds']}"])


def _measurer(folders: Folders) -> Callable[[Wish], dict[str, Any]]:
    trained: dict[Any, LinkName] = {
        modality: "signal" if folders.projections[modality].is_dir() else "caption"
        for modality in folders.links
    }
    return partial(_measure, System(replace(folders, links=trained)), dict(folders.links))


def _measure(system: System, chosen: Mapping[Any, LinkName], wish: Wish) -> dict[str, Any]:
    rng = random.Random(f"links-{wish.seed}-{wish.name}-{wish.split}")
    scenes = FreshScenes(rng, held_out=wish.split == "held_out")
    exercises = [make(wish.name, rng, scenes, reserved_wordings=True) for _ in range(wish.samples)]
    samples = [prepare(exercise, rng) for exercise in exercises]
    for sample in samples:
        converse(system, sample)
    links = [link for link in LINKS if link == "caption" or system.projections]
    right = {
        link: _right_over(system, samples, dict.fromkeys(system.links, link), wish.seed, from_noise=True)
        for link in links
    }
    own = _right_over(system, samples, chosen, wish.seed, from_noise=False)
    if wish.name in CEILINGS:  # nothing is shown, and nothing kept
        keeping = right["caption"]
    else:
        captions: dict[Any, LinkName] = dict.fromkeys(system.links, "caption")
        keeping = _right_over(system, samples, captions, wish.seed, from_noise=False)
    return {
        "n": len(samples),
        "chosen": sum(own) / len(own),
        "caption_keeping": sum(keeping) / len(keeping),
        "links": {link: sum(flags) / len(flags) for link, flags in right.items()},
        "ceiling": ceiling(system, samples, wish.seed),
    }


def _right_over(
    system: System, samples: list[Sample], links: Mapping[Any, LinkName], seed: int, *, from_noise: bool
) -> list[bool]:
    """Decode every reply over the given links; a modality without that link takes the caption."""
    copies = [replace(sample, made=[]) for sample in samples]
    there = {m: links[m] if m in system.projections else "caption" for m in system.decoders}
    decode(system, copies, seed, links=there, from_noise=from_noise)
    return [all_right(sample) for sample in copies]


def _mean_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    total = sum(f["n"] for f in found)

    def mean(pick: Callable[[dict[str, Any]], float]) -> float:
        return float(round(sum(f["n"] * pick(f) for f in found) / total, 4))

    return {
        "n": total,
        "chosen": mean(lambda f: f["chosen"]),
        "caption_keeping": mean(lambda f: f["caption_keeping"]),
        "links": {link: mean(lambda f, link=link: f["links"][link]) for link in found[0]["links"]},  # type: ignore[misc]
        "ceiling": mean(lambda f: f["ceiling"]),
    }
