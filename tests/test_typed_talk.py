"""What people type, as somebody typed it who had seen the model fail, and whether it does what was meant."""

from __future__ import annotations

import random
import re

import pytest

from alignment.system import System
from alignment.toybox.media import render, to_bytes
from alignment.toybox.talk import ELSEWHERE
from alignment.toybox.world import Clip, Look, Scene, Sound
from encoders.media import read_media
from llm.signals import Signal
from llm.template import Message, Part, SignalPart
from services.measuring import folders_of
from services.presets import load_preset

SHOWN: dict[str, Scene] = {
    "(frog) ": Look("frog", "green", "small", 1, "left", "white"),
    "(bird) ": Clip("bird", "blue", "big", "sky", "up", "slow"),
    "(bell) ": Sound("bell", "low", 2, "slow", "loud"),
}
THANKED = "you are welcome"
CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("draw a big red bell", "a big red bell in the middle on white"),
        ("what does this picture sound like?", "a low bell sounding once, slow and loud"),
        ("and now a video of two of them", "a big red bell .* on white.*"),
        ("thanks!", THANKED),
    ),
    (
        ("draw a big red bell", "a big red bell in the middle on white"),
        ("what does it sound like?", "a low bell sounding once, slow and loud"),
        ("and now a video of two bells", "a big red bell .* on white.*"),
    ),
    (
        (
            "a purple spaceship climbing into the night sky, fast, as a video please",
            "a medium purple rocket moving up fast at night.*",
        ),
    ),
    (("can you show me a rocket that climbs?", "a medium white rocket moving up.*"),),
    (
        ("I'd love a picture of three tiny bees flying around at night", "three small yellow bees at night"),
        ("remove one", "two small yellow bees at night"),
        ("make the background white", "two small yellow bees on white"),
        ("great job!", THANKED),
    ),
    (
        (
            "draw a huge green frog in the bottom right corner",
            "a big green frog at the bottom right on white",
        ),
        ("make it purple", "a big purple frog at the bottom right on white"),
        ("animate it", "a big purple frog staying still .* on white.*"),
    ),
    (
        ("play a deep drum three times, quickly", "a low drum sounding three times, fast and loud"),
        ("a bit quieter", "a low drum sounding three times, fast and quiet"),
        ("nice", THANKED),
    ),
    (
        ("let me hear a police siren, high pitched", "a high siren sounding once, slow and loud"),
        ("now lower", "a middle siren sounding once, slow and loud"),
    ),
    (("how are you doing today?", ELSEWHERE),),
    (("hello", "hello! tell me what to draw, film or play"),),
    (("what can you do?", "i can draw, film and play twelve things.*"),),
    (
        (
            "can you draw a yellow heart on a grey background, small, top left?",
            "a small yellow heart at the top left on grey",
        ),
        ("bigger please", "a medium yellow heart at the top left on grey"),
        ("move it to the middle", "a medium yellow heart in the middle on grey"),
        ("what did you just draw?", "a medium yellow heart in the middle on grey"),
    ),
    (
        (
            "film a tiny orange bee drifting to the left in slow motion",
            "a small orange bee moving left slowly on white",
        ),
        ("speed it up", "a small orange bee moving left fast on white"),
        ("now at night", "a small orange bee moving left fast at night"),
    ),
    (
        ("two black phones, please", "two medium black phones on white"),
        ("one more", "three medium black phones on white"),
        ("what colour are they?", "it is black"),
    ),
    (
        (
            "make me a picture of a storm cloud, dark purple, in the upper right",
            "a medium purple rain cloud at the top right on white",
        ),
    ),
    (("draw a cat", ELSEWHERE),),
    (
        ("draw me two medium sized blue drums against the sky", "two medium blue drums in the sky"),
        ("and the sound of that", "a middle drum sounding twice.*"),
    ),
    (("(frog) what do you see here?", "a small green frog at the left on white"),),
    (("(frog) make it red", "a small red frog at the left on white"),),
    (("(frog) what would this sound like?", "a high frog sounding once, slow and loud"),),
    (("(frog) bring it to life", "a small green frog staying still .* on white.*"),),
    (("(frog) make this hop to the right, fast", "a small green frog moving right fast on white"),),
    (("(frog) draw exactly this again", "a small green frog at the left on white"),),
    (("(frog) give me an identical copy", "a small green frog at the left on white"),),
    (("(frog) can you duplicate this?", "a small green frog at the left on white"),),
    (("(frog) same again", "a small green frog at the left on white"),),
    (("(bell) play that back exactly as it is", "a low bell sounding twice, slow and loud"),),
    (("(bell) clone this sound", "a low bell sounding twice, slow and loud"),),
    (("(bell) i want to hear the identical tone", "a low bell sounding twice, slow and loud"),),
    (("(bell) what is it?", "a low bell sounding twice, slow and loud"),),
    (("(bell) higher", "a middle bell sounding twice, slow and loud"),),
    (("(bell) ring it only once", "a low bell sounding once, slow and loud"),),
    (("(bell) draw the thing that makes this noise", "two big yellow bells on white"),),
    (("(bird) describe the clip", "a big blue bird moving up slowly in the sky"),),
    (("(bird) make it go down instead", "a big blue bird moving down slowly in the sky"),),
    (("(bird) i'd like it in green", "a big green bird moving up slowly in the sky"),),
    (("(bird) put it on a grey backdrop", "a big blue bird moving up slowly on grey"),),
    (("(bird) faster!", "a big blue bird moving up fast in the sky"),),
    (("(bird) take a screenshot of this for me", "a big blue bird in the middle in the sky"),),
    (
        (
            "draw a red bell and a blue drum",
            "a medium red bell in the middle on white, a medium blue drum in the middle on white",
        ),
    ),
    (
        (
            "show me a green harp and let me hear it",
            "a medium green harp in the middle on white, a middle harp sounding.*",
        ),
    ),
    (("play a bird, then a bee, then a siren", "a middle bird .*, a middle bee .*, a middle siren.*"),),
    (
        (
            "picture of a small white clock at night and a video of a big red rocket going up",
            "a small white clock in the middle at night, a big red rocket moving up.*",
        ),
    ),
    (("what's the weather like?", ELSEWHERE),),
    (("lol ok", ELSEWHERE),),
    (("do you know any jokes?", ELSEWHERE),),
    (("draw something", "i can draw.*|a .*"),),
    (
        (
            "an enormous scarlet heart, dead centre, black of night behind it",
            "a big red heart in the middle at night",
        ),
    ),
    (("sketch a lemon yellow bird at the bottom, tiny", "a small yellow bird at the bottom on white"),),
    (
        (
            "i need a clip: phone, blue, rising quickly, sky",
            "a medium blue phone moving up fast in the sky.*",
        ),
    ),
    (("bell, high, twice, fast, quiet", "a high bell sounding twice, fast and quiet"),),
    (("the croak of a frog, low and slow, three times", "a low frog sounding three times, slow and loud"),),
    (("ring a bell softly", "a .* bell sounding .* quiet.*"),),
    (("could i get a harp playing a high note, just once?", "a high harp sounding once, slow and loud"),),
    (("video of a heart beating fast", "a medium red heart staying still fast.*"),),
    (
        ("draw a frog", "a medium green frog in the middle on white"),
        ("no, a bird", "a medium .* bird in the middle on white.*"),
        ("thank you so much", THANKED),
        ("bye", "goodbye"),
    ),
    (
        ("draw a big blue clock at night", "a big blue clock in the middle at night"),
        ("the same but without the night, on white", "a big blue clock in the middle on white"),
        ("two of them", "two big blue clocks on white"),
        ("smaller", "two medium blue clocks on white"),
        ("again", "two medium blue clocks on white"),
    ),
)
"""What is said, a medium in brackets being shown with it, and a pattern of the words of the right reply."""
AT_LEAST = 75  # of 85; 77 when this was written


@pytest.fixture(scope="module")
def system() -> System:
    return System(folders_of(load_preset("toybox")))


def test_most_of_what_people_type_is_understood(system: System) -> None:
    rng = random.Random(1)
    wrong: list[tuple[str, str]] = []
    for conversation in CONVERSATIONS:
        dialogue: list[Message] = []
        for text, wanted in conversation:
            dialogue.append(Message("user", _parts(system, text, rng)))
            spoken = system.speak(dialogue)
            words = ", ".join(part for part in spoken if isinstance(part, str))
            if not re.fullmatch(wanted, words):
                wrong.append((text, words))
            said: list[Part] = [SignalPart(p.modality) if isinstance(p, Signal) else p for p in spoken]
            dialogue.append(Message("assistant", said))
    assert sum(map(len, CONVERSATIONS)) - len(wrong) >= AT_LEAST, wrong


def _parts(system: System, text: str, rng: random.Random) -> list[Part]:
    for name, scene in SHOWN.items():
        if text.startswith(name):
            return [system.read(read_media(to_bytes(render(scene, rng)))), text.removeprefix(name)]
    return [text]
