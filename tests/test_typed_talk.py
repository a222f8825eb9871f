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
    (("how are you doing today?", "hello! tell me what to draw, film or play"),),
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
OTHERS: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("pic of a smal orange clock plz", "a small orange clock in the middle on white"),
        ("put it in the top left corner", "a small orange clock at the top left on white"),
    ),
    (
        ("hiya", "hello! tell me what to draw, film or play"),
        ("can i get a green bee", "a medium green bee in the middle on white"),
    ),
    (
        (
            "Good afternoon! Would you be so kind as to draw a large violet harp for me?",
            "a big purple harp in the middle on white",
        ),
        ("Lovely, thank you.", THANKED),
    ),
    (
        ("3 red frogs", "three medium red frogs on white"),
        ("how many frogs is that", "there are three"),
    ),
    (
        ("ticking clock sound pls", "a middle clock sounding (once|twice|three times), (slow|fast) and loud"),
        ("make it tick faster", "a middle clock sounding (once|twice|three times), fast and loud"),
    ),
    (("fim a yelow rocket goin left", "a medium yellow rocket moving left slowly on white"),),
    (
        ("phone ringing 3 times", "a middle phone sounding three times, slow and loud"),
        ("too loud!", "a middle phone sounding three times, slow and quiet"),
    ),
    (
        ("heart, purple, at the bottom left", "a medium purple heart at the bottom left on white"),
        ("hmm rather bottom right", "a medium purple heart at the bottom right on white"),
    ),
    (
        ("show me a rain cloud", "a medium blue rain cloud in the middle on white"),
        ("and how does that sound?", "a middle rain cloud sounding once, slow and loud"),
    ),
    (
        (
            "video: black bird flying right across the sky, quick",
            "a medium black bird moving right fast in the sky",
        ),
        ("slow it down", "a medium black bird moving right slowly in the sky"),
        ("which way is it flying?", "it is moving right"),
    ),
    (("umbrella pls", ELSEWHERE),),
    (
        ("could you paint a piano", ELSEWHERE),
        ("ok then a harp", "a medium orange harp in the middle on white|a middle harp sounding .*"),
    ),
    (("whats the capital of spain", ELSEWHERE),),
    (("im new here, how do i use this", "i can draw, film and play twelve things.*|hello!.*"),),
    (("which colors do you have?", "the colours are .*"),),
    (("what color are bees normally", "a bee is mostly yellow"),),
    (
        ("siren going off twice, real quick", "a middle siren sounding twice, fast and loud"),
        ("nope just one time", "a middle siren sounding once, fast and loud"),
    ),
    (("play me a drum as quietly as you can", "a middle drum sounding once, slow and quiet"),),
    (
        (
            "give me the deepest heartbeat u have",
            "a low heart sounding (once|twice|three times), slow and loud",
        ),
    ),
    (
        ("two little birds in the sky", "two small blue birds in the sky"),
        ("make them red", "two small red birds in the sky"),
    ),
    (
        (
            "draw a phone then play its ringtone",
            "a medium black phone in the middle on white, a middle phone sounding .*, slow and loud",
        ),
    ),
    (
        (
            "a picture, a video and a sound of a bell please",
            "a medium yellow bell in the middle on white, a medium yellow bell staying still slowly on white"
            ", a middle bell sounding once, slow and loud",
        ),
    ),
    (
        (
            "I want to see a bee, a bird and a frog",
            "a medium yellow bee .* on white, a medium blue bird .* on white, "
            "a medium green frog .* on white",
        ),
    ),
    (("bird", "a medium blue bird in the middle on white|a medium blue bird staying .*|a middle bird .*"),),
    (("(frog) which colour has this froggy", "it is green"),),
    (("(frog) can it sit on the right side instead?", "a small green frog at the right on white"),),
    (("(frog) i want 3 of these", "three small green frogs on white"),),
    (("(frog) same pic but nighttime please", "a small green frog at the left at night"),),
    (
        ("(frog) way too small, make it huge", "a big green frog at the left on white"),
        ("thats better, thx", THANKED),
    ),
    (("(bird) where is it headed", "it is moving up"),),
    (("(bird) i want to hear this birdy", "a low bird sounding once, slow and loud"),),
    (("(bird) shrink it down to tiny", "a small blue bird moving up slowly in the sky"),),
    (("(bird) don't let it move, it should stay put", "a big blue bird staying still slowly in the sky"),),
    (
        ("(bell) how often does it ring", "it sounds twice"),
        ("and how loud was it", "it is loud"),
    ),
    (("(bell) can i have that a lot quieter", "a low bell sounding twice, slow and quiet"),),
    (
        ("(bell) quicker pls", "a low bell sounding twice, fast and loud"),
        ("now three times", "a low bell sounding three times, fast and loud"),
    ),
    (("(bell) film whatever that is", "a big yellow bell staying still slowly on white"),),
    (
        ("movie of a green drum falling down", "a medium green drum moving down (slowly|fast) on white"),
        ("put a gray background behind it", "a medium green drum moving down (slowly|fast) on grey"),
    ),
    (
        (
            "one big bee and one small bee pls",
            "a big yellow bee in the middle on white, a small yellow bee in the middle on white",
        ),
    ),
    (
        ("a white heart", "a medium white heart in the middle (on grey|in the sky|at night)"),
        ("change the background to sky", "a medium white heart in the middle in the sky"),
    ),
    (
        ("harp music, high and soft", "a high harp sounding once, slow and quiet"),
        ("ok a bit louder", "a high harp sounding once, slow and loud"),
    ),
    (("animate a blue phone shaking in place", "a medium blue phone staying still (slowly|fast) on white"),),
    (
        ("orange harp floating up at night, video pls", "a medium orange harp moving up slowly at night"),
        ("the sound too", "a middle harp sounding once, slow and loud"),
    ),
    (("asdkjh", ELSEWHERE),),
    (
        ("draw a black clock", "a medium black clock in the middle on white"),
        ("wow that looks amazing", THANKED),
        ("see ya later", "goodbye"),
    ),
    (("pls dont draw anything now", "all right, only words"),),
    (
        ("Please draw three large orange drums on a grey background.", "three big orange drums on grey"),
        ("take two away", "a big orange drum .* on grey"),
    ),
    (
        ("paint a heart", "a medium red heart in the middle on white"),
        ("nah blue", "a medium blue heart in the middle on white"),
        ("little bit smaller", "a small blue heart in the middle on white"),
        ("and in film", "a small blue heart staying still slowly on white"),
    ),
    (
        ("buzz of a bee, high, 2 times", "a high bee sounding twice, slow and loud"),
        ("a bit lower", "a middle bee sounding twice, slow and loud"),
    ),
    (
        (
            "purple bell in the top right corner at night, as a picture",
            "a medium purple bell at the top right at night",
        ),
        ("sorry i meant top left", "a medium purple bell at the top left at night"),
    ),
    (
        ("doodle a tiny siren", "a small red siren in the middle on white"),
        ("what size is that", "it is small"),
    ),
    (
        ("vid of a clock moving right on grey", "a medium white clock moving right slowly on grey"),
        ("in red instead", "a medium red clock moving right slowly on grey"),
        ("up, not right", "a medium red clock moving up slowly on grey"),
    ),
    (
        (
            "make a vid of a big yellow heart sinking slowly at night",
            "a big yellow heart moving down slowly at night",
        ),
        ("now just as a picture", "a big yellow heart in the middle at night"),
    ),
    (
        (
            "I'd like to listen to a rain cloud, really quiet",
            "a middle rain cloud sounding once, slow and quiet",
        ),
        ("perfect, helps me sleep", THANKED),
    ),
    (("ring ring! low phone sound", "a low phone sounding (once|twice), (slow|fast) and loud"),),
    (
        ("blue frog on the left", "a medium blue frog at the left on white"),
        ("show me the same one at the top", "a medium blue frog at the top on white"),
        ("what is on it?", "a medium blue frog at the top on white|it is a frog"),
    ),
    (("any chance of a horse?", ELSEWHERE),),
    (("play some guitar", ELSEWHERE),),
    (("who invented you?", ELSEWHERE),),
    (
        (
            "a big red drum and then the sound of a high bell",
            "a big red drum in the middle on white, a high bell sounding once, slow and loud",
        ),
    ),
    (
        (
            "film a green bird going down and a bee going up",
            "a medium green bird moving down slowly on white, a medium yellow bee moving up slowly on white",
        ),
    ),
    (
        (
            "let me listen to a harp twice and a drum three times",
            "a middle harp sounding twice, slow and loud, a middle drum sounding three times, slow and loud",
        ),
    ),
    (
        ("drwa a balck rocket", "a medium black rocket in the middle on white"),
        ("larger", "a big black rocket in the middle on white"),
        ("can you film it flying up", "a big black rocket moving up (slowly|fast) on white"),
    ),
    (
        ("two bells on a drawing", "two medium yellow bells on white"),
        ("in green maybe?", "two medium green bells on white"),
        ("only one of them", "a medium green bell .* on white"),
    ),
    (("can i see the moon", ELSEWHERE),),
    (
        (
            "Is there any chance of a quiet, high bird call, three times?",
            "a high bird sounding three times, slow and quiet",
        ),
        ("what a sweet sound", THANKED),
    ),
    (
        (
            "short film: frog leaping left quickly, background grey",
            "a medium green frog moving left fast on grey",
        ),
        ("to the right", "a medium green frog moving right fast on grey"),
        ("how does that frog sound", "a middle frog sounding once, fast and loud"),
    ),
    (
        (
            "a big black rain cloud in the sky, all the way at the top",
            "a big black rain cloud at the top in the sky",
        ),
        ("move it to the bottom", "a big black rain cloud at the bottom in the sky"),
        ("white please", "a big white rain cloud at the bottom in the sky"),
        ("cheers mate", THANKED),
    ),
    (
        ("i need a sound for my game, drum, deep and fast", "a low drum sounding once, fast and loud"),
        ("play it twice", "a low drum sounding twice, fast and loud"),
        ("what was that?", "a low drum sounding twice, fast and loud|it is a drum"),
    ),
    (
        ("hey there, how's it going", "hello! tell me what to draw, film or play"),
        ("could u do a yellow phone, bottom of the page", "a medium yellow phone at the bottom on white"),
        ("which color did you use", "it is yellow"),
    ),
)
"""The same by a writer who had not seen the phrase book, but what is above and the grammar of talk."""
TYPED = {"known failures": (CONVERSATIONS, 71), "others": (OTHERS, 96)}
"""Conversations, and how many of their 85 and 119 turns have the right reply at least; 73 and 98 had it."""
COPIED = (
    "(frog) draw exactly this again",
    "(frog) give me an identical copy",
    "(frog) can you duplicate this?",
    "(bell) play that back exactly as it is",
    "(bell) clone this sound",
    "(bird) make this very video again, exactly as it is",
)
ANEW = (
    "(frog) make it red",
    "(frog) the same but bigger",
    "(frog) bring it to life",
    "(bell) higher",
    "(bell) draw the thing that makes this noise",
    "(bird) faster!",
)


