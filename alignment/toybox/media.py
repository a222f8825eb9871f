"""Scenes as files, and verdicts on files.

The judge sees what a person gets: the bytes of a PNG, an MP4 or a WAV, never a tensor.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image

from alignment.toybox.draw import draw_clip, draw_look
from alignment.toybox.judge_sound import judge_sound
from alignment.toybox.judge_visual import judge_clip, judge_look
from alignment.toybox.sound import synthesise
from alignment.toybox.world import (
    AUDIO_RATE_HZ,
    AUDIO_SAMPLES,
    IMAGE_SIDE_PX,
    VIDEO_FPS,
    VIDEO_FRAMES,
    Clip,
    Look,
    Scene,
)
from decoders.writing import to_mp4, to_png, to_wav
from encoders.media import Audio, Image, Medium, Video, read_media

Value = str | int | None


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether one attribute is right, and for attributes with names which was wanted and which found."""

    right: bool
    wanted: Value = None
    found: Value = None


def compare(seen: Mapping[str, Value], scene: Scene, names: Sequence[str]) -> dict[str, Finding]:
    """Hold what was seen against a scene, attribute by attribute."""
    pairs = {name: (getattr(scene, name), seen.get(name)) for name in names}
    return {name: Finding(wanted == found, wanted, found) for name, (wanted, found) in pairs.items()}


def render(scene: Scene, rng: random.Random) -> Medium:
    """Draw or synthesise a scene with the jitter that ``rng`` gives."""
    if isinstance(scene, Look):
        return Image(draw_look(scene, rng))
    if isinstance(scene, Clip):
        return Video(draw_clip(scene, rng), VIDEO_FPS)
    return Audio(synthesise(scene, rng), AUDIO_RATE_HZ)


def to_bytes(medium: Medium) -> bytes:
    """Return the file of a medium: PNG, MP4 or WAV."""
    if isinstance(medium, Image):
        return to_png(medium, {})
    if isinstance(medium, Video):
        return to_mp4(medium, {})
    return to_wav(medium, {})


def judge(data: bytes) -> dict[str, Value]:
    """Read a file and name the attributes of what it shows or sounds like, ``None`` where there is none.

    A medium of another size is first brought to that of the world, a short sound with silence.

    Raises:
        encoders.media.MediaError: the bytes are not a medium.

    """
    medium = read_media(data)
    if isinstance(medium, Image):
        return dict(judge_look(fitted(medium.pixels)))
    if isinstance(medium, Video):
        picked = np.linspace(0, len(medium.frames) - 1, VIDEO_FRAMES).round().astype(int)
        return dict(judge_clip(np.stack([fitted(medium.frames[i]) for i in picked])))
    return dict(judge_sound(lengthened(medium).samples, medium.rate))


def lengthened(sound: Audio) -> Audio:
    """Return a sound that is at least as long as those of the world, with silence at its end."""
    missing = AUDIO_SAMPLES * sound.rate // AUDIO_RATE_HZ - len(sound.samples)
    return replace(sound, samples=np.pad(sound.samples, (0, missing))) if missing > 0 else sound


def fitted(pixels: np.ndarray) -> np.ndarray:
    """Return a picture in the size of the world."""
    if pixels.shape[:2] == (IMAGE_SIDE_PX, IMAGE_SIDE_PX):
        return pixels
    size = (IMAGE_SIDE_PX, IMAGE_SIDE_PX)
    return np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BOX))
