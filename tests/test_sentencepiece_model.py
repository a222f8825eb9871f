"""A tokenizer.model of LLaMA's kind is read without sentencepiece, and means the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from llm.sentencepiece_model import read_sentencepiece
from tests.nextgpt_files import llama_pieces, write_sentencepiece

WORDS = ["\u2581a", "el", "\u2581b", "\u2581bel", "\u2581bell", "ll", "\u2581\u2581", "\u2581", *"abel<s>\n"]
PIECES = llama_pieces(WORDS)
BYTES, FIRST = 3, 259


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return read_sentencepiece(write_sentencepiece(tmp_path_factory.mktemp("spm") / "tokenizer.model", PIECES))


def said(tokenizer: Tokenizer, text: str) -> list[str]:
    pieces: list[str] = tokenizer.encode(text, add_special_tokens=False).tokens
    return pieces


def test_pieces_keep_their_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab() == {name: i for i, (name, _, _) in enumerate(PIECES)}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a bell", ["\u2581a", "\u2581bell"]),
        ("bel", ["\u2581bel"]),
        ("bll", ["\u2581b", "ll"]),
        ("", []),
        (" a", ["\u2581", "\u2581a"]),  # the better piece goes before the first two spaces
        ("  ", ["\u2581\u2581", "\u2581"]),
        ("\na", ["\u2581", "\n", "a"]),
    ],
)
def test_the_best_pair_is_joined_first_behind_a_space_in_front(
    tokenizer: Tokenizer, text: str, pieces: list[str]
) -> None:
    assert said(tokenizer, text) == pieces
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_score_and_not_the_place_says_which_piece_is_better(tmp_path: Path) -> None:
    words = [("ab", -2.0, 1), ("bc", -1.0, 1), *((letter, -9.0, 1) for letter in "abc\u2581")]
    path = write_sentencepiece(tmp_path / "tokenizer.model", [*llama_pieces([]), *words])
    assert said(read_sentencepiece(path), "abc") == ["\u2581", "a", "bc"]


def test_what_has_no_piece_is_written_in_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\u2603", add_special_tokens=False).ids
    assert ids == [FIRST, *(BYTES + byte for byte in "\u2603".encode())]
    assert tokenizer.decode(ids) == "a\u2603"


def test_control_pieces_are_special_and_never_joined_from_letters(tmp_path: Path) -> None:
    joined = [*llama_pieces([*WORDS, "<s", "s>"])]
    tokenizer = read_sentencepiece(write_sentencepiece(tmp_path / "tokenizer.model", joined))
    assert [token.content for token in tokenizer.get_added_tokens_decoder().values()] == [
        "<unk>",
        "<s>",
        "</s>",
    ]
    tokenizer.encode_special_tokens = True
    assert 1 not in tokenizer.encode("<s>", add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": b"\x18\x01\x98\x02\x01"}, "has another model than byte-pair encoding; .* of a LLaMA"),
        ({"trainer": b"\x18\x02"}, "has no bytes for what has no piece"),
        ({"normalizer": b""}, "has white space that is removed"),
        ({"normalizer": b"\x12\x01x\x20\x00"}, "has a map of characters"),
        ({"normalizer": b"\x18\x00\x20\x00"}, "has no space in front of a text"),
        ({"normalizer": b"\x20\x00\x28\x00"}, "has white space that is not escaped"),
        ({"pieces": PIECES[1:]}, "has no piece for what is unknown"),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, changes: dict[str, bytes], message: str) -> None:
    path = write_sentencepiece(tmp_path / "tokenizer.model", **{"pieces": PIECES, **changes})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        read_sentencepiece(path)


@pytest.mark.parametrize("size", [1, 700, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    path = write_sentencepiece(tmp_path / "tokenizer.model", PIECES)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"tokenizer.model is no model of sentencepiece, or is cut off"):
        read_sentencepiece(path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="is no model of sentencepiece"):
        read_sentencepiece(tmp_path / "tokenizer.model")
