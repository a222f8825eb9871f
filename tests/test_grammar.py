import random

import pytest

from alignment.toybox.grammar import caption, describe, phrase, read_text, with_typos
from alignment.toybox.world import (
    Clip,
    Look,
    Sound,
    attributes,
    sample_clip,
    sample_look,
    sample_sound,
)


def test_each_kind_of_scene_has_one_plain_caption() -> None:
    assert (
        caption(Look("bell", "red", "big", 1, "top left", "white"))
        == "a big red bell at the top left on white"
    )
    assert (
        caption(Look("rain cloud", "blue", "small", 3, None, "night"))
        == "three small blue rain clouds at night"
    )
    assert caption(Clip("bird", "green", "medium", "sky", "up", "fast")) == (
        "a medium green bird moving up fast in the sky"
    )
    assert caption(Sound("drum", "low", 2, "slow", "quiet")) == "a low drum sounding twice, slow and quiet"


@pytest.mark.parametrize("sample", [sample_look, sample_clip, sample_sound])
def test_every_wording_states_the_scene_and_nothing_else(sample) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(7)
    for _ in range(300):
        scene = sample(rng)
        for text in (caption(scene), describe(scene, rng)):
            read = read_text(text)
            assert {name: read.get(name) for name in attributes(scene)} == attributes(scene), text


def test_what_is_omitted_is_not_said() -> None:
    rng = random.Random(3)
    for _ in range(50):
        look = sample_look(rng, count=1)
        read = read_text(describe(look, rng, omit=("colour", "ground", "place")))
        assert not {"colour", "ground", "place"} & read.keys()
        assert (read["thing"], read["size"]) == (look.thing, look.size)


def test_wordings_are_many() -> None:
    rng = random.Random(5)
    look = Look("phone", "purple", "big", 1, "left", "grey")
    assert len({describe(look, rng) for _ in range(300)}) > 100


def test_a_phrase_states_its_attribute_alone() -> None:
    rng = random.Random(2)
    assert read_text(phrase("colour", "blue", rng)) == {"colour": "blue", "count": 1}
    assert read_text(phrase("count", 3, rng, heard=True)) == {"count": 3}


def test_a_typo_swaps_two_letters_of_one_word() -> None:
    text = "draw a purple telephone"
    changed = with_typos(text, random.Random(0))
    assert changed != text
    assert sorted(changed) == sorted(text)
