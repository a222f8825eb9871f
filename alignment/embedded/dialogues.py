"""Toybox exercises as dialogues with encoded media, for the three stages.

Media of people are taken from the pools, encoded once. What the agent makes is a signal: nothing
has to be rendered for it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.embedded import pools
from alignment.embedded.captions import Kind
from alignment.embedded.own_media import OwnMedia
from alignment.toybox import world
from alignment.toybox.exercises import Exercise, Part, make
from alignment.toybox.world import Clip, Look, Scene, Sound
from encoders.encoder import Encoder
from encoders.media import Audio, Image, Medium, Modality, Video
from llm.template import Dialogue, MediaTokens, Message, SignalPart

MODALITY: Mapping[type, Modality] = {Look: Modality.IMAGE, Clip: Modality.VIDEO, Sound: Modality.AUDIO}
MODALITY_OF: Mapping[Kind, Modality] = {
    "look": Modality.IMAGE,
    "clip": Modality.VIDEO,
    "sound": Modality.AUDIO,
}
ENCODED: Mapping[Kind, int] = {"look": 16_000, "clip": 12_000, "sound": 10_000}


@dataclass(frozen=True)
class EncodedPool:
    """Scenes of one kind with their encoder features, ``(N, n, width)`` tokens and ``(N, width)`` vectors.

    All are of one size, so all have the same ``blocks``; ``()`` is one.
    """

    scenes: list[Scene]
    tokens: NDArray[np.float16]
    pooled: NDArray[np.float16]
    blocks: tuple[int | str, ...] = ()

    def media(self, index: int) -> MediaTokens:
        """Return one medium as the language model reads it."""
        modality = MODALITY[type(self.scenes[index])]
        return MediaTokens(modality, _floats(self.tokens[index]), _floats(self.pooled[index]), self.blocks)


class PoolScenes:
    """Scenes that have been rendered and encoded; it remembers which rendering each came from."""

    def __init__(self, rng: random.Random, encoded: Mapping[Kind, EncodedPool]) -> None:
        self.rng, self.encoded = rng, encoded
        self.drawn: dict[Scene, MediaTokens] = {}

    def look(self, **fixed: str | int) -> Look:
        """Return a picture of the pool that has the given attributes."""
        scene = self._draw("look", fixed)
        assert isinstance(scene, Look)
        return scene

    def clip(self, **fixed: str) -> Clip:
        """Return a video of the pool that has the given attributes."""
        scene = self._draw("clip", fixed)
        assert isinstance(scene, Clip)
        return scene

    def sound(self, **fixed: str | int) -> Sound:
        """Return a sound of the pool that has the given attributes."""
        scene = self._draw("sound", fixed)
        assert isinstance(scene, Sound)
        return scene

    def _draw(self, kind: Kind, fixed: Mapping[str, str | int]) -> Scene:
        pool = self.encoded[kind]
        while True:
            index = self.rng.randrange(len(pool.scenes))
            scene = pool.scenes[index]
            if all(getattr(scene, name) == value for name, value in fixed.items()):
                self.drawn[scene] = pool.media(index)
                return scene


def dialogue_of(exercise: Exercise, media: Mapping[Scene, MediaTokens]) -> Dialogue:
    """Return the exercise with its answer; a scene of a person becomes its medium, of the agent a signal."""

    def part(given: Part, role: str) -> str | MediaTokens | SignalPart:
        if isinstance(given, str):
            return given
        return media[given] if role == "user" else SignalPart(MODALITY[type(given)])

    dialogue = [Message(turn.role, [part(p, turn.role) for p in turn.parts]) for turn in exercise.turns]
    return [*dialogue, Message("assistant", [part(p, "assistant") for p in exercise.answer])]


def sample_dialogues(
    rng: random.Random,
    directions: Mapping[str, float],
    encoded: Mapping[Kind, EncodedPool],
    batch_size: int,
) -> list[Dialogue]:
    """Return the dialogues of one training step, each of a direction drawn by its share."""
    dialogues = []
    for name in rng.choices(list(directions), weights=list(directions.values()), k=batch_size):
        scenes = PoolScenes(rng, encoded)
        dialogues.append(dialogue_of(make(name, rng, scenes), scenes.drawn))
    return dialogues


def encode_pools(
    encoder: Encoder, cache: Path, sizes: pools.PoolSizes, own: Mapping[Kind, OwnMedia] | None = None
) -> dict[Kind, EncodedPool]:
    """Return every pool that ``encoder`` reads with its features, encoding on the first call.

    With ``own``, what the decoders made is among the rest.
    """
    looks = pools.look_pixels(cache, sizes.looks)
    clips = pools.clip_pixels(cache, sizes.clips)
    sounds = pools.sound_samples(cache, sizes.sounds)

    def read(row: NDArray[Any]) -> Medium:
        if row.ndim == 4:
            return Video(row, world.VIDEO_FPS)
        if row.ndim == 3:
            return Image(row)
        return Audio(row.astype(np.float32) / np.float32(32767), world.AUDIO_RATE_HZ)

    def features(batch: Tensor) -> Tensor:
        encoded = encoder.encode_batch([read(row) for row in batch.numpy()])
        return torch.stack([torch.cat([f.pooled[None], f.tokens]) for f in encoded])  # (B, 1 + n, width)

    found: dict[Kind, EncodedPool] = {}
    rows: Sequence[tuple[Kind, NDArray[np.generic]]] = (("look", looks), ("clip", clips), ("sound", sounds))
    for kind, row in rows:
        if MODALITY_OF[kind] not in encoder.modalities:
            continue
        number = min(ENCODED[kind], len(row))
        joined = pools.encoded(cache / f"features-{kind}-{number}.npy", row[:number], features, 32)
        listed = pools.scenes(kind, number)
        if own is not None and own[kind].scenes:
            made = own[kind]
            path = cache / f"features-own-{kind}-{len(made.rows)}.npy"
            joined = np.concatenate([joined, pools.encoded(path, made.rows, features, 32)])
            listed = [*listed, *made.scenes]
        blocks = encoder.encode(read(row[0])).blocks
        found[kind] = EncodedPool(listed, joined[:, 1:], joined[:, 0], blocks)
    return found


def _floats(row: NDArray[np.float16]) -> Tensor:
    return torch.from_numpy(row.astype(np.float32))
