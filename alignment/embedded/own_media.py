"""What the decoders make of the pools' captions, for the encoder and the language model to read.

A person goes on with what a decoder made: asks for a change of it, or what it sounds like. Trained on
renderings alone, the encoder misread one in ten of these media, though the judge found all of their
attributes right. Only those are kept here.

Shape letters in this file:
    N media kept   F video frames   H, W pixels   L audio samples
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from alignment.embedded.captions import Kind
from alignment.toybox.exercises import judged
from alignment.toybox.grammar import caption
from alignment.toybox.media import compare, judge, to_bytes
from alignment.toybox.world import AUDIO_SAMPLES, Scene
from decoders.latent_decoder import LatentDecoder
from decoders.settings import DecodeSettings
from encoders.media import Audio, Image, Medium, Video, read_media

CHUNK = 200
_BATCH = 20


@dataclass(frozen=True)
class OwnMedia:
    """Media of one kind that were made right: ``rows`` like those of a pool, and the scene of each.

    Rows are pixels ``(N, H, W, 3)``, frames ``(N, F, H, W, 3)`` or 16-bit samples ``(N, L)``.
    """

    scenes: list[Scene]
    rows: NDArray[Any]


def made(load: Callable[[], LatentDecoder], kind: Kind, scenes: Sequence[Scene], cache: Path) -> OwnMedia:
    """Decode the captions of ``scenes`` and return what came out right.

    Args:
        load: gives the decoder of this kind, if there is anything left to make.
        kind: which kind of scene.
        scenes: what is to be made.
        cache: keeps what is done, :data:`CHUNK` scenes to a file.

    """
    decoder: LatentDecoder | None = None
    kept, rows = list[Scene](), list[NDArray[Any]]()
    for start in track(range(0, len(scenes), CHUNK), description=f"own {kind}s"):
        some = scenes[start : start + CHUNK]
        path = cache / f"own-{kind}-{start}-{start + len(some)}.npz"
        if not path.exists():
            decoder = decoder or load()
            _make(decoder, some, start, path)
        with np.load(path) as file:
            kept += [some[i] for i in file["places"]]
            rows.append(file["rows"])
    return OwnMedia(kept, np.concatenate(rows))


def _make(decoder: LatentDecoder, scenes: Sequence[Scene], first_seed: int, path: Path) -> None:
    right, rows = list[bool](), list[NDArray[Any]]()
    for start in range(0, len(scenes), _BATCH):
        some = scenes[start : start + _BATCH]
        conditions = [decoder.encode_caption(caption(scene)) for scene in some]
        wishes = [DecodeSettings(seed=first_seed + start + i) for i in range(len(some))]
        for scene, done in zip(some, decoder.decode_batch(conditions, wishes), strict=True):
            data = to_bytes(done.medium)
            found = compare(judge(data), scene, judged(scene))
            right.append(all(finding.right for finding in found.values()))
            rows.append(_row(read_media(data)))
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, places=np.flatnonzero(right), rows=np.stack(rows)[right])
    partial.replace(path)


def _row(medium: Medium) -> NDArray[Any]:
    """Return a medium, as it is read from its file, like a row of its pool."""
    if isinstance(medium, Video):
        return medium.frames
    if isinstance(medium, Image):
        return medium.pixels
    assert isinstance(medium, Audio)
    samples = np.round(medium.samples[:AUDIO_SAMPLES] * 32767).astype(np.int16)
    return np.pad(samples, (0, AUDIO_SAMPLES - len(samples)))
