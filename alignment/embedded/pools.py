"""Renderings of the seen half of Toybox, made once and kept on disk for every training step.

Shape letters in this file:
    N pool size   F video frames   H, W pixels   T mel frames   M mel bins   L audio samples
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from alignment.toybox.draw import draw_clip, draw_look
from alignment.toybox.sound import synthesise
from alignment.toybox.world import (
    AUDIO_SAMPLES,
    IMAGE_SIDE_PX,
    VIDEO_FRAMES,
    Clip,
    Look,
    Scene,
    Sound,
    sample_clip,
    sample_look,
    sample_sound,
)
from decoders.mel import log_mel

SEED = 20_231
STILL_SHARE = 3.0
SUBTLE = frozenset({"harp", "clock"})  # standing still, they move by a few pixels
SUBTLE_SHARE = 2.0
WHITE_SHARE = 3.0
QUIET_SHARE = 3.0
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class PoolSizes:
    """How many scenes of each kind are rendered for training."""

    looks: int = 24_000
    clips: int = 16_000
    sounds: int = 10_000

    @property
    def own(self) -> dict[str, int]:
        """How many of each kind are made by the decoders."""
        return {"look": self.looks // 12, "clip": self.clips // 16, "sound": self.sounds // 5}


def scenes(kind: str, number: int, seed: int = SEED) -> list[Scene]:
    """Return the seen scenes of a pool, the same for the same seed. ``kind``: look, clip or sound."""
    samplers: Mapping[str, Callable[[random.Random], Scene]]
    samplers = {"look": sample_look, "clip": sample_clip, "sound": sample_sound}
    return [samplers[kind](random.Random(f"{seed}-{kind}-{index}")) for index in range(number)]


def shares(listed: Sequence[Scene]) -> list[float]:
    """Return how often each scene is to be met, added up for :func:`random.choices`.

    A clip that stands still tells its tempo by its own small movement alone, white things are the last
    that denoisers draw clearly, and a quiet sound's latents differ little from silence's. Every event of a
    sound must come out right, so those with more events are met more often.
    """

    def share(scene: Scene) -> float:
        if isinstance(scene, Sound):
            return scene.count * (QUIET_SHARE if scene.loudness == "quiet" else 1.0)
        met = WHITE_SHARE if scene.colour == "white" else 1.0
        if isinstance(scene, Clip) and scene.motion == "still":
            met *= STILL_SHARE * (SUBTLE_SHARE if scene.thing in SUBTLE else 1.0)
        return met

    return list(accumulate(map(share, listed)))


def look_pixels(folder: Path, number: int, seed: int = SEED) -> NDArray[np.uint8]:
    """Return ``(N, H, W, 3)`` drawings of the look pool, rendering them on the first call."""

    def draw(scene: Scene, rng: random.Random) -> NDArray[np.uint8]:
        assert isinstance(scene, Look)
        return draw_look(scene, rng)

    shape = (IMAGE_SIDE_PX, IMAGE_SIDE_PX, 3)
    return _kept(folder / f"looks-{number}-{seed}.npy", "look", number, seed, shape, np.uint8, draw)


def clip_pixels(folder: Path, number: int, seed: int = SEED) -> NDArray[np.uint8]:
    """Return ``(N, F, H, W, 3)`` frames of the clip pool, rendering them on the first call."""

    def draw(scene: Scene, rng: random.Random) -> NDArray[np.uint8]:
        assert isinstance(scene, Clip)
        return draw_clip(scene, rng)

    shape = (VIDEO_FRAMES, IMAGE_SIDE_PX, IMAGE_SIDE_PX, 3)
    return _kept(folder / f"clips-{number}-{seed}.npy", "clip", number, seed, shape, np.uint8, draw)


def sound_samples(folder: Path, number: int, seed: int = SEED) -> NDArray[np.int16]:
    """Return ``(N, L)`` 16-bit samples of the sound pool, synthesising them on the first call."""

    def play(scene: Scene, rng: random.Random) -> NDArray[np.int16]:
        assert isinstance(scene, Sound)
        return np.round(synthesise(scene, rng) * 32767).astype(np.int16)

    path = folder / f"sounds-{number}-{seed}.npy"
    return _kept(path, "sound", number, seed, (AUDIO_SAMPLES,), np.int16, play)


def sound_mels(folder: Path, number: int, seed: int = SEED) -> NDArray[np.float16]:
    """Return ``(N, T, M)`` log-mels of the sound pool, in half precision."""
    path = folder / f"mels-{number}-{seed}.npy"
    if not path.exists():
        samples = sound_samples(folder, number, seed)
        mels = []
        for start in track(range(0, number, 64), description="mel spectrograms"):
            batch = torch.from_numpy(samples[start : start + 64].astype(np.float32) / 32767)  # (B, L)
            mels.append(log_mel(batch).numpy().astype(np.float16))  # (B, T, M)
        _write(path, np.concatenate(mels))
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def render(folder: Path, sizes: PoolSizes) -> None:
    """Render all pools that are not there yet."""
    look_pixels(folder, sizes.looks)
    clip_pixels(folder, sizes.clips)
    sound_samples(folder, sizes.sounds)


def encoded(
    path: Path,
    rows: NDArray[np.generic],
    encode: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int = 64,
) -> NDArray[np.float16]:
    """Return ``encode`` of every row, in half precision, computed once and kept at ``path``.

    What is kept is computed anew where ``encode`` makes something else of the first rows by now: a model
    was trained since. It must make the same of the same batch, whatever it was called with before.
    """

    def batch_at(start: int) -> NDArray[np.float16]:
        batch = torch.from_numpy(np.array(rows[start : start + batch_size]))
        return encode(batch).numpy().astype(np.float16)

    with torch.inference_mode():
        first = batch_at(0)
        if not (path.exists() and _alike(first, np.load(path, mmap_mode="r"), len(rows))):
            starts = range(batch_size, len(rows), batch_size)
            done = [batch_at(start) for start in track(starts, description=path.stem)]
            _write(path, np.concatenate([first, *done]))
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _alike(first: NDArray[np.float16], kept: NDArray[np.float16], number: int) -> bool:
    """Return whether kept rows begin with these, but for what rounding does on other machines."""
    if kept.shape != (number, *first.shape[1:]):
        return False
    ours, theirs = first.astype(np.float32), kept[: len(first)].astype(np.float32)
    return bool(np.abs(ours - theirs).mean() <= 0.01 * ours.std() + 1e-6)


def _kept(
    path: Path, kind: str, number: int, seed: int, shape: tuple[int, ...], dtype: type[Number],
    render: Callable[[Scene, random.Random], NDArray[Number]],
) -> NDArray[Number]:  # fmt: skip
    if not path.exists():
        rows = np.empty((number, *shape), dtype)
        listed: Iterable[tuple[int, Scene]] = enumerate(scenes(kind, number, seed))
        for index, scene in track(listed, description=f"rendering {kind}s", total=number):
            rows[index] = render(scene, random.Random(f"{seed}-{kind}-jitter-{index}"))
        _write(path, rows)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _write(path: Path, rows: NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, rows)
    partial.replace(path)
