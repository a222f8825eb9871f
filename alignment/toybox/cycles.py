"""Cycles: what survives when one medium becomes another and comes back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from alignment.toybox.exercise import FreshScenes
from alignment.toybox.media import Finding, compare, judge, render, to_bytes
from alignment.toybox.world import Scene
from encoders.media import Medium, Modality, read_media
from llm.signals import Signal
from llm.template import Message, Part

if TYPE_CHECKING:
    from alignment.system import System

_LOOK = ("thing", "colour", "size", "ground")
CYCLES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "cycle image-text": ("describe this", "draw {text}", (*_LOOK, "count")),
    "cycle image-audio": ("what does this sound like?", "draw what you hear", ("thing", "size", "count")),
    "cycle image-video": ("make a video of this staying still slowly", "draw what is in this video", _LOOK),
    "cycle video-text": ("describe this", "make a video of {text}", (*_LOOK, "motion", "tempo")),
    "cycle video-audio": ("what does this video sound like?", "film this sound", ("thing", "size", "tempo")),
    "cycle audio-text": (
        "describe this sound",
        "play {text}",
        ("thing", "pitch", "count", "tempo", "loudness"),
    ),
}
"""Name -> the words on the way there, the words on the way back, and what must survive."""


def run_cycle(
    name: str, system: System, rng: random.Random, scenes: FreshScenes, seed: int
) -> dict[str, Finding]:
    """Send one medium there and back; say which of the shared attributes survived."""
    there, back, names = CYCLES[name]
    first, second = name.removeprefix("cycle ").split("-")
    scene: Scene
    if first == "image":
        scene = scenes.look(count=1) if second == "video" else scenes.look()
    else:
        scene = scenes.clip() if first == "video" else scenes.sound()
    source = read_media(to_bytes(render(scene, rng)))
    said, made = _ask(system, there, source, Modality(second), seed)
    if second != "text" and made is None:
        return compare({}, scene, names)
    if second == "text":
        _, returned = _ask(system, back.format(text=said), None, Modality(first), seed)
    else:
        _, returned = _ask(system, back, made, Modality(first), seed)
    return compare({} if returned is None else judge(to_bytes(returned)), scene, names)


def _ask(
    system: System, text: str, shown: Medium | None, wanted: Modality, seed: int
) -> tuple[str, Medium | None]:
    parts: list[Part] = [text] if shown is None else [system.read(shown), text]
    spoken = system.speak([Message("user", parts)])
    said = " ".join(part for part in spoken if isinstance(part, str))
    for part in spoken:
        if isinstance(part, Signal) and part.modality == wanted:
            medium = system.make(wanted, [system.condition(part)], seed, captions=[part.caption])[0]
            return said, read_media(to_bytes(medium))
    return said, None
