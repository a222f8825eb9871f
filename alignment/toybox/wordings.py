"""What people say around the captions: requests, questions, changes and small talk.

The order and number of the phrases in a tuple matter: an exercise picks among them with its own
random numbers. What stands in braces is filled in by the exercise.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from alignment.toybox.grammar import (
    COLOUR_WORDS,
    COUNT_WORDS,
    GROUND_PHRASES,
    LOUDNESS_WORDS,
    MOTION_PHRASES,
    PITCH_WORDS,
    PLACE_PHRASES,
    SIZE_WORDS,
    TIMES_WORDS,
)
from alignment.toybox.world import (
    COLOURS,
    COUNTS,
    GROUNDS,
    LOUDNESSES,
    MOTIONS,
    PITCHES,
    PLACES,
    SIZES,
    TEMPOS,
    THINGS,
    Clip,
    Look,
    Scene,
    Sound,
    changed,
)

DRAW = (
    "draw",
    "paint",
    "show me",
    "make a picture of",
    "i want a picture of",
    "give me an image of",
    "can you draw",
    "please draw",
    "create an image of",
    "a picture of",
)
FILM = (
    "make a video of",
    "animate",
    "film",
    "show me a clip of",
    "i want a video of",
    "can you make a video of",
    "please make a clip of",
    "create a video of",
    "a video of",
)
PLAY = (
    "play",
    "let me hear",
    "make the sound of",
    "i want to hear",
    "can you play",
    "please play",
    "create the sound of",
    "give me the sound of",
)
POLITE_ENDINGS = ("", "", "", "", " please", ".", "!", " for me", ", please", " now")
JOINTS = (" and ", ", then ", " and then ", ", and ")

WHAT_IS_SEEN = (
    "what is this?",
    "describe this",
    "what do you see?",
    "tell me what is shown here",
    "what does this show?",
    "caption this please",
    "describe what you see",
)
WHAT_IS_HEARD = (
    "what is this sound?",
    "describe this sound",
    "what do you hear?",
    "tell me what this is",
    "what can be heard here?",
    "describe what you hear in words",
)

IMAGE_TO_AUDIO = (
    "what does this sound like?",
    "what does this picture sound like?",
    "play its sound",
    "let me hear this",
    "make the sound of this picture",
    "how does that sound?",
)
AUDIO_TO_IMAGE = (
    "draw what you hear",
    "what does this look like?",
    "draw this sound",
    "paint what makes this sound",
    "show me a picture of this sound",
    "make an image of what you hear",
)
IMAGE_TO_VIDEO = (
    "make a video of this {motion} {tempo}",
    "animate this {motion} {tempo}",
    "show it {motion} {tempo} in a video",
    "a clip of this picture {motion} {tempo}",
)
VIDEO_TO_IMAGE = (
    "draw what is in this video",
    "make a picture of this",
    "give me an image of this video",
    "draw this",
    "show me a picture of what you see",
)
VIDEO_TO_AUDIO = (
    "what does this video sound like?",
    "what does this sound like?",
    "play its sound",
    "add the sound of this video",
    "let me hear this",
    "make the sound of this clip",
)
AUDIO_TO_VIDEO = (
    "make a video of what you hear",
    "film this sound",
    "make a video for this sound",
    "show me a clip of what makes this sound",
    "animate what you hear",
)
IMAGE_AUDIO_TO_VIDEO = (
    "make a video of this picture with the tempo of this sound",
    "animate the picture at the tempo of the sound",
    "a video of this, as fast or slow as this sound",
)
ABOUT_THING = (
    "draw a {thing} and play its sound",
    "show me a {thing} and let me hear it",
    "a picture and the sound of a {thing}",
)
SAME_SOUND_AGAIN = (
    "play exactly this again",
    "the same sound again, at exactly this pitch",
    "let me hear the very same one again",
)
SAME_PICTURE_AGAIN = (
    "draw exactly this again",
    "the same one again, in exactly this shade",
    "the very same picture again",
    "draw it again exactly there",
)

CHANGES: Mapping[str, tuple[str, ...]] = {
    "colour": (
        "make it {word}",
        "now a {word} one",
        "change the colour to {word}",
        "in {word}",
        "the same one but {word}",
    ),
    "size": ("make it {word}", "now a {word} one", "change the size to {word}", "the same one but {word}"),
    "place": ("move it to be {word}", "put it {word}", "now {word}", "the same one but {word}"),
    "count": (
        "make it {word}",
        "now {word} of them",
        "the same but {word} of them",
        "i want {word} of them",
    ),
    "times": ("make it sound {word}", "now {word}", "the same but {word}"),
    "ground": (
        "put it {word}",
        "now {word}",
        "the same one but {word}",
        "change the background so it is {word}",
    ),
    "motion": ("now {word}", "the same one but {word}", "i want it {word}"),
    "tempo": ("make it {word}", "now {word}", "the same but {word}"),
    "pitch": ("make it {word}", "now a {word} one", "the same one but {word}", "change the pitch to {word}"),
    "loudness": ("make it {word}", "now {word}", "the same but {word}"),
}
"""How to ask for another value of an attribute; ``times`` is the count of a sound."""

NOW_AS_PICTURE_OF_SOUND = ("and what does it look like?", "draw it", "show me a picture of it")
NOW_AS_SOUND = (
    "and what does it sound like?",
    "what does it sound like?",
    "now play its sound",
    "let me hear it",
)
NOW_AS_VIDEO = ("now a video of it {motion}", "animate it {motion}")
NOW_AS_PICTURE = ("now a picture of it", "draw it as a picture")

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "thing": ("what thing is it?", "which thing is this?"),
    "colour": ("what colour is it?", "which colour does it have?"),
    "size": ("how big is it?", "what size is it?"),
    "count": ("how many are there?", "how many do you see?"),
    "times": ("how often does it sound?", "how many times does it sound?"),
    "loudness": ("is it loud or quiet?", "how loud is it?"),
    "motion": ("where is it going?", "how does it move?"),
}
"""Questions about one attribute of a medium; ``times`` is the count of a sound."""

TYPICAL_COLOUR_QUESTIONS = ("what colour is a {thing}?", "which colour does a {thing} have?")
TYPICAL_COLOUR_ANSWER = "a {thing} is mostly {colour}"

GREETING = "hello! tell me what to draw, film or play"
TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("hello", "hi", "hi there", "good morning", "hey"), GREETING),
    (
        ("what can you do?", "help", "what do you know?", "which things do you know?", "who are you?"),
        "i can draw, film and play twelve things: " + ", ".join(THINGS),
    ),
    (("thank you", "thanks", "great, thank you", "very nice"), "you are welcome"),
    (("bye", "goodbye", "see you"), "goodbye"),
    (("which colours do you know?", "what colours are there?"), "the colours are " + ", ".join(COLOURS)),
    (("do not draw anything", "no picture please", "just talk to me"), "all right, only words"),
    (
        ("tell me a joke", "what is the weather?", "how old are you?", "what is two plus two?"),
        "i only know my toy box. ask me to draw, film or play something in it",
    ),
)
"""Small talk: what a person may say, and the answer to all of it."""

_CHANGED: Mapping[type, tuple[str, ...]] = {
    Look: ("colour", "size", "place", "count", "ground"),
    Clip: ("colour", "motion", "tempo", "ground"),
    Sound: ("pitch", "count", "tempo", "loudness"),
}
_NAMED: Mapping[str, tuple[tuple[str, ...], Mapping[str, Sequence[str]]]] = {
    "colour": (COLOURS, COLOUR_WORDS),
    "size": (SIZES, SIZE_WORDS),
    "place": (PLACES, PLACE_PHRASES),
    "ground": (GROUNDS, GROUND_PHRASES),
    "motion": (MOTIONS, MOTION_PHRASES),
    "pitch": (PITCHES, PITCH_WORDS),
    "loudness": (LOUDNESSES, LOUDNESS_WORDS),
}


def ask_for_change(scene: Scene, rng: random.Random) -> tuple[Scene, str]:
    """Return the scene with one named attribute changed, and the words that ask for it."""
    while True:
        name = rng.choice(_CHANGED[type(scene)])
        values, wording, word = _other_value(scene, name, rng)
        if name == "place" and isinstance(scene, Look) and scene.count > 1:
            continue
        result = changed(scene, **values)
        if result is not None and result != scene:
            return result, rng.choice(CHANGES[wording]).format(word=word)


def _other_value(scene: Scene, name: str, rng: random.Random) -> tuple[dict[str, str | int | None], str, str]:
    """Return a random value of an attribute, the key of the wordings that ask for it, and its word."""
    if name == "count":
        count = rng.choice(COUNTS)
        if isinstance(scene, Look):
            return {"count": count, "place": "middle" if count == 1 else None}, "count", COUNT_WORDS[count][0]
        return {"count": count}, "times", rng.choice(TIMES_WORDS[count])
    if name == "tempo":
        tempo = rng.choice(TEMPOS)
        return {"tempo": tempo}, "tempo", "slower" if tempo == "slow" else "faster"
    allowed, words = _NAMED[name]
    value = rng.choice(allowed)
    return {name: value}, name, rng.choice(words[value])


def ask_about(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return a question about one attribute of a scene, and its answer."""
    choices = [("thing", scene.thing)]
    if not isinstance(scene, Sound):
        choices.append(("colour", scene.colour))
        choices.append(("size", scene.size))
    if isinstance(scene, Look):
        choices.append(("count", COUNT_WORDS[scene.count][0]))
    if isinstance(scene, Sound):
        choices.append(("times", TIMES_WORDS[scene.count][0]))
        choices.append(("loudness", scene.loudness))
    if isinstance(scene, Clip):
        choices.append(("motion", MOTION_PHRASES[scene.motion][0]))
    question, answer = rng.choice(choices)
    return rng.choice(QUESTIONS[question]), answer
