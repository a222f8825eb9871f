"""Exercises of several turns, and such as are answered in words alone."""

from __future__ import annotations

from alignment.toybox import changes, talk, wordings
from alignment.toybox.exercise import Exercise, Scenes, Turn, judged, single
from alignment.toybox.grammar import MOTION_PHRASES, THING_WORDS, TYPICAL_COLOUR, caption, describe
from alignment.toybox.phrases import Speaker
from alignment.toybox.requests import (
    asking,
    said,
    shown,
    sound_of,
    typical_look,
    wanted_clip,
    wanted_look,
    wanted_sound,
)
from alignment.toybox.world import MOTIONS, SIZE_OF_PITCH, THINGS, Clip, Look, Scene, Sound


def conversation(rng: Speaker, scenes: Scenes) -> Exercise:
    """Ask for something, for a change of it, and for what follows from that."""
    while True:
        wanted = rng.choice((wanted_look, wanted_look, wanted_clip, wanted_sound))
        scene, request = wanted(rng, scenes)
        turns = [Turn("user", (said(request, rng),)), Turn("assistant", (caption(scene), scene))]
        middle, text = changes.ask_for_change(scene, rng)
        turns += [Turn("user", (said(text, rng),)), Turn("assistant", (caption(middle), middle))]
        last, text, names = _follow_up(middle, rng)
        found = [scene.held_out, middle.held_out, last.held_out]
        if len(set(found)) == 1 or scene.held_out:
            break
    if rng.random() < 0.15:
        turns = [Turn("user", ("hello",)), Turn("assistant", (talk.GREETING,)), *turns]
    return Exercise("", (*turns, Turn("user", (said(text, rng),))), (caption(last), last), (names,))


def new_subject(rng: Speaker, scenes: Scenes) -> Exercise:
    """Ask for something that has nothing to do with what was made before."""
    wanted = (wanted_look, wanted_clip, wanted_sound)
    while True:
        made = [rng.choice(wanted)(rng, scenes) for _ in range(rng.choice((2, 2, 3)))]
        if len({scene.held_out for scene, _ in made}) == 1:
            break
    turns: list[Turn] = []
    for scene, request in made[:-1]:
        turns += [Turn("user", (said(request, rng),)), Turn("assistant", (caption(scene), scene))]
    scene, request = made[-1]
    return single((said(request, rng),), scene, judged(scene), tuple(turns))


def _follow_up(scene: Scene, rng: Speaker) -> tuple[Scene, str, tuple[str, ...]]:
    if rng.random() < 0.5:
        last, text = changes.ask_for_change(scene, rng)
        return last, text, judged(last)
    if isinstance(scene, Sound):
        look = typical_look(scene.thing, SIZE_OF_PITCH[scene.pitch], scene.count)
        return look, rng.say(wordings.NOW_AS_PICTURE_OF_SOUND), ("thing", "size", "count")
    if rng.random() < 0.6:
        sound, names = sound_of(scene)
        return sound, rng.say(wordings.NOW_AS_SOUND), names
    if isinstance(scene, Look):
        clip = Clip(scene.thing, scene.colour, scene.size, scene.ground, rng.choice(MOTIONS), "slow")
        motion = rng.choice(MOTION_PHRASES[clip.motion])
        return clip, rng.say(wordings.NOW_AS_VIDEO).format(motion=motion), judged(clip, ("tempo",))
    look = Look(scene.thing, scene.colour, scene.size, 1, "middle", scene.ground)
    return look, rng.say(wordings.NOW_AS_PICTURE), ("thing", "colour", "size", "ground")


def words_only(rng: Speaker, scenes: Scenes) -> Exercise:
    """Say something to which words are the answer."""
    kind = rng.randrange(5)
    if kind == 4:
        return Exercise("", (Turn("user", (talk.noise(rng),)),), (talk.ELSEWHERE,), ())
    if kind == 0:
        questions, answer = rng.choice(talk.TALK)
        return Exercise("", (Turn("user", (said(rng.say(questions), rng),)),), (answer,), ())
    if kind == 1:
        thing = rng.choice(THINGS)
        word = rng.choice(THING_WORDS[thing])
        text = rng.say(talk.TYPICAL_COLOUR_QUESTIONS).format(thing=word)
        answer = talk.TYPICAL_COLOUR_ANSWER.format(thing=thing, colour=TYPICAL_COLOUR[thing])
        return Exercise("", (Turn("user", (text,)),), (answer,), ())
    scene: Scene = rng.choice((scenes.look, scenes.clip, scenes.sound))()
    if kind == 2:
        made = Turn("assistant", (caption(scene), scene))
        before = (Turn("user", (f"{asking(scene, rng)} {describe(scene, rng)}",)), made)
        question, answer = talk.ask_about(scene, rng)
        return Exercise("", (*before, Turn("user", (question,))), (answer,), ())
    question, answer = talk.ask_about(scene, rng)
    return Exercise("", (Turn("user", shown(rng, question, scene)),), (answer,), ())
