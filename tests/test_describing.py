import json
import random
import re
from itertools import combinations

import pytest

from alignment.toybox import describing, world
from alignment.toybox.conversations import conversation
from alignment.toybox.describing import described, thing_name
from alignment.toybox.directions import make
from alignment.toybox.exercise import FreshScenes
from alignment.toybox.grammar import THING_WORDS, describe
from alignment.toybox.phrases import NAMES, Speaker
from alignment.toybox.world import Clip, Look, Scene, Sound

VALUES = {
    "thing": world.THINGS, "things": world.THINGS, "colour": world.COLOURS, "size": world.SIZES,
    "place": world.PLACES, "ground": world.GROUNDS, "motion": world.MOTIONS, "motion clause": world.MOTIONS,
    "tempo": world.TEMPOS, "tempo adjective": world.TEMPOS, "pitch": world.PITCHES,
    "loudness": world.LOUDNESSES, "count": ("1", "2", "3"), "times": ("1", "2", "3"),
}  # fmt: skip
SCENES: tuple[Scene, ...] = (
    Look("bell", "red", "big", 1, "top left", "night"),
    Look("bell", "red", "big", 3, None, "night"),
    Clip("bell", "red", "big", "night", "up", "fast"),
    Sound("bell", "low", 3, "fast", "quiet"),
)


def test_every_value_has_many_names_and_no_two_values_share_one() -> None:
    names = json.loads(NAMES.read_text(encoding="utf-8"))
    assert {attribute: tuple(values) for attribute, values in names.items()} == VALUES
    for values in names.values():
        assert all(len(listed) >= 4 == len({*listed[:4]}) for listed in values.values())
        for one, other in combinations(values.values(), 2):
            assert not {*one} & {*other}


@pytest.mark.parametrize("scene", SCENES, ids=["picture", "several", "clip", "sound"])
def test_training_describes_in_many_ways_and_tests_as_the_grammar_does(scene: Scene) -> None:
    speaker = Speaker(1)
    assert len({described(scene, speaker) for _ in range(300)}) > 240
    speaker.reserved = True
    state = speaker.getstate()
    said = described(scene, speaker)
    speaker.setstate(state)
    assert said == describe(scene, speaker)


def test_what_is_omitted_is_not_said_by_any_name() -> None:
    names = json.loads(NAMES.read_text(encoding="utf-8"))
    speaker = Speaker(2)
    clip = Clip("bell", "red", "big", "night", "up", "fast")
    for _ in range(200):
        said = described(clip, speaker, ("colour", "ground", "motion", "tempo"))
        assert "red" not in said
        assert not any(name in said for name in (*names["ground"]["night"], *names["motion"]["up"]))


def test_the_size_of_what_sounds_says_how_high_it_is_and_its_colour_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(describing, "SEEN_SHARE", 1.0)
    names = json.loads(NAMES.read_text(encoding="utf-8"))
    speaker = Speaker(3)
    for pitch, size in (("high", "small"), ("low", "big")):
        sound = Sound("bell", pitch, 1, "slow", "loud")
        said = [described(sound, speaker, ("count", "tempo", "loudness")) for _ in range(100)]
        sized = [text for text in said if any(f"{name} " in text for name in names["size"][size])]
        assert len(sized) > 50  # the others are plain, in the words of the grammar
        assert not any(re.search(rf"\b{pitch}\b", text) for text in sized)
        assert not any(other in text.split() for text in said for other in ("small", "big") if other != size)


def test_a_thing_is_named_in_the_right_number() -> None:
    names = json.loads(NAMES.read_text(encoding="utf-8"))
    speaker = Speaker(3)
    for thing in world.THINGS:
        assert {thing_name(thing, speaker) for _ in range(60)} <= {
            *names["thing"][thing],
            *THING_WORDS[thing],
        }
        several = {thing_name(thing, speaker, 2) for _ in range(60)}
        assert several <= {*names["things"][thing], *(f"{word}s" for word in THING_WORDS[thing])}


def test_a_picture_whose_sound_was_heard_is_what_goes_on() -> None:
    rng = random.Random(4)
    speaker = Speaker(4)
    found = []
    for _ in range(400):
        exercise = conversation(speaker, FreshScenes(rng))
        made = [part for turn in exercise.turns for part in turn.parts if not isinstance(part, str)]
        if isinstance(made[0], Look) and len(made) > 1 and isinstance(made[1], Sound):
            found.append((made[0], exercise.scenes[0]))
    clips = [(look, last) for look, last in found if isinstance(last, Clip)]
    assert len(found) > 20
    assert len(clips) > 10
    for look, clip in clips:
        assert (clip.thing, clip.colour, clip.size, clip.ground) == (
            look.thing,
            look.colour,
            look.size,
            look.ground,
        )


def test_several_of_one_kind_are_asked_for_in_training_alone() -> None:
    rng = random.Random(5)

    def alike(*, reserved: bool) -> int:
        made = [make("text-to-many", rng, FreshScenes(rng), reserved_wordings=reserved) for _ in range(100)]
        return sum(len({type(scene) for scene in one.scenes}) == 1 for one in made)

    assert alike(reserved=False) > 5
    assert alike(reserved=True) == 0
