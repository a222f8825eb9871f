"""How people ask for a change of what they see or hear: another value of one attribute, or the next one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain

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
from alignment.toybox.phrases import Phrases, Speaker, ways
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
    Clip,
    Look,
    Scene,
    Sound,
    changed,
)

VERB_SHARE, VERB_SHARE_IN_TRAINING = 0.25, 0.4
"""How often a change is asked for by a verb of its own ("speed it up"), where there is one."""

_SAME = "(the same one|the same thing|this one|this very one|it again) (but|only|just)"
_LET_IT = "(i want it|i would like it|let it be|it should be|could it be|i want it to be|please let it be)"
_MAY_IT = (
    "(could it be|may it be|might it be|will it be|should it be|would it be|can this be|can this one be"
    "|can the thing be|can we have it|can i have it|can you show it|could this be|is it possible to have it) "
    "{word}?"
)

_A_BIT, _A_BIT_OR_NOT = " (||a bit |a little |much |even )", "(||a bit |a little |much |even )"

_VERBS: Mapping[tuple[type, str, str | int | None], str] = {
    (Look, "place", "middle"): "verb: middle",
    (Sound, "count", 1): "verb: once",
    **{(kind, "ground", to): f"verb: {to}" for kind in (Look, Clip) for to in ("white", "sky", "night")},
    **{(Clip, "motion", to): f"verb: {to}" for to in MOTIONS},
    **{(kind, "tempo", to): f"verb: {to}er" for kind in (Clip, Sound) for to in TEMPOS},
}
_STEP_VERBS: Mapping[str, tuple[str, str]] = {
    "size": ("verb: smaller", "verb: bigger"),
    "pitch": ("verb: lower", "verb: higher"),
    "loudness": ("verb: quieter", "verb: louder"),
}
"""Changes that have verbs of their own, to a value or by one step, and their keys in the phrase book."""

CHANGES: Mapping[str, Phrases] = {
    "colour": ways(
        "change: colour",
        "(||now |please |and now )(make|turn|paint|colour) it {word}",
        "(now |and |and now |)a {word} one",
        "(change|set|switch) (the|its) colour to {word}",
        "(in|now in|and in|do it in) {word}",
        _SAME + " (|in ){word}",
        _LET_IT + " {word}",
        _MAY_IT,
        "(|||in |now )({word}|{word} please|{word}, please|{word} instead)",
    ),
    "size": ways(
        "change: size",
        "(||please |and now )(make|let) it( be|) {word}",
        "(now |and |and now |)a {word} one",
        "(change|set|switch) (the|its) size to {word}",
        _SAME + " {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        "(|now |and |but )({word}|{word} please|{word}, please)",
    ),
    "place": ways(
        "change: place",
        "(move it to be|put it|please put it|place it|draw it|set it|move it so it is|and now put it) {word}",
        "(now|and|and now|but now) {word}",
        "(||please |now |and |can you )(move|shift|bring|push) it {there}",
        _SAME + " {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        "({word}|{word} please|{word}, please|just {word}|{there}|{there} please|now {there})",
    ),
    "count": ways(
        "change: count",
        "(make it|now|and now|please make it) {word}( of them|)",
        "(the same but|i want|show|show me|draw|let there be|there should be|i would like) {word} of them",
        "(this one|this very one|the same thing|the very same|it again|just this)(,|, but| but) "
        "{word} of them",
        "(could|may|might|will|should) there be {word} of them?",
        "can (we have|i have|i see|you draw|you show|you make it) {word} of them?",
        "({word}|{word} please|just {word}|only {word}) of them",
    ),
    "times": ways(
        "change: times",
        "(make it sound|let it sound|play it|please play it|it should sound|i want to hear it) {word}",
        "(now|and|and now|the same but|the same sound but|this one but|it again but) {word}",
        "(could|may|might|will|would|should) it sound {word}?",
        "can (this|this one|the sound) (be played|be heard|sound) {word}?",
        "({word}|{word} please|{word}, please|just {word})",
    ),
    "ground": ways(
        "change: ground",
        "(put it|please put it|place it|draw it|set it|and now put it) {word}",
        "(now|and|and now|but now) {word}",
        "(change the background so it is|the background should be) {word}",
        _SAME + " {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        "({word}|{word} please|{word}, please|just {word})",
    ),
    "motion": ways(
        "change: motion",
        "(now|and|and now|but now|show it|please show it|film it|make it go, i mean) {word}",
        _SAME + " {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        "({word}|{word} please|{word}, please|just {word})",
    ),
    "tempo": ways(
        "change: tempo",
        "(make it|now|and|and now|please make it|let it go|do it|play it) {word}",
        "(the same but|the same thing but) {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        "(|now |and |a bit |much )({word}|{word} please|{word}, please)",
    ),
    "pitch": ways(
        "change: pitch",
        "(make it|please make it|and now make it|let it sound) {word}",
        "(now |and |and now |)a {word} one",
        "(change|set|switch) (the|its) pitch to {word}",
        _SAME + " {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        "(|now |and |but )({word}|{word} please|{word}, please)",
    ),
    "loudness": ways(
        "change: loudness",
        "(make it|now|and|and now|please make it|play it) {word}",
        "(the same but|the same sound but) {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        "(|now |and |but )({word}|{word} please|{word}, please)",
    ),
    "bigger": ways(
        "change: bigger",
        "(||now |please |and now |but )(make|let|draw|show) it" + _A_BIT + "{word}",
        "(now |and |and now |but |)" + _A_BIT_OR_NOT + "{word}(| please)",
        "(now |and |and now |)a {word} one",
        "(|now |please )let it be" + _A_BIT + "{word}",
        _SAME + _A_BIT + "{word}",
        _LET_IT + _A_BIT + "{word}",
        _MAY_IT,
        "(can|could) you make it" + _A_BIT + "{word}?",
    ),
    "louder": ways(
        "change: louder",
        "(||now |please |and now |but )(make|let|play|play) it" + _A_BIT + "{word}",
        "(now |and |and now |but |)" + _A_BIT_OR_NOT + "{word}(| please)",
        "(now |and |and now |)a {word} one",
        "(|now |please )let it (be|sound)" + _A_BIT + "{word}",
        _SAME + _A_BIT + "{word}",
        _LET_IT + _A_BIT + "{word}",
        _MAY_IT,
        "(can|could) you (make|play) it" + _A_BIT + "{word}?",
    ),
    "background": ways(
        "change: background",
        "(make|let|change) the background (be |)(to |){word}",
        "(now |and |)(with|on|against) {word}( background| backdrop| behind it| as the background|)",
        "(i want|give it|put|draw) {word} (behind it|as its background|as the background|in the background)",
        "(the |)background: {word}",
        "(turn|paint|set) the (background|backdrop|ground) (to |){word}",
    ),
    "one more": ways(
        "one more",
        "(add|draw|give me|i want|put in|show) (one more|another one|another|one more of them)",
        "(now |and |)(one more|one more of them|another one)(, please| please|)",
    ),
    "one fewer": ways(
        "one fewer",
        "(remove|take away|erase|delete|drop|leave out) one( of them|)(, please|)",
        "(now |and |)(one fewer|one less|one of them less)(, please|)",
    ),
    **{verb: ways(verb) for verb in {*_VERBS.values(), *chain(*_STEP_VERBS.values())}},
}  # fmt: skip
"""How to ask for another value of an attribute; ``times`` is the count of a sound, ``bigger`` and ``louder``
are for the next value of what is seen and heard, ``one more`` and ``one fewer`` are of a picture.
``{there}`` is a place that something is moved to."""

_CHANGED: Mapping[type, tuple[str, ...]] = {
    Look: ("colour", "size", "place", "count", "ground"),
    Clip: ("colour", "motion", "tempo", "ground"),
    Sound: ("pitch", "count", "tempo", "loudness"),
}
_CHANGED_IN_TRAINING: Mapping[type, tuple[str, ...]] = {
    **_CHANGED,
    Look: (*_CHANGED[Look], "count"),
    Clip: (*_CHANGED[Clip], "size", "tempo"),
    Sound: (*_CHANGED[Sound], "tempo", "loudness"),
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
STEP_WORDS: Mapping[str, tuple[Sequence[str], Sequence[str], Sequence[str]]] = {
    "size": (SIZES, ("smaller", "tinier"), ("bigger", "larger")),
    "pitch": (PITCHES[::-1], ("lower", "deeper"), ("higher", "higher pitched")),
    "loudness": (LOUDNESSES, ("quieter", "softer", "less loud"), ("louder", "noisier")),
}
"""Attributes whose values have an order: the values, and words for the one before and the one after."""
_STEP_SHARE = 0.4
BACKGROUNDS: Mapping[str, Sequence[str]] = {
    "white": ("white", "a white one", "plain white"),
    "grey": ("grey", "gray", "a grey one"),
    "sky": ("a sky", "the sky", "a blue sky"),
    "night": ("a night sky", "the night sky", "the night"),
}
"""What a background is called where it is asked for by that word."""
_BACKGROUND_SHARE = 0.4


def ask_for_change(scene: Scene, rng: Speaker) -> tuple[Scene, str]:
    """Return the scene with one named attribute changed, and the words that ask for it."""
    while True:
        name = rng.choice((_CHANGED if rng.reserved else _CHANGED_IN_TRAINING)[type(scene)])
        values, wording, word = _other_value(scene, name, rng)
        if name == "place" and isinstance(scene, Look) and scene.count > 1:
            continue
        result = changed(scene, **values)
        if result is None or result == scene:
            continue
        if rng.random() < (VERB_SHARE if rng.reserved else VERB_SHARE_IN_TRAINING):
            wording = _verb(scene, name, values[name], rng) or wording
        there = re.sub("^(at|in|on) ", "to ", word)
        text = rng.say(CHANGES[wording]).format(word=word, there=there)
        return result, re.sub(r"\ba (?=[aeiou])", "an ", text)


def _verb(scene: Scene, name: str, value: str | int | None, rng: Speaker) -> str | None:
    """Return the key of the verbs that say a change by themselves, if there are any."""
    step = _step(scene, name, value, rng)
    if step:
        return _STEP_VERBS[name][step > 0]
    return _VERBS.get((type(scene), name, value))


def _step(scene: Scene, name: str, value: str | int | None, rng: Speaker) -> int:
    """Return -1 or 1 for the value before or after that of the scene, where values have an order; else 0."""
    if name not in STEP_WORDS:
        return 0
    order = STEP_WORDS[name][0]
    apart = order.index(str(value)) - order.index(getattr(scene, name))
    last = value in (order[0], order[-1])  # a person may mean more than one step by "bigger"
    return apart if abs(apart) == 1 and (last or not rng.reserved) else 0


def _other_value(scene: Scene, name: str, rng: Speaker) -> tuple[dict[str, str | int | None], str, str]:
    """Return a random value of an attribute, the key of the wordings that ask for it, and its word."""
    if name == "count":
        count = rng.choice(COUNTS)
        if isinstance(scene, Look):
            values: dict[str, str | int | None] = {"count": count, "place": "middle" if count == 1 else None}
            apart = count - scene.count
            if abs(apart) == 1 and rng.random() < _STEP_SHARE:
                return values, "one more" if apart > 0 else "one fewer", ""
            return values, "count", COUNT_WORDS[count][0]
        return {"count": count}, "times", rng.name("times", count, TIMES_WORDS[count])
    if name == "tempo":
        tempo = rng.choice(TEMPOS)
        return {"tempo": tempo}, "tempo", "slower" if tempo == "slow" else "faster"
    allowed, words = _NAMED[name]
    value = rng.choice(allowed)
    if rng.random() < _STEP_SHARE and (step := _step(scene, name, value, rng)):
        less, more = STEP_WORDS[name][1:]
        wording = "louder" if isinstance(scene, Sound) else "bigger"
        return {name: value}, wording, rng.choice(less if step < 0 else more)
    if name == "ground" and rng.random() < _BACKGROUND_SHARE:
        return {name: value}, "background", rng.choice(BACKGROUNDS[value])
    return {name: value}, name, rng.name(name, value, words[value])
