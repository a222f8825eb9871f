import random
from dataclasses import replace

import pytest
import torch

from alignment.phrasings import WORDINGS, after_other_talk, as_array, mean_cosine, wordings_of
from alignment.toybox.directions import make
from alignment.toybox.exercise import FreshScenes
from alignment.toybox.media import render
from alignment.toybox.world import Clip, Look, Scene, Sound

SCENES: dict[str, Scene] = {
    "text-to-image": Look("frog", "purple", "small", 1, "top left", "night"),
    "text-to-video": Clip("frog", "purple", "small", "night", "up", "fast"),
    "text-to-audio": Sound("frog", "high", 3, "fast", "quiet"),
}


@pytest.mark.parametrize("direction", list(SCENES))
def test_ten_wordings_ask_for_one_scene_in_ten_ways(direction: str) -> None:
    exercises = wordings_of(direction, SCENES[direction], random.Random(0))
    assert len(exercises) == WORDINGS
    assert {exercise.scenes for exercise in exercises} == {(SCENES[direction],)}
    assert len({str(exercise.turns[-1].parts) for exercise in exercises}) == WORDINGS


def test_other_talk_comes_before_the_same_request() -> None:
    rng = random.Random(1)
    exercise = make("text-to-image", rng, FreshScenes(rng))
    distracted = after_other_talk(exercise, rng)
    assert distracted.turns[-1] == exercise.turns[-1]
    assert len(distracted.turns) in (3, 5)
    assert [turn.role for turn in distracted.turns[:2]] == ["user", "assistant"]
    assert replace(distracted, turns=exercise.turns) == exercise


def test_the_mean_cosine_is_over_pairs_of_different_conditions() -> None:
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert mean_cosine([east, east]) == pytest.approx(1.0)
    assert mean_cosine([east, north]) == pytest.approx(0.0)
    assert mean_cosine([east, east, north]) == pytest.approx(1 / 3)
    assert mean_cosine([east]) is None


@pytest.mark.parametrize("direction", list(SCENES))
def test_media_are_compared_on_a_scale_of_about_one(direction: str) -> None:
    array = as_array(render(SCENES[direction], random.Random(0)))
    assert 0.1 < array.max() - array.min() <= 1.5
