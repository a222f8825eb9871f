"""Chains of edits: a medium is shown with a wish, what comes back is shown with the next wish, and so on.

What nobody asked to change should stay. In pictures and videos that is measured in pixels: the renderer
draws source and every goal so far with the same jitter, and where all of these agree, what was made is held
against the source. In sounds it is the tuning, as long as nobody named a pitch. What was changed and changed
back, as grounds are, is measured apart: it should look as it did, and no pixel of it is left to be kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alignment.samples import semitones_between
from alignment.toybox.directions import make
from alignment.toybox.exercise import Exercise, FreshScenes, judged
from alignment.toybox.media import Finding, compare, judge, render, to_bytes
from alignment.toybox.world import Clip, Look, Scene, Sound
from encoders.media import Audio, Image, Medium, Modality, Video, read_media
from llm.signals import Signal
from llm.template import Message

if TYPE_CHECKING:
    from alignment.system import System

CHAINS: Mapping[str, tuple[Modality, str]] = {
    "chain image": (Modality.IMAGE, "text+image-to-image"),
    "chain video": (Modality.VIDEO, "text+video-to-video"),
    "chain audio": (Modality.AUDIO, "text+audio-to-audio"),
}
"""Name -> the modality, and the direction that gives the wishes."""
TURNS, JUDGED_TURNS = 10, 5
DRIFT_AT = (1, 3, 5, 10)
ONE_CHAIN_FOR = 5  # samples of other directions: a chain has ten turns
_SAME_SHADE = 10  # of 255: grounds are lifted by up to 3 either way
_LEAST_SHARE = 0.02  # of all pixels, for a mean over them to mean something

Floats = NDArray[np.float32]


@dataclass
class Chain:
    """A chain on its way: the source and what was wanted since, and the last medium that came back."""

    scenes: list[Scene]
    jitter: str
    first: Medium
    now: Medium
    broken: bool = False
    right: list[bool] = field(default_factory=list)
    drift: dict[int, float] = field(default_factory=dict)
    regained: dict[int, float] = field(default_factory=dict)

    @property
    def wanted(self) -> Scene:
        """What is wanted now."""
        return self.scenes[-1]


@dataclass(frozen=True)
class OneScene:
    """A source of scenes that has only one."""

    scene: Scene

    def look(self, **fixed: str | int) -> Look:
        """Return the picture."""
        assert isinstance(self.scene, Look)
        return self.scene

    def clip(self, **fixed: str) -> Clip:
        """Return the video."""
        assert isinstance(self.scene, Clip)
        return self.scene

    def sound(self, **fixed: str | int) -> Sound:
        """Return the sound."""
        assert isinstance(self.scene, Sound)
        return self.scene


def run_chains(
    name: str,
    system: System,
    rng: random.Random,
    scenes: FreshScenes,
    number: int,
    seed: int,
    *,
    reserved_wordings: bool = False,
) -> list[Chain]:
    """Run ``number`` chains side by side, so that decoders work in batches."""
    modality, direction = CHAINS[name]
    draw: Mapping[Modality, Callable[[], Scene]] = {
        Modality.IMAGE: scenes.look,
        Modality.VIDEO: scenes.clip,
        Modality.AUDIO: scenes.sound,
    }
    chains = [_begun(draw[modality](), f"chain-{rng.random()}") for _ in range(number)]
    for turn in range(1, TURNS + 1):
        asked: list[tuple[int, Signal]] = []
        for index, chain in enumerate(chains):
            exercise = make(direction, rng, OneScene(chain.wanted), reserved_wordings=reserved_wordings)
            chain.scenes.append(exercise.scenes[0])
            signals = [] if chain.broken else _reply(system, exercise, chain.now, modality)
            if len(signals) == 1:
                asked.append((index, signals[0]))
            else:
                chain.broken = True
        conditions = [system.condition(signal) for _, signal in asked]
        sources = [chains[index].now for index, _ in asked]
        captions = [signal.caption for _, signal in asked]
        made = system.make(modality, conditions, seed + 1000 * turn, sources=sources, captions=captions)
        for (index, _), medium in zip(asked, made, strict=True):
            _take(chains[index], to_bytes(medium), turn)
        for chain in chains:
            chain.right += [False] * (turn - len(chain.right))
    return chains


def chain_findings(chain: Chain) -> dict[str, Finding]:
    """Return whether each of the first five turns was right."""
    return {f"turn {i + 1}": Finding(right) for i, right in enumerate(chain.right[:JUDGED_TURNS])}


def drift(chains: Sequence[Chain]) -> dict[str, Any]:
    """Return, after 1, 3, 5 and 10 turns, how many chains are right and how far off the other parts are.

    ``untouched`` is a mean absolute difference from the source, where no wish so far asked for a change: in
    pixel values from 0 to 1, for sounds in semitones. ``regained`` is the same where things are to be as they
    were at first, whatever was asked for between. A chain in which a medium did not come counts as wrong, and
    not in these.
    """
    return {
        "right": {str(t): _mean([float(chain.right[t - 1]) for chain in chains]) for t in DRIFT_AT},
        "untouched": _by_turn([chain.drift for chain in chains]),
        "regained": _by_turn([chain.regained for chain in chains]),
        "unit": "semitones" if isinstance(chains[0].wanted, Sound) else "of 1",
    }


def _by_turn(found: Sequence[Mapping[int, float]]) -> dict[str, float]:
    apart = {turn: [one[turn] for one in found if turn in one] for turn in DRIFT_AT}
    return {str(turn): _mean(values) for turn, values in apart.items() if values}


def _begun(scene: Scene, jitter: str) -> Chain:
    first = read_media(to_bytes(render(scene, random.Random(jitter))))
    return Chain([scene], jitter, first, first)


def _reply(system: System, exercise: Exercise, shown: Medium, modality: Modality) -> list[Signal]:
    parts = exercise.turns[0].parts
    read = system.read(shown)
    spoken = system.speak([Message("user", [part if isinstance(part, str) else read for part in parts])])
    signals = [part for part in spoken if isinstance(part, Signal)]
    return signals if [signal.modality for signal in signals] == [modality] else []


def _take(chain: Chain, data: bytes, turn: int) -> None:
    chain.now = read_media(data)
    found = compare(judge(data), chain.wanted, judged(chain.wanted))
    chain.right.append(all(finding.right for finding in found.values()))
    if turn in DRIFT_AT:
        for kept, scenes in (
            (chain.drift, chain.scenes),
            (chain.regained, [chain.scenes[0], chain.wanted]),
        ):
            apart = untouched_difference(chain.first, chain.now, scenes, chain.jitter)
            if apart is not None:
                kept[turn] = apart


def untouched_difference(first: Medium, now: Medium, scenes: Sequence[Scene], jitter: str) -> float | None:
    """Return how far ``now`` is from ``first`` where all ``scenes`` look or sound the same.

    The first scene is that of ``first``. None where nothing can be compared: no such pixels, another pitch,
    or silence.
    """
    if isinstance(first, Audio) and isinstance(now, Audio):
        pitches = {scene.pitch for scene in scenes if isinstance(scene, Sound)}
        apart = semitones_between(first, now) if len(pitches) == 1 else float("inf")
        return apart if apart < float("inf") else None
    before, made = _pixels(first), _pixels(now)
    if before.shape != made.shape:
        return None
    same = np.ones(before.shape[:-1], dtype=np.bool_)  # (..., H, W)
    for scene in dict.fromkeys(scenes[1:]):
        same &= np.abs(before - _pixels(render(scene, random.Random(jitter)))).max(axis=-1) <= _SAME_SHADE
    if same.mean() < _LEAST_SHARE:
        return None
    return float(np.abs(made - before)[same].mean()) / 255


def _pixels(medium: Medium) -> Floats:
    assert isinstance(medium, Image | Video)
    pixels = medium.pixels if isinstance(medium, Image) else medium.frames
    return pixels.astype(np.float32)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / max(1, len(values)), 4)
