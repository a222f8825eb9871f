"""Sounds that begin one or two events late: any event may come at any time, for what makes and what hears it.

Where a thing was met at a pitch and tempo once and twice but never three times, a denoiser leaves the third
event out, however clearly its condition asks for it: it has learnt that nothing like this is heard so late.
No caption tells of the delay. To what a caption gives, a direction is added that stands for it and that
nothing else uses.

What hears sounds takes the same shortcut from a thing, its pitch and its tempo to how often it sounds. So
late sounds are among those that it hears, described like any other.

Shape letters in this file:
    N sounds   L audio samples   T mel frames   M mel bins
    C latent channels   h, w latent cells   E condition width
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from alignment.embedded import pools
from alignment.embedded.own_media import OwnMedia
from alignment.toybox.sound import TIMING
from alignment.toybox.world import AUDIO_RATE_HZ, Scene, Sound
from decoders.mel import HOP, RATE_HZ

SHARE = 0.3
"""Of each batch."""
DELAYS: Mapping[int, tuple[int, ...]] = {1: (1, 2), 2: (1,)}
"""How many events late a sound of so many events may be: there is room for three."""
MARKS: Mapping[tuple[int, int], int] = {
    pair: number for number, pair in enumerate((count, delay) for count in DELAYS for delay in DELAYS[count])
}


@dataclass(frozen=True)
class LateSounds:
    """Latents ``(N, C, h, w)`` of late sounds, what each is, and what its condition gets added ``(N, E)``."""

    latents: NDArray[np.float16]
    scenes: Sequence[Sound]
    marks: Tensor


def late_sounds(
    cache: Path,
    mels: NDArray[np.float16],
    encode: Callable[[Tensor], Tensor],
    width: int,
    number: int | None = None,
) -> LateSounds:
    """Return late versions of sounds of the pool, the same at every call; latents are kept in ``cache``.

    Args:
        cache: of the pools.
        mels: of the whole pool of sounds, ``(N, T, M)``.
        encode: mels to latents.
        width: of the condition.
        number: how many; 6 for 10 of the pool by default.

    """
    listed = pools.scenes("sound", len(mels))
    chosen = _chosen(listed, len(mels) * 6 // 10 if number is None else number)
    path = cache / f"latents-late-{len(chosen)}.npy"
    rows = np.stack([delayed(mels[i], listed[i], by) for i, by in chosen])
    latents = pools.encoded(path, rows, encode, 16)
    directions = F.normalize(
        torch.randn(len(MARKS), width, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    scenes = [_sound(listed[i]) for i, _ in chosen]
    marks = [MARKS[scene.count, by] for scene, (_, by) in zip(scenes, chosen, strict=True)]
    return LateSounds(latents, scenes, directions[marks])


def also_late(own: OwnMedia, samples: NDArray[np.int16]) -> OwnMedia:
    """Return what the decoder made and, after it, half as many late sounds, the same at every call.

    Args:
        own: of sounds; its rows are ``(N, L)``.
        samples: of the whole pool of sounds, ``(N, L)``.

    """
    listed = pools.scenes("sound", len(samples))
    chosen = _chosen(listed, len(own.scenes) // 2)
    rows = [np.roll(samples[i], round(_delay_s(_sound(listed[i]), by) * AUDIO_RATE_HZ)) for i, by in chosen]
    scenes = [*own.scenes, *(listed[i] for i, _ in chosen)]
    return OwnMedia(scenes, np.concatenate([own.rows, *(row[None] for row in rows)]), len(chosen))


def delayed(mel: NDArray[np.float16], scene: Scene, events: int) -> NDArray[np.float16]:
    """Return mel frames ``(T, M)`` of a sound that begins so many of its events later.

    What would come after the end is heard at the beginning: it is silence.
    """
    return np.roll(mel, round(_delay_s(_sound(scene), events) * RATE_HZ / HOP), axis=0)


def _delay_s(scene: Sound, events: int) -> float:
    return events * TIMING[scene.tempo].gap_s


def _chosen(listed: Sequence[Scene], number: int) -> list[tuple[int, int]]:
    """Draw rows of the pool, quiet ones more often, and how late each is."""
    rng = random.Random("late")
    short = [i for i, scene in enumerate(listed) if _sound(scene).count in DELAYS]
    weights = [pools.QUIET_SHARE if _sound(listed[i]).loudness == "quiet" else 1.0 for i in short]
    rows = rng.choices(short, weights=weights, k=number)
    return [(row, rng.choice(DELAYS[_sound(listed[row]).count])) for row in rows]


def _sound(scene: Scene) -> Sound:
    assert isinstance(scene, Sound)
    return scene
