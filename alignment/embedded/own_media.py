"""What the decoders make of the pools' captions, for the encoder and the language model to read.

A person goes on with what a decoder made: asks for a change of it, or what it sounds like. Trained on
renderings alone, the encoder misread one in ten of these media, though the judge found all of their
attributes right. Only those are kept here. Two thirds of the pictures and clips were changed once or twice
after they were made, as an edit does it: they keep what is not touched.

Shape letters in this file:
    N media kept   F video frames   H, W pixels   L audio samples
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from alignment.embedded.captions import Kind
from alignment.toybox.changes import ask_for_change
from alignment.toybox.exercise import judged
from alignment.toybox.grammar import caption
from alignment.toybox.media import compare, judge, to_bytes
from alignment.toybox.phrases import Speaker
from alignment.toybox.world import AUDIO_SAMPLES, Clip, Look, Scene, Sound
from decoders.latent_decoder import LatentDecoder
from decoders.settings import DecodeSettings
from encoders.media import Audio, Image, Medium, Video, read_media

CHUNK = 200
MOST_EDITS: Mapping[Kind, int] = {"look": 2, "clip": 2, "sound": 0}
"""An edited sound is a new one, as the preset has it, but for its tuning."""
OWN_SHARE = 0.35
"""Of the media that are met in training, those that the decoders made."""
SCENES: Mapping[Kind, type[Scene]] = {"look": Look, "clip": Clip, "sound": Sound}
_BATCH = 20


@dataclass(frozen=True)
class OwnMedia:
    """Media of one kind that were made right: ``rows`` like those of a pool, and the scene of each.

    Rows are pixels ``(N, H, W, 3)``, frames ``(N, F, H, W, 3)`` or 16-bit samples ``(N, L)``. The last
    ``num_late`` are sounds of the pool that begin late (:mod:`alignment.embedded.late_sounds`).
    """

    scenes: list[Scene]
    rows: NDArray[Any]
    num_late: int = 0


def made(load: Callable[[], LatentDecoder], kind: Kind, scenes: Sequence[Scene], cache: Path) -> OwnMedia:
    """Decode the captions of ``scenes``, change some of the media, and return what came out right.

    Args:
        load: gives the decoder of this kind, if there is anything left to make.
        kind: which kind of scene.
        scenes: what is to be made first.
        cache: keeps what is done, :data:`CHUNK` scenes to a file. Each file tells what its media show, as
            the changes that are drawn for a scene depend on how changes are asked for.

    """
    decoder: LatentDecoder | None = None
    kept, rows = list[Scene](), list[NDArray[Any]]()
    for start in track(range(0, len(scenes), CHUNK), description=f"own {kind}s"):
        some = scenes[start : start + CHUNK]
        ways = [edited(scene, f"{kind}-{start + i}", MOST_EDITS[kind]) for i, scene in enumerate(some)]
        path = cache / f"own-{kind}-{start}-{start + len(ways)}.npz"
        if not path.exists():
            decoder = decoder or load()
            _make(decoder, ways, start, path)
        with np.load(path) as file:
            kept += [SCENES[kind](**json.loads(str(told))) for told in file["scenes"]]
            rows.append(file["rows"])
    return OwnMedia(kept, np.concatenate(rows))


def edited(scene: Scene, name: str, most: int) -> list[Scene]:
    """Return ``scene`` and what it is after each of some edits, none to ``most``; ``name`` decides which."""
    rng = random.Random(name)
    speaker = Speaker.drawn_from(rng, reserved=False)
    way = [scene]
    for _ in range(rng.randint(0, most)):
        goal, _ = ask_for_change(way[-1], speaker)
        while goal.held_out:
            goal, _ = ask_for_change(way[-1], speaker)
        way.append(goal)
    return way


def _make(decoder: LatentDecoder, ways: Sequence[Sequence[Scene]], first_seed: int, path: Path) -> None:
    right, rows = list[bool](), list[NDArray[Any]]()
    for start in range(0, len(ways), _BATCH):
        some = ways[start : start + _BATCH]
        media: list[Medium] = [
            read_media(to_bytes(medium))
            for medium in _drawn(decoder, [way[0] for way in some], first_seed + start)
        ]
        for turn in range(1, max(map(len, some))):
            places = [i for i, way in enumerate(some) if len(way) > turn]
            changed = _drawn(
                decoder, [some[i][turn] for i in places], first_seed + start, [media[i] for i in places]
            )
            for i, medium in zip(places, changed, strict=True):
                media[i] = read_media(to_bytes(medium))
        for way, medium in zip(some, media, strict=True):
            found = compare(judge(to_bytes(medium)), way[-1], judged(way[-1]))
            right.append(all(finding.right for finding in found.values()))
            rows.append(_row(medium))
    partial = path.with_suffix(".partial.npz")
    told = [json.dumps(asdict(way[-1])) for way, fine in zip(ways, right, strict=True) if fine]
    np.savez(partial, scenes=np.array(told, dtype=np.str_), rows=np.stack(rows)[right])
    partial.replace(path)


def _drawn(
    decoder: LatentDecoder, scenes: Sequence[Scene], seed: int, before: Sequence[Medium] | None = None
) -> list[Medium]:
    wishes = [DecodeSettings(seed=seed + i) for i in range(len(scenes))]
    conditions = [decoder.encode_caption(caption(scene)) for scene in scenes]
    return [one.medium for one in decoder.decode_batch(conditions, wishes, originals=before)]


def _row(medium: Medium) -> NDArray[Any]:
    """Return a medium, as it is read from its file, like a row of its pool."""
    if isinstance(medium, Video):
        return medium.frames
    if isinstance(medium, Image):
        return medium.pixels
    assert isinstance(medium, Audio)
    samples = np.round(medium.samples[:AUDIO_SAMPLES] * 32767).astype(np.int16)
    return np.pad(samples, (0, AUDIO_SAMPLES - len(samples)))
