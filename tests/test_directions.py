import json
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from alignment.toybox import changes, directions, requests, talk, wordings
from alignment.toybox.directions import DIRECTIONS, make
from alignment.toybox.exercise import Exercise, FreshScenes
from alignment.toybox.grammar import PLURALS, THING_WORDS, caption, read_text
from alignment.toybox.phrases import NAMES, PHRASE_BOOK, TYPED_SHARE, Phrases, Speaker, spelled_out, ways
from alignment.toybox.requests import wanted_clip, wanted_list, wanted_look, wanted_sound
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


def test_a_copy_is_wanted_of_the_newest_medium_of_its_kind_where_the_very_same_is_asked_for() -> None:
    conversations = some("conversation", 400)
    copied = [exercise for exercise in (*some("beyond-words"), *conversations) if exercise.copied]
    for exercise in copied:
        (scene,) = exercise.scenes
        parts = [part for turn in exercise.turns for part in turn.parts if type(part) is type(scene)]
        assert parts[-1] == scene
    assert all(exercise.copied for exercise in some("beyond-words"))
    assert 0 < sum(exercise.copied for exercise in conversations) < len(conversations) // 5
    assert not any(exercise.copied for exercise in some("text+image-to-image"))


def test_several_media_may_be_listed_after_one_verb() -> None:
    rng, scenes = Speaker(5), FreshScenes(random.Random(5))

    for draws in ([scenes.look] * 3, [scenes.look, scenes.sound], [scenes.clip, scenes.clip]):
        made, text = wanted_list(rng, draws)

        assert [type(scene) for scene in made] == [type(draw()) for draw in draws]
        assert not text.startswith(" ")
        assert "  " not in text
        for scene in made:
            assert any(word in text for word in _names_of(scene.thing)), text


def _names_of(thing: str) -> set[str]:
    listed = json.loads(NAMES.read_text())
    return {
        thing,
        *THING_WORDS[thing],
        *(PLURALS[word] for word in THING_WORDS[thing]),
        *listed["thing"][thing],
        *listed["things"][thing],
    }


def test_something_and_its_sound_may_stand_beside_another_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "ANOTHER_SHARE", 1.0)
    rng = Speaker(11)
    places = set()
    for _ in range(200):
        exercise = directions._and_its_sound(rng, FreshScenes(rng))
        assert len(exercise.scenes) == len(exercise.judged) == 3
        at = next(
            place
            for place, (shown, sound) in enumerate(pairwise(exercise.scenes))
            if not isinstance(shown, Sound) and isinstance(sound, Sound) and shown.thing == sound.thing
        )
        places.add(at)
    assert places == {0, 1}


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


def every_kind_of_phrase() -> list[Phrases]:
    kinds = [value for value in (vars(wordings) | vars(talk)).values() if isinstance(value, Phrases)]
    for table in (wordings.WISHES, wordings.SOUND_VERBS, changes.CHANGES, talk.QUESTIONS):
        kinds += table.values()
    return [*kinds, *(questions for questions, _ in talk.TALK)]


def test_every_kind_of_phrase_keeps_some_for_tests_alone() -> None:
    kinds = every_kind_of_phrase()
    assert len(kinds) > 40
    for phrases in kinds:
        assert phrases.reserved, phrases
        assert not set(phrases.training) & (set(phrases.reserved) - {""}), phrases


def test_bigger_and_louder_ask_for_the_next_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "VERB_SHARE_IN_TRAINING", 0)  # "that came out louder than it should have"
    steps = {
        "bigger": ("size", 1),
        "smaller": ("size", -1),
        "deeper": ("pitch", -1),
        "louder": ("loudness", 1),
    }
    speaker = Speaker(3)
    met = set()
    for _ in range(3000):
        scene = speaker.choice((FreshScenes(speaker).look, FreshScenes(speaker).sound))()
        goal, said = changes.ask_for_change(scene, speaker)
        for word, (name, step) in steps.items():
            if word in said.split():
                order = changes.STEP_WORDS[name][0]
                assert order.index(getattr(goal, name)) - order.index(getattr(scene, name)) == step, said
                met.add(word)
    assert met == set(steps)


VERBS = {
    "faster": ("tempo", "fast"),
    "slower": ("tempo", "slow"),
    "bigger": ("size", 1),
    "smaller": ("size", -1),
    "louder": ("loudness", 1),
    "quieter": ("loudness", -1),
    "higher": ("pitch", 1),
    "lower": ("pitch", -1),
    "once": ("count", 1),
    "middle": ("place", "middle"),
    **{ground: ("ground", ground) for ground in ("white", "sky", "night")},
    **{motion: ("motion", motion) for motion in ("still", "left", "right", "up", "down")},
}


