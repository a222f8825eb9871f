"""``patchbay eval phrasings``: the way one asks must not leak into what is made.

One scene is asked for in ten wordings, and in the same ten after talk about something else. All twenty
are decoded with the same seed, so a link that carries the scene alone gives the same medium each time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from alignment.chains import OneScene
from alignment.samples import Sample, converse, findings, prepare
from alignment.shared_work import share
from alignment.system import Folders, System
from alignment.toybox.directions import make
from alignment.toybox.exercise import Exercise, FreshScenes, Turn
from alignment.toybox.media import lengthened, to_bytes
from alignment.toybox.world import Scene
from decoders.mel import HOP, log_mel
from encoders.media import Audio, Image, Medium, Modality, Video

DIRECTIONS: Mapping[str, Modality] = {
    "text-to-image": Modality.IMAGE,
    "text-to-video": Modality.VIDEO,
    "text-to-audio": Modality.AUDIO,
}
WORDINGS = 10
MOST_TRIES = 400
MODES = ("asked at once", "after other talk")
MEL_RANGE_NEPERS = 10.0

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Wish:
    """One scene to ask for."""

    direction: str
    index: int
    seed: int


def main_phrasings(folders: Folders, samples: int, seed: int, jobs: int = 1) -> dict[str, Any]:
    """Measure how much the wording changes what is made.

    Args:
        folders: where the parts of the preset lie.
        samples: scenes of each modality; each is asked for twenty times.
        seed: of scenes, wordings, other talk and decoders.
        jobs: processes that share the work; the result is the same for every number.

    Returns:
        ``directions``: for each way to ask, over all scenes: ``right``; ``spread``, the standard deviation
        of right (1) and wrong (0) within the ten of a scene; ``same``, the share of scenes all ten of which
        were judged alike in every attribute; ``cosine`` between the conditions of a scene's wordings; and
        ``difference``, the mean absolute difference of the media of a scene from their mean, of 1.
        ``drift`` is how far the mean of the ten after other talk is from that of the ten asked at once.

    """
    started = time.monotonic()
    wishes = [Wish(name, index, seed) for name in DIRECTIONS for index in range(samples)]
    found = share("phrasings", wishes, partial(_measurer, folders), jobs)
    directions: dict[str, Any] = {}
    for name in DIRECTIONS:
        mine = [result for wish, result in zip(wishes, found, strict=True) if wish.direction == name]
        directions[name] = {
            mode: {key: _mean([one[mode][key] for one in mine]) for key in mine[0][mode]} for mode in MODES
        } | {"drift": _mean([one["drift"] for one in mine])}
    seconds = round(time.monotonic() - started, 1)
    return {
        "samples": samples, "wordings": WORDINGS, "seed": seed, "directions": directions, "seconds": seconds
    }  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table."""
    lines = [
        f"| {result['samples']} scenes, {result['wordings']} wordings each | | right | spread within a scene "
        "| all wordings judged alike | cosine of conditions | difference of media | moved by other talk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["directions"].items():
        for mode in MODES:
            f = row[mode]
            moved = f"{row['drift']:.4f}" if mode == MODES[1] else ""
            lines.append(
                f"| {name} | {mode} | {f['right']:.1%} | {f['spread']:.3f} | {f['same']:.1%} "
                f"| {f['cosine']:.4f} | {f['difference']:.4f} | {moved} |"
            )
    return "\n".join([*lines, f"\n{result['seconds']:.0f} s, seed {result['seed']}"])


def wordings_of(direction: str, scene: Scene, rng: random.Random, number: int = WORDINGS) -> list[Exercise]:
    """Return exercises of one direction that ask for the very same scene in different words.

    Fewer come back when ``MOST_TRIES`` draws give no more.
    """
    found: dict[tuple[Turn, ...], Exercise] = {}
    for _ in range(MOST_TRIES):
        exercise = make(direction, rng, OneScene(scene), reserved_wordings=True)
        if exercise.scenes == (scene,):
            found.setdefault(exercise.turns, exercise)
        if len(found) == number:
            break
    return list(found.values())


def after_other_talk(exercise: Exercise, rng: random.Random) -> Exercise:
    """Return the exercise after one or two requests for other things."""
    before: list[Turn] = []
    for _ in range(rng.choice((1, 2))):
        other = make(rng.choice(list(DIRECTIONS)), rng, FreshScenes(rng), reserved_wordings=True)
        before += [*other.turns, Turn("assistant", other.answer)]
    return replace(exercise, turns=(*before, *exercise.turns))


def _measurer(folders: Folders) -> Callable[[Wish], dict[str, Any]]:
    return partial(_measure, System(folders))


def _measure(system: System, wish: Wish) -> dict[str, Any]:
    rng = random.Random(f"phrasings-{wish.seed}-{wish.direction}-{wish.index}")
    modality = DIRECTIONS[wish.direction]
    scene = make(wish.direction, rng, FreshScenes(rng)).scenes[0]
    plain = wordings_of(wish.direction, scene, rng)
    asked = {MODES[0]: plain, MODES[1]: [after_other_talk(one, rng) for one in plain]}
    result: dict[str, Any] = {}
    means: list[Floats] = []
    for mode, exercises in asked.items():
        samples = [prepare(exercise, rng) for exercise in exercises]
        for sample in samples:
            converse(system, sample)
        result[mode], mean = _spread_of(system, samples, modality, wish.seed + wish.index)
        means += [] if mean is None else [mean]
    result["drift"] = float(np.abs(means[0] - means[1]).mean()) if len(means) == 2 else None
    return result


def _spread_of(
    system: System, samples: Sequence[Sample], modality: Modality, seed: int
) -> tuple[dict[str, Any], Floats | None]:
    asked = [s for s in samples if [signal.modality for signal in s.signals] == [modality]]
    conditions = [system.condition(sample.signals[0]) for sample in asked]
    media = system.make(modality, conditions, [seed] * len(asked))
    for sample, medium in zip(asked, media, strict=True):
        sample.made = [to_bytes(medium)]
    found = [findings(sample) for sample in samples]
    right = np.array([all(finding.right for finding in one.values()) for one in found], dtype=float)
    alike = {tuple((name, finding.found) for name, finding in one.items()) for one in found}
    figures = {
        "right": float(right.mean()),
        "spread": float(right.std()),
        "same": float(len(alike) == 1),
        "cosine": mean_cosine([condition.embeddings for condition in conditions]),
        "difference": None,
    }
    if not media:
        return figures, None
    arrays = np.stack([as_array(medium) for medium in media])
    mean = arrays.mean(axis=0)
    figures["difference"] = float(np.abs(arrays - mean).mean())
    return figures, mean


def mean_cosine(conditions: Sequence[Tensor]) -> float | None:
    """Return the mean cosine between all pairs of conditions, or None where there is no pair."""
    if len(conditions) < 2:
        return None
    units = F.normalize(torch.stack([c.flatten().float() for c in conditions]), dim=1)  # (N, features)
    likeness = units @ units.T
    n = len(units)
    return float((likeness.sum() - likeness.diagonal().sum()) / (n * (n - 1)))


def as_array(medium: Medium) -> Floats:
    """Return pixels, or the log-mel spectrogram of a sound, on a scale from 0 to about 1."""
    if isinstance(medium, Audio):
        samples = lengthened(medium).samples
        mel = log_mel(torch.from_numpy(np.ascontiguousarray(samples[: len(samples) // HOP * HOP])))
        scaled: Floats = (mel / MEL_RANGE_NEPERS).numpy()
        return scaled
    assert isinstance(medium, Image | Video)
    pixels = medium.pixels if isinstance(medium, Image) else medium.frames
    return pixels.astype(np.float32) / np.float32(255)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return round(sum(there) / len(there), 4) if there else None
