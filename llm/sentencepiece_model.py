"""Read the ``tokenizer.model`` of a LLaMA, as sentencepiece wrote it, without that library.

Read is what LLaMA's kind needs: byte-pair encoding with bytes for what has no piece, and white space that
is kept as it is behind one space that every text gets in front. Other models of sentencepiece are refused.
The format is that of sentencepiece_model.proto, https://github.com/google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

SPACE = "\u2581"
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK, _BPE = 3, 35, 2
_CHARACTER_MAP, _DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3
_VARINT, _BYTES, _SIZES = 0, 2, {1: 8, 5: 4}


def read_sentencepiece(path: Path) -> Tokenizer:
    """Return the tokenizer in ``path``, with the unknown and the control pieces as special tokens.

    A text that begins with a space keeps it behind the one that is put in front, as sentencepiece does;
    transformers 5 drops one of the two when it reads the same file.

    Raises:
        ValueError: the file is no model of sentencepiece, is cut off, or is of another kind.

    """
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == _PIECES and isinstance(value, bytes)]
        specs = {
            n: dict(_fields(v)) for n, v in fields if n in (_TRAINER, _NORMALIZER) and isinstance(v, bytes)
        }
    except (IndexError, UnicodeDecodeError, struct.error, ValueError) as error:
        raise ValueError(
            f"{path} is no model of sentencepiece, or is cut off ({error}). Download it again."
        ) from error
    _expect_llama(path, pieces, specs.get(_TRAINER, {}), specs.get(_NORMALIZER, {}))
    names = {name: i for i, (name, _, _) in enumerate(pieces)}
    unknown = next(name for name, _, kind in pieces if kind == _UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=names, merges=_merges(pieces, names), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [name for name, _, kind in pieces if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return tokenizer


def _expect_llama(
    path: Path,
    pieces: list[tuple[str, float, int]],
    trainer: dict[int, int | bytes],
    normalizer: dict[int, int | bytes],
) -> None:
    faults = {
        "no pieces": not pieces,
        "no piece for what is unknown": not any(kind == _UNKNOWN for _, _, kind in pieces),
        "another model than byte-pair encoding": trainer.get(_MODEL_TYPE, 1) != _BPE,
        "no bytes for what has no piece": not trainer.get(_BYTE_FALLBACK, 0),
        "a map of characters": bool(normalizer.get(_CHARACTER_MAP)),
        "no space in front of a text": not normalizer.get(_DUMMY_PREFIX, 1),
        "white space that is removed": bool(normalizer.get(_REMOVE_EXTRA_SPACES, 1)),
        "white space that is not escaped": not normalizer.get(_ESCAPE_SPACES, 1),
    }
    if found := [fault for fault, there in faults.items() if there]:
        raise ValueError(
            f"{path} has {', '.join(found)}; expected the tokenizer of a LLaMA. Use that of the base model, "
            f"or give a tokenizer.json instead."
        )


def _merges(pieces: list[tuple[str, float, int]], names: dict[str, int]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes another, the best piece first."""
    whole = {name: score for name, score, kind in pieces if kind == _NORMAL}
    found = [
        (-score, names[name[:cut]], names[name[cut:]], name, cut)
        for name, score in whole.items()
        for cut in range(1, len(name))
        if name[:cut] in whole and name[cut:] in whole
    ]
    return [(name[:cut], name[cut:]) for *_, name, cut in sorted(found)]


def _piece(data: bytes) -> tuple[str, float, int]:
    """Return what a piece stands for, its score, and its kind."""
    values = dict(_fields(data))
    name, score, kind = values.get(1, b""), values.get(2, b"\0\0\0\0"), values.get(3, _NORMAL)
    if not (isinstance(name, bytes) and isinstance(score, bytes) and isinstance(kind, int)):
        raise ValueError("a piece is not made of a text, a score and a kind")
    return name.decode(), float(struct.unpack("<f", score)[0]), kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a protocol buffer: integers, and the bytes of all else."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if number == 0 or kind not in (_VARINT, *_SIZES, _BYTES):
            raise ValueError(f"a field has the number {number} and is of the kind {kind}")
        if kind == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        size, place = (_SIZES[kind], place) if kind in _SIZES else _varint(data, place)
        if place + size > len(data):
            raise ValueError("a field ends behind the end of the file")
        yield number, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place
