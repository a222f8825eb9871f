"""What people say around the captions: requests, questions, changes and small talk.

Every kind of phrase comes in two groups (:class:`Phrases`): those that training says, and reserved
ones that only tests say, so that a test shows what was understood and not what was learnt by heart. What
stands in braces is filled in by the exercise.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Phrases:
    """Ways to say one thing: those that training uses, and those that are kept for tests alone."""

    training: tuple[str, ...]
    reserved: tuple[str, ...] = ()


class Speaker(random.Random):
    """A source of chance that also chooses words; with ``reserved`` it says what training never said."""

    reserved: bool = False

    @classmethod
    def drawn_from(cls, rng: random.Random, *, reserved: bool) -> Speaker:
        """Return a speaker whose choices follow from the state of ``rng``."""
        speaker = cls(rng.getrandbits(64))
        speaker.reserved = reserved
        return speaker

    def say(self, phrases: Phrases) -> str:
        """Choose one phrase."""
        return self.choice(phrases.reserved if self.reserved and phrases.reserved else phrases.training)


OPENINGS = Phrases(
    (
        "",
        "",
        "",
        "",
        "",
        "please ",
        "can you ",
        "could you ",
        "hey, ",
        "ok, ",
        "would you ",
        "i want you to ",
    ),
    ("", "", "would you please ", "can you please ", "i need you to ", "hello, could you ", "go on and "),
)
"""What may stand before a request in the imperative."""
DRAW = Phrases(
    (
        "draw", "paint", "show me", "make a picture of", "give me an image of", "create an image of",
        "sketch", "show me a picture of", "create a picture of", "make me an image of",
        "produce a drawing of", "let me see",
    ),
    ("make a drawing of", "paint a picture of", "show me an image of", "give me a picture of", "draw me"),
)  # fmt: skip
FILM = Phrases(
    (
        "make a video of", "animate", "film", "show me a clip of", "make a clip of", "create a video of",
        "show me a video of", "record a clip of", "produce a video of", "give me a video of",
    ),
    ("create a clip of", "make me a video of", "record a video of", "give me a clip of", "film me"),
)  # fmt: skip
PLAY = Phrases(
    (
        "play", "let me hear", "make the sound of", "create the sound of", "give me the sound of",
        "play me", "produce the sound of", "play the sound of", "make a recording of",
    ),
    ("let me hear the sound of", "create a recording of", "play me the sound of", "make me the sound of"),
)  # fmt: skip
WISHES: Mapping[type, Phrases] = {
    Look: Phrases(
        ("i want a picture of", "a picture of", "i would like an image of", "picture:", "i want to see"),
        ("i would like a picture of", "an image of", "i need a picture of"),
    ),
    Clip: Phrases(
        ("i want a video of", "a video of", "i would like a clip of", "video:", "a clip of"),
        ("i would like a video of", "i need a clip of", "i want a clip of"),
    ),
    Sound: Phrases(
        ("i want to hear", "the sound of", "i would like to hear", "sound:", "i want the sound of"),
        ("i need the sound of", "i would like the sound of"),
    ),
}
"""Requests that are no imperatives."""
POLITE_ENDINGS = Phrases(
    ("", "", "", "", " please", ".", "!", " for me", ", please", " now"),
    ("", "", " for us", ", thanks", " please!"),
)
JOINTS = Phrases(
    (" and ", ", then ", " and then ", ", and ", ". ", ". then ", " and also ", ", next "),
    (". also ", ", and then ", " and next "),
)

WHAT_IS_SEEN = Phrases(
    (
        "what is this?", "describe this", "what do you see?", "tell me what is shown here",
        "what does this show?", "caption this please", "describe what you see", "say what this is",
        "tell me about this", "what is in it?", "put this in words",
    ),
    ("what is shown here?", "describe what this shows", "tell me what you see", "say what you see"),
)  # fmt: skip
WHAT_IS_HEARD = Phrases(
    (
        "what is this sound?", "describe this sound", "what do you hear?", "tell me what this is",
        "what can be heard here?", "describe what you hear in words", "say what this sound is",
        "tell me about this sound", "what sound is it?", "put this sound in words",
    ),
    ("tell me what you hear", "which sound is this?", "say what you hear", "describe what can be heard"),
)  # fmt: skip

IMAGE_TO_AUDIO = Phrases(
    (
        "what does this sound like?", "what does this picture sound like?", "play its sound",
        "let me hear this", "make the sound of this picture", "how does that sound?",
        "play the sound of this", "give me the sound of it", "turn this picture into sound",
    ),
    ("how does this picture sound?", "let me hear this picture", "play what this sounds like"),
)  # fmt: skip
AUDIO_TO_IMAGE = Phrases(
    (
        "draw what you hear", "what does this look like?", "draw this sound", "paint what makes this sound",
        "show me a picture of this sound", "make an image of what you hear", "turn this sound into a picture",
        "sketch what you hear", "what thing is this? draw it",
    ),
    ("paint what you hear", "draw what makes this sound", "make a picture of this sound"),
)  # fmt: skip
IMAGE_TO_VIDEO = Phrases(
    (
        "make a video of this {motion} {tempo}", "animate this {motion} {tempo}",
        "show it {motion} {tempo} in a video", "a clip of this picture {motion} {tempo}",
        "film it {motion} {tempo}", "turn this picture into a video of it {motion} {tempo}",
        "create a clip of this {motion} {tempo}",
    ),
    (
        "make a clip of it {motion} {tempo}", "show this {motion} {tempo} in a clip",
        "film this {motion} {tempo}",
    ),
)  # fmt: skip
VIDEO_TO_IMAGE = Phrases(
    (
        "draw what is in this video", "make a picture of this", "give me an image of this video", "draw this",
        "show me a picture of what you see", "turn this video into a picture", "paint what you see here",
        "create an image of this clip",
    ),
    ("draw what you see in this video", "make an image of this clip", "paint this"),
)  # fmt: skip
VIDEO_TO_AUDIO = Phrases(
    (
        "what does this video sound like?", "what does this sound like?", "play its sound",
        "add the sound of this video", "let me hear this", "make the sound of this clip",
        "play the sound of this", "turn this video into sound", "give me the sound of it",
    ),
    ("how does this video sound?", "let me hear this clip", "play what this video sounds like"),
)  # fmt: skip
AUDIO_TO_VIDEO = Phrases(
    (
        "make a video of what you hear", "film this sound", "make a video for this sound",
        "show me a clip of what makes this sound", "animate what you hear", "turn this sound into a video",
        "create a video of this sound", "a clip of what you hear",
    ),
    ("film what you hear", "make a clip for this sound", "animate this sound"),
)  # fmt: skip
IMAGE_AUDIO_TO_VIDEO = Phrases(
    (
        "make a video of this picture with the tempo of this sound",
        "animate the picture at the tempo of the sound",
        "a video of this, as fast or slow as this sound",
        "film the picture with the tempo of the sound",
        "turn the picture into a video as fast or slow as the sound",
    ),
    ("animate this with the tempo of the sound", "make a clip of the picture, as fast or slow as the sound"),
)
ABOUT_THING = Phrases(
    (
        "draw a {thing} and play its sound", "show me a {thing} and let me hear it",
        "a picture and the sound of a {thing}", "paint a {thing}, then play its sound",
    ),
    ("draw a {thing} and let me hear it", "show me a picture of a {thing} and play its sound"),
)  # fmt: skip
SAME_SOUND_AGAIN = Phrases(
    (
        "play exactly this again", "the same sound again, at exactly this pitch",
        "let me hear the very same one again", "play this very sound again",
    ),
    ("play the same sound again", "let me hear exactly this again"),
)  # fmt: skip
SAME_PICTURE_AGAIN = Phrases(
    (
        "draw exactly this again", "the same one again, in exactly this shade", "the very same picture again",
        "draw it again exactly there", "draw this very picture again",
    ),
    ("draw the same picture again", "paint exactly this again"),
)  # fmt: skip

CHANGES: Mapping[str, Phrases] = {
    "colour": Phrases(
        (
            "make it {word}", "now a {word} one", "change the colour to {word}", "in {word}",
            "the same one but {word}", "i want it {word}", "turn it {word}", "let it be {word}",
        ),
        ("now make it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "size": Phrases(
        (
            "make it {word}", "now a {word} one", "change the size to {word}", "the same one but {word}",
            "i want it {word}", "let it be {word}",
        ),
        ("now make it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "place": Phrases(
        (
            "move it to be {word}", "put it {word}", "now {word}", "the same one but {word}",
            "i want it {word}", "let it be {word}", "move it so it is {word}",
        ),
        ("now put it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "count": Phrases(
        (
            "make it {word}", "now {word} of them", "the same but {word} of them", "i want {word} of them",
            "show {word} of them", "let there be {word} of them",
        ),
        ("now make it {word} of them", "can there be {word} of them?", "the same one but {word} of them"),
    ),
    "times": Phrases(
        (
            "make it sound {word}", "now {word}", "the same but {word}", "i want to hear it {word}",
            "play it {word}", "let it sound {word}",
        ),
        ("now play it {word}", "can it sound {word}?", "the same one but {word}"),
    ),
    "ground": Phrases(
        (
            "put it {word}", "now {word}", "the same one but {word}", "change the background so it is {word}",
            "i want it {word}", "let it be {word}",
        ),
        ("now put it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "motion": Phrases(
        ("now {word}", "the same one but {word}", "i want it {word}", "show it {word}", "let it be {word}"),
        ("now show it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "tempo": Phrases(
        ("make it {word}", "now {word}", "the same but {word}", "i want it {word}", "let it be {word}"),
        ("now make it {word}", "can it be {word}?", "the same one but {word}"),
    ),
    "pitch": Phrases(
        (
            "make it {word}", "now a {word} one", "the same one but {word}", "change the pitch to {word}",
            "i want it {word}", "let it be {word}",
        ),
        ("now make it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "loudness": Phrases(
        ("make it {word}", "now {word}", "the same but {word}", "i want it {word}", "let it be {word}"),
        ("now make it {word}", "can it be {word}?", "the same one but {word}"),
    ),
}  # fmt: skip
"""How to ask for another value of an attribute; ``times`` is the count of a sound."""

NOW_AS_PICTURE_OF_SOUND = Phrases(
    (
        "and what does it look like?", "draw it", "show me a picture of it", "what does it look like?",
        "now draw it", "now a picture of it", "paint it",
    ),
    ("and a picture of it", "now paint it", "draw me a picture of it"),
)  # fmt: skip
NOW_AS_SOUND = Phrases(
    (
        "and what does it sound like?", "what does it sound like?", "now play its sound", "let me hear it",
        "and its sound", "play its sound", "how does it sound?",
    ),
    ("and how does it sound?", "now let me hear it", "now the sound of it"),
)  # fmt: skip
NOW_AS_VIDEO = Phrases(
    (
        "now a video of it {motion}", "animate it {motion}", "film it {motion}",
        "show it {motion} in a video", "and a clip of it {motion}",
    ),
    ("now animate it {motion}", "and a video of it {motion}", "make a clip of it {motion}"),
)  # fmt: skip
NOW_AS_PICTURE = Phrases(
    ("now a picture of it", "draw it as a picture", "draw it", "now draw it", "show me a picture of it"),
    ("and a picture of it", "paint it as a picture"),
)

QUESTIONS: Mapping[str, Phrases] = {
    "thing": Phrases(
        ("what thing is it?", "which thing is this?", "name the thing", "what is it called?"),
        ("which thing is it?", "what thing is this?"),
    ),
    "colour": Phrases(
        ("what colour is it?", "which colour does it have?", "name its colour", "in which colour is it?"),
        ("which colour is it?", "what is its colour?"),
    ),
    "size": Phrases(
        ("how big is it?", "what size is it?", "name its size", "which size does it have?"),
        ("which size is it?", "what is its size?"),
    ),
    "count": Phrases(
        ("how many are there?", "how many do you see?", "count them", "how many of them are there?"),
        ("how many of them do you see?", "how many are they?"),
    ),
    "times": Phrases(
        ("how often does it sound?", "how many times does it sound?", "how often do you hear it?"),
        ("how many times do you hear it?",),
    ),
    "loudness": Phrases(
        ("is it loud or quiet?", "how loud is it?", "is this quiet or loud?"), ("how loud is this?",)
    ),
    "motion": Phrases(
        ("where is it going?", "how does it move?", "which way does it go?"), ("where does it move?",)
    ),
}
"""Questions about one attribute of a medium; ``times`` is the count of a sound."""

TYPICAL_COLOUR_QUESTIONS = Phrases(
    (
        "what colour is a {thing}?", "which colour does a {thing} have?", "which colour is a {thing}?",
        "what colour does a {thing} have?",
    ),
    ("what is the colour of a {thing}?", "tell me the colour of a {thing}"),
)  # fmt: skip
TYPICAL_COLOUR_ANSWER = "a {thing} is mostly {colour}"

GREETING = "hello! tell me what to draw, film or play"
TALK: tuple[tuple[Phrases, str], ...] = (
    (Phrases(("hello", "hi", "hi there", "good morning", "hey"), ("hey there", "good day")), GREETING),
    (
        Phrases(
            ("what can you do?", "help", "what do you know?", "which things do you know?", "who are you?"),
            ("tell me what you can do", "what things do you know?"),
        ),
        "i can draw, film and play twelve things: " + ", ".join(THINGS),
    ),
    (
        Phrases(
            ("thank you", "thanks", "great, thank you", "very nice"),
            ("very nice, thank you", "great, thanks"),
        ),
        "you are welcome",
    ),
    (Phrases(("bye", "goodbye", "see you"), ("bye bye", "thanks, bye")), "goodbye"),
    (
        Phrases(
            ("which colours do you know?", "what colours are there?"), ("tell me the colours that you know",)
        ),
        "the colours are " + ", ".join(COLOURS),
    ),
    (
        Phrases(
            (
                "do not draw anything", "no picture please", "just talk to me", "no sound please",
                "only words please",
            ),
            ("do not play anything", "no video please"),
        ),
        "all right, only words",
    ),
    (
        Phrases(
            (
                "tell me a joke", "what is the weather?", "how old are you?", "what is two plus two?",
                "where do you live?", "sing me a song", "do you like me?",
            ),
            ("how are you?", "tell me a story", "what is your name?"),
        ),
        "i only know my toy box. ask me to draw, film or play something in it",
    ),
)  # fmt: skip
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


def ask_for_change(scene: Scene, rng: Speaker) -> tuple[Scene, str]:
    """Return the scene with one named attribute changed, and the words that ask for it."""
    while True:
        name = rng.choice(_CHANGED[type(scene)])
        values, wording, word = _other_value(scene, name, rng)
        if name == "place" and isinstance(scene, Look) and scene.count > 1:
            continue
        result = changed(scene, **values)
        if result is not None and result != scene:
            return result, rng.say(CHANGES[wording]).format(word=word)


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


def ask_about(scene: Scene, rng: Speaker) -> tuple[str, str]:
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
    return rng.say(QUESTIONS[question]), answer
