"""How Toybox is spoken of: captions, their many wordings, and reading attributes back from text.

Every scene has one plain caption (:func:`caption`), which the agent writes and the decoders'
text encoders read, and very many wordings (:func:`describe`), which people use.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence

from alignment.toybox.world import Clip, Look, Scene, Sound

THING_WORDS: Mapping[str, tuple[str, ...]] = {
    "bell": ("bell",),
    "drum": ("drum",),
    "bird": ("bird",),
    "bee": ("bee", "bumblebee"),
    "clock": ("clock",),
    "siren": ("siren",),
    "heart": ("heart",),
    "rocket": ("rocket", "spaceship"),
    "harp": ("harp",),
    "frog": ("frog",),
    "phone": ("phone", "telephone"),
    "rain cloud": ("rain cloud", "raincloud"),
}
COLOUR_WORDS: Mapping[str, tuple[str, ...]] = {
    "red": ("red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "white": ("white",),
    "black": ("black",),
}
SIZE_WORDS: Mapping[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium sized", "mid sized"),
    "big": ("big", "large", "huge"),
}
PITCH_WORDS: Mapping[str, tuple[str, ...]] = {
    "high": ("high", "high pitched"),
    "middle": ("mid pitched", "middle"),
    "low": ("low", "deep"),
}
TEMPO_ADVERBS: Mapping[str, tuple[str, ...]] = {
    "slow": ("slowly", "slow", "at a slow pace"),
    "fast": ("fast", "quickly", "rapidly", "at a fast pace"),
}
TEMPO_ADJECTIVES: Mapping[str, tuple[str, ...]] = {"slow": ("slow",), "fast": ("fast", "quick", "rapid")}
LOUDNESS_WORDS: Mapping[str, tuple[str, ...]] = {
    "quiet": ("quiet", "soft", "faint"),
    "loud": ("loud", "noisy"),
}
COUNT_WORDS: Mapping[int, tuple[str, ...]] = {1: ("one", "a single"), 2: ("two", "2"), 3: ("three", "3")}
TIMES_WORDS: Mapping[int, tuple[str, ...]] = {
    1: ("once", "one time"),
    2: ("twice", "two times"),
    3: ("three times", "thrice"),
}
PLACE_PHRASES: Mapping[str, tuple[str, ...]] = {
    "top left": ("at the top left", "in the top left corner", "in the upper left"),
    "top": ("at the top", "in the upper middle"),
    "top right": ("at the top right", "in the top right corner", "in the upper right"),
    "left": ("at the left", "on the left side", "on the left"),
    "middle": ("in the middle", "in the center", "in the centre"),
    "right": ("at the right", "on the right side", "on the right"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom": ("at the bottom", "in the lower middle"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
GROUND_PHRASES: Mapping[str, tuple[str, ...]] = {
    "white": ("on white", "on a white background", "on a white ground"),
    "grey": ("on grey", "on a grey background", "on gray", "on a gray ground"),
    "sky": ("in the sky", "against the sky", "on a sky background"),
    "night": ("at night", "in the night", "on a night background"),
}
MOTION_PHRASES: Mapping[str, tuple[str, ...]] = {
    "still": ("staying still", "not going anywhere", "standing still"),
    "left": ("moving left", "going left", "moving to the left"),
    "right": ("moving right", "going right", "moving to the right"),
    "up": ("moving up", "going up", "rising"),
    "down": ("moving down", "going down", "sinking"),
}
TYPICAL_COLOUR: Mapping[str, str] = {
    "bell": "yellow",
    "drum": "red",
    "bird": "blue",
    "bee": "yellow",
    "clock": "white",
    "siren": "red",
    "heart": "red",
    "rocket": "white",
    "harp": "orange",
    "frog": "green",
    "phone": "black",
    "rain cloud": "blue",
}
PLURALS = {word: f"{word}s" for words in THING_WORDS.values() for word in words}


def caption(scene: Scene) -> str:
    """Return the one plain caption of a scene: lower case, every attribute, fixed order."""
    return " ".join(words for _, words in caption_words(scene))


def caption_words(scene: Scene) -> list[tuple[str, str]]:
    """Return the words of a caption, each with the attribute that it tells; "" where it tells none."""
    if isinstance(scene, Look):
        noun = scene.thing if scene.count == 1 else PLURALS[scene.thing]
        number = COUNT_WORDS[scene.count][0] if scene.count > 1 else "a"
        words = [("count", number), ("size", scene.size), ("colour", scene.colour), ("thing", noun)]
        if scene.place is not None:
            words.append(("place", PLACE_PHRASES[scene.place][0]))
        return [*words, ("ground", GROUND_PHRASES[scene.ground][0])]
    if isinstance(scene, Clip):
        return [
            ("", "a"), ("size", scene.size), ("colour", scene.colour), ("thing", scene.thing),
            ("motion", MOTION_PHRASES[scene.motion][0]), ("tempo", TEMPO_ADVERBS[scene.tempo][0]),
            ("ground", GROUND_PHRASES[scene.ground][0]),
        ]  # fmt: skip
    return [
        ("", "a"), ("pitch", scene.pitch), ("thing", scene.thing), ("", "sounding"),
        ("count", f"{TIMES_WORDS[scene.count][0]},"), ("tempo", TEMPO_ADJECTIVES[scene.tempo][0]),
        ("", "and"), ("loudness", scene.loudness),
    ]  # fmt: skip


def describe(scene: Scene, rng: random.Random, omit: Collection[str] = ()) -> str:
    """Return one of the many wordings of a scene.

    Args:
        scene: what to describe.
        rng: where the choices come from.
        omit: attributes to leave unsaid ("thing" cannot be omitted).

    """
    said = {name: name not in omit for name in (*_NAMES,)}
    if isinstance(scene, Look):
        head = _noun_phrase(scene, rng, said, scene.count if said["count"] else 1)
        tails = []
        if scene.place is not None and said["place"]:
            tails.append(rng.choice(PLACE_PHRASES[scene.place]))
        if said["ground"]:
            tails.append(rng.choice(GROUND_PHRASES[scene.ground]))
        return _arranged(head, tails, rng)
    if isinstance(scene, Clip):
        head = _noun_phrase(scene, rng, said, 1)
        movement = []
        if said["motion"]:
            movement.append(rng.choice(MOTION_PHRASES[scene.motion]))
        if said["tempo"]:
            movement.append(rng.choice(TEMPO_ADVERBS[scene.tempo]))
        if movement:
            head = f"{head} {' '.join(movement)}"
        return _arranged(head, [rng.choice(GROUND_PHRASES[scene.ground])] if said["ground"] else [], rng)
    return _describe_sound(scene, rng, said)


def phrase(name: str, value: str | int | None, rng: random.Random, *, heard: bool = False) -> str:
    """Return a caption that states one attribute and nothing else.

    Args:
        name: the attribute, as in the fields of the scenes.
        value: its value; None only for ``place``, where it means several things.
        rng: where the choice among wordings comes from.
        heard: for ``count``: whether the scene is a sound.

    """
    if name == "count" and heard:
        return f"sounding {rng.choice(TIMES_WORDS[int(value or 1)])}"
    if name == "place" and value is None:
        return "several places"
    table = _PHRASES[name]
    word = rng.choice(table[value])  # type: ignore[index]
    patterns = {
        "thing": f"a {word}", "colour": f"something {word}", "size": f"something {word}",
        "count": f"{word} of them", "tempo": f"going {word}", "pitch": f"a {word} sound",
        "loudness": f"a {word} sound",
    }  # fmt: skip
    return patterns.get(name, word)


def read_text(text: str) -> dict[str, str | int]:
    """Read the attributes that a text states, in any wording of this grammar.

    What the text does not state is missing from the result; where a text states an attribute
    twice, the first statement counts.
    """
    words = " " + re.sub(r"[^a-z0-9 ]+", " ", text.lower()) + " "
    words = re.sub(r"\s+", " ", words)
    found: dict[str, str | int] = {}

    def take(name: str, table: Mapping[str, Sequence[str]] | Mapping[int, Sequence[str]]) -> None:
        nonlocal words
        hits = [
            (words.find(f" {phrase} "), -len(phrase), value, phrase)
            for value, phrases in table.items()
            for phrase in phrases
            if f" {phrase} " in words
        ]
        if hits:
            _, _, value, phrase = min(hits)
            found[name] = value
            words = words.replace(f" {phrase} ", " ; ", 1)

    plural = {thing: tuple(PLURALS[w] for w in forms) for thing, forms in THING_WORDS.items()}
    take("ground", GROUND_PHRASES)
    take("motion", MOTION_PHRASES)
    take("tempo", {tempo: (*TEMPO_ADVERBS[tempo], *TEMPO_ADJECTIVES[tempo]) for tempo in TEMPO_ADVERBS})
    take("place", PLACE_PHRASES)
    take("times", TIMES_WORDS)
    take("number", COUNT_WORDS)
    take("thing", {thing: (*THING_WORDS[thing], *plural[thing]) for thing in THING_WORDS})
    take("colour", COLOUR_WORDS)
    take("size", SIZE_WORDS)
    take("pitch", PITCH_WORDS)
    take("loudness", LOUDNESS_WORDS)
    times, number = found.pop("times", None), found.pop("number", None)
    count = times if times is not None else number
    found["count"] = count if count is not None else 1
    return found


def with_typos(text: str, rng: random.Random) -> str:
    """Swap two neighbouring letters inside one longer word of the text."""
    words = text.split(" ")
    long_ones = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not long_ones:
        return text
    chosen = rng.choice(long_ones)
    word = words[chosen]
    at = rng.randrange(1, len(word) - 2)
    words[chosen] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


_PHRASES: Mapping[str, Mapping[str, Sequence[str]] | Mapping[int, Sequence[str]]] = {
    "thing": THING_WORDS,
    "colour": COLOUR_WORDS,
    "size": SIZE_WORDS,
    "count": COUNT_WORDS,
    "place": PLACE_PHRASES,
    "ground": GROUND_PHRASES,
    "motion": MOTION_PHRASES,
    "tempo": TEMPO_ADVERBS,
    "pitch": PITCH_WORDS,
    "loudness": LOUDNESS_WORDS,
}
_NAMES = (
    "thing", "colour", "size", "count", "place", "ground",
    "motion", "tempo", "pitch", "loudness",
)  # fmt: skip


def _noun_phrase(scene: Look | Clip, rng: random.Random, said: Mapping[str, bool], count: int) -> str:
    noun = rng.choice(THING_WORDS[scene.thing])
    if count > 1:
        noun = PLURALS[noun]
    size = rng.choice(SIZE_WORDS[scene.size]) if said["size"] else ""
    colour = rng.choice(COLOUR_WORDS[scene.colour]) if said["colour"] else ""
    if size and colour and rng.random() < 0.12:
        adjectives, after = "", f" that {'is' if count == 1 else 'are'} {size} and {colour}"
    elif size and colour and rng.random() < 0.12:
        adjectives, after = f"{colour} {size} ", ""
    else:
        adjectives, after = "".join(f"{word} " for word in (size, colour) if word), ""
    if count > 1:
        number = rng.choice(COUNT_WORDS[count])
    else:
        article = "an" if f"{adjectives}{noun}"[0] in "aeiou" else "a"
        number = rng.choice((article, article, article, "one"))
    return f"{number} {adjectives}{noun}{after}"


def _describe_sound(scene: Sound, rng: random.Random, said: Mapping[str, bool]) -> str:
    noun = rng.choice(THING_WORDS[scene.thing])
    pitch = rng.choice(PITCH_WORDS[scene.pitch]) if said["pitch"] else ""
    loudness = rng.choice(LOUDNESS_WORDS[scene.loudness]) if said["loudness"] else ""
    tempo = rng.choice(TEMPO_ADJECTIVES[scene.tempo]) if said["tempo"] else ""
    times = rng.choice(TIMES_WORDS[scene.count]) if said["count"] else ""
    style = rng.randrange(3)
    if style == 0:
        head = " ".join(word for word in ("a", pitch, noun) if word)
        head += " sounding" + (f" {times}" if times else "")
        tail = " and ".join(word for word in (tempo, loudness) if word)
        return f"{head}, {tail}" if tail else head
    if style == 1:
        adjectives = [word for word in (loudness, tempo, pitch) if word]
        rng.shuffle(adjectives)
        head = " ".join(["a", *adjectives, noun])
        return f"{head} {times}" if times else head
    head = f"the {' '.join([word for word in (loudness, pitch) if word] + ['sound'])} of a {noun}"
    tail = " ".join(word for word in (times, rng.choice(TEMPO_ADVERBS[scene.tempo]) if tempo else "") if word)
    return f"{head} {tail}" if tail else head


def _arranged(head: str, tails: list[str], rng: random.Random) -> str:
    rng.shuffle(tails)
    if tails and rng.random() < 0.15:
        return f"{tails[0]}, {' '.join([head, *tails[1:]])}"
    return " ".join([head, *tails])