@pytest.mark.parametrize("reserved", [False, True])
def test_a_verb_of_its_own_asks_for_what_it_says(reserved: bool) -> None:
    speaker = Speaker(4)
    speaker.reserved = reserved
    scenes = FreshScenes(speaker)
    keys: dict[str, set[str]] = {}
    for verb in VERBS:
        phrases = changes.CHANGES[f"verb: {verb}"]
        for phrase in phrases.reserved if reserved else phrases.typed:
            keys.setdefault(phrase, set()).add(verb)
    met = set()
    for _ in range(6000):
        scene = speaker.choice((scenes.look, scenes.clip, scenes.sound))()
        goal, said = changes.ask_for_change(scene, speaker)
        wanted = [VERBS[verb] for verb in keys.get(said, ())]
        if not wanted:
            continue
        (changed,) = {name for name in attributes(scene) if attributes(scene)[name] != attributes(goal)[name]}
        value = getattr(goal, changed)
        order = changes.STEP_WORDS[changed][0] if changed in changes.STEP_WORDS else (value,)
        step = order.index(value) - order.index(getattr(scene, changed)) if len(order) > 1 else 0
        assert (changed, step or value) in wanted, said
        met |= keys[said]
    assert met == set(VERBS)


def test_what_moves_may_be_wished_for_without_a_word_for_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MOVING_SHARE", 1.0)
    monkeypatch.setattr(wordings, "MOVING_WISH", Phrases((), ("behold",), ("lo",)))
    speaker, still = Speaker(6), set()
    for _ in range(600):
        scene, text = wanted_clip(speaker, FreshScenes(speaker))
        assert isinstance(scene, Clip)
        if not text.startswith("behold "):
            still.add(scene.motion)
            continue
        assert scene.motion != "still", text
    assert "still" in still


def test_a_sound_may_be_asked_for_with_the_verb_that_goes_with_its_thing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requests, "SOUND_VERB_SHARE", 1.0)
    speaker = Speaker(7)
    for _ in range(300):
        scene, text = wanted_sound(speaker, FreshScenes(speaker))
        verbs = wordings.SOUND_VERBS[scene.thing].training
        assert text.startswith(tuple(f"{verb} " for verb in verbs)), text


def test_words_that_add_nothing_stand_around_requests_and_not_around_talk() -> None:
    speaker = Speaker(8)
    before, after = wordings.FILLER_BEFORE.typed, wordings.FILLER_AFTER.typed

    def share(filled: float) -> float:
        texts = [requests.said("draw a bell", speaker, filled) for _ in range(1000)]
        return sum(text.startswith(before) or text.endswith(after) for text in texts) / len(texts)

    assert share(1.0) > 0.8  # typos hit the others
    by_chance = share(0.0)  # endings that are polite may be the same words
    assert by_chance < 0.1
    assert share(requests.FILLER_SHARE) - by_chance == pytest.approx(requests.FILLER_SHARE, abs=0.05)


def test_patterns_spell_out_all_their_ways() -> None:
    assert spelled_out("(draw|draw|paint)( me|)") == [
        "draw me",
        "draw",
        "draw me",
        "draw",
        "paint me",
        "paint",
    ]
    assert spelled_out("show") == ["show"]


def test_what_is_reserved_is_not_said_in_training_whatever_spells_it_out() -> None:
    first = wordings.DRAW.reserved[0]
    phrases = ways("draw", f"({first}|show)")
    assert phrases.spelled == ("show",)
    assert phrases.typed == wordings.DRAW.typed
    assert phrases.reserved == wordings.DRAW.reserved


def test_the_phrase_book_has_what_is_used_and_nothing_else() -> None:
    book = json.loads(PHRASE_BOOK.read_text(encoding="utf-8"))
    reserved = [tuple(kinds["reserved"]) for kinds in book.values()]
    assert sorted(reserved) == sorted(phrases.reserved for phrases in every_kind_of_phrase())


def test_what_people_type_is_said_in_training_as_often_as_it_should_be() -> None:
    speaker = Speaker(0)
    typed = set(wordings.WHAT_IS_SEEN.typed) - set(wordings.WHAT_IS_SEEN.spelled)
    share = sum(speaker.say(wordings.WHAT_IS_SEEN) in typed for _ in range(2000)) / 2000
    assert share == pytest.approx(TYPED_SHARE, abs=0.05)


