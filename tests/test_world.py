import random

import pytest

from alignment.toybox.world import (
    COLOURS,
    SIZES,
    THINGS,
    Clip,
    Look,
    Sound,
    attributes,
    changed,
    looks,
    sample_clip,
    sample_look,
    sample_sound,
)


def test_white_on_white_and_black_on_night_do_not_exist() -> None:
    with pytest.raises(ValueError, match="white on white cannot be seen"):
        Look("bell", "white", "big", 1, "middle", "white")
    with pytest.raises(ValueError, match="black on night cannot be seen"):
        Clip("bell", "black", "big", "night", "still", "slow")


def test_several_things_have_no_place() -> None:
    with pytest.raises(ValueError, match="only a single thing has a place"):
        Look("bell", "red", "big", 2, "middle", "white")
    assert "place" not in attributes(Look("bell", "red", "big", 2, None, "white"))


def test_an_unknown_word_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="thing is 'cat'; expected one of bell, drum"):
        Sound("cat", "high", 1, "slow", "loud")


def test_the_held_out_split_is_the_same_on_every_machine() -> None:
    combinations = list(looks())
    held_out = [c for c in combinations if Look(*c, 1, "top", "sky").held_out]

    assert len(combinations) == len(THINGS) * len(COLOURS) * len(SIZES)
    assert len(held_out) == 29
    assert held_out[:2] == [("bell", "black", "medium"), ("drum", "red", "big")]


@pytest.mark.parametrize("held_out", [False, True])
def test_samples_belong_to_the_split_that_was_asked_for(held_out: bool) -> None:
    rng = random.Random(0)
    for sample in (sample_look, sample_clip, sample_sound):
        assert all(sample(rng, held_out=held_out).held_out is held_out for _ in range(50))


def test_fixed_attributes_are_kept() -> None:
    look = sample_look(random.Random(1), place="top left", ground="night")
    assert (look.place, look.ground, look.count) == ("top left", "night", 1)


def test_a_change_that_cannot_be_seen_is_no_scene() -> None:
    look = Look("bell", "white", "big", 1, "middle", "grey")
    assert changed(look, ground="white") is None
    assert changed(look, ground="sky") == Look("bell", "white", "big", 1, "middle", "sky")
