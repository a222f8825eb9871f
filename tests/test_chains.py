import random
from dataclasses import replace

import numpy as np
import pytest

from alignment.chains import Chain, OneScene, chain_findings, drift, untouched_difference
from alignment.toybox.directions import make
from alignment.toybox.media import render
from alignment.toybox.world import Clip, Look, Scene, Sound
from encoders.media import Image, Medium

BELL = Look("bell", "red", "medium", 1, "left", "grey")


def drawn(scene: Scene, jitter: str = "one") -> Medium:
    return render(scene, random.Random(jitter))


def test_a_perfect_edit_leaves_everything_else_untouched() -> None:
    for wanted in (replace(BELL, colour="blue"), replace(BELL, place="right"), replace(BELL, ground="sky")):
        apart = untouched_difference(drawn(BELL), drawn(wanted), [BELL, wanted], "one")
        assert apart is not None
        assert apart < 0.01


def test_a_picture_that_is_right_but_another_one_is_told_apart() -> None:
    wanted = replace(BELL, colour="blue")
    kept = untouched_difference(drawn(BELL), drawn(wanted), [BELL, wanted], "one")
    other = untouched_difference(drawn(BELL), drawn(wanted, "two"), [BELL, wanted], "one")
    assert kept is not None
    assert other is not None
    assert other > 2 * kept


def test_only_pixels_that_should_stay_count() -> None:
    wanted = replace(BELL, place="right")
    before = drawn(BELL)
    assert isinstance(before, Image)
    unchanged = untouched_difference(before, before, [BELL, wanted], "one")
    assert unchanged == 0.0  # the bell did not move, but where it was and should be nobody looks


def test_what_was_changed_and_changed_back_is_not_untouched() -> None:
    night = replace(BELL, ground="night")
    lighter = drawn(BELL)
    assert isinstance(lighter, Image)
    ground = np.abs(lighter.pixels.astype(int) - lighter.pixels[0, 0]).max(axis=-1) < 4
    lighter = Image(np.where(ground[..., None], 200, lighter.pixels).astype(np.uint8))

    regained = untouched_difference(drawn(BELL), lighter, [BELL, BELL], "one")
    untouched = untouched_difference(drawn(BELL), lighter, [BELL, night, BELL], "one")

    assert regained is not None
    assert untouched is not None
    assert regained > 0.05
    assert untouched < 0.01  # the bell itself, which no wish named


def test_videos_and_sounds_have_a_drift_of_their_own() -> None:
    clip = Clip("bee", "yellow", "big", "sky", "left", "slow")
    faster = replace(clip, colour="red")
    apart = untouched_difference(drawn(clip), drawn(faster), [clip, faster], "one")
    assert apart is not None
    assert apart < 0.02
    sound = Sound("harp", "middle", 2, "slow", "loud")
    quiet, low = replace(sound, loudness="quiet"), replace(sound, pitch="low")
    tuned = untouched_difference(drawn(sound), drawn(quiet), [sound, quiet], "one")
    assert tuned == pytest.approx(0.0, abs=0.1)
    assert untouched_difference(drawn(sound), drawn(low), [sound, low], "one") is None


def test_wishes_of_a_chain_change_the_scene_that_is_there() -> None:
    rng = random.Random(0)
    for _ in range(20):
        exercise = make("text+image-to-image", rng, OneScene(BELL))
        wanted = exercise.scenes[0]
        assert BELL in exercise.turns[0].parts
        assert isinstance(wanted, Look)
        assert wanted != BELL
        assert wanted.thing == "bell"


def test_a_chain_is_right_when_its_first_five_turns_are() -> None:
    medium = drawn(BELL)
    right = Chain([BELL], "one", medium, medium, right=[True] * 5 + [False] * 5, drift={1: 0.01, 10: 0.03})
    wrong = Chain(
        [BELL], "one", medium, medium, right=[True] * 4 + [False] * 6, drift={1: 0.03}, regained={3: 0.2}
    )
    assert all(finding.right for finding in chain_findings(right).values())
    assert not all(finding.right for finding in chain_findings(wrong).values())
    assert drift([right, wrong]) == {
        "right": {"1": 1.0, "3": 1.0, "5": 0.5, "10": 0.0},
        "untouched": {"1": 0.02, "10": 0.03},
        "regained": {"3": 0.2},
        "unit": "of 1",
    }
