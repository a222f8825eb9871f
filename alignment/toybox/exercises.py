"""What is asked in Toybox, and the one right answer: an exercise for every direction.

An exercise is a conversation that ends with a person's turn, and the answer that is right. The
same generator feeds training and evaluation; only the sampler (which scenes) and the seed differ.

A part of a turn is a text or a scene. A scene in a person's turn is a medium they show; a scene
in the agent's turn is a medium to be made, and the text right before it is its caption.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from alignment.toybox import changes, talk, wordings
from alignment.toybox.grammar import (
    MOTION_PHRASES,
    SIZE_WORDS,
    TEMPO_ADVERBS,
    THING_WORDS,
    TYPICAL_COLOUR,
    caption,
    describe,
    with_typos,
)
from alignment.toybox.phrases import Phrases, Speaker
from alignment.toybox.world import (
    MOTIONS,
    PITCH_OF_SIZE,
    SIZE_OF_PITCH,
    SIZES,
    TEMPOS,
    THINGS,
    Clip,
    Look,
    Scene,
    Sound,
    changed,
    sample_clip,
    sample_look,
    sample_sound,
)

Part = str | Scene


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: who speaks, and texts and scenes in order."""

    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Exercise:
    """A conversation, its right answer, and which attributes of each part of the answer are judged.

    ``judged`` has one entry for each scene of the answer; for an answer in words alone it has one
    entry for the text when the text states a scene (``stated``), and is empty for small talk.
    """

    direction: str
    turns: tuple[Turn, ...]
    answer: tuple[Part, ...]
    judged: tuple[tuple[str, ...], ...]
    stated: Scene | None = None

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The scenes of the answer, in order."""
        return tuple(part for part in self.answer if not isinstance(part, str))

    @property
    def held_out(self) -> bool:
        """True when any scene of the conversation or of its answer is held out of training."""
        parts = [part for turn in self.turns for part in turn.parts] + list(self.answer)
        stated = [self.stated] if self.stated is not None else []
        return any(part.held_out for part in (*parts, *stated) if not isinstance(part, str))


class Scenes(Protocol):
    """Where an exercise takes its scenes from."""

    def look(self, **fixed: str | int) -> Look:
        """Return a picture with the given attributes."""

    def clip(self, **fixed: str) -> Clip:
        """Return a video with the given attributes."""

    def sound(self, **fixed: str | int) -> Sound:
        """Return a sound with the given attributes."""


@dataclass(frozen=True)
class FreshScenes:
    """Scenes drawn from the whole world, seen or held out."""

    rng: random.Random
    held_out: bool = False

    def look(self, **fixed: str | int) -> Look:
        """Return a random picture of this split."""
        return sample_look(self.rng, held_out=self.held_out, **fixed)

    def clip(self, **fixed: str) -> Clip:
        """Return a random video of this split."""
        return sample_clip(self.rng, held_out=self.held_out, **fixed)

    def sound(self, **fixed: str | int) -> Sound:
        """Return a random sound of this split."""
        return sample_sound(self.rng, held_out=self.held_out, **fixed)


LOOK_JUDGED = ("thing", "colour", "size", "count", "place", "ground")
CLIP_JUDGED = ("thing", "colour", "size", "ground", "motion", "tempo")
SOUND_JUDGED = ("thing", "pitch", "count", "tempo", "loudness")


def judged(scene: Scene, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the attributes of a scene that are judged in full directions."""
    names = (
        LOOK_JUDGED if isinstance(scene, Look) else CLIP_JUDGED if isinstance(scene, Clip) else SOUND_JUDGED
    )
    absent = ("place",) if isinstance(scene, Look) and scene.count > 1 else ()
    return tuple(name for name in names if name not in without and name not in absent)


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


def make(direction: str, rng: random.Random, scenes: Scenes, *, reserved_wordings: bool = False) -> Exercise:
    """Return one exercise of a direction, said in the words of training or in those reserved for tests.

    Raises:
        ValueError: for a direction that does not exist; the message lists those that do.

    """
    try:
        build = DIRECTIONS[direction]
    except KeyError:
        raise ValueError(f"direction is {direction!r}; expected one of {', '.join(DIRECTIONS)}.") from None
    speaker = Speaker.drawn_from(rng, reserved=reserved_wordings)
    return replace(build(speaker, scenes), direction=direction)


