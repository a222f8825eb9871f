"""Captions, with media or without, as dialogues: from Toybox, or from a file in the field's own form.

The file is JSON, as NExT-GPT's X-caption data: a list of objects with ``caption`` and, for training that
reads media, one of ``image_name``, ``video_name`` and ``audio_name``, a path relative to the file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.embedded.dialogues import dialogue_of, encode_pools, sample_dialogues
from alignment.embedded.pools import PoolSizes
from alignment.toybox.directions import make
from alignment.toybox.exercise import FreshScenes
from encoders.encoder import Encoder
from encoders.media import MediaError, Modality, read_media
from llm.template import Dialogue, MediaTokens, Message, SignalPart

ASKED = "What is this?"
NAMES = {f"{modality}_name": modality for modality in (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)}
Dialogues = Callable[[random.Random, int], list[Dialogue]]
"""(source of chance, how many) -> dialogues."""


@dataclass(frozen=True)
class Pair:
    """One caption, and the medium that it describes if there is one."""

    caption: str
    modality: Modality | None = None
    file: Path | None = None


def read_pairs(path: Path) -> list[Pair]:
    """Read a file of captions.

    Raises:
        ValueError: no such file, not of the form described above, or empty.

    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    pairs = []
    for number, value in enumerate(values if isinstance(values, list) else [None]):
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("caption"), str)
            or not value["caption"].strip()
        ):
            raise ValueError(
                f"{path}: entry {number} is {value!r:.100}; expected a list of objects with a caption, and "
                f"perhaps {', '.join(NAMES)}."
            )
        named = [(modality, value[name]) for name, modality in NAMES.items() if name in value]
        modality, file = named[0] if named else (None, None)
        pairs.append(
            Pair(value["caption"].strip(), modality, None if file is None else path.parent / str(file))
        )
    if not pairs:
        raise ValueError(f"{path} is an empty list; expected captions.")
    return pairs


def pairs_that_ask(pairs: Sequence[Pair], modalities: Sequence[Modality]) -> Dialogues:
    """Return dialogues in which a caption is asked for and made: words, then a signal of ``modalities``."""

    def draw(rng: random.Random, number: int) -> list[Dialogue]:
        found = []
        for pair in rng.choices(pairs, k=number):
            named = pair.modality
            modality = named if named is not None and named in modalities else rng.choice(modalities)
            reply: list[str | SignalPart] = [pair.caption, SignalPart(modality)]
            found.append([Message("user", [pair.caption]), Message("assistant", [*reply])])
        return found

    return draw


def pairs_that_tell(pairs: Sequence[Pair], encoder: Encoder) -> Dialogues:
    """Return dialogues in which a medium is shown and its caption said. Each medium is encoded once.

    Raises:
        ValueError: no pair has a medium that ``encoder`` reads, or (later) a medium cannot be read.

    """
    shown = [pair for pair in pairs if pair.file is not None and pair.modality in encoder.modalities]
    if not shown:
        raise ValueError(
            f"None of the {len(pairs)} captions comes with a medium that the encoder reads; expected one of "
            f"{', '.join(NAMES)} beside the captions."
        )
    encoded: dict[Path, MediaTokens] = {}

    def medium(pair: Pair) -> MediaTokens:
        assert pair.file is not None
        if pair.file not in encoded:
            try:
                features = encoder.encode(read_media(pair.file.read_bytes(), expect=pair.modality))
            except (OSError, MediaError) as error:
                raise ValueError(f"{pair.file} cannot be read: {error}") from error
            encoded[pair.file] = MediaTokens(
                features.modality, features.tokens, features.pooled, features.blocks
            )
        return encoded[pair.file]

    def draw(rng: random.Random, number: int) -> list[Dialogue]:
        return [
            [Message("user", [medium(pair), ASKED]), Message("assistant", [pair.caption])]
            for pair in rng.choices(shown, k=number)
        ]

    return draw


def toybox_that_asks(modalities: Sequence[Modality]) -> Dialogues:
    """Return dialogues of Toybox in which media are asked for with words."""

    def draw(rng: random.Random, number: int) -> list[Dialogue]:
        names = rng.choices([f"text-to-{modality}" for modality in modalities], k=number)
        return [dialogue_of(make(name, rng, FreshScenes(rng)), {}) for name in names]

    return draw


def toybox_that_tells(encoder: Encoder, cache: Path, sizes: PoolSizes) -> Dialogues:
    """Return dialogues of Toybox in which media are told in words; they are rendered and encoded once."""
    encoded = encode_pools(encoder, cache, sizes)
    directions = {f"{modality}-to-text": 1.0 for modality in sorted(encoder.modalities - {Modality.TEXT})}
    return lambda rng, number: sample_dialogues(rng, directions, encoded, number)
