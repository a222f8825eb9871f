"""Exercises of several turns, and such as are answered in words alone."""

from __future__ import annotations

from alignment.toybox import changes, talk, wordings
from alignment.toybox.exercise import Exercise, Scenes, Turn, judged, single
from alignment.toybox.grammar import MOTION_PHRASES, THING_WORDS, TYPICAL_COLOUR, caption, describe
from alignment.toybox.phrases import Speaker
from alignment.toybox.requests import (
    asking,
    asking_for_unknown,
    asking_what,
    said,
    shown,
    sound_of,
    typical_look,
    wanted_clip,
    wanted_look,
    wanted_sound,
)
from alignment.toybox.world import MOTIONS, SIZE_OF_PITCH, THINGS, Clip, Look, Scene, Sound

ASIDE_SHARE = 0.1
"""Of the replies in a conversation, how many somebody thanks for, or says something else to."""

_WORDS_ALONE = (
    "talk", "talk", "talk", "typical colour", "noise", "unknown", "unknown",
    "about shown", "about made", "about made", "about made", "what was made", "what was made",
)  # fmt: skip


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
    turns = _with_asides(turns, rng)
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
    return single((said(request, rng),), scene, judged(scene), tuple(_with_asides(turns, rng)))


def _follow_up(scene: Scene, rng: Speaker) -> tuple[Scene, str, tuple[str, ...]]:
    if rng.random() < 0.08:
        return scene, rng.say(wordings.ONCE_MORE), judged(scene)
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
    """Say something to which words are the answer, first thing or after requests."""
    kind = rng.choice(_WORDS_ALONE)
    if kind == "about shown":
        scene: Scene = rng.choice((scenes.look, scenes.clip, scenes.sound))()
        question, answer = talk.ask_about(scene, rng)
        return Exercise("", (Turn("user", shown(rng, question, scene)),), (answer,), ())
    before = _talk_so_far(rng, scenes, at_least=1 if kind in ("about made", "what was made") else 0)
    made = [part for turn in before for part in turn.parts if not isinstance(part, str)]
    if kind == "about made":
        text, answer = talk.ask_about(made[-1], rng)
    elif kind == "what was made":
        text, answer = asking_what(rng, made[-1]), caption(made[-1])
    elif kind == "typical colour":
        thing = rng.choice(THINGS)
        word = rng.choice(THING_WORDS[thing])
        text = rng.say(talk.TYPICAL_COLOUR_QUESTIONS).format(thing=word)
        answer = talk.TYPICAL_COLOUR_ANSWER.format(thing=thing, colour=TYPICAL_COLOUR[thing])
    elif kind == "noise":
        text, answer = talk.noise(rng), talk.ELSEWHERE
    elif kind == "unknown":
        text, answer = said(asking_for_unknown(rng, scenes), rng), talk.ELSEWHERE
    else:
        text, answer = _small_talk(rng)
    return Exercise("", (*before, Turn("user", (text,))), (answer,), ())


def _small_talk(rng: Speaker) -> tuple[str, str]:
    questions, answer = rng.choice(talk.TALK)
    return said(rng.say(questions), rng), answer


def _talk_so_far(rng: Speaker, scenes: Scenes, at_least: int) -> list[Turn]:
    """Return some requests, said in every detail or one out of the other, and the replies to them."""
    if rng.random() < 0.4:
        held = conversation(rng, scenes)
        return [*held.turns, Turn("assistant", held.answer)]
    turns: list[Turn] = []
    for _ in range(rng.choice((at_least, 1, 1, 2))):
        scene: Scene = rng.choice((scenes.look, scenes.clip, scenes.sound))()
        request = f"{asking(scene, rng)} {describe(scene, rng)}"
        turns += [Turn("user", (said(request, rng),)), Turn("assistant", (caption(scene), scene))]
    return _with_asides(turns, rng)


def _with_asides(turns: list[Turn], rng: Speaker) -> list[Turn]:
    """Return turns with thanks and the like, and their answers, after some of the replies."""
    found: list[Turn] = []
    for turn in turns:
        found.append(turn)
        if turn.role == "assistant" and rng.random() < ASIDE_SHARE:
            words, answer = _small_talk(rng)
            found += [Turn("user", (words,)), Turn("assistant", (answer,))]
    return found
