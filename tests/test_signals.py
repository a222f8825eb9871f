"""The signal vocabulary."""

from __future__ import annotations

import pytest

from encoders.media import Modality
from llm.signals import SignalVocabulary


def test_the_tokens_are_those_of_nextgpt_in_their_order() -> None:
    tokens = SignalVocabulary().tokens

    assert len(tokens) == 38
    assert tokens[:6] == ("<Img>", "</Img>", "[IMG0]", "[IMG1]", "[IMG2]", "[IMG3]")
    assert (tokens[6], tokens[29], tokens[30], tokens[37]) == ("[VID0]", "[VID23]", "[AUD0]", "[AUD7]")


def test_a_modality_without_tokens_is_left_out() -> None:
    vocabulary = SignalVocabulary(video=0)

    assert vocabulary.modalities == (Modality.IMAGE, Modality.AUDIO)
    assert vocabulary.names(Modality.VIDEO) == vocabulary.names(Modality.TEXT) == ()


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"audio has -1 signal tokens; expected 0 or more"):
        SignalVocabulary(audio=-1)
