"""How people ask for a scene: in full, leaving things unsaid, with typos, or for what there is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from alignment.toybox import talk, wordings
from alignment.toybox.describing import described
from alignment.toybox.exercise import Part, Scenes
from alignment.toybox.grammar import SIZE_WORDS, TYPICAL_COLOUR, describe, with_typos
from alignment.toybox.phrases import Phrases, Speaker
from alignment.toybox.world import PITCH_OF_SIZE, Clip, Look, Scene, Sound, changed

BARE_SHARE = 0.08
"""Of the requests for pictures, how many say what is to be seen, and nothing else."""
MOVING_SHARE, SOUND_VERB_SHARE = 0.12, 0.12
"""Of the requests for videos and sounds, how many say so by how things move, or by a verb of the thing."""
FILLER_SHARE, TYPO_SHARE = 0.1, 0.15
"""Of what training says, how much has words around it that add nothing, or typos."""
_RESERVED_SHARE = 0.3
"""How much of these shares there is in what is reserved for tests."""


def typical_look(thing: str, size: str = "medium", count: int = 1) -> Look:
    """Return the picture that is drawn when only this much was said."""
    place = "middle" if count == 1 else None
    colour = TYPICAL_COLOUR[thing]
    return Look(thing, colour, size, count, place, "grey" if colour == "white" else "white")


def typical_clip(thing: str, size: str = "medium", tempo: str = "slow") -> Clip:
    """Return the video that is made when only this much was said."""
    colour = TYPICAL_COLOUR[thing]
    return Clip(thing, colour, size, "grey" if colour == "white" else "white", "still", tempo)


def typical_sound(thing: str, size: str = "medium", count: int = 1, tempo: str = "slow") -> Sound:
    """Return the sound that is made when only this much was said."""
    return Sound(thing, PITCH_OF_SIZE[size], count, tempo, "loud")


def animated(look: Look) -> Clip:
    """Return the video of a picture when nothing is said of how it moves."""
    return Clip(look.thing, look.colour, look.size, look.ground, "still", "slow")


def sound_of(scene: Look | Clip) -> tuple[Sound, tuple[str, ...]]:
    """Return how what is shown sounds, and the attributes of that sound which the scene decides."""
    count = scene.count if isinstance(scene, Look) else 1
    tempo = scene.tempo if isinstance(scene, Clip) else "slow"
    names = ("thing", "pitch", "count" if isinstance(scene, Look) else "tempo")
    return typical_sound(scene.thing, scene.size, count, tempo), names


def said(request: str, rng: Speaker, filled: float = FILLER_SHARE) -> str:
    """Return a request as it is typed: politely or not, with typos and with words that add nothing."""
    share = _RESERVED_SHARE if rng.reserved else 1.0
    is_filled = rng.random() < share * filled
    if is_filled and (request.endswith("?") or rng.random() < 0.5):
        request = rng.say(wordings.FILLER_BEFORE) + request
    elif is_filled:
        request += rng.say(wordings.FILLER_AFTER)
    if rng.random() < share * TYPO_SHARE:
        request = with_typos(request, rng)
    if is_filled:
        return request
    if request.endswith("?"):
        return request if rng.random() < 0.7 else request[:-1]
    return request + rng.say(wordings.POLITE_ENDINGS)


def _omitted(rng: Speaker, names: tuple[str, ...], share: float) -> tuple[str, ...]:
    """Return what a person leaves unsaid: in ``share`` of all requests some of the attributes."""
    if rng.random() >= share:
        return ()
    return tuple(name for name in names if rng.random() < 0.6)


def _unsaid(scene: Scene, omit: tuple[str, ...]) -> Scene | None:
    """Return the scene with everything unsaid at its typical value, or None if there is none."""
    values: dict[str, str | int | None] = {}
    if isinstance(scene, Look):
        typical: Scene = typical_look(scene.thing)
    elif isinstance(scene, Clip):
        typical = typical_clip(scene.thing)
    else:
        typical = typical_sound(scene.thing)
    for name in omit:
        if name == "place" and isinstance(scene, Look) and scene.count > 1:
            continue
        values[name] = getattr(typical, name)
    if values.get("ground") == "white" and values.get("colour", getattr(scene, "colour", "")) == "white":
        values["ground"] = "grey"
    if values.get("ground") == "grey" and values.get("colour", getattr(scene, "colour", "")) != "white":
        values["ground"] = "white"
    return changed(scene, **values)


_MAY_BE_UNSAID: Mapping[type, tuple[str, ...]] = {
    Look: ("colour", "size", "place", "ground"),
    Clip: ("colour", "size", "ground", "motion", "tempo"),
    Sound: ("pitch", "count", "tempo", "loudness"),
}


def _wanted(
    rng: Speaker, draw: Callable[[], Scene], names: tuple[str, ...], omitting: float = 0.3
) -> tuple[Scene, tuple[str, ...]]:
    while True:
        scene, omit = draw(), _omitted(rng, names, omitting)
        completed = _unsaid(scene, omit)
        if completed is not None and completed.held_out is scene.held_out:
            return completed, omit


_IMPERATIVES: Mapping[type, Phrases] = {
    Look: wordings.DRAW,
    Clip: wordings.FILM,
    Sound: wordings.PLAY,
}


def asking(scene: Scene, rng: Speaker) -> str:
    """Return how a request for a scene begins; what is wanted follows."""
    if rng.random() < 0.3:
        return rng.say(wordings.WISHES[type(scene)])
    return rng.say(wordings.OPENINGS) + rng.say(_IMPERATIVES[type(scene)])


def wanted_look(rng: Speaker, scenes: Scenes, *, first: bool = True) -> tuple[Scene, str]:
    """Return a picture and a request for it, which says that it is one unless it stands ``first``."""
    bare = first and rng.random() < BARE_SHARE
    scene, omit = _wanted(rng, scenes.look, _MAY_BE_UNSAID[Look], 0.8 if bare else 0.3)
    words = described(scene, rng, omit)
    if not bare:
        return scene, f"{asking(scene, rng)} {words}"
    return scene, words.removeprefix("a ").removeprefix("an ") if rng.random() < 0.4 else words


def wanted_clip(rng: Speaker, scenes: Scenes) -> tuple[Scene, str]:
    """Return a video and a request for it."""
    scene, omit = _wanted(rng, scenes.clip, _MAY_BE_UNSAID[Clip])
    moving = isinstance(scene, Clip) and scene.motion != "still" and "motion" not in omit
    wish = moving and rng.random() < MOVING_SHARE
    opening = rng.say(wordings.MOVING_WISH) if wish else asking(scene, rng)
    return scene, f"{opening} {described(scene, rng, omit)}"


def wanted_sound(rng: Speaker, scenes: Scenes) -> tuple[Scene, str]:
    """Return a sound and a request for it."""
    scene, omit = _wanted(rng, scenes.sound, _MAY_BE_UNSAID[Sound])
    verb = rng.random() < SOUND_VERB_SHARE
    opening = rng.say(wordings.SOUND_VERBS[scene.thing]) if verb else asking(scene, rng)
    return scene, f"{opening} {described(scene, rng, omit)}"


def wanted_list(rng: Speaker, draws: Sequence[Callable[[], Scene]]) -> tuple[list[Scene], str]:
    """Return several scenes, and one request that lists them.

    Args:
        rng: who speaks.
        draws: for each scene, where it comes from.

    """
    found: list[Scene] = []
    items: list[str] = []
    for draw in draws:
        scene, omit = _wanted(rng, draw, _MAY_BE_UNSAID[type(draw())])
        words = described(scene, rng, omit)
        while ", " in words:
            words = describe(scene, rng, omit)
        found.append(scene)
        items.append(words)
    if len({type(scene) for scene in found}) == 1 and rng.random() < 0.7:
        opening = asking(found[0], rng)
    else:
        wished = rng.random() < 0.5
        verb = rng.choice(wordings.LISTED_WISHES if wished else wordings.LISTED_IMPERATIVES)
        opening = verb if wished else f"{rng.say(wordings.OPENINGS)}{verb}"
        nouns = [rng.choice(wordings.NOUNS[type(scene)]) for scene in found]
        items = [f"{noun} {item}" for noun, item in zip(nouns, items, strict=True)]
    between, last = rng.choice(wordings.BETWEEN_LISTED)
    return found, f"{opening} {between.join(items[:-1])}{last}{items[-1]}".strip()


def asking_what(rng: Speaker, scene: Scene) -> str:
    """Return a question that a caption of the scene answers."""
    words = wordings.WHAT_IS_HEARD if isinstance(scene, Sound) else wordings.WHAT_IS_SEEN
    return said(rng.say(words), rng)


def asking_for_unknown(rng: Speaker, scenes: Scenes) -> str:
    """Return a request for a thing that is not in the toy box."""
    scene = rng.choice((scenes.look, scenes.look, scenes.clip, scenes.sound))()
    words = [rng.say(talk.UNKNOWN)]
    if not isinstance(scene, Sound):
        words = [w for w in (rng.choice(SIZE_WORDS[scene.size]), scene.colour) if rng.random() < 0.4] + words
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{asking(scene, rng)} {rng.choice((article, article, 'the', 'my'))} {' '.join(words)}"


def shown(rng: Speaker, text: str, scene: Scene) -> tuple[Part, ...]:
    """Return a text and what is shown with it, in either order."""
    return (scene, text) if rng.random() < 0.7 else (text, scene)