def _single(
    asked: tuple[Part, ...], scene: Scene, names: tuple[str, ...], before: tuple[Turn, ...] = ()
) -> Exercise:
    return Exercise("", (*before, Turn("user", asked)), (caption(scene), scene), (names,))


def _said(request: str, rng: Speaker) -> str:
    if rng.random() < (0.04 if rng.reserved else 0.15):
        request = with_typos(request, rng)
    if request.endswith("?"):
        return request if rng.random() < 0.7 else request[:-1]
    return request + rng.say(wordings.POLITE_ENDINGS)


def _omitted(rng: Speaker, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a person leaves unsaid: mostly nothing, sometimes several attributes."""
    if rng.random() < 0.7:
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


def _wanted(rng: Speaker, draw: Callable[[], Scene], names: tuple[str, ...]) -> tuple[Scene, tuple[str, ...]]:
    while True:
        scene, omit = draw(), _omitted(rng, names)
        completed = _unsaid(scene, omit)
        if completed is not None and completed.held_out is scene.held_out:
            return completed, omit


_IMPERATIVES: Mapping[type, Phrases] = {
    Look: wordings.DRAW,
    Clip: wordings.FILM,
    Sound: wordings.PLAY,
}


def _asking(scene: Scene, rng: Speaker) -> str:
    """Return how a request for a scene begins; what is wanted follows."""
    if rng.random() < 0.3:
        return rng.say(wordings.WISHES[type(scene)])
    return rng.say(wordings.OPENINGS) + rng.say(_IMPERATIVES[type(scene)])


def _wanted_look(rng: Speaker, scenes: Scenes) -> tuple[Scene, str]:
    scene, omit = _wanted(rng, scenes.look, ("colour", "size", "place", "ground"))
    return scene, f"{_asking(scene, rng)} {describe(scene, rng, omit)}"


def _wanted_clip(rng: Speaker, scenes: Scenes) -> tuple[Scene, str]:
    scene, omit = _wanted(rng, scenes.clip, ("colour", "size", "ground", "motion", "tempo"))
    return scene, f"{_asking(scene, rng)} {describe(scene, rng, omit)}"


def _wanted_sound(rng: Speaker, scenes: Scenes) -> tuple[Scene, str]:
    scene, omit = _wanted(rng, scenes.sound, ("pitch", "count", "tempo", "loudness"))
    return scene, f"{_asking(scene, rng)} {describe(scene, rng, omit)}"


def _text_to_image(rng: Speaker, scenes: Scenes) -> Exercise:
    scene, request = _wanted_look(rng, scenes)
    return _single((_said(request, rng),), scene, judged(scene))


def _text_to_video(rng: Speaker, scenes: Scenes) -> Exercise:
    scene, request = _wanted_clip(rng, scenes)
    return _single((_said(request, rng),), scene, judged(scene))


def _text_to_audio(rng: Speaker, scenes: Scenes) -> Exercise:
    scene, request = _wanted_sound(rng, scenes)
    return _single((_said(request, rng),), scene, judged(scene))


def _shown(rng: Speaker, text: str, scene: Scene) -> tuple[Part, ...]:
    return (scene, text) if rng.random() < 0.7 else (text, scene)


def _to_text(rng: Speaker, scene: Scene) -> Exercise:
    words = wordings.WHAT_IS_HEARD if isinstance(scene, Sound) else wordings.WHAT_IS_SEEN
    asked = _shown(rng, _said(rng.say(words), rng), scene)
    return Exercise("", (Turn("user", asked),), (caption(scene),), (judged(scene),), stated=scene)


def _image_to_audio(rng: Speaker, scenes: Scenes) -> Exercise:
    while True:
        look = scenes.look()
        sound = typical_sound(look.thing, look.size, look.count)
        if sound.held_out is look.held_out or look.held_out:
            break
    text = rng.say(wordings.IMAGE_TO_AUDIO)
    return _single(_shown(rng, _said(text, rng), look), sound, ("thing", "pitch", "count"))


def _audio_to_image(rng: Speaker, scenes: Scenes) -> Exercise:
    while True:
        sound = scenes.sound()
        look = typical_look(sound.thing, SIZE_OF_PITCH[sound.pitch], sound.count)
        if look.held_out is sound.held_out or sound.held_out:
            break
    text = rng.say(wordings.AUDIO_TO_IMAGE)
    return _single(_shown(rng, _said(text, rng), sound), look, ("thing", "size", "count"))


def _image_to_video(rng: Speaker, scenes: Scenes) -> Exercise:
    look = scenes.look(count=1)
    clip = Clip(look.thing, look.colour, look.size, look.ground, rng.choice(MOTIONS), rng.choice(TEMPOS))
    motion, tempo = rng.choice(MOTION_PHRASES[clip.motion]), rng.choice(TEMPO_ADVERBS[clip.tempo])
    text = rng.say(wordings.IMAGE_TO_VIDEO).format(motion=motion, tempo=tempo)
    return _single(_shown(rng, _said(text, rng), look), clip, judged(clip))


def _video_to_image(rng: Speaker, scenes: Scenes) -> Exercise:
    clip = scenes.clip()
    look = Look(clip.thing, clip.colour, clip.size, 1, "middle", clip.ground)
    text = rng.say(wordings.VIDEO_TO_IMAGE)
    return _single(_shown(rng, _said(text, rng), clip), look, ("thing", "colour", "size", "ground"))


def _video_to_audio(rng: Speaker, scenes: Scenes) -> Exercise:
    while True:
        clip = scenes.clip()
        sound = typical_sound(clip.thing, clip.size, 1, clip.tempo)
        if sound.held_out is clip.held_out or clip.held_out:
            break
    text = rng.say(wordings.VIDEO_TO_AUDIO)
    return _single(_shown(rng, _said(text, rng), clip), sound, ("thing", "pitch", "tempo"))


def _audio_to_video(rng: Speaker, scenes: Scenes) -> Exercise:
    while True:
        sound = scenes.sound()
        clip = typical_clip(sound.thing, SIZE_OF_PITCH[sound.pitch], sound.tempo)
        if clip.held_out is sound.held_out or sound.held_out:
            break
    text = rng.say(wordings.AUDIO_TO_VIDEO)
    return _single(_shown(rng, _said(text, rng), sound), clip, ("thing", "size", "tempo"))


def _edit(rng: Speaker, draw: Callable[[], Scene]) -> Exercise:
    while True:
        scene = draw()
        result, text = changes.ask_for_change(scene, rng)
        if result.held_out is scene.held_out or scene.held_out:
            return _single(_shown(rng, _said(text, rng), scene), result, judged(result))


def _beyond_words(rng: Speaker, scenes: Scenes) -> Exercise:
    """Ask for the very same medium again; its shade, spot and tuning are measured, not named."""
    scene: Scene = scenes.sound() if rng.random() < 0.4 else scenes.look(count=1)
    if isinstance(scene, Sound):
        text = rng.say(wordings.SAME_SOUND_AGAIN)
        return _single(_shown(rng, _said(text, rng), scene), scene, ("thing", "fundamental"))
    text = rng.say(wordings.SAME_PICTURE_AGAIN)
    return _single(_shown(rng, _said(text, rng), scene), scene, ("thing", "hue", "centre"))


def _image_audio_to_video(rng: Speaker, scenes: Scenes) -> Exercise:
    look, sound = scenes.look(count=1), scenes.sound()
    clip = Clip(look.thing, look.colour, look.size, look.ground, "still", sound.tempo)
    text = _said(rng.say(wordings.IMAGE_AUDIO_TO_VIDEO), rng)
    asked: tuple[Part, ...] = (look, sound, text) if rng.random() < 0.7 else (text, look, sound)
    return _single(asked, clip, ("thing", "colour", "size", "ground", "tempo"))


def _text_to_many(rng: Speaker, scenes: Scenes) -> Exercise:
    kinds = list(rng.choice((("image", "audio"), ("video", "audio"), ("image", "video", "audio"))))
    rng.shuffle(kinds)
    wanted = {"image": _wanted_look, "video": _wanted_clip, "audio": _wanted_sound}
    requests, made = [], []
    for kind in kinds:
        scene, request = wanted[kind](rng, scenes)
        made.append(scene)
        requests.append(request)
    joint = rng.say(wordings.JOINTS)
    answer = tuple(part for scene in made for part in (caption(scene), scene))
    asked = _said(joint.join(requests), rng)
    return Exercise("", (Turn("user", (asked,)),), answer, tuple(judged(scene) for scene in made))


def _about_thing(rng: Speaker, scenes: Scenes) -> Exercise:
    """Ask for picture, video and sound of one thing at once, naming it once."""
    while True:
        thing = rng.choice(THINGS)
        size = rng.choice(SIZES)
        made: list[Scene] = [typical_look(thing, size), typical_sound(thing, size)]
        if not any(scene.held_out for scene in made):
            break
    word = f"{rng.choice(SIZE_WORDS[size])} {rng.choice(THING_WORDS[thing])}"
    text = rng.say(wordings.ABOUT_THING).format(thing=word)
    answer = tuple(part for scene in made for part in (caption(scene), scene))
    return Exercise("", (Turn("user", (_said(text, rng),)),), answer, tuple(judged(scene) for scene in made))


def _and_its_sound(rng: Speaker, scenes: Scenes) -> Exercise:
    """Ask for a picture or a video in every detail, and for its sound along with it."""
    while True:
        scene, request = rng.choice((_wanted_look, _wanted_clip))(rng, scenes)
        assert not isinstance(scene, Sound)
        sound, names = _sound_of(scene)
        if sound.held_out is scene.held_out or scene.held_out:
            break
    answer = (caption(scene), scene, caption(sound), sound)
    asked = _said(request + rng.say(wordings.AND_ITS_SOUND), rng)
    return Exercise("", (Turn("user", (asked,)),), answer, (judged(scene), names))


def _sound_of(scene: Look | Clip) -> tuple[Sound, tuple[str, ...]]:
    """Return how what is shown sounds, and the attributes of that sound which the scene decides."""
    count = scene.count if isinstance(scene, Look) else 1
    tempo = scene.tempo if isinstance(scene, Clip) else "slow"
    names = ("thing", "pitch", "count" if isinstance(scene, Look) else "tempo")
    return typical_sound(scene.thing, scene.size, count, tempo), names


def _conversation(rng: Speaker, scenes: Scenes) -> Exercise:
    while True:
        wanted = rng.choice((_wanted_look, _wanted_look, _wanted_clip, _wanted_sound))
        scene, request = wanted(rng, scenes)
        turns = [Turn("user", (_said(request, rng),)), Turn("assistant", (caption(scene), scene))]
        middle, text = changes.ask_for_change(scene, rng)
        turns += [Turn("user", (_said(text, rng),)), Turn("assistant", (caption(middle), middle))]
        last, text, names = _follow_up(middle, rng)
        found = [scene.held_out, middle.held_out, last.held_out]
        if len(set(found)) == 1 or scene.held_out:
            break
    if rng.random() < 0.15:
        turns = [Turn("user", ("hello",)), Turn("assistant", (talk.GREETING,)), *turns]
    return Exercise("", (*turns, Turn("user", (_said(text, rng),))), (caption(last), last), (names,))


def _new_subject(rng: Speaker, scenes: Scenes) -> Exercise:
    """Ask for something that has nothing to do with what was made before."""
    wanted = (_wanted_look, _wanted_clip, _wanted_sound)
    while True:
        made = [rng.choice(wanted)(rng, scenes) for _ in range(rng.choice((2, 2, 3)))]
        if len({scene.held_out for scene, _ in made}) == 1:
            break
    turns: list[Turn] = []
    for scene, request in made[:-1]:
        turns += [Turn("user", (_said(request, rng),)), Turn("assistant", (caption(scene), scene))]
    scene, request = made[-1]
    return _single((_said(request, rng),), scene, judged(scene), tuple(turns))


def _follow_up(scene: Scene, rng: Speaker) -> tuple[Scene, str, tuple[str, ...]]:
    if rng.random() < 0.5:
        last, text = changes.ask_for_change(scene, rng)
        return last, text, judged(last)
    if isinstance(scene, Sound):
        look = typical_look(scene.thing, SIZE_OF_PITCH[scene.pitch], scene.count)
        return look, rng.say(wordings.NOW_AS_PICTURE_OF_SOUND), ("thing", "size", "count")
    if rng.random() < 0.6:
        sound, names = _sound_of(scene)
        return sound, rng.say(wordings.NOW_AS_SOUND), names
    if isinstance(scene, Look):
        clip = Clip(scene.thing, scene.colour, scene.size, scene.ground, rng.choice(MOTIONS), "slow")
        motion = rng.choice(MOTION_PHRASES[clip.motion])
        return clip, rng.say(wordings.NOW_AS_VIDEO).format(motion=motion), judged(clip, ("tempo",))
    look = Look(scene.thing, scene.colour, scene.size, 1, "middle", scene.ground)
    return look, rng.say(wordings.NOW_AS_PICTURE), ("thing", "colour", "size", "ground")


def _words_only(rng: Speaker, scenes: Scenes) -> Exercise:
    kind = rng.randrange(5)
    if kind == 4:
        return Exercise("", (Turn("user", (talk.noise(rng),)),), (talk.ELSEWHERE,), ())
    if kind == 0:
        questions, answer = rng.choice(talk.TALK)
        return Exercise("", (Turn("user", (_said(rng.say(questions), rng),)),), (answer,), ())
    if kind == 1:
        thing = rng.choice(THINGS)
        word = rng.choice(THING_WORDS[thing])
        text = rng.say(talk.TYPICAL_COLOUR_QUESTIONS).format(thing=word)
        answer = talk.TYPICAL_COLOUR_ANSWER.format(thing=thing, colour=TYPICAL_COLOUR[thing])
        return Exercise("", (Turn("user", (text,)),), (answer,), ())
    scene: Scene = rng.choice((scenes.look, scenes.clip, scenes.sound))()
    if kind == 2:
        made = Turn("assistant", (caption(scene), scene))
        before = (Turn("user", (f"{_asking(scene, rng)} {describe(scene, rng)}",)), made)
        question, answer = talk.ask_about(scene, rng)
        return Exercise("", (*before, Turn("user", (question,))), (answer,), ())
    question, answer = talk.ask_about(scene, rng)
    return Exercise("", (Turn("user", _shown(rng, question, scene)),), (answer,), ())


def _decision(rng: Speaker, scenes: Scenes) -> Exercise:
    return rng.choice(_DECIDED)(rng, scenes)


_DECIDED: tuple[Callable[[Speaker, Scenes], Exercise], ...] = (
    _words_only,
    _words_only,
    _text_to_image,
    _text_to_video,
    _text_to_audio,
    _text_to_many,
    _about_thing,
    _and_its_sound,
    _image_to_audio,
    _image_to_video,
    _conversation,
)


DIRECTIONS: Mapping[str, Callable[[Speaker, Scenes], Exercise]] = {
    "text-to-image": _text_to_image,
    "text-to-video": _text_to_video,
    "text-to-audio": _text_to_audio,
    "image-to-text": lambda rng, scenes: _to_text(rng, scenes.look()),
    "video-to-text": lambda rng, scenes: _to_text(rng, scenes.clip()),
    "audio-to-text": lambda rng, scenes: _to_text(rng, scenes.sound()),
    "image-to-audio": _image_to_audio,
    "audio-to-image": _audio_to_image,
    "image-to-video": _image_to_video,
    "video-to-image": _video_to_image,
    "video-to-audio": _video_to_audio,
    "audio-to-video": _audio_to_video,
    "text+image-to-image": lambda rng, scenes: _edit(rng, scenes.look),
    "text+audio-to-audio": lambda rng, scenes: _edit(rng, scenes.sound),
    "text+video-to-video": lambda rng, scenes: _edit(rng, scenes.clip),
    "image+audio-to-video": _image_audio_to_video,
    "text-to-many": _text_to_many,
    "conversation": _conversation,
    "new-subject": _new_subject,
    "decision": _decision,
    "beyond-words": _beyond_words,
}
