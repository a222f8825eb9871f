"""Toybox exercises as dialogues with encoded media, for the three stages.

Media of people are taken from the pools, encoded once. What the agent makes is a signal: nothing
has to be rendered for it. Some media are disguised (:mod:`alignment.embedded.disguises`), and only the words
for what is left of them are learnt: of a thing and a colour that were never seen together, one would be
guessed from the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignment.embedded import pools
from alignment.embedded.captions import SAMPLERS, Kind
from alignment.embedded.disguises import OF_DUETS, WITHOUT_COLOUR, greyed, of_no_thing
from alignment.embedded.own_media import OWN_SHARE, OwnMedia
from alignment.toybox import world
from alignment.toybox.directions import make
from alignment.toybox.exercise import Exercise, Part
from alignment.toybox.grammar import caption_words
from alignment.toybox.world import Clip, Look, Scene, Sound, attributes
from encoders.encoder import Encoder
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Audio, Image, Medium, Modality, Video
from llm.template import Dialogue, Given, MediaTokens, Message, SignalPart
from llm.template import Part as TextPart

MODALITY: Mapping[type, Modality] = {Look: Modality.IMAGE, Clip: Modality.VIDEO, Sound: Modality.AUDIO}
MODALITY_OF: Mapping[Kind, Modality] = {
    "look": Modality.IMAGE,
    "clip": Modality.VIDEO,
    "sound": Modality.AUDIO,
}
ENCODED: Mapping[Kind, int] = {"look": 16_000, "clip": 12_000, "sound": 10_000}
DISGUISED_ONE_IN = 3
"""Of the pools, the media that are encoded in disguise, too."""
DISGUISED_SHARE = 0.35
"""Of the dialogues in which a medium is to be described."""
HIDDEN: Mapping[Kind, frozenset[str]] = {
    "look": frozenset(WITHOUT_COLOUR),
    "clip": frozenset(WITHOUT_COLOUR),
    "sound": frozenset(OF_DUETS),
}
_DESCRIBED: Mapping[str, Kind] = {"image-to-text": "look", "video-to-text": "clip", "audio-to-text": "sound"}


@dataclass(frozen=True)
class EncodedPool:
    """Scenes of one kind with their encoder features, ``(N, n, width)`` tokens and ``(N, width)`` vectors.

    All are of one size, so all have the same ``blocks``; ``()`` is one. The last ``num_own`` are what the
    decoders made, and ``disguised`` are some in disguise.
    """

    scenes: list[Scene]
    tokens: NDArray[np.float16]
    pooled: NDArray[np.float16]
    blocks: tuple[int | str, ...] = ()
    num_own: int = 0
    disguised: EncodedPool | None = None

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
        rendered = len(pool.scenes) - pool.num_own
        while True:
            if pool.num_own and self.rng.random() < OWN_SHARE:
                index = self.rng.randrange(rendered, len(pool.scenes))
            else:
                index = self.rng.randrange(rendered)
            scene = pool.scenes[index]
            if all(getattr(scene, name) == value for name, value in fixed.items()):
                self.drawn[scene] = pool.media(index)
                return scene


def dialogue_of(exercise: Exercise, media: Mapping[Scene, MediaTokens]) -> Dialogue:
    """Return the exercise with its answer; a scene of a person becomes its medium, of the agent a signal."""

    def part(given: Part, role: str, copied: bool = False) -> str | MediaTokens | SignalPart:
        if isinstance(given, str):
            return given
        return media[given] if role == "user" else SignalPart(MODALITY[type(given)], copied)

    dialogue = [Message(turn.role, [part(p, turn.role) for p in turn.parts]) for turn in exercise.turns]
    return [*dialogue, Message("assistant", [part(p, "assistant", exercise.copied) for p in exercise.answer])]


def sample_dialogues(
    rng: random.Random,
    directions: Mapping[str, float],
    encoded: Mapping[Kind, EncodedPool],
    batch_size: int,
) -> list[Dialogue]:
    """Return the dialogues of one training step, each of a direction drawn by its share."""
    dialogues = []
    for name in rng.choices(list(directions), weights=list(directions.values()), k=batch_size):
        kind = _DESCRIBED.get(name)
        if kind is not None and (less := encoded[kind].disguised) and rng.random() < DISGUISED_SHARE:
            dialogues.append(_partly_told(name, kind, rng, less))
            continue
        scenes = PoolScenes(rng, encoded)
        dialogues.append(dialogue_of(make(name, rng, scenes), scenes.drawn))
    return dialogues


def _partly_told(name: str, kind: Kind, rng: random.Random, disguised: EncodedPool) -> Dialogue:
    """Return a dialogue about a medium in disguise; any words stand for what it hides, and are not learnt."""
    scenes = PoolScenes(rng, {kind: disguised})
    exercise = make(name, rng, scenes)
    scene = exercise.stated
    assert scene is not None
    told = {name: value for name, value in attributes(scene).items() if name not in HIDDEN[kind]}
    words = caption_words(SAMPLERS[kind](rng, **told))
    parts: list[TextPart] = []
    for i, (attribute, text) in enumerate(words):
        spaced = f" {text}" if i else text
        parts.append(Given(spaced) if attribute in HIDDEN[kind] else spaced)
    return [*dialogue_of(exercise, scenes.drawn)[:-1], Message("assistant", [*parts])]


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
        num_own = 0
        if own is not None and own[kind].scenes:
            made = own[kind]
            num_own = len(made.scenes)
            path = cache / f"features-own-{kind}-{len(made.rows)}.npy"
            joined = np.concatenate([joined, pools.encoded(path, made.rows, features, 32)])
            listed = [*listed, *made.scenes]
        blocks = encoder.encode(read(row[0])).blocks
        less = None
        if isinstance(encoder, ImageBindEncoder):
            less = _in_disguise(encoder, kind, row[:number], read, cache)
        found[kind] = EncodedPool(listed, joined[:, 1:], joined[:, 0], blocks, num_own, less)
    return found


def _in_disguise(
    encoder: ImageBindEncoder,
    kind: Kind,
    rows: NDArray[Any],
    read: Callable[[NDArray[Any]], Medium],
    cache: Path,
) -> EncodedPool:
    chosen = range(0, len(rows), DISGUISED_ONE_IN)
    listed = pools.scenes(kind, len(rows))
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, scene in enumerate(listed):
        alike.setdefault(_left(scene, kind), []).append(i)

    def features(batch: Tensor) -> Tensor:
        places = batch.tolist()
        rng, noise = random.Random(f"disguised-{kind}-{places[0]}"), torch.Generator().manual_seed(places[0])
        prepared = encoder.prepare([read(rows[i]) for i in places])
        if kind == "sound":
            partners = [rng.choice(alike[_left(listed[i], kind)]) for i in places]
            prepared = of_no_thing(prepared, encoder.prepare([read(rows[i]) for i in partners]), noise)
        else:
            prepared = greyed(prepared)
        encoded = encoder.encode_prepared(prepared, MODALITY_OF[kind])
        return torch.stack([torch.cat([f.pooled[None], f.tokens]) for f in encoded])  # (B, 1 + n, width)

    path = cache / f"features-disguised-{kind}-{len(chosen)}.npy"
    joined = pools.encoded(path, np.array(chosen), features, 32)
    return EncodedPool([listed[i] for i in chosen], joined[:, 1:], joined[:, 0])


def _left(scene: Scene, kind: Kind) -> tuple[object, ...]:
    """Return what a disguise leaves of a scene."""
    return tuple(value for name, value in attributes(scene).items() if name not in HIDDEN[kind])


def _floats(row: NDArray[np.float16]) -> Tensor:
    return torch.from_numpy(row.astype(np.float32))
