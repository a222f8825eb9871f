"""The layout of conversations, the same for training and for generation."""

from __future__ import annotations

import pytest
import torch

from encoders.media import Modality
from llm.template import Dialogue, Given, MediaTokens, Message, Row, SignalPart, encode_dialogue
from tests.tiny_llm import assistant, medium, tiny_tokenizer, user

IMAGE, AUDIO = Modality.IMAGE, Modality.AUDIO


def names(row: Row) -> list[str]:
    """Control tokens by name, media slots as '_', text as itself."""
    tokenizer = tiny_tokenizer()
    out: list[str] = []
    for i in row.ids:
        live = i in tokenizer.live_ids
        name = tokenizer.backing.convert_ids_to_tokens(i) if live else tokenizer.decode_text([i])
        out.append("_" if i == tokenizer.pad_id else name)
    return out


def laid_out(dialogue: Dialogue, **options: object) -> Row:
    return encode_dialogue(dialogue, tiny_tokenizer(), lambda media: 2, **options)  # type: ignore[arg-type]


def test_the_layout_is_exactly_this() -> None:
    row = laid_out(
        [
            Message("system", ["be"]),
            user("a", medium(IMAGE), "b"),
            assistant("c", SignalPart(IMAGE), "d"),
            user("e"),
        ],
        open_reply=True,
    )

    assert "".join(names(row)) == (
        "<s><|system|>be<|end|><|user|>a<Img>__</Img>b<|end|>"
        "<|assistant|>c[IMG0][IMG1][IMG2][IMG3]d</s><|user|>e<|end|><|assistant|>"
    )


def test_given_words_stand_where_others_would_and_are_not_learnt() -> None:
    row = laid_out([user("a"), assistant("b", Given(" c"), " d", SignalPart(IMAGE))])
    plain = laid_out([user("a"), assistant("b c d", SignalPart(IMAGE))])

    assert row.ids == plain.ids
    assert row.signals[0].caption == "b c d"
    hidden = [
        name for name, learnt, usual in zip(names(row), row.trained, plain.trained, strict=True)
        if usual and not learnt
    ]  # fmt: skip
    assert "".join(hidden).strip() == "c"


def test_only_the_assistant_has_given_words() -> None:
    with pytest.raises(ValueError, match="A user message holds a Given; only the assistant's may"):
        user("a", Given("b"))


def test_the_model_learns_its_words_its_choices_and_its_end() -> None:
    row = laid_out([user("a", medium(IMAGE)), assistant("c", SignalPart(IMAGE), "d")])
    learnt = [name for name, trained in zip(names(row), row.trained, strict=True) if trained]

    assert learnt == ["c", "[IMG0]", "d", "</s>"]


def test_loss_on_the_last_reply_leaves_earlier_ones_out() -> None:
    row = laid_out([user("a"), assistant("b"), user("c"), assistant("d")], loss_on="last_assistant")
    learnt = [name for name, trained in zip(names(row), row.trained, strict=True) if trained]

    assert learnt == ["d", "</s>"]


def test_loss_on_all_covers_every_word() -> None:
    row = laid_out([user("a", medium(IMAGE)), assistant("b", SignalPart(IMAGE))], loss_on="all")
    learnt = [name for name, trained in zip(names(row), row.trained, strict=True) if trained]

    assert learnt == ["a", "<|end|>", "b", "[IMG0]", "</s>"]


def test_slots_and_blocks_are_where_they_are_said_to_be() -> None:
    row = laid_out([user("a", medium(IMAGE), "b"), assistant("c", SignalPart(AUDIO), SignalPart(IMAGE))])
    tokenizer = tiny_tokenizer()

    (slot,) = row.media
    assert row.ids[slot.start - 1] == tokenizer.media_open_id
    assert row.ids[slot.start + slot.length] == tokenizer.media_close_id
    assert slot.prompt_ids == tokenizer.encode_text("ab"[0]) + tokenizer.encode_text("b")
    for span in row.signals:
        block = tokenizer.signal_ids(span.modality)
        assert tuple(row.ids[span.start : span.start + len(block)]) == block


def test_a_caption_is_the_text_since_the_previous_medium() -> None:
    row = laid_out(
        [
            user("draw"),
            assistant(
                " A bell ", "here.", SignalPart(IMAGE), " its Sound", SignalPart(AUDIO), SignalPart(IMAGE)
            ),
            user("more"),
            assistant("again", SignalPart(IMAGE)),
        ]
    )

    assert [span.caption for span in row.signals] == ["a bell here.", "its sound", "", "again"]


def test_a_medium_in_a_reply_starts_a_new_caption() -> None:
    row = laid_out([Message("assistant", ["old", medium(IMAGE), "new", SignalPart(IMAGE)])])

    assert row.signals[0].caption == "new"


def test_how_a_text_is_cut_into_parts_does_not_matter() -> None:
    assert laid_out([user("draw a be", "ll")]).ids == laid_out([user("draw a bell")]).ids


def test_an_empty_dialogue_is_refused_in_training() -> None:
    with pytest.raises(ValueError, match=r"dialogue is empty"):
        laid_out([])


def test_a_user_cannot_hold_a_signal() -> None:
    with pytest.raises(ValueError, match=r"A user message holds a SignalPart"):
        Message("user", [SignalPart(IMAGE)])


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(ValueError, match=r"role is 'human'; expected one of system, user, assistant"):
        Message("human", ["hello"])


@pytest.mark.parametrize("shape", [(5,), (0, 5), (1, 2, 5)])
def test_media_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image tokens have shape .*; expected \(n, width\)"):
        MediaTokens(IMAGE, torch.zeros(shape))
