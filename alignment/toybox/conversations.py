"""Exercises of several turns, and such as are answered in words alone."""

from __future__ import annotations

import re

from alignment.toybox import changes, talk, wordings
from alignment.toybox.describing import described, thing_name
from alignment.toybox.exercise import Exercise, Scenes, Turn, judged, single
from alignment.toybox.grammar import COUNT_WORDS, MOTION_PHRASES, TYPICAL_COLOUR, caption
from alignment.toybox.phrases import Speaker
from alignment.toybox.requests import (
    animated,
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
HEARD_SHARE = 0.25
"""Of the conversations about a picture, those in which its sound is heard before something else is wanted."""
NAMED_SHARE = 0.3
"""How often what was made is called by its name when something is made of it, and not "it"."""
SAME_SHARE = 0.06
"""How often a conversation ends with the very same medium once more; in training alone."""

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
        copied = False
        if isinstance(scene, Look) and rng.random() < HEARD_SHARE:
            middle: Scene = sound_of(scene)[0]
            text = _of_the_thing(rng.say(wordings.NOW_AS_SOUND), scene, rng)
            last, wish, names = _after_its_sound(scene, middle, rng)
        else:
            middle, text = changes.ask_for_change(scene, rng)
            copied = not rng.reserved and rng.random() < SAME_SHARE
            last, wish, names = _same(middle, rng) if copied else _follow_up(middle, rng)
        turns += [Turn("user", (said(text, rng),)), Turn("assistant", (caption(middle), middle))]
        found = [scene.held_out, middle.held_out, last.held_out]
        if len(set(found)) == 1 or scene.held_out:
            break
    if rng.random() < 0.15:
        turns = [Turn("user", ("hello",)), Turn("assistant", (talk.GREETING,)), *turns]
    turns = _with_asides(turns, rng)
    asked = Turn("user", (said(wish, rng),))
    return Exercise("", (*turns, asked), (caption(last), last), (names,), copied=copied)


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


def _same(scene: Scene, rng: Speaker) -> tuple[Scene, str, tuple[str, ...]]:
    return scene, wordings.same_again(scene, rng), judged(scene)


def _follow_up(scene: Scene, rng: Speaker) -> tuple[Scene, str, tuple[str, ...]]:
    if rng.random() < 0.08:
        return scene, rng.say(wordings.ONCE_MORE), judged(scene)
    if rng.random() < 0.5:
        last, text = changes.ask_for_change(scene, rng)
        return last, text, judged(last)
    if isinstance(scene, Sound):
        look = typical_look(scene.thing, SIZE_OF_PITCH[scene.pitch], scene.count)
        text = _of_the_thing(rng.say(wordings.NOW_AS_PICTURE_OF_SOUND), scene, rng)
        return look, text, ("thing", "size", "count")
    if rng.random() < 0.6:
        sound, names = sound_of(scene)
        return sound, _of_the_thing(rng.say(wordings.NOW_AS_SOUND), scene, rng), names
    if isinstance(scene, Look):
        return _now_as_video(scene, rng)
    look = Look(scene.thing, scene.colour, scene.size, 1, "middle", scene.ground)
    text = _of_the_thing(rng.say(wordings.NOW_AS_PICTURE), scene, rng)
    return look, text, ("thing", "colour", "size", "ground")


def _after_its_sound(look: Look, sound: Scene, rng: Speaker) -> tuple[Scene, str, tuple[str, ...]]:
    """Go on after a picture and its sound: with the picture, or with the sound."""
    if rng.random() < 0.5:
        return _now_as_video(look, rng)
    last, text = changes.ask_for_change(look if rng.random() < 0.6 else sound, rng)
    return last, text, judged(last)


def _now_as_video(look: Look, rng: Speaker) -> tuple[Scene, str, tuple[str, ...]]:
    if rng.random() < 0.3:
        clip = animated(look)
        return clip, _of_the_thing(rng.say(wordings.ANIMATE), look, rng), judged(clip, ("motion", "tempo"))
    clip = Clip(look.thing, look.colour, look.size, look.ground, rng.choice(MOTIONS), "slow")
    motion = rng.name("motion", clip.motion, MOTION_PHRASES[clip.motion])
    text = _of_the_thing(rng.say(wordings.NOW_AS_VIDEO), look, rng).format(motion=motion)
    return clip, text, judged(clip, ("tempo",))


def _of_the_thing(text: str, scene: Scene, rng: Speaker) -> str:
    """Return a text with a thing, or several, named in place of "it" now and then; in training alone."""
    if rng.reserved or rng.random() >= NAMED_SHARE:
        return text
    count = 1 if isinstance(scene, Sound) else rng.choice((1, 1, 2, 3))
    thing = thing_name(scene.thing, rng, count)
    if count == 1:
        named = rng.choice((f"the {thing}", f"this {thing}", f"that {thing}"))
    else:
        number = rng.choice(COUNT_WORDS[count])
        named = rng.choice((f"{number} of them", f"{number} {thing}", f"{number} such {thing}"))
    return re.sub(r"\b(it|that|this)\b", named, text, count=1)


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
        made_now = rng.random() < 0.5
        text = said(rng.say(wordings.WHAT_WAS_MADE), rng) if made_now else asking_what(rng, made[-1])
        answer = caption(made[-1])
    elif kind == "typical colour":
        thing = rng.choice(THINGS)
        text = rng.say(talk.TYPICAL_COLOUR_QUESTIONS).format(thing=thing_name(thing, rng))
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
    return said(rng.say(questions), rng, filled=0), answer


def _talk_so_far(rng: Speaker, scenes: Scenes, at_least: int) -> list[Turn]:
    """Return some requests, said in every detail or one out of the other, and the replies to them."""
    if rng.random() < 0.4:
        held = conversation(rng, scenes)
        return [*held.turns, Turn("assistant", held.answer)]
    turns: list[Turn] = []
    for _ in range(rng.choice((at_least, 1, 1, 2))):
        scene: Scene = rng.choice((scenes.look, scenes.clip, scenes.sound))()
        request = f"{asking(scene, rng)} {described(scene, rng)}"
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
