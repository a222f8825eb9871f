import math
import random

import pytest
import torch

from alignment.decision import (
    MEDIA,
    Decided,
    asking_figures,
    calibrate,
    calibration_error,
    decision_figures,
    malformed_signals,
    media_probabilities,
)
from encoders.media import Modality
from llm.generate import Finished, generate
from llm.template import Message
from tests.tiny_llm import tiny_model, tiny_tokenizer

IMAGE, VIDEO, AUDIO = MEDIA


def decided(wanted: tuple[Modality, ...], made: tuple[Modality, ...], sure: float = 0.99) -> Decided:
    return Decided(wanted, made, {m: sure if m in made else 1 - sure for m in MEDIA}, 0)


@torch.no_grad()
def test_the_probability_of_a_medium_adds_up_over_the_places_where_it_could_have_begun() -> None:
    model = tiny_model().eval()
    heard = [Message("user", ["draw a bell"])]
    *_, end = generate(model, heard)
    assert isinstance(end, Finished)
    ids = end.ids[:6]
    tokenizer = model.tokenizer
    found = media_probabilities(model, heard, ids)

    row = model.encode(heard, open_reply=True)
    for modality in MEDIA:
        first = tokenizer.signal_ids(modality)[0]
        passed = 1.0
        for place, token in enumerate(ids):  # one prompt at a time, without any batch
            if token in tokenizer.unspeakable_ids:
                continue
            hidden = model.run(model.embed(torch.tensor([row.ids + list(ids[:place])])))[0, -1:]
            logits = model.logits(hidden)[0]
            logits[list(tokenizer.unspeakable_ids)] = float("-inf")
            passed *= 1 - logits.softmax(dim=0)[first].item()
            if token == first:
                break
        assert found[modality] == pytest.approx(1 - passed, abs=1e-5)
    assert media_probabilities(model, heard, ()) == dict.fromkeys(MEDIA, 0.0)


def test_broken_and_stray_signal_tokens_are_counted() -> None:
    tokenizer = tiny_tokenizer()
    words, block = tokenizer.encode_text("a bell"), list(tokenizer.signal_ids(IMAGE))
    assert malformed_signals(tokenizer, [*words, *block, tokenizer.eos_id]) == 0
    assert malformed_signals(tokenizer, [*block, *block]) == 0
    assert malformed_signals(tokenizer, [*words, *block[1:]]) == len(block) - 1
    assert malformed_signals(tokenizer, [block[0], *words]) == 1


def test_the_calibration_error_is_what_sureness_promises_less_what_it_keeps() -> None:
    assert calibration_error([0.9] * 10, [True] * 9 + [False]) == pytest.approx(0.0)
    assert calibration_error([0.9] * 10, [True] * 5 + [False] * 5) == pytest.approx(0.4)
    assert calibration_error([0.95, 0.05], [False, True]) == pytest.approx(0.95)


def test_calibration_takes_back_what_is_too_sure() -> None:
    rng = random.Random(0)

    def too_sure(number: int) -> list[Decided]:
        """Replies that are right four times in five and say that they are right 99 times in 100."""
        made = []
        for _ in range(number):
            truth = rng.random() < 0.5
            said = truth if rng.random() < 0.8 else not truth
            made.append(decided((IMAGE,) if truth else (), (IMAGE,) if said else ()))
        return made

    figures = decision_figures(too_sure(400), too_sure(400))
    assert figures["ece"]["image"] == pytest.approx(0.19, abs=0.04)
    assert figures["ece_calibrated"]["image"] < 0.05


def test_calibration_leaves_good_probabilities_as_they_are() -> None:
    good = [decided((IMAGE,), (IMAGE,), 0.9)] * 9 + [decided((), (IMAGE,), 0.9)]
    line = calibrate(good * 20, IMAGE)
    assert line(0.9) == pytest.approx(0.9, abs=0.02)


def test_asking_is_counted_with_what_it_catches() -> None:
    replies: list[tuple[tuple[float, ...], bool]] = [
        ((0.995,), True), ((0.9999, 0.5), True), ((0.9994,), False), ((0.9999,), False), ((), True)
    ]  # fmt: skip
    figures = asking_figures([sure for sure, _ in replies], [wrong for _, wrong in replies])
    assert (figures["n"], figures["wrong"]) == (5, 3)
    assert figures["asked"] == {"0.99": 1, "0.999": 2, "0.9995": 3, "0.9998": 3, "0.9999": 3}
    assert figures["caught"] == {"0.99": 1, "0.999": 2, "0.9995": 2, "0.9998": 2, "0.9999": 2}


def test_figures_count_hits_and_false_media() -> None:
    sure = [decided((IMAGE,), (IMAGE,))] * 6 + [decided((AUDIO, VIDEO), (AUDIO, VIDEO))] * 2
    talk = [decided((), ())] * 3
    wrong = [decided((), (IMAGE,), 0.7)]
    figures = decision_figures([*sure, *talk, *wrong], [*sure, *talk] * 5)
    assert figures["f1"]["image"] == pytest.approx(12 / 13, abs=1e-4)
    assert (figures["f1"]["video"], figures["f1"]["audio"]) == (1.0, 1.0)
    assert figures["macro_f1"] == pytest.approx((2 + 12 / 13) / 3, abs=1e-4)
    assert figures["false_generation"] == 0.25
    assert figures["malformed"] == 0
    assert not any(math.isnan(value) for value in figures["ece"].values())