@pytest.fixture(scope="module")
def system() -> System:
    return System(folders_of(load_preset("toybox")))


@pytest.mark.parametrize("name", list(TYPED))
def test_most_of_what_people_type_is_understood(system: System, name: str) -> None:
    conversations, at_least = TYPED[name]
    rng = random.Random(1)
    wrong: list[tuple[str, str]] = []
    for conversation in conversations:
        dialogue: list[Message] = []
        for text, wanted in conversation:
            dialogue.append(Message("user", _parts(system, text, rng)))
            spoken = system.speak(dialogue)
            words = ", ".join(part for part in spoken if isinstance(part, str))
            if not re.fullmatch(wanted, words):
                wrong.append((text, words))
            said: list[Part] = [SignalPart(p.modality) if isinstance(p, Signal) else p for p in spoken]
            dialogue.append(Message("assistant", said))
    assert sum(map(len, conversations)) - len(wrong) >= at_least, wrong


def _parts(system: System, text: str, rng: random.Random) -> list[Part]:
    for name, scene in SHOWN.items():
        if text.startswith(name):
            return [system.read(read_media(to_bytes(render(scene, rng)))), text.removeprefix(name)]
    return [text]


@pytest.mark.parametrize("copied", [True, False])
def test_the_very_medium_that_is_shown_is_wanted_only_where_it_is_asked_for(
    system: System, *, copied: bool
) -> None:
    rng = random.Random(2)
    asked: dict[str, list[bool]] = {}
    for text in COPIED if copied else ANEW:
        spoken = system.speak([Message("user", _parts(system, text, rng))])
        asked[text] = [system.condition(part).copied for part in spoken if isinstance(part, Signal)]
    assert asked == {text: [copied] for text in asked}
