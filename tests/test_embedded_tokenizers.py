from pathlib import Path

import pytest

from alignment.embedded import captions, language
from alignment.embedded.contrastive import kept_tokens


def test_a_caption_tokenizer_is_trained_once(tmp_path: Path) -> None:
    first = captions.kept_tokenizer("look", tmp_path / "look")
    again = captions.kept_tokenizer("look", tmp_path / "look")
    text = "3 tiny red bells at the top left on a white background"
    assert again(text).input_ids == first(text).input_ids
    assert again.get_vocab() == first.get_vocab()
    assert again.model_max_length == captions.CAPTION_TOKENS


@pytest.mark.parametrize("kind", ["look", "sound"])
def test_a_caption_tokenizer_that_is_trained_again_gives_the_same_ids(kind: captions.Kind) -> None:
    first, again = captions.train_tokenizer(kind), captions.train_tokenizer(kind)
    assert again.get_vocab() == first.get_vocab()
    text = "3 tiny red bells at the top left on a white background"
    assert again(text).input_ids == first(text).input_ids
    assert len(first(text).input_ids) < len(text)  # merges still apply


def test_the_language_tokenizer_is_learnt_once(tmp_path: Path) -> None:
    first = language.kept_tokenizer(tmp_path / "llm")
    again = language.kept_tokenizer(tmp_path / "llm")
    text = "draw a big red bell [IMG0]"
    assert again.encode_text(text) == first.encode_text(text)
    assert again.base_vocabulary == first.base_vocabulary


def test_the_encoders_vocabulary_is_learnt_once(tmp_path: Path) -> None:
    first, again = kept_tokens(tmp_path), kept_tokens(tmp_path)
    assert (first(["a low drum"]) == again(["a low drum"])).all()


def test_the_encoders_vocabulary_that_is_learnt_again_has_the_same_ids(tmp_path: Path) -> None:
    first, again = kept_tokens(tmp_path / "one"), kept_tokens(tmp_path / "other")
    text = ["3 tiny red bells at the top left on a white background", "a low drum"]
    assert (first(text) == again(text)).all()
