import random
from collections.abc import Sequence

import pytest

from alignment.toybox.exercises import DIRECTIONS, Exercise, FreshScenes, make
from alignment.toybox.grammar import read_text
from alignment.toybox.world import Clip, Look, Sound, attributes


def some(direction: str, number: int = 60, held_out: bool = False) -> Sequence[Exercise]:
    rng = random.Random(f"test-{direction}")
    return [make(direction, rng, FreshScenes(rng, held_out)) for _ in range(number)]


@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_training_never_meets_a_held_out_combination(direction: str) -> None:
    assert not any(exercise.held_out for exercise in some(direction))


@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_what_stands_before_a_medium_is_its_caption(direction: str) -> None:
    for exercise in some(direction):
        for before, scene in zip(exercise.answer, exercise.answer[1:], strict=False):
            if isinstance(before, str) and not isinstance(scene, str):
                read = read_text(before)
                assert {name: read.get(name) for name in attributes(scene)} == attributes(scene)


@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_an_exercise_ends_with_a_person_and_judges_what_the_answer_has(direction: str) -> None:
    for exercise in some(direction):
        assert exercise.turns[-1].role == "user"
        for scene, names in zip(exercise.scenes, exercise.judged, strict=False):
            exact = {"hue", "centre", "fundamental"}
            assert set(names) - exact <= attributes(scene).keys()


def test_big_things_sound_low_and_as_often_as_they_are_many() -> None:
    pitch = {"small": "high", "medium": "middle", "big": "low"}
    for exercise in some("image-to-audio"):
        (look,) = [p for t in exercise.turns for p in t.parts if isinstance(p, Look)]
        (sound,) = exercise.scenes
        assert isinstance(sound, Sound)
        assert (sound.thing, sound.pitch, sound.count) == (look.thing, pitch[look.size], look.count)


def test_an_edit_changes_exactly_what_is_named() -> None:
    for exercise in some("text+video-to-video"):
        (before,) = [p for t in exercise.turns for p in t.parts if isinstance(p, Clip)]
        (after,) = exercise.scenes
        old, new = attributes(before), attributes(after)
        assert sum(old[name] != new[name] for name in old) == 1


def test_an_unknown_direction_is_named_with_the_known_ones() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="direction is 'smell-to-text'; expected one of text-to-image"):
        make("smell-to-text", rng, FreshScenes(rng))


def test_some_requests_leave_things_unsaid_and_the_answer_fills_them_in() -> None:
    texts = [str(exercise.turns[0].parts[0]) for exercise in some("text-to-image", 200)]
    assert any("ground" not in read_text(text) for text in texts)