@pytest.mark.parametrize("direction", ["image-to-audio", "text+image-to-image", "conversation", "decision"])
def test_training_and_tests_ask_in_different_words(direction: str) -> None:
    def asked(*, reserved: bool) -> set[str]:
        rng = random.Random(f"words-{direction}")
        made = [make(direction, rng, FreshScenes(rng), reserved_wordings=reserved) for _ in range(400)]
        return {str(part) for exercise in made for part in exercise.turns[-1].parts if isinstance(part, str)}

    assert not asked(reserved=False) & asked(reserved=True)


def test_a_new_subject_owes_nothing_to_what_came_before() -> None:
    for exercise in some("new-subject"):
        read = read_text(str(exercise.turns[-1].parts[0]))
        if "thing" in read:  # a typo may have hit its name
            assert read["thing"] == exercise.scenes[0].thing


def test_some_requests_leave_things_unsaid_and_the_answer_fills_them_in() -> None:
    texts = [str(exercise.turns[0].parts[0]) for exercise in some("text-to-image", 200)]
    assert any("ground" not in read_text(text) for text in texts)


def test_a_picture_may_be_asked_for_by_what_is_on_it_alone_if_it_comes_first() -> None:
    """Elsewhere a bare noun would belong to the request before it: "play a bell and a red frog"."""

    def bare(first: bool) -> list[tuple[Look, str]]:
        rng = Speaker(0)
        made = [wanted_look(rng, FreshScenes(rng), first=first) for _ in range(2500)]
        nouns = [(scene, text) for scene, text in made if len(text.split()) <= 2]
        return [(scene, text) for scene, text in nouns if isinstance(scene, Look)]

    assert len(bare(first=True)) >= 20
    assert not bare(first=False)
    for scene, text in bare(first=True):
        assert read_text(text)["thing"] == scene.thing
    assert any(" " not in text for _, text in bare(first=True))


def test_what_was_made_is_told_in_its_caption_or_in_one_word_of_it() -> None:
    asked = [e for e in some("talk", 1200) if len(e.turns) > 1 and e.turns[-2].role == "assistant"]
    told = [(e, scene) for e in asked for scene in e.turns[-2].parts[-1:] if not isinstance(scene, str)]
    captions = [e for e, scene in told if e.answer == (caption(scene),)]

    assert len(captions) > 20
    for exercise, scene in told:
        (answer,) = exercise.answer
        assert isinstance(answer, str)
        if answer.startswith("it is a "):
            assert answer.removeprefix("it is a ") == scene.thing


def test_noise_is_no_request_and_is_answered_in_words() -> None:
    rng = Speaker(0)
    typed = [talk.noise(rng) for _ in range(300)]

    assert len(set(typed)) > 250
    assert not any(word in text.split() for text in typed for word in ("draw", "play", "film", "hello"))
    assert any(text.startswith("[") and "][" in text for text in typed)
    rng.reserved = True
    own = [talk.noise(rng) for _ in range(300)]
    assert all(any(tag in text for tag in talk.OWN_TAGS) for text in own)
    assert not set(own) & set(typed)
    said = [make("talk", random.Random(i), FreshScenes(random.Random(i))) for i in range(600)]
    answered = [exercise for exercise in said if exercise.answer == (talk.ELSEWHERE,)]
    assert any(str(exercise.turns[-1].parts[0])[0] in "[<{" for exercise in answered)
    assert not any(exercise.scenes for exercise in answered)


def test_talk_about_other_things_comes_at_any_time_and_is_answered_in_words() -> None:
    answers = {answer for _, answer in talk.TALK} | {talk.ELSEWHERE}
    met = [exercise for exercise in some("talk", 400) if exercise.answer[0] in answers]
    after_media = [exercise for exercise in met if len(exercise.turns) > 1]

    assert len(after_media) > len(met) / 3
    assert not any(exercise.scenes for exercise in met)
    for exercise in after_media:
        roles = [turn.role for turn in exercise.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert any(not isinstance(part, str) for turn in exercise.turns for part in turn.parts)


def test_thanks_in_between_leave_a_conversation_about_what_it_was() -> None:
    answers = {answer for _, answer in talk.TALK} - {talk.GREETING}
    with_asides = [
        exercise
        for exercise in some("conversation", 300)
        if any(part in answers for turn in exercise.turns for part in turn.parts)
    ]
    assert 20 < len(with_asides) < 120
    for exercise in with_asides:
        made = [part for turn in exercise.turns for part in turn.parts if not isinstance(part, str)]
        assert [scene.thing for scene in (*made, *exercise.scenes)].count(made[0].thing) >= 2
