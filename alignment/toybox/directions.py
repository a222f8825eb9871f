"""What is asked in Toybox, and the one right answer: an exercise for every direction.

The same generator feeds training and evaluation; only the sampler (which scenes) and the seed differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from alignment.toybox import changes, wordings
from alignment.toybox.conversations import conversation, new_subject, words_only
from alignment.toybox.describing import thing_name
from alignment.toybox.exercise import Exercise, Part, Scenes, Turn, judged, single
from alignment.toybox.grammar import MOTION_PHRASES, SIZE_WORDS, TEMPO_ADVERBS, caption
from alignment.toybox.phrases import Speaker
from alignment.toybox.requests import (
    animated,
    asking_what,
    said,
    shown,
    sound_of,
    typical_clip,
    typical_look,
    typical_sound,
    wanted_clip,
    wanted_list,
    wanted_look,
    wanted_sound,
)
from alignment.toybox.world import MOTIONS, SIZE_OF_PITCH, SIZES, TEMPOS, THINGS, Clip, Look, Scene, Sound

ALIKE_SHARE = 0.2
"""Of the requests for several media, those for several of one kind; in training alone."""
SAME_VIDEO_SHARE = 0.15
"""Of the requests for the very same once more, those for a video; in training alone."""
LISTED_SHARE = 0.35
"""Of the requests for several media, those that list them after one verb; in training alone."""
ANOTHER_SHARE = 0.3
"""Of the requests for something and its sound, those with another wish; in training alone."""


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


def _text_to_image(rng: Speaker, scenes: Scenes) -> Exercise:
    scene, request = wanted_look(rng, scenes)
    return single((said(request, rng),), scene, judged(scene))


def _text_to_video(rng: Speaker, scenes: Scenes) -> Exercise:
    scene, request = wanted_clip(rng, scenes)
    return single((said(request, rng),), scene, judged(scene))


def _text_to_audio(rng: Speaker, scenes: Scenes) -> Exercise:
    scene, request = wanted_sound(rng, scenes)
    return single((said(request, rng),), scene, judged(scene))


def _to_text(rng: Speaker, scene: Scene) -> Exercise:
    asked = shown(rng, asking_what(rng, scene), scene)
    return Exercise("", (Turn("user", asked),), (caption(scene),), (judged(scene),), stated=scene)


def _image_to_audio(rng: Speaker, scenes: Scenes) -> Exercise:
    while True:
        look = scenes.look()
        sound = typical_sound(look.thing, look.size, look.count)
        if sound.held_out is look.held_out or look.held_out:
            break
    text = rng.say(wordings.IMAGE_TO_AUDIO)
    return single(shown(rng, said(text, rng), look), sound, ("thing", "pitch", "count"))


def _audio_to_image(rng: Speaker, scenes: Scenes) -> Exercise:
    while True:
        sound = scenes.sound()
        look = typical_look(sound.thing, SIZE_OF_PITCH[sound.pitch], sound.count)
        if look.held_out is sound.held_out or sound.held_out:
            break
    text = rng.say(wordings.AUDIO_TO_IMAGE)
    return single(shown(rng, said(text, rng), sound), look, ("thing", "size", "count"))


def _image_to_video(rng: Speaker, scenes: Scenes) -> Exercise:
    look = scenes.look(count=1)
    if rng.random() < 0.15:
        clip = animated(look)
        asked = shown(rng, said(rng.say(wordings.ANIMATE), rng), look)
        return single(asked, clip, judged(clip, ("motion", "tempo")))
    clip = Clip(look.thing, look.colour, look.size, look.ground, rng.choice(MOTIONS), rng.choice(TEMPOS))
    motion = rng.name("motion", clip.motion, MOTION_PHRASES[clip.motion])
    tempo = rng.name("tempo", clip.tempo, TEMPO_ADVERBS[clip.tempo])
    text = rng.say(wordings.IMAGE_TO_VIDEO).format(motion=motion, tempo=tempo)
    return single(shown(rng, said(text, rng), look), clip, judged(clip))


def _video_to_image(rng: Speaker, scenes: Scenes) -> Exercise:
    clip = scenes.clip()
    look = Look(clip.thing, clip.colour, clip.size, 1, "middle", clip.ground)
    text = rng.say(wordings.VIDEO_TO_IMAGE)
    return single(shown(rng, said(text, rng), clip), look, ("thing", "colour", "size", "ground"))


def _video_to_audio(rng: Speaker, scenes: Scenes) -> Exercise:
    while True:
        clip = scenes.clip()
        sound = typical_sound(clip.thing, clip.size, 1, clip.tempo)
        if sound.held_out is clip.held_out or clip.held_out:
            break
    text = rng.say(wordings.VIDEO_TO_AUDIO)
    return single(shown(rng, said(text, rng), clip), sound, ("thing", "pitch", "tempo"))


def _audio_to_video(rng: Speaker, scenes: Scenes) -> Exercise:
    while True:
        sound = scenes.sound()
        clip = typical_clip(sound.thing, SIZE_OF_PITCH[sound.pitch], sound.tempo)
        if clip.held_out is sound.held_out or sound.held_out:
            break
    text = rng.say(wordings.AUDIO_TO_VIDEO)
    return single(shown(rng, said(text, rng), sound), clip, ("thing", "size", "tempo"))


def _edit(rng: Speaker, draw: Callable[[], Scene]) -> Exercise:
    while True:
        scene = draw()
        result, text = changes.ask_for_change(scene, rng)
        if result.held_out is scene.held_out or scene.held_out:
            return single(shown(rng, said(text, rng), scene), result, judged(result))


def _beyond_words(rng: Speaker, scenes: Scenes) -> Exercise:
    """Ask for the very same medium again; its shade, spot and tuning are measured, not named."""
    if not rng.reserved and rng.random() < SAME_VIDEO_SHARE:
        scene: Scene = scenes.clip()
    else:
        scene = scenes.sound() if rng.random() < 0.4 else scenes.look(count=1)
    exact: Mapping[type, tuple[str, ...]] = {
        Look: ("thing", "hue", "centre"),
        Clip: judged(scene),
        Sound: ("thing", "fundamental"),
    }
    text = said(wordings.same_again(scene, rng), rng)
    return replace(single(shown(rng, text, scene), scene, exact[type(scene)]), copied=True)


def _image_audio_to_video(rng: Speaker, scenes: Scenes) -> Exercise:
    look, sound = scenes.look(count=1), scenes.sound()
    clip = Clip(look.thing, look.colour, look.size, look.ground, "still", sound.tempo)
    text = said(rng.say(wordings.IMAGE_AUDIO_TO_VIDEO), rng)
    asked: tuple[Part, ...] = (look, sound, text) if rng.random() < 0.7 else (text, look, sound)
    return single(asked, clip, ("thing", "colour", "size", "ground", "tempo"))


def _text_to_many(rng: Speaker, scenes: Scenes) -> Exercise:
    kinds = list(rng.choice((("image", "audio"), ("video", "audio"), ("image", "video", "audio"))))
    rng.shuffle(kinds)
    if not rng.reserved and rng.random() < ALIKE_SHARE:
        kinds = [rng.choice(kinds)] * rng.choice((2, 2, 3))
    if not rng.reserved and rng.random() < LISTED_SHARE:
        draws: Mapping[str, Callable[[], Scene]] = {
            "image": scenes.look,
            "video": scenes.clip,
            "audio": scenes.sound,
        }
        return _several(*wanted_list(rng, [draws[kind] for kind in kinds]), rng)
    wanted = {"video": wanted_clip, "audio": wanted_sound}
    requests: list[str] = []
    made: list[Scene] = []
    for kind in kinds:
        look = kind == "image"
        scene, request = wanted_look(rng, scenes, first=not made) if look else wanted[kind](rng, scenes)
        made.append(scene)
        requests.append(request)
    return _several(made, rng.say(wordings.JOINTS).join(requests), rng)


def _several(made: Sequence[Scene], request: str, rng: Speaker) -> Exercise:
    answer = tuple(part for scene in made for part in (caption(scene), scene))
    asked = Turn("user", (said(request, rng),))
    return Exercise("", (asked,), answer, tuple(judged(scene) for scene in made))


def _about_thing(rng: Speaker, scenes: Scenes) -> Exercise:
    """Ask for picture, video and sound of one thing at once, naming it once."""
    while True:
        thing = rng.choice(THINGS)
        size = rng.choice(SIZES)
        made: list[Scene] = [typical_look(thing, size), typical_sound(thing, size)]
        if not any(scene.held_out for scene in made):
            break
    word = f"{rng.name('size', size, SIZE_WORDS[size])} {thing_name(thing, rng)}"
    text = rng.say(wordings.ABOUT_THING).format(thing=word)
    answer = tuple(part for scene in made for part in (caption(scene), scene))
    return Exercise("", (Turn("user", (said(text, rng),)),), answer, tuple(judged(scene) for scene in made))


def _and_its_sound(rng: Speaker, scenes: Scenes) -> Exercise:
    """Ask for a picture or a video in every detail, and for its sound along with it."""
    while True:
        scene, request = rng.choice((wanted_look, wanted_clip))(rng, scenes)
        assert not isinstance(scene, Sound)
        sound, names = sound_of(scene)
        if sound.held_out is scene.held_out or scene.held_out:
            break
    made: list[Scene] = [scene, sound]
    names_of = [judged(scene), names]
    request += rng.say(wordings.AND_ITS_SOUND)
    if not rng.reserved and rng.random() < ANOTHER_SHARE:
        kind = rng.choice((wanted_look, wanted_clip, wanted_sound))
        other, wish = wanted_look(rng, scenes, first=False) if kind is wanted_look else kind(rng, scenes)
        at, requests = rng.choice(((0, [wish, request]), (2, [request, wish])))
        made.insert(at, other)
        names_of.insert(at, judged(other))
        request = rng.say(wordings.JOINTS).join(requests)
    answer = tuple(part for one in made for part in (caption(one), one))
    return Exercise("", (Turn("user", (said(request, rng),)),), answer, tuple(names_of))


def _decision(rng: Speaker, scenes: Scenes) -> Exercise:
    return rng.choice(_DECIDED)(rng, scenes)


_DECIDED: tuple[Callable[[Speaker, Scenes], Exercise], ...] = (
    words_only,
    words_only,
    _text_to_image,
    _text_to_video,
    _text_to_audio,
    _text_to_many,
    _about_thing,
    _and_its_sound,
    _image_to_audio,
    _image_to_video,
    conversation,
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
    "conversation": conversation,
    "new-subject": new_subject,
    "talk": words_only,
    "decision": _decision,
    "beyond-words": _beyond_words,
}
