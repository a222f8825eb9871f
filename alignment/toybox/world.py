"""What exists in Toybox: the attributes, the scenes made of them, and the held-out split.

This file knows words and numbers only. How a scene looks is in :mod:`alignment.toybox.draw`,
how it sounds in :mod:`alignment.toybox.sound`, how it is spoken of in
:mod:`alignment.toybox.grammar`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

THINGS = (
    "bell",
    "drum",
    "bird",
    "bee",
    "clock",
    "siren",
    "heart",
    "rocket",
    "harp",
    "frog",
    "phone",
    "rain cloud",
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SIZES = ("small", "medium", "big")
PITCHES = ("high", "middle", "low")
COUNTS = (1, 2, 3)
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "middle",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
GROUNDS = ("white", "grey", "sky", "night")
MOTIONS = ("still", "left", "right", "up", "down")
TEMPOS = ("slow", "fast")
LOUDNESSES = ("quiet", "loud")

PITCH_OF_SIZE = dict(zip(SIZES, PITCHES, strict=True))
SIZE_OF_PITCH = dict(zip(PITCHES, SIZES, strict=True))
INVISIBLE = frozenset({("white", "white"), ("black", "night")})  # (colour, ground)

IMAGE_SIDE_PX = 64
VIDEO_FRAMES = 8
VIDEO_FPS = 8
AUDIO_RATE_HZ = 16_000
AUDIO_SAMPLES = 40_960  # 2.56 s

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class Look:
    """What a picture shows. ``place`` is None exactly when ``count`` is above one."""

    thing: str
    colour: str
    size: str
    count: int
    place: str | None
    ground: str

    def __post_init__(self) -> None:
        _check(self.thing, THINGS, "thing")
        _check(self.colour, COLOURS, "colour")
        _check(self.size, SIZES, "size")
        _check(self.count, COUNTS, "count")
        _check(self.ground, GROUNDS, "ground")
        if self.count == 1:
            _check(self.place, PLACES, "place")
        elif self.place is not None:
            raise ValueError(
                f"place is {self.place!r} with count {self.count}; only a single thing has a place. "
                "Pass place=None."
            )
        _check_visible(self.colour, self.ground)

    @property
    def held_out(self) -> bool:
        """True when no part of training may contain this thing in this colour and size."""
        return _one_in_ten("look", self.thing, self.colour, self.size)


@dataclass(frozen=True, slots=True)
class Clip:
    """What a video shows: one thing, its motion and the tempo of every movement in it."""

    thing: str
    colour: str
    size: str
    ground: str
    motion: str
    tempo: str

    def __post_init__(self) -> None:
        _check(self.thing, THINGS, "thing")
        _check(self.colour, COLOURS, "colour")
        _check(self.size, SIZES, "size")
        _check(self.ground, GROUNDS, "ground")
        _check(self.motion, MOTIONS, "motion")
        _check(self.tempo, TEMPOS, "tempo")
        _check_visible(self.colour, self.ground)

    @property
    def held_out(self) -> bool:
        """True when no part of training may contain this thing in this colour and size."""
        return _one_in_ten("look", self.thing, self.colour, self.size)


@dataclass(frozen=True, slots=True)
class Sound:
    """What is heard: a thing sounding ``count`` times."""

    thing: str
    pitch: str
    count: int
    tempo: str
    loudness: str

    def __post_init__(self) -> None:
        _check(self.thing, THINGS, "thing")
        _check(self.pitch, PITCHES, "pitch")
        _check(self.count, COUNTS, "count")
        _check(self.tempo, TEMPOS, "tempo")
        _check(self.loudness, LOUDNESSES, "loudness")

    @property
    def held_out(self) -> bool:
        """True when no part of training may contain this thing at this pitch, count and tempo."""
        return _one_in_ten("sound", self.thing, self.pitch, str(self.count), self.tempo)


Scene = Look | Clip | Sound


def attributes(scene: Scene) -> dict[str, str | int]:
    """Return the attributes of a scene by name, without those that do not apply."""
    values = {field.name: getattr(scene, field.name) for field in fields(scene)}
    return {name: value for name, value in values.items() if value is not None}


def sample_look(rng: random.Random, *, held_out: bool = False, **fixed: str | int | None) -> Look:
    """Draw a random picture whose split and fixed attributes are as asked.

    One picture in three holds two or three things. ``fixed`` names attributes of
    :class:`Look` that must have the given value.
    """
    while True:
        count = fixed.get("count", rng.choice((1, 1, 1, 1, 2, 3)))
        if fixed.get("place") is not None:
            count = 1
        values = {
            "thing": rng.choice(THINGS),
            "colour": rng.choice(COLOURS),
            "size": rng.choice(SIZES),
            "ground": rng.choice(GROUNDS),
            "place": rng.choice(PLACES) if count == 1 else None,
        } | {name: value for name, value in fixed.items() if value is not None}
        values["count"] = count
        if (values["colour"], values["ground"]) in INVISIBLE:
            if "colour" in fixed and "ground" in fixed:
                raise ValueError(
                    f"{values['colour']} on {values['ground']} cannot be seen; change one of them."
                )
            continue
        look = Look(**values)  # type: ignore[arg-type]
        if look.held_out is held_out:
            return look


def sample_clip(rng: random.Random, *, held_out: bool = False, **fixed: str) -> Clip:
    """Draw a random video whose split and fixed attributes are as asked."""
    while True:
        values = {
            "thing": rng.choice(THINGS),
            "colour": rng.choice(COLOURS),
            "size": rng.choice(SIZES),
            "ground": rng.choice(GROUNDS),
            "motion": rng.choice(MOTIONS),
            "tempo": rng.choice(TEMPOS),
        } | fixed
        if (values["colour"], values["ground"]) in INVISIBLE:
            if "colour" in fixed and "ground" in fixed:
                raise ValueError(
                    f"{values['colour']} on {values['ground']} cannot be seen; change one of them."
                )
            continue
        clip = Clip(**values)
        if clip.held_out is held_out:
            return clip


def sample_sound(rng: random.Random, *, held_out: bool = False, **fixed: str | int) -> Sound:
    """Draw a random sound whose split and fixed attributes are as asked."""
    while True:
        values = {
            "thing": rng.choice(THINGS),
            "pitch": rng.choice(PITCHES),
            "count": rng.choice(COUNTS),
            "tempo": rng.choice(TEMPOS),
            "loudness": rng.choice(LOUDNESSES),
        } | fixed
        sound = Sound(**values)  # type: ignore[arg-type]
        if sound.held_out is held_out:
            return sound


def changed(scene: Scene, **values: str | int | None) -> Scene | None:
    """Return the scene with some attributes changed, or None where the world has no such scene."""
    try:
        return replace(scene, **values)  # type: ignore[arg-type]
    except ValueError:
        return None


def looks() -> Iterator[tuple[str, str, str]]:
    """Every (thing, colour, size) of the world, in a fixed order."""
    return ((thing, colour, size) for thing in THINGS for colour in COLOURS for size in SIZES)


def _one_in_ten(*words: str) -> bool:
    digest = hashlib.sha256("|".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _check(value: object, allowed: tuple[object, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, allowed))}.")


def _check_visible(colour: str, ground: str) -> None:
    if (colour, ground) in INVISIBLE:
        raise ValueError(f"{colour} on {ground} cannot be seen; choose another colour or ground.")
