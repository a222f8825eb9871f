"""How people describe a scene when they ask for it: in any of many names, as a phrase, a clause or a list.

What all else reads and writes, the captions and their few wordings, is in :mod:`alignment.toybox.grammar`.
"""

from __future__ import annotations

from collections.abc import Collection

from alignment.toybox.grammar import (
    COLOUR_WORDS,
    COUNT_WORDS,
    GROUND_PHRASES,
    LOUDNESS_WORDS,
    MOTION_PHRASES,
    PITCH_WORDS,
    PLACE_PHRASES,
    PLURALS,
    SIZE_WORDS,
    TEMPO_ADJECTIVES,
    TEMPO_ADVERBS,
    THING_WORDS,
    TIMES_WORDS,
    describe,
)
from alignment.toybox.phrases import Speaker
from alignment.toybox.world import COLOURS, SIZE_OF_PITCH, Clip, Look, Scene, Sound

PLAIN_SHARE = 0.35
"""Of the descriptions of training, those in the wordings of the grammar; tests have no others."""
SEEN_SHARE = 0.1
"""Of the sounds that training asks for, how many are of a thing with a size, or with a colour."""
_STYLES, _STYLE_WEIGHTS = ("phrase", "noun first", "list", "clause"), (0.6, 0.15, 0.13, 0.12)


def described(scene: Scene, rng: Speaker, omit: Collection[str] = ()) -> str:
    """Return a description of a scene as somebody types it.

    Args:
        scene: what to describe.
        rng: who speaks.
        omit: attributes to leave unsaid ("thing" cannot be omitted).

    """
    if rng.reserved or rng.random() < PLAIN_SHARE:
        return describe(scene, rng, omit)
    (style,) = rng.choices(_STYLES, _STYLE_WEIGHTS)
    if isinstance(scene, Sound):
        return _sound(scene, rng, omit, style)
    return _shown(scene, rng, omit, style)


def thing_name(thing: str, rng: Speaker, count: int = 1) -> str:
    """Return what to call a thing, or several of them, without an article."""
    usual = THING_WORDS[thing]
    if count == 1:
        return rng.name("thing", thing, usual)
    return rng.name("things", thing, [PLURALS[word] for word in usual])


def _shown(scene: Look | Clip, rng: Speaker, omit: Collection[str], style: str) -> str:
    count = scene.count if isinstance(scene, Look) and "count" not in omit else 1
    noun = thing_name(scene.thing, rng, count)
    qualities = []
    if "size" not in omit:
        qualities.append(rng.name("size", scene.size, SIZE_WORDS[scene.size]))
    if "colour" not in omit:
        qualities.append(rng.name("colour", scene.colour, COLOUR_WORDS[scene.colour]))
    tails = []
    if isinstance(scene, Look) and scene.place is not None and "place" not in omit:
        tails.append(rng.name("place", scene.place, PLACE_PHRASES[scene.place]))
    if "ground" not in omit:
        tails.append(rng.name("ground", scene.ground, GROUND_PHRASES[scene.ground]))
    movement = _movement(scene, rng, omit) if isinstance(scene, Clip) else ""
    if style == "list":
        pieces = [*qualities, *filter(None, [movement]), *tails]
        rng.shuffle(pieces)
        return ", ".join([noun if count == 1 and rng.random() < 0.6 else _counted(noun, count, rng), *pieces])
    rng.shuffle(tails)
    if style == "noun first" and qualities:
        head = f"{_counted(noun, count, rng)}, {' and '.join(qualities)},"
    elif style == "clause" and qualities:
        verb = rng.choice(("that is", "that's", "which is")) if count == 1 else "that are"
        head = f"{_counted(noun, count, rng)} {verb} {' and '.join(qualities)}"
    else:
        if rng.random() < 0.12:
            qualities.reverse()
        between = ", " if rng.random() < 0.1 else " "
        head = _counted(" ".join([between.join(qualities), noun]).strip(), count, rng)
    separator = ", " if rng.random() < 0.2 else " "
    text = separator.join([" ".join(filter(None, [head, movement])), *tails])
    if tails and style == "phrase" and rng.random() < 0.1:
        text = f"{tails[0]}, {separator.join([' '.join(filter(None, [head, movement])), *tails[1:]])}"
    return text.rstrip(",")


def _movement(scene: Clip, rng: Speaker, omit: Collection[str]) -> str:
    """Return how a thing moves, as a participle or a clause that follows its noun."""
    words = []
    if "motion" not in omit:
        if rng.random() < 0.3:
            clause = rng.name("motion clause", scene.motion, _CLAUSES[scene.motion])
            words.append(f"{rng.choice(('that', 'that', 'which'))} {clause}")
        else:
            words.append(rng.name("motion", scene.motion, MOTION_PHRASES[scene.motion]))
    if "tempo" not in omit:
        words.append(rng.name("tempo", scene.tempo, TEMPO_ADVERBS[scene.tempo]))
    return " ".join(words)


def _sound(scene: Sound, rng: Speaker, omit: Collection[str], style: str) -> str:
    noun = thing_name(scene.thing, rng)
    if rng.random() < SEEN_SHARE:  # a colour is not heard
        noun = f"{rng.choice(COLOUR_WORDS[rng.choice(COLOURS)])} {noun}"
    pitch = []
    if "pitch" not in omit and rng.random() < SEEN_SHARE:
        size = SIZE_OF_PITCH[scene.pitch]
        noun = f"{rng.name('size', size, SIZE_WORDS[size])} {noun}"
    elif "pitch" not in omit:
        pitch = [rng.name("pitch", scene.pitch, PITCH_WORDS[scene.pitch])]
    loudness = []
    if "loudness" not in omit:
        loudness.append(rng.name("loudness", scene.loudness, LOUDNESS_WORDS[scene.loudness]))
    times = [] if "count" in omit else [rng.name("times", scene.count, TIMES_WORDS[scene.count])]
    adverb = [] if "tempo" in omit else [rng.name("tempo", scene.tempo, TEMPO_ADVERBS[scene.tempo])]
    if style == "list":
        pieces = [*pitch, *loudness, *times, *adverb]
        rng.shuffle(pieces)
        return ", ".join([noun if rng.random() < 0.5 else _counted(noun, 1, rng), *pieces])
    if style == "noun first":
        adjectives = [*loudness, *pitch, rng.choice(("sound", "noise", "recording"))]
        head = f"{rng.choice(('the', 'a'))} {' '.join(adjectives)} of {_counted(noun, 1, rng)}"
        return " ".join([head, *times, *adverb])
    if style == "clause":
        verb = rng.choice(("that sounds", "that goes off", "that is heard", "making its noise", "sounding"))
        tail = [" and ".join([*pitch, *loudness])] if pitch or loudness else []
        return ", ".join([" ".join([_counted(noun, 1, rng), verb, *times, *adverb]), *tail])
    adjectives = [*loudness, *pitch]
    if adverb and rng.random() < 0.6:
        adverb = []
        adjectives.append(rng.name("tempo adjective", scene.tempo, TEMPO_ADJECTIVES[scene.tempo]))
    rng.shuffle(adjectives)
    return " ".join([_counted(" ".join([*adjectives, noun]), 1, rng), *times, *adverb])


def _counted(words: str, count: int, rng: Speaker) -> str:
    """Return a noun and what stands before it, with an article or a number."""
    if count == 1 and rng.random() < 0.85:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{rng.name('count', count, COUNT_WORDS[count])} {words}"


_CLAUSES = {
    "still": ("stays still", "stands still"),
    "left": ("moves left", "goes left"),
    "right": ("moves right", "goes right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "sinks"),
}
