"""What people say around the captions: requests, questions, changes and small talk.

Every kind of phrase comes in two groups (:class:`Phrases`): those that training says, and reserved
ones that only tests say, so that a test shows what was understood and not what was learnt by heart. What
stands in braces is filled in by the exercise.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

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


def ways(*patterns: str, reserved: Sequence[str]) -> Phrases:
    """Return all that the patterns spell out, without what is reserved.

    ``(a|b)`` in a pattern stands for either; an alternative that is written twice is said twice as often.
    """
    spelled = [phrase for pattern in patterns for phrase in _spelled_out(pattern)]
    return Phrases(
        tuple(phrase for phrase in spelled if not phrase or phrase not in reserved), tuple(reserved)
    )


def _spelled_out(pattern: str) -> list[str]:
    literals_and_choices = re.split(r"\(([^()]*)\)", pattern)
    alternatives = [piece.split("|") if i % 2 else [piece] for i, piece in enumerate(literals_and_choices)]
    return ["".join(pieces) for pieces in product(*alternatives)]


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


OPENINGS = ways(
    "(||||hey, |hi, |ok, |well, |so, |now |and now |good, )"
    "(|||||please |can you |could you |would you |will you |could you please |i want you to |just )",
    "(hello, |i would like you to |can i ask you to |next, |oh, and )",
    "(|||hello, |dear box, |listen, |hm, |my dear, )"
    "(i ask you to |i beg you to |i wish you to |you should |you could |try to |go ahead and |be so kind and "
    "|do me a favour and |let me ask you to |it is time to |would you mind to |how about you )",
    reserved=(
        "",
        "",
        "would you please ",
        "can you please ",
        "i need you to ",
        "hello, could you ",
        "go on and ",
    ),
)
"""What may stand before a request in the imperative."""
DRAW = ways(
    "(draw|draw|paint|sketch)( me|)",
    "(make|create|produce|show|give|draw|paint)( me|) (a picture|an image|a drawing|a painting|a sketch) of",
    "(show me|let me see|let us see|get me a picture of)",
    reserved=(
        "make a drawing of", "paint a picture of", "show me an image of", "give me a picture of", "draw me",
    ),
)  # fmt: skip
FILM = ways(
    "(animate|animate|film)( for me|)",
    "(make|create|produce|show|give|film|record)( me|) (a video|a clip|a film|a movie|an animation) of",
    reserved=(
        "create a clip of", "make me a video of", "record a video of", "give me a clip of", "film me",
    ),
)  # fmt: skip
PLAY = ways(
    "(play|play)( me|)",
    "(let me hear|let us hear|let me listen to)",
    "(play|make|create|produce|give|record)( me|) (the sound|a recording|the noise|a sound) of",
    reserved=(
        "let me hear the sound of", "create a recording of", "play me the sound of", "make me the sound of",
    ),
)  # fmt: skip
_I_WANT = (
    "(i want |i would like |i wish for |we want |how about ||||i could use |i am looking for |i ask for "
    "|i fancy |i am waiting for |may i have |can i have |could we have |can i get |she wants |they asked for "
    "|my friend wants |give us |bring me |we are missing )"
)
WISHES: Mapping[type, Phrases] = {
    Look: ways(
        _I_WANT + "(a picture|an image|a drawing) of",
        "(i want to see|i would like to see|picture:|image:)",
        reserved=("i would like a picture of", "an image of", "i need a picture of"),
    ),
    Clip: ways(
        _I_WANT + "(a video|a clip|a film) of",
        "(i want to watch|video:|clip:)",
        reserved=("i would like a video of", "i need a clip of", "i want a clip of"),
    ),
    Sound: ways(
        _I_WANT + "(the sound|a sound|a recording) of",
        "(i want to hear|i would like to hear|we want to hear|sound:|audio:)",
        reserved=("i need the sound of", "i would like the sound of"),
    ),
}
"""Requests that are no imperatives."""
POLITE_ENDINGS = ways(
    "(||||||| please| for me| now| today| for my friend| for them| if you can)(||||.|!)",
    "(, please|, please.|, thank you|, ok?|, will you?|, if you like)",
    " for (her|him|my mother|the children|our party|my class|everyone|you and me|this evening|a change)"
    "(|.|!)",
    "(, that would be nice|, i beg you|, many thanks|, cheers|, my dear|, if that is possible|, as we said)",
    reserved=("", "", " for us", ", thanks", " please!"),
)
JOINTS = ways(
    "(,|) (and|and|then|and then|and also|and after that|plus|as well as|and finally) ",
    "(.|;) (and|then|and then|next,|after that,|now|finally,|i also want you to) ",
    "(, next |, also |, after that |. |. |, )",
    "(. besides |, and besides |; furthermore |. in addition |, along with that | and furthermore )",
    "(. when done, |; as soon as you can |, on top of that )",
    reserved=(". also ", ", and then ", " and next "),
)

_SEEN = "(this|this|it|this picture|the picture|what you see|what is here|what can be seen)"
WHAT_IS_SEEN = ways(
    "what is (this|it|that|in it|here|to be seen here)?",
    "(describe|caption|explain|name) " + _SEEN,
    "(tell me|say|write|write down|report) "
    "(what is this|what this is|what it shows|what is in it|what is here)",
    "(tell me|say something) about " + _SEEN,
    "what (do|can) you (see|see here|make out|recognise)?",
    "what (does|can) (this|it|the picture|the video) show?",
    "put (this|it|what you see) (in|into) words",
    "(give me|write|make) (a caption|a description|the words) (for|of) " + _SEEN,
    "(tell me what is shown here|what can be seen here?|which thing is shown, and how?)",
    reserved=("what is shown here?", "describe what this shows", "tell me what you see", "say what you see"),
)
_HEARD = "(this|this sound|it|this noise|the sound|what you hear|what is heard here)"
WHAT_IS_HEARD = ways(
    "what is (this sound|this noise|it|that|that sound|to be heard here)?",
    "(describe|caption|explain|name) " + _HEARD,
    "(tell me|say|write|write down|report) (what this is|what this sound is|what sounds here|what is heard)",
    "(tell me|say something) about " + _HEARD,
    "what (do|can) you (hear|hear here|make out)?",
    "what (sound|noise) (is it|is that|do you hear|was that)?",
    "which (noise|thing|of the things) (is it|is that|is this|was that|do you hear|sounds here)?",
    "which sound (was that|can be heard|do you hear)?",
    "what can be heard here?",
    "put (this sound|it|what you hear) (in|into) words",
    "(give me|write|make) (a caption|a description|the words) (for|of) " + _HEARD,
    reserved=(
        "tell me what you hear",
        "which sound is this?",
        "say what you hear",
        "describe what can be heard",
    ),
)

_PLAY_WHAT = "(play|play me|make|create|give me|let us hear|i want to hear) what "
_SOUNDS_LIKE = " (sounds like|would sound like)"
_A_SOUND = "(play |make |create |let me hear |)(the sound|the noise|a sound) (of|for|that belongs to) "
_PICTURE = "(this|this|it|this picture|the picture|this image|what you see)"
IMAGE_TO_AUDIO = ways(
    "what (does|would) " + _PICTURE + " sound like?",
    "how (does|would) (it|this|that|the picture) sound?",
    "(play|make|create|give me) (its sound|the sound of this|the sound of it|the sound of this picture)",
    "let me hear (this|it|its sound|what it sounds like|the sound of this)",
    "(turn|change) (this picture|the picture|this|it) into (a sound|sound)",
    "(which|what) sound does (this|it|the thing here) make?",
    "(and the sound|the sound of it, please|i want to hear it|i want to hear this picture)",
    _PLAY_WHAT + "(it|that|the picture|this image|the thing|this thing)" + _SOUNDS_LIKE,
    _A_SOUND + "(this picture|the picture|this image|what you see|the thing here|what is drawn here)",
    "(how|tell me how) (this image|this thing|the thing in the picture|what you see) (sounds|would sound)"
    "(, play it|, let me hear)",
    "(play|let me hear|give me) (this picture|the picture|this image|it) as (a sound|sound|audio)",
    reserved=("how does this picture sound?", "let me hear this picture", "play what this sounds like"),
)
_SHOW_WHAT = "(show me|draw|paint|sketch|let me see) what (it|this|the thing that sounds|this noise)"
_SOUND = "(this sound|this sound|it|this|this noise|what you hear)"
AUDIO_TO_IMAGE = ways(
    "(draw|paint|sketch|show me) (what you hear|this sound|what makes this sound|what sounds here)",
    "what does (this|this sound|it|the thing that you hear) look like?",
    "(make|create|draw|show me|give me) (a picture|an image|a drawing) of "
    "(what you hear|this sound|this noise)",
    "turn " + _SOUND + " into (a picture|an image|a drawing)",
    "(what thing is this? draw it|what is it? draw it|who makes this sound? show me a picture)",
    "i (want|would like) to see a picture of " + _SOUND,
    _SHOW_WHAT + " (looks like|would look like)",
    "(a picture|an image|a drawing|a sketch) (of|for) (this sound|this noise|what you hear|what sounds here)",
    "(draw|paint|sketch) (the thing that|whatever) (sounds here|you hear|makes this noise|makes it)",
    reserved=("paint what you hear", "draw what makes this sound", "make a picture of this sound"),
)
IMAGE_TO_VIDEO = ways(
    "(make|create|show me|give me|i want) (a video|a clip|a film) of (this|it|this picture) {motion} {tempo}",
    "(animate|film) (this|it|this picture|the picture) {motion} {tempo}",
    "(show|let me see) (it|this|the picture) {motion} {tempo} in a (video|film)",
    "turn (this|it|this picture) into a (video|clip|film)( of it|) {motion} {tempo}",
    "a (clip|video) of (this|this picture) {motion} {tempo}",
    "(make|let) (this|it|this picture|the picture|the thing) (move|go) in a (video|clip|film), "
    "{motion} {tempo}",
    "(i want|i would like) to (see|watch) (this|it|this picture|the thing here) {motion} {tempo}",
    "(let it move in a video,|now in a video,|as a video,|bring it to life,) {motion} {tempo}",
    reserved=(
        "make a clip of it {motion} {tempo}", "show this {motion} {tempo} in a clip",
        "film this {motion} {tempo}",
    ),
)  # fmt: skip
VIDEO_TO_IMAGE = ways(
    "(draw|sketch|paint) (this|what is in this video|what is in it|what you see here|what you see|this clip)",
    "(make|create|draw|show me|give me) (a picture|an image|a drawing) of "
    "(this|it|this video|this clip|what you see|what is in the video)",
    "turn (this|this video|it|this clip) into (a picture|an image|a drawing)",
    "(i want|i would like) (a picture|an image|a drawing) of (this|it|this video)",
    "(draw|paint|sketch) (the thing in|what moves in|what is to be seen in) (this video|the clip|this film)",
    "(show me|give me|let me see) (this video|this clip|it|the film) as (a picture|an image|a drawing)",
    "(a picture|an image|a drawing) (of|for) (this video|the clip|this film|what moves here)",
    reserved=("draw what you see in this video", "make an image of this clip", "paint this"),
)
VIDEO_TO_AUDIO = ways(
    "what (does|would) (this|it|this video|this clip|the video) sound like?",
    "how (does|would) (it|this|that|the video) sound?",
    "(play|make|create|add|give me) (its sound|the sound of this|the sound of it|the sound of this video)",
    "(make|play|add) the sound (of this clip|for this video|for this clip)",
    "let me hear (this|it|its sound|what it sounds like|the sound of this|this video)",
    "(turn|change) (this video|the video|this|it) into (a sound|sound)",
    "(which|what) sound does (this|it|the thing here) make?",
    "(and the sound|the sound of it, please|i want to hear it|i want to hear this video)",
    _PLAY_WHAT + "(it|that|the video|the clip|this clip|this film|the thing)" + _SOUNDS_LIKE,
    _A_SOUND + "(this video|the video|this clip|this film|what you see|the thing here)",
    "(how|tell me how) (this film|this clip|the thing in the video|what you see) (sounds|would sound)"
    "(, play it|, let me hear)",
    "(play|let me hear|give me) (this video|the clip|this film|it) as (a sound|sound|audio)",
    "how (does|would) (this film|the clip|this clip|what you see) sound?",
    "(let me hear|i want to hear|let us hear) (the video|the clip|this film|the film)",
    reserved=("how does this video sound?", "let me hear this clip", "play what this video sounds like"),
)
AUDIO_TO_VIDEO = ways(
    "(make|create|show me|give me) (a video|a clip|a film) (of|for) (what you hear|this sound|this noise)",
    "(film|animate) (this sound|what sounds here|what makes this sound|this noise)",
    "(animate what you hear|show me a clip of what makes this sound|a clip of what you hear)",
    "turn " + _SOUND + " into (a video|a clip|a film)",
    "i (want|would like) to see a (video|film|clip) of " + _SOUND,
    "(a video|a clip|a film|an animation) (of|for) (this sound|this noise|what you hear|what sounds here)",
    "(film|animate) (the thing that|whatever) (sounds here|you hear|makes this noise|makes it)",
    "(show me|let me see) what (you hear|makes this sound|sounds here) in a (video|clip|film)",
    reserved=("film what you hear", "make a clip for this sound", "animate this sound"),
)
_IN_TIME_WITH = (
    "(with the tempo of|at the tempo of|at the pace of|in the rhythm of|as quick or slow as"
    "|as fast or slow as|as slow or fast as|just as fast or slow as) "
    "(this sound|the sound|this noise|what you hear)"
)
IMAGE_AUDIO_TO_VIDEO = ways(
    "(make|create|show me|give me|i want) a (video|film|clip) of (this picture|the picture|this|it)(,|) "
    + _IN_TIME_WITH,
    "(animate|film) (the picture|this picture|this|it|what you see)(,|) " + _IN_TIME_WITH,
    "a (video|clip|film) of (this|this picture), " + _IN_TIME_WITH,
    "turn (the picture|this picture|this) into a (video|clip)(,|) " + _IN_TIME_WITH,
    reserved=(
        "animate this with the tempo of the sound",
        "make a clip of the picture, as fast or slow as the sound",
    ),
)
ABOUT_THING = ways(
    "(draw|paint|sketch|show me) a {thing}(, then| and|, and then) (play its sound|play the sound of it)",
    "(show me|paint) a {thing} and (let me hear it|let me hear its sound)",
    "(i want |give me |)(a picture|an image) and the sound of a {thing}",
    "(a picture|an image) of a {thing}, (and|then|and also) its sound",
    reserved=("draw a {thing} and let me hear it", "show me a picture of a {thing} and play its sound"),
)
AND_ITS_SOUND = ways(
    "(,|) and (|then |also |now )(play|play me|let me hear|give me|make|add|i want to hear) "
    "(its sound|the sound of it|the noise of it)",
    "(,|) (and|with|plus|then|and also) (its sound|the sound of it|its noise)",
    "(. then|. and|. and then|; then|. also) (play its sound|let me hear it|play the sound of it|its sound)",
    "(,|) and (|then )(let me hear it|i want to hear it|play it)",
    reserved=(", and let me hear its sound", " and the sound of it", ", then let me hear it"),
)
"""What follows the request for a picture or a video whose sound is wanted too."""
SAME_SOUND_AGAIN = ways(
    "(play|make|repeat|let me hear) "
    "(exactly this|this very sound|the very same one|the very same sound) again",
    "the (same|very same) (sound|one) again, (at|with|in) exactly (this|the same) pitch",
    "(repeat|copy) (this sound|it) exactly",
    reserved=("play the same sound again", "let me hear exactly this again"),
)
SAME_PICTURE_AGAIN = ways(
    "(draw|make|repeat) (exactly this|this very picture|the very same one|the very same picture) again",
    "the (same|very same) (picture|one|image) again, in exactly (this|the same) (shade|colour)",
    "(draw|paint) it again (exactly there|just there|in exactly this shade|in the very same place)",
    "(the very same picture again|copy this picture exactly|repeat this picture exactly)",
    reserved=("draw the same picture again", "paint exactly this again"),
)


_SAME = "(the same one|the same thing|this one|this very one|it again) (but|only|just)"
_LET_IT = "(i want it|i would like it|let it be|it should be|could it be|i want it to be|please let it be)"
_MAY_IT = (
    "(could it be|may it be|might it be|will it be|should it be|would it be|can this be|can this one be"
    "|can the thing be|can we have it|can i have it|can you show it|could this be|is it possible to have it) "
    "{word}?"
)

_A_BIT, _A_BIT_OR_NOT = " (||a bit |a little |much |even )", "(||a bit |a little |much |even )"

CHANGES: Mapping[str, Phrases] = {
    "colour": ways(
        "(||now |please |and now )(make|turn|paint|colour) it {word}",
        "(now |and |and now |)a {word} one",
        "(change|set|switch) (the|its) colour to {word}",
        "(in|now in|and in|do it in) {word}",
        _SAME + " (|in ){word}",
        _LET_IT + " {word}",
        _MAY_IT,
        reserved=("now make it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "size": ways(
        "(||please |and now )(make|let) it( be|) {word}",
        "(now |and |and now |)a {word} one",
        "(change|set|switch) (the|its) size to {word}",
        _SAME + " {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        reserved=("now make it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "place": ways(
        "(move it to be|put it|please put it|place it|draw it|set it|move it so it is|and now put it) {word}",
        "(now|and|and now|but now) {word}",
        _SAME + " {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        reserved=("now put it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "count": ways(
        "(make it|now|and now|please make it) {word}( of them|)",
        "(the same but|i want|show|show me|draw|let there be|there should be|i would like) {word} of them",
        "(this one|this very one|the same thing|the very same|it again|just this)(,|, but| but) "
        "{word} of them",
        "(could|may|might|will|should) there be {word} of them?",
        "can (we have|i have|i see|you draw|you show|you make it) {word} of them?",
        reserved=(
            "now make it {word} of them", "can there be {word} of them?", "the same one but {word} of them",
        ),
    ),
    "times": ways(
        "(make it sound|let it sound|play it|please play it|it should sound|i want to hear it) {word}",
        "(now|and|and now|the same but|the same sound but|this one but|it again but) {word}",
        "(could|may|might|will|would|should) it sound {word}?",
        "can (this|this one|the sound) (be played|be heard|sound) {word}?",
        reserved=("now play it {word}", "can it sound {word}?", "the same one but {word}"),
    ),
    "ground": ways(
        "(put it|please put it|place it|draw it|set it|and now put it) {word}",
        "(now|and|and now|but now) {word}",
        "(change the background so it is|the background should be) {word}",
        _SAME + " {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        reserved=("now put it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "motion": ways(
        "(now|and|and now|but now|show it|please show it|film it|make it go, i mean) {word}",
        _SAME + " {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        reserved=("now show it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "tempo": ways(
        "(make it|now|and|and now|please make it|let it go|do it|play it) {word}",
        "(the same but|the same thing but) {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        reserved=("now make it {word}", "can it be {word}?", "the same one but {word}"),
    ),
    "pitch": ways(
        "(make it|please make it|and now make it|let it sound) {word}",
        "(now |and |and now |)a {word} one",
        "(change|set|switch) (the|its) pitch to {word}",
        _SAME + " {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        reserved=("now make it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "loudness": ways(
        "(make it|now|and|and now|please make it|play it) {word}",
        "(the same but|the same sound but) {word}",
        _LET_IT + " {word}",
        _MAY_IT,
        reserved=("now make it {word}", "can it be {word}?", "the same one but {word}"),
    ),
    "bigger": ways(
        "(||now |please |and now |but )(make|let|draw|show) it" + _A_BIT + "{word}",
        "(now |and |and now |but |)" + _A_BIT_OR_NOT + "{word}(| please)",
        "(now |and |and now |)a {word} one",
        "(|now |please )let it be" + _A_BIT + "{word}",
        _SAME + _A_BIT + "{word}",
        _LET_IT + _A_BIT + "{word}",
        _MAY_IT,
        "(can|could) you make it" + _A_BIT + "{word}?",
        reserved=("now make it {word}", "can it be {word}?", "the same but {word}"),
    ),
    "louder": ways(
        "(||now |please |and now |but )(make|let|play|play) it" + _A_BIT + "{word}",
        "(now |and |and now |but |)" + _A_BIT_OR_NOT + "{word}(| please)",
        "(now |and |and now |)a {word} one",
        "(|now |please )let it (be|sound)" + _A_BIT + "{word}",
        _SAME + _A_BIT + "{word}",
        _LET_IT + _A_BIT + "{word}",
        _MAY_IT,
        "(can|could) you (make|play) it" + _A_BIT + "{word}?",
        reserved=("now make it {word}", "can it be {word}?", "the same but {word}"),
    ),
}  # fmt: skip
"""How to ask for another value of an attribute; ``times`` is the count of a sound, ``bigger`` and ``louder``
are for the next value of what is seen and heard."""

NOW_AS_PICTURE_OF_SOUND = ways(
    "(and |now |so |)what (does|would) it look like?",
    "(now |and now |please |)(draw|paint|sketch) it",
    "(now |and |)(show me|make|draw|give me) (a picture|an image|a drawing) of it",
    "(now|and now) a (picture|drawing) of it",
    reserved=("and a picture of it", "now paint it", "draw me a picture of it"),
)
NOW_AS_SOUND = ways(
    "(and |now |so |)what (does|would) (it|this) sound like?",
    "(now |and now |please |)(play|make|give me) (its sound|the sound of it)",
    "(and |)let me hear (it|its sound)",
    "(and its sound|now its sound|how does it sound?|how would it sound?|i want to hear it|and the sound?)",
    reserved=("and how does it sound?", "now let me hear it", "now the sound of it"),
)
NOW_AS_VIDEO = ways(
    "(now |and |and now |)(a video|a film) of it {motion}",
    "(please |and now |and |)(animate|film) it {motion}",
    "(show|let me see) it {motion} in a video",
    "(now |)(make|create|show me) a (video|film) of it {motion}",
    "(and|now) a clip of it {motion}",
    reserved=("now animate it {motion}", "and a video of it {motion}", "make a clip of it {motion}"),
)
NOW_AS_PICTURE = ways(
    "(now |and now |please |)(draw|sketch) it( as a picture|)",
    "(now |and |)(show me|make|draw|give me) (a picture|an image|a drawing) of it",
    "(now|and now) a (picture|drawing) of it",
    reserved=("and a picture of it", "paint it as a picture"),
)

QUESTIONS: Mapping[str, Phrases] = {
    "thing": ways(
        "(what|which|what kind of) (thing|object) (is it|is that|is shown|do you notice)?",
        "(which thing is this?|name the thing|what is it called?|what is its name?|what is that called?)",
        "(tell me|say) (what thing it is|what it is called|which thing it is)",
        reserved=("which thing is it?", "what thing is this?"),
    ),
    "colour": ways(
        "(what|which) colour (does it have|has it|is the thing|is this)?",
        "(what colour is it?|in which colour is it?|how is it coloured?|its colour?)",
        "(name|tell me|say) (its colour|what colour it is|which colour it has|the colour of it)",
        "(what|which) (is|was) the colour( of it| of this| of the thing|)?",
        "(which|what) colour (was it|was this|does it show|may it be|did it have|do you see)?",
        "(what was its colour?|which of the colours is it?|in what colour is it drawn?|and its colour?)",
        reserved=("which colour is it?", "what is its colour?"),
    ),
    "size": ways(
        "(what|which) size (does it have|has it|is the thing|is this)?",
        "(what size is it?|how big is it?|how large is it?|is it big or small?|its size?)",
        "(name|tell me|say) (its size|how big it is|which size it has|the size of it)",
        "(what|which) (is|was) the size( of it| of this| of the thing|)?",
        "(which|what) size (was it|was this|does it show|may it be|did it have|do you see)?",
        "(what was its size?|which of the sizes is it?|how small is it?|and its size?)",
        reserved=("which size is it?", "what is its size?"),
    ),
    "count": ways(
        "how many (are there|do you see|of them are there|can you see|things are there|are in it)?",
        "(count them|count the things|what is their number?)",
        "(tell me|say) how many (there are|you see|of them there are)",
        "how many of them (were there|can be seen|are to be seen|can you count|are shown)?",
        "(how many were there?|how many things do you see?|and how many?|what is the number of them?)",
        reserved=("how many of them do you see?", "how many are they?"),
    ),
    "times": ways(
        "how (often|many times) (does it sound|is it|did it sound|can you hear it|is it heard)?",
        "(how often do you hear it?|count the sounds)",
        "(tell me how often it sounds|say how many times it sounds)",
        reserved=("how many times do you hear it?",),
    ),
    "loudness": ways(
        "(is|was) (it|this|that) (loud or quiet|quiet or loud)?",
        "how loud (is it|was it|is that|is the sound)?",
        "(tell me|say) (how loud it is|if it is loud or quiet)",
        reserved=("how loud is this?",),
    ),
    "motion": ways(
        "(where|which way) (is it going|does it go|is it moving)?",
        "(how does it move?|how is it moving?|in which direction does it go?|is it moving, and where?)",
        "(tell me|say) (how it moves|where it is going|which way it goes)",
        reserved=("where does it move?",),
    ),
}
"""Questions about one attribute of a medium; ``times`` is the count of a sound."""

TYPICAL_COLOUR_QUESTIONS = ways(
    "(what|which) colour (is|has) (a|the usual|every) {thing}?",
    "(what|which) colour does (a|the usual) {thing}( usually|) have?",
    "(tell me|name|say) (what|which) colour a {thing} (is|has)",
    "how is a {thing} coloured?",
    reserved=("what is the colour of a {thing}?", "tell me the colour of a {thing}"),
)
TYPICAL_COLOUR_ANSWER = "a {thing} is mostly {colour}"

GREETING = "hello! tell me what to draw, film or play"
TALK: tuple[tuple[Phrases, str], ...] = (
    (
        ways(
            "(hello|hi|hey|good morning|good evening)(| again| you)",
            "(hi there|hello there|good to see you)",
            reserved=("hey there", "good day"),
        ),
        GREETING,
    ),
    (
        ways(
            "what (can|could) you (do|make|draw|show me)?",
            "(what|which things|how many things) do you know?",
            "(help|help me|who are you?|what are you?|what is this?|how does this work?)",
            "(tell me|say) (who you are|what you know|which things you know|what you do)",
            reserved=("tell me what you can do", "what things do you know?"),
        ),
        "i can draw, film and play twelve things: " + ", ".join(THINGS),
    ),
    (
        ways(
            "(thank you|thanks)(| very much| a lot| for this| again)",
            "(great|good|wonderful|perfect)(|, thank you|, thank you very much)",
            "(very nice|i like it|well done|that is good)",
            reserved=("very nice, thank you", "great, thanks"),
        ),
        "you are welcome",
    ),
    (
        ways(
            "(bye|goodbye|see you)(| now| then| later| soon)",
            "(ok, bye|good night|until tomorrow|i have to go)",
            reserved=("bye bye", "thanks, bye"),
        ),
        "goodbye",
    ),
    (
        ways(
            "(which|what) colours (do you know|are there|can you draw|can you make|can i choose)?",
            "(tell me|name|say|list) (the colours|your colours|all colours|which colours there are)",
            reserved=("tell me the colours that you know",),
        ),
        "the colours are " + ", ".join(COLOURS),
    ),
    (
        ways(
            "(do not|don't|please do not|please don't) (draw|film|make|show me|record) (anything|a thing)",
            "(do not|don't|please do not) (play|make) (a|any) (sound|video|picture)",
            "(no|make no|i want no|i do not want a) (picture|sound|clip|image|film)( please|, please|)",
            "(just|only|simply) (talk|talk to me|words|words please|text|text please|answer in words)",
            "(do not film|do not draw|do not sing|stop drawing)",
            "(no more pictures|no more sounds|nothing to see please)",
            reserved=("do not play anything", "no video please"),
        ),
        "all right, only words",
    ),
    (
        ways(
            "(tell me|do you know|i want to hear) a (joke|riddle|secret|poem|fairy tale)",
            "what is the (weather|time|date|news|capital of france|meaning of life)?",
            "what is (two plus two|three times three|ten minus four|love|a number)?",
            "(how old are you?|where do you live?|sing me a song|do you like me?|are you a robot?)",
            "(who made you?|who is your friend?|what do you eat?|are you happy?|when do you sleep?)",
            "(can you cook?|can you dance?|where are you from?|do you like music?|what did you do today?)",
            reserved=("how are you?", "tell me a story", "what is your name?"),
        ),
        "i only know my toy box. ask me to draw, film or play something in it",
    ),
)
"""Small talk: what a person may say, and the answer to all of it."""

_CHANGED: Mapping[type, tuple[str, ...]] = {
    Look: ("colour", "size", "place", "count", "ground"),
    Clip: ("colour", "motion", "tempo", "ground"),
    Sound: ("pitch", "count", "tempo", "loudness"),
}
_CHANGED_IN_TRAINING: Mapping[type, tuple[str, ...]] = {**_CHANGED, Clip: (*_CHANGED[Clip], "size")}
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


def ask_for_change(scene: Scene, rng: Speaker) -> tuple[Scene, str]:
    """Return the scene with one named attribute changed, and the words that ask for it."""
    while True:
        name = rng.choice((_CHANGED if rng.reserved else _CHANGED_IN_TRAINING)[type(scene)])
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
    if name in STEP_WORDS and rng.random() < _STEP_SHARE:
        order, less, more = STEP_WORDS[name]
        apart = order.index(value) - order.index(getattr(scene, name))
        if abs(apart) == 1:
            wording = "louder" if isinstance(scene, Sound) else "bigger"
            return {name: value}, wording, rng.choice(less if apart < 0 else more)
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
