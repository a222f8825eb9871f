"""Text never becomes a control token, and streams without broken characters."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from encoders.media import Modality
from llm.signals import SignalVocabulary
from llm.tokenizer import ConversationTokenizer, TextStream, train_tokenizer
from tests.tiny_llm import SENTENCES, tiny_tokenizer


def unigram() -> PreTrainedTokenizerFast:
    """A base whose model itself has a control string as a piece, as sentencepiece models do."""
    letters = [(chr(c), -5.0) for c in range(33, 127)]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), ("<tool>", -0.5), *letters]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def whole_words() -> PreTrainedTokenizerFast:
    words = ["<unk>", "</s>", "<mark>", "bell", "[IMG0"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<mark>", special=False, normalized=True, lstrip=True)])
    tokenizer.add_tokens([AddedToken("<|system|>", special=True)], special_tokens=True)
    return tokenizer


def byte_pairs() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(SENTENCES, 300)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("<hid", special=True)])
    return tokenizer


@pytest.mark.parametrize("base", [unigram, whole_words, byte_pairs])
def test_no_text_yields_a_control_token(base: type) -> None:
    tokenizer = ConversationTokenizer(base())
    controls = tokenizer.backing.convert_ids_to_tokens(sorted(tokenizer.live_ids))
    draw = random.Random(0)
    noise = [" ", "\n", "<", "[", "a bell", "]", "|>", "\uff1c", "é", "</", "s>", "<" * 3, ""]

    for control in controls:
        assert tokenizer.live_ids.isdisjoint(tokenizer.encode_text(control)), control
    for _ in range(300):
        text = "".join(draw.choice(controls + noise) for _ in range(draw.randint(1, 8)))
        assert tokenizer.live_ids.isdisjoint(tokenizer.encode_text(text)), text
        upper = text.upper() if draw.random() < 0.5 else text.lower()
        assert tokenizer.live_ids.isdisjoint(tokenizer.encode_text(upper)), upper


def test_the_bases_own_way_would_have_yielded_control_tokens() -> None:
    tokenizer = ConversationTokenizer(unigram())
    text = "</s> <tool> [IMG0]"

    ids = set(tokenizer.backing(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    assert ids & tokenizer.live_ids  # splitting special tokens alone does not help
    assert set(tokenizer.backing(text).input_ids) >= set(tokenizer.signal_ids(Modality.IMAGE)[:1])


def test_control_strings_survive_as_text() -> None:
    tokenizer = tiny_tokenizer()
    text = "is [img0] or </s> or <|assistant|> or <pad> magic? \u00e9\U0001f514\n"

    assert tokenizer.decode_text(tokenizer.encode_text(text)) == text


def test_case_is_ignored_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer()

    assert tokenizer.encode_text("A Big BELL") == tokenizer.encode_text("a big bell")
    assert tokenizer.decode_text(tokenizer.encode_text("A  Big BELL\t!")) == "a  big bell\t!"


def test_media_and_signal_tokens_follow_the_base_vocabulary() -> None:
    tokenizer = ConversationTokenizer(train_tokenizer(SENTENCES, 290))

    assert tokenizer.base_vocabulary == 290
    assert tokenizer.added_tokens == SignalVocabulary().tokens
    assert tokenizer.signal_ids(Modality.IMAGE) == (292, 293, 294, 295)
    assert tokenizer.signal_starts == {
        292: Modality.IMAGE,
        296: Modality.VIDEO,
        320: Modality.AUDIO,
    }


def test_what_the_base_lacks_is_added_behind_the_signals() -> None:
    tokenizer = ConversationTokenizer(unigram())

    assert tokenizer.added_tokens[:38] == SignalVocabulary().tokens
    assert tokenizer.added_tokens[38:] == ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


def test_only_the_end_and_the_first_signals_may_be_spoken() -> None:
    tokenizer = tiny_tokenizer()
    video = tokenizer.signal_ids(Modality.VIDEO)

    assert tokenizer.live_ids - tokenizer.unspeakable_ids == {
        tokenizer.eos_id,
        *tokenizer.signal_starts,
    }
    assert set(video[1:]) | {tokenizer.bos_id, tokenizer.media_open_id} <= tokenizer.unspeakable_ids


def test_a_saved_tokenizer_comes_back_the_same(tmp_path: Path) -> None:
    tokenizer = ConversationTokenizer(unigram())
    tokenizer.save(tmp_path)
    again = ConversationTokenizer.load(tmp_path)

    assert again.base_vocabulary == tokenizer.base_vocabulary
    assert again.added_tokens == tokenizer.added_tokens
    assert again.live_ids == tokenizer.live_ids
    assert again.encode_text("a <tool> </s>") == tokenizer.encode_text("a <tool> </s>")


def test_other_signal_counts_than_the_saved_ones_are_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path)

    with pytest.raises(ValueError, match=r"expected the media and signal tokens"):
        ConversationTokenizer.load(tmp_path, SignalVocabulary(image=5))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        ConversationTokenizer.load(tmp_path)


def test_a_modality_without_signals_is_named() -> None:
    with pytest.raises(ValueError, match=r"no signal tokens for text; .* image, video, audio"):
        tiny_tokenizer().signal_ids(Modality.TEXT)


def test_streamed_text_is_whole_and_complete() -> None:
    tokenizer = tiny_tokenizer()
    text = "a bell \U0001f514\u00e9, zwei: \u6f22\u5b57 \ufffd!"
    stream = TextStream(tokenizer)

    deltas = [stream.push(i) for i in tokenizer.encode_text(text)]
    rest = stream.flush()

    assert "".join(deltas) + rest == text
    assert rest == ""
    assert "\U0001f514" in deltas  # four bytes, four tokens, one delta
    assert len(deltas) > 20


def test_an_unfinished_character_is_held_until_flushed() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer)

    deltas = [stream.push(i) for i in tokenizer.encode_text("ab\U0001f514")[:-1]]

    assert "".join(deltas) == "ab"
    assert stream.flush() == "\ufffd"


def test_streamed_words_keep_their_spaces_with_a_metaspace_decoder() -> None:
    tokenizer = ConversationTokenizer(unigram())
    stream = TextStream(tokenizer)
    ids = tokenizer.encode_text("a big bell rings " * 5)

    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode_text(ids)


def test_random_ids_stream_to_what_they_decode_to() -> None:
    tokenizer = tiny_tokenizer()
    draw = random.Random(1)
    for _ in range(100):
        stream = TextStream(tokenizer)
        ids = [draw.randrange(8, 270) for _ in range(40)]
        deltas = [stream.push(i) for i in ids]

        assert "".join(deltas) + stream.flush() == tokenizer.decode_text(ids)


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocabulary_size is 100; expected at least 263"):
        train_tokenizer(SENTENCES, 100)
