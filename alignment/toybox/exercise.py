"""An exercise: a conversation that ends with a person's turn, and the answer that is right.

A part of a turn is a text or a scene. A scene in a person's turn is a medium they show; a scene
in the agent's turn is a medium to be made, and the text right before it is its caption.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, Protocol

from alignment.toybox.grammar import caption
from alignment.toybox.world import Clip, Look, Scene, Sound, sample_clip, sample_look, sample_sound

Part = str | Scene


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: who speaks, and texts and scenes in order."""

    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Exercise:
    """A conversation, its right answer, and which attributes of each part of the answer are judged.

    ``judged`` has one entry for each scene of the answer; for an answer in words alone it has one
    entry for the text when the text states a scene (``stated``), and is empty for small talk. ``copied``
    is whether the medium of the answer is to be the very one of its kind that was there last.
    """

    direction: str
    turns: tuple[Turn, ...]
    answer: tuple[Part, ...]
    judged: tuple[tuple[str, ...], ...]
    stated: Scene | None = None
    copied: bool = False

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The scenes of the answer, in order."""
        return tuple(part for part in self.answer if not isinstance(part, str))

    @property
    def held_out(self) -> bool:
        """True when any scene of the conversation or of its answer is held out of training."""
        parts = [part for turn in self.turns for part in turn.parts] + list(self.answer)
        stated = [self.stated] if self.stated is not None else []
        return any(part.held_out for part in (*parts, *stated) if not isinstance(part, str))


class Scenes(Protocol):
    """Where an exercise takes its scenes from."""

    def look(self, **fixed: str | int) -> Look:
        """Return a picture with the given attributes."""

    def clip(self, **fixed: str) -> Clip:
        """Return a video with the given attributes."""

    def sound(self, **fixed: str | int) -> Sound:
        """Return a sound with the given attributes."""


@dataclass(frozen=True)
class FreshScenes:
    """Scenes drawn from the whole world, seen or held out."""

    rng: random.Random
    held_out: bool = False

    def look(self, **fixed: str | int) -> Look:
        """Return a random picture of this split."""
        return sample_look(self.rng, held_out=self.held_out, **fixed)

    def clip(self, **fixed: str) -> Clip:
        """Return a random video of this split."""
        return sample_clip(self.rng, held_out=self.held_out, **fixed)

    def sound(self, **fixed: str | int) -> Sound:
        """Return a random sound of this split."""
        return sample_sound(self.rng, held_out=self.held_out, **fixed)


LOOK_JUDGED = ("thing", "colour", "size", "count", "place", "ground")

CLIP_JUDGED = ("thing", "colour", "size", "ground", "motion", "tempo")

SOUND_JUDGED = ("thing", "pitch", "count", "tempo", "loudness")


def judged(scene: Scene, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the attributes of a scene that are judged in full directions."""
    names = (
        LOOK_JUDGED if isinstance(scene, Look) else CLIP_JUDGED if isinstance(scene, Clip) else SOUND_JUDGED
    )
    absent = ("place",) if isinstance(scene, Look) and scene.count > 1 else ()
    return tuple(name for name in names if name not in without and name not in absent)


def single(
    asked: tuple[Part, ...], scene: Scene, names: tuple[str, ...], before: tuple[Turn, ...] = ()
) -> Exercise:
    """Return the exercise whose answer is one scene and its caption; its direction is still to be named."""
    return Exercise("", (*before, Turn("user", asked)), (caption(scene), scene), (names,))
