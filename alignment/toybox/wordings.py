"""What people say when they ask for media, around the captions. What stands in braces the exercise fills."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from alignment.toybox.phrases import Phrases, Speaker, ways
from alignment.toybox.world import THINGS, Clip, Look, Scene, Sound

OPENINGS = ways(
    "openings",
    "(||||hey, |hi, |ok, |well, |so, |now |and now |good, )"
    "(|||||please |can you |could you |would you |will you |could you please |i want you to |just )",
    "(hello, |i would like you to |can i ask you to |next, |oh, and )",
    "(|||hello, |dear box, |listen, |hm, |my dear, )"
    "(i ask you to |i beg you to |i wish you to |you should |you could |try to |go ahead and |be so kind and "
    "|do me a favour and |let me ask you to |it is time to |would you mind to |how about you )",
)
"""What may stand before a request in the imperative."""
DRAW = ways(
    "draw",
    "(draw|draw|paint|sketch)( me|)",
    "(make|create|produce|show|give|draw|paint)( me|) (a picture|an image|a drawing|a painting|a sketch) of",
    "(show me|let me see|let us see|get me a picture of)",
)  # fmt: skip
FILM = ways(
    "film",
    "(animate|animate|film)( for me|)",
    "(make|create|produce|show|give|film|record)( me|) (a video|a clip|a film|a movie|an animation) of",
)  # fmt: skip
PLAY = ways(
    "play",
    "(play|play)( me|)",
    "(let me hear|let us hear|let me listen to)",
    "(play|make|create|produce|give|record)( me|) (the sound|a recording|the noise|a sound) of",
)  # fmt: skip
_I_WANT = (
    "(i want |i would like |i wish for |we want |how about ||||i could use |i am looking for |i ask for "
    "|i fancy |i am waiting for |may i have |can i have |could we have |can i get |she wants |they asked for "
    "|my friend wants |give us |bring me |we are missing )"
)
WISHES: Mapping[type, Phrases] = {
    Look: ways(
        "wish for a picture",
        _I_WANT + "(a picture|an image|a drawing) of",
        "(i want to see|i would like to see|picture:|image:)",
    ),
    Clip: ways(
        "wish for a video",
        _I_WANT + "(a video|a clip|a film) of",
        "(i want to watch|video:|clip:)",
    ),
    Sound: ways(
        "wish for a sound",
        _I_WANT + "(the sound|a sound|a recording) of",
        "(i want to hear|i would like to hear|we want to hear|sound:|audio:)",
    ),
}
"""Requests that are no imperatives."""
MOVING_WISH = ways("moving wish")
"""Requests for something that moves which do not say that it is a video."""
SOUND_VERBS: Mapping[str, Phrases] = {thing: ways(f"sound verb: {thing}") for thing in THINGS}
"""Requests for the sound of a thing, with the verb that goes with it."""
FILLER_BEFORE, FILLER_AFTER = ways("filler before"), ways("filler after")
"""What stands before and after a request and adds nothing to it."""
POLITE_ENDINGS = ways(
    "polite endings",
    "(||||||| please| for me| now| today| for my friend| for them| if you can)(||||.|!)",
    "(, please|, please.|, thank you|, ok?|, will you?|, if you like)",
    " for (her|him|my mother|the children|our party|my class|everyone|you and me|this evening|a change)"
    "(|.|!)",
    "(, that would be nice|, i beg you|, many thanks|, cheers|, my dear|, if that is possible|, as we said)",
)
JOINTS = ways(
    "joints",
    "(,|) (and|and|then|and then|and also|and after that|plus|as well as|and finally) ",
    "(.|;) (and|then|and then|next,|after that,|now|finally,|i also want you to) ",
    "(, next |, also |, after that |. |. |, )",
    "(. besides |, and besides |; furthermore |. in addition |, along with that | and furthermore )",
    "(. when done, |; as soon as you can |, on top of that )",
)

_SEEN = "(this|this|it|this picture|the picture|what you see|what is here|what can be seen)"
WHAT_IS_SEEN = ways(
    "what is seen",
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
    "(what|which|what kind of) (thing|object) (is it|is that|is this|is shown|do you notice)?",
    "(tell me|say|report) what (thing it is|you recognise|you make out|you notice|it is|is to be seen)",
)
_HEARD = "(this|this sound|it|this noise|the sound|what you hear|what is heard here)"
WHAT_IS_HEARD = ways(
    "what is heard",
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
)

_PLAY_WHAT = "(play|play me|make|create|give me|let us hear|i want to hear) what "
_SOUNDS_LIKE = " (sounds like|would sound like)"
_A_SOUND = "(play |make |create |let me hear |)(the sound|the noise|a sound) (of|for|that belongs to) "
_PICTURE = "(this|this|it|this picture|the picture|this image|what you see)"
IMAGE_TO_AUDIO = ways(
    "image to audio",
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
)
_SHOW_WHAT = "(show me|draw|paint|sketch|let me see) what (it|this|the thing that sounds|this noise)"
_SOUND = "(this sound|this sound|it|this|this noise|what you hear)"
AUDIO_TO_IMAGE = ways(
    "audio to image",
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
)
IMAGE_TO_VIDEO = ways(
    "image to video",
    "(make|create|show me|give me|i want) (a video|a clip|a film) of (this|it|this picture) {motion} {tempo}",
    "(animate|film) (this|it|this picture|the picture) {motion} {tempo}",
    "(show|let me see) (it|this|the picture) {motion} {tempo} in a (video|film)",
    "turn (this|it|this picture) into a (video|clip|film)( of it|) {motion} {tempo}",
    "a (clip|video) of (this|this picture) {motion} {tempo}",
    "(make|let) (this|it|this picture|the picture|the thing) (move|go) in a (video|clip|film), "
    "{motion} {tempo}",
    "(i want|i would like) to (see|watch) (this|it|this picture|the thing here) {motion} {tempo}",
    "(let it move in a video,|now in a video,|as a video,|bring it to life,) {motion} {tempo}",
)  # fmt: skip
VIDEO_TO_IMAGE = ways(
    "video to image",
    "(draw|sketch|paint) (this|what is in this video|what is in it|what you see here|what you see|this clip)",
    "(make|create|draw|show me|give me) (a picture|an image|a drawing) of "
    "(this|it|this video|this clip|what you see|what is in the video)",
    "turn (this|this video|it|this clip) into (a picture|an image|a drawing)",
    "(i want|i would like) (a picture|an image|a drawing) of (this|it|this video)",
    "(draw|paint|sketch) (the thing in|what moves in|what is to be seen in) (this video|the clip|this film)",
    "(show me|give me|let me see) (this video|this clip|it|the film) as (a picture|an image|a drawing)",
    "(a picture|an image|a drawing) (of|for) (this video|the clip|this film|what moves here)",
)
VIDEO_TO_AUDIO = ways(
    "video to audio",
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
)
AUDIO_TO_VIDEO = ways(
    "audio to video",
    "(make|create|show me|give me) (a video|a clip|a film) (of|for) (what you hear|this sound|this noise)",
    "(film|animate) (this sound|what sounds here|what makes this sound|this noise)",
    "(animate what you hear|show me a clip of what makes this sound|a clip of what you hear)",
    "turn " + _SOUND + " into (a video|a clip|a film)",
    "i (want|would like) to see a (video|film|clip) of " + _SOUND,
    "(a video|a clip|a film|an animation) (of|for) (this sound|this noise|what you hear|what sounds here)",
    "(film|animate) (the thing that|whatever) (sounds here|you hear|makes this noise|makes it)",
    "(show me|let me see) what (you hear|makes this sound|sounds here) in a (video|clip|film)",
)
_IN_TIME_WITH = (
    "(with the tempo of|at the tempo of|at the pace of|in the rhythm of|as quick or slow as"
    "|as fast or slow as|as slow or fast as|just as fast or slow as) "
    "(this sound|the sound|this noise|what you hear)"
)
IMAGE_AUDIO_TO_VIDEO = ways(
    "image audio to video",
    "(make|create|show me|give me|i want) a (video|film|clip) of (this picture|the picture|this|it)(,|) "
    + _IN_TIME_WITH,
    "(animate|film) (the picture|this picture|this|it|what you see)(,|) " + _IN_TIME_WITH,
    "a (video|clip|film) of (this|this picture), " + _IN_TIME_WITH,
    "turn (the picture|this picture|this) into a (video|clip)(,|) " + _IN_TIME_WITH,
)
LISTED_IMPERATIVES: Sequence[str] = (
    "give me", "make", "make me", "create", "show me", "produce", "let me have", "get me", "bring me",
)  # fmt: skip
LISTED_WISHES: Sequence[str] = (
    "i want", "i would like", "i'd like", "i need", "can i have", "could i get", "we need", "may i have", "",
)  # fmt: skip
"""What may stand before a list of media, each with its noun."""
NOUNS: Mapping[type, Sequence[str]] = {
    Look: ("a picture of", "an image of", "a drawing of", "a pic of", "a sketch of", "a painting of"),
    Clip: ("a video of", "a clip of", "a film of", "an animation of", "a movie of"),
    Sound: ("the sound of", "a recording of", "the noise of", "a sound clip of", "the sound made by"),
}
BETWEEN_LISTED: Sequence[tuple[str, str]] = (
    (", ", " and "), (", ", " and "), (", ", ", and "), (" and ", " and "), (", ", ", "),
    (", then ", ", then "), (", ", " plus "), (", ", " and also "), (", ", ", and then "),
)  # fmt: skip
"""What stands between the things of a list, and before its last."""
ABOUT_THING = ways(
    "about thing",
    "(draw|paint|sketch|show me) a {thing}(, then| and|, and then) (play its sound|play the sound of it)",
    "(show me|paint) a {thing} and (let me hear it|let me hear its sound)",
    "(i want |give me |)(a picture|an image) and the sound of a {thing}",
    "(a picture|an image) of a {thing}, (and|then|and also) its sound",
)
AND_ITS_SOUND = ways(
    "and its sound",
    "(,|) and (|then |also |now )(play|play me|let me hear|give me|make|add|i want to hear) "
    "(its sound|the sound of it|the noise of it)",
    "(,|) (and|with|plus|then|and also) (its sound|the sound of it|its noise)",
    "(. then|. and|. and then|; then|. also) (play its sound|let me hear it|play the sound of it|its sound)",
    "(,|) and (|then )(let me hear it|i want to hear it|play it)",
)
"""What follows the request for a picture or a video whose sound is wanted too."""
SAME_SOUND_AGAIN = ways(
    "same sound again",
    "(play|make|repeat|let me hear) "
    "(exactly this|this very sound|the very same one|the very same sound) again",
    "the (same|very same) (sound|one) again, (at|with|in) exactly (this|the same) pitch",
    "(repeat|copy) (this sound|it) exactly",
)
SAME_PICTURE_AGAIN = ways(
    "same picture again",
    "(draw|make|repeat) (exactly this|this very picture|the very same one|the very same picture) again",
    "the (same|very same) (picture|one|image) again, in exactly (this|the same) (shade|colour)",
    "(draw|paint) it again (exactly there|just there|in exactly this shade|in the very same place)",
    "(the very same picture again|copy this picture exactly|repeat this picture exactly)",
)


def same_again(scene: Scene, rng: Speaker) -> str:
    """Ask for the very medium that was there last. For a video as for a picture, which only training does."""
    if isinstance(scene, Sound):
        return rng.say(SAME_SOUND_AGAIN)
    text = rng.say(SAME_PICTURE_AGAIN)
    if isinstance(scene, Look):
        return text
    text = re.sub(r"\b(picture|image|drawing|painting|sketch)\b", rng.choice(("video", "clip")), text)
    return re.sub(r"\b(draw|paint|sketch)\b", rng.choice(("make", "film", "show")), text)


ONCE_MORE = ways(
    "once more",
    "(|and |now |please )(again|once more|one more time|once again)(|!|, please)",
    "(do|make|try|repeat) (it|that|this)( again| once more|)",
)
"""After something was made: make it once more."""
NOW_AS_PICTURE_OF_SOUND = ways(
    "now as picture of sound",
    "(and |now |so |)what (does|would) it look like?",
    "(now |and now |please |)(draw|paint|sketch) it",
    "(now |and |)(show me|make|draw|give me) (a picture|an image|a drawing) of it",
    "(now|and now) a (picture|drawing) of it",
)
NOW_AS_SOUND = ways(
    "now as sound",
    "(and |now |so |)what (does|would) (it|this) sound like?",
    "(now |and now |please |)(play|make|give me) (its sound|the sound of it)",
    "(and |)let me hear (it|its sound)",
    "(and its sound|now its sound|how does it sound?|how would it sound?|i want to hear it|and the sound?)",
)
NOW_AS_VIDEO = ways(
    "now as video",
    "(now |and |and now |)(a video|a film) of it {motion}",
    "(please |and now |and |)(animate|film) it {motion}",
    "(show|let me see) it {motion} in a video",
    "(now |)(make|create|show me) a (video|film) of it {motion}",
    "(and|now) a clip of it {motion}",
)
ANIMATE = ways(
    "animate",
    "(|now |and now |please )(animate|film) (it|this|that)",
    "(now |and now |)(a video|a clip|a film) (of it|of that|of this|of this one)(, please|)",
    "(make|create|show me|give me|i want) (a video|a clip|a film) (of it|of this|of that)",
    "(now |and |)(let it move|bring it to life|make it move|turn it into a video|as a video|as a clip)",
)
"""A video of what is shown or was made, with no word about how it moves."""
WHAT_WAS_MADE = ways(
    "what was made",
    "what (was that|did you make|did you just make|have you made|was it|is that now)?",
    "(tell me|say) what (that was|you made|it was|you have just made)",
    "(describe|name) (what you made|what you just made|your last one)",
)
"""A question about the newest medium, which its caption answers."""
NOW_AS_PICTURE = ways(
    "now as picture",
    "(now |and now |please |)(draw|sketch) it( as a picture|)",
    "(now |and |)(show me|make|draw|give me) (a picture|an image|a drawing) of it",
    "(now|and now) a (picture|drawing) of it",
)
