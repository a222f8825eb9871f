"""What people ask about media and about the agent, to be answered in words alone."""

from __future__ import annotations

import string
from collections.abc import Mapping

from alignment.toybox.grammar import COUNT_WORDS, MOTION_PHRASES, TIMES_WORDS
from alignment.toybox.phrases import Phrases, Speaker, ways
from alignment.toybox.world import COLOURS, THINGS, Clip, Look, Scene, Sound

QUESTIONS: Mapping[str, Phrases] = {
    "thing": ways(
        "question: thing",
        "(name the thing|what is it called?|what is its name?|what is that called?|how is it called?)",
        "(tell me|say) (what it is called|its name|the name of it|the name of the thing)",
        "what (do you|would you|does one) call (it|this|that|the thing)?",
    ),
    "colour": ways(
        "question: colour",
        "(what|which) colour (does it have|has it|is the thing|is this)?",
        "(what colour is it?|in which colour is it?|how is it coloured?|its colour?)",
        "(name|tell me|say) (its colour|what colour it is|which colour it has|the colour of it)",
        "(what|which) (is|was) the colour( of it| of this| of the thing|)?",
        "(which|what) colour (was it|was this|does it show|may it be|did it have|do you see)?",
        "(what was its colour?|which of the colours is it?|in what colour is it drawn?|and its colour?)",
    ),
    "size": ways(
        "question: size",
        "(what|which) size (does it have|has it|is the thing|is this)?",
        "(what size is it?|how big is it?|how large is it?|is it big or small?|its size?)",
        "(name|tell me|say) (its size|how big it is|which size it has|the size of it)",
        "(what|which) (is|was) the size( of it| of this| of the thing|)?",
        "(which|what) size (was it|was this|does it show|may it be|did it have|do you see)?",
        "(what was its size?|which of the sizes is it?|how small is it?|and its size?)",
    ),
    "count": ways(
        "question: count",
        "how many (are there|do you see|of them are there|can you see|things are there|are in it)?",
        "(count them|count the things|what is their number?)",
        "(tell me|say) how many (there are|you see|of them there are)",
        "how many of them (were there|can be seen|are to be seen|can you count|are shown)?",
        "(how many were there?|how many things do you see?|and how many?|what is the number of them?)",
    ),
    "times": ways(
        "question: times",
        "how (often|many times) (does it sound|is it|did it sound|can you hear it|is it heard)?",
        "(how often do you hear it?|count the sounds)",
        "(tell me how often it sounds|say how many times it sounds)",
    ),
    "loudness": ways(
        "question: loudness",
        "(is|was) (it|this|that) (loud or quiet|quiet or loud)?",
        "how loud (is it|was it|is that|is the sound)?",
        "(tell me|say) (how loud it is|if it is loud or quiet)",
    ),
    "motion": ways(
        "question: motion",
        "(where|which way) (is it going|does it go|is it moving)?",
        "(how does it move?|how is it moving?|in which direction does it go?|is it moving, and where?)",
        "(tell me|say) (how it moves|where it is going|which way it goes)",
    ),
}
"""Questions about one attribute of a medium; ``times`` is the count of a sound."""

TYPICAL_COLOUR_QUESTIONS = ways(
    "typical colour questions",
    "(what|which) colour (is|has) (a|the usual|every) {thing}?",
    "(what|which) colour does (a|the usual) {thing}( usually|) have?",
    "(tell me|name|say) (what|which) colour a {thing} (is|has)",
    "how is a {thing} coloured?",
)
TYPICAL_COLOUR_ANSWER = "a {thing} is mostly {colour}"

GREETING = "hello! tell me what to draw, film or play"
UNKNOWN = ways(
    "unknown",
    "(dog|cow|pig|sheep|goat|mouse|rabbit|lion|tiger|bear|wolf|fox|monkey|elephant|giraffe|zebra|camel)",
    "(deer|duck|goose|hen|chicken|eagle|owl|parrot|fish|shark|whale|dolphin|crab|snake|lizard|turtle)",
    "(spider|ant|fly|butterfly|worm|snail|man|woman|boy|girl|baby|child|king|queen|doctor|teacher)",
    "(soldier|clown|witch|robot|ghost|dragon|unicorn|monster|face|hand|foot|eye|nose|house|castle)",
    "(tower|church|bridge|road|street|city|village|room|door|window|roof|wall|table|chair|bed|sofa)",
    "(lamp|candle|mirror|book|pen|pencil|letter|bag|box|bottle|cup|glass|plate|spoon|knife|fork|pot)",
    "(apple|orange|lemon|cherry|grape|pear|melon|tomato|potato|carrot|onion|bread|cake|pizza|egg)",
    "(cheese|burger|bus|train|truck|bicycle|boat|ship|plane|helicopter|balloon|tractor|wheel|engine)",
    "(hammer|saw|nail|key|lock|guitar|violin|flute|trumpet|whistle|horn|organ|sun|moon|star|planet)",
    "(mountain|hill|river|lake|sea|beach|island|forest|flower|rose|grass|leaf|stone|fire|snow|storm)",
    "(wind|rainbow|hat|shirt|shoe|coat|ring|crown|flag|ball|kite|doll|game|computer|screen|camera)",
    "(radio|television|square|circle|triangle|cube|number|word|song)",
)  # fmt: skip
"""Things that are not in the toy box."""
OWN_TAGS = ("img", "vid", "aud", "s", "user", "assistant")
ELSEWHERE = "i only know my toy box. ask me to draw, film or play something in it"
TALK: tuple[tuple[Phrases, str], ...] = (
    (
        ways(
            "talk: greeting",
            "(hello|hi|hey|good morning|good evening)(| again| you)",
            "(hi there|hello there|good to see you)",
        ),
        GREETING,
    ),
    (
        ways(
            "talk: help",
            "what (can|could) you (do|make|draw|show me)?",
            "(what|which things|how many things) do you know?",
            "(help|help me|who are you?|what are you?|how does this work?)",
            "(tell me|say) (who you are|what you know|which things you know|what you do)",
            "(draw|paint|show me|make|film|play) (something|a thing|what you like|whatever you want)",
            "(surprise me|you choose|your choice|do something|make something up|what now?|what next?)",
        ),
        "i can draw, film and play twelve things: " + ", ".join(THINGS),
    ),
    (
        ways(
            "talk: thanks",
            "(thank you|thanks)(| very much| a lot| for this| again)",
            "(great|good|wonderful|perfect)(|, thank you|, thank you very much)",
            "(very nice|i like it|well done|that is good|nice|cool|wow|lovely|beautiful|super|bravo|not bad)",
            "(what a|that is a|such a) (nice|lovely|good|fine|pretty) (picture|sound|video|clip|one)",
            "(that|this|it) (is|was|looks|sounds) (nice|lovely|good|great|fine|pretty|right|perfect|funny)",
            "(great|good|nice), (that is|it is|this is) (nice|lovely|right|what i wanted|just right|it)",
        ),
        "you are welcome",
    ),
    (
        ways(
            "talk: goodbye",
            "(bye|goodbye|see you)(| now| then| later| soon)",
            "(ok, bye|good night|until tomorrow|i have to go)",
        ),
        "goodbye",
    ),
    (
        ways(
            "talk: colours",
            "(which|what) colours (do you know|are there|can you draw|can you make|can i choose)?",
            "(tell me|name|say|list) (the colours|your colours|all colours|which colours there are)",
        ),
        "the colours are " + ", ".join(COLOURS),
    ),
    (
        ways(
            "talk: no media",
            "(do not|don't|please do not|please don't) (draw|film|make|show me|record) (anything|a thing)",
            "(do not|don't|please do not) (play|make) (a|any) (sound|video|picture)",
            "(no|make no|i want no|i do not want a) (picture|sound|clip|image|film)( please|, please|)",
            "(just|only|simply) (talk|talk to me|words|words please|text|text please|answer in words)",
            "(do not film|do not draw|do not sing|stop drawing)",
            "(no more pictures|no more sounds|nothing to see please)",
            "(no|stop|wait|enough|stop it|never mind|nothing|leave it|no more|not now)",
        ),
        "all right, only words",
    ),
    (
        ways(
            "talk: elsewhere",
            "(tell me|do you know|i want to hear) a (joke|riddle|secret|poem|fairy tale)",
            "what is the (weather|time|date|news|capital of france|meaning of life)?",
            "what is (two plus two|three times three|ten minus four|love|a number)?",
            "(how old are you?|where do you live?|sing me a song|do you like me?|are you a robot?)",
            "(who made you?|who is your friend?|what do you eat?|are you happy?|when do you sleep?)",
            "(can you cook?|can you dance?|where are you from?|do you like music?|what did you do today?)",
            "(ok|okay|yes|yeah|well|hm|haha|oh|ah|i see|sure|maybe|so what?|really?|why?|and now?)",
            "(what time is it?|is it late?|i am tired|it rains here|my day was long|i do not know)",
        ),
        ELSEWHERE,
    ),
)
"""Small talk: what a person may say, and the answer to all of it."""


def noise(rng: Speaker) -> str:
    """Return what is no request in any words: keys hit at random, marks, or tags as programs write them.

    Tests type the tags of this very program, which training never does.
    """
    kind = 2 if rng.reserved else rng.randrange(3)
    if kind == 0:
        rows = ("qwertyuiop", "asdfghjkl", "zxcvbnm", string.ascii_lowercase + string.digits)
        keys = rng.choice((*rows, rows[-1], rows[-1]))
        return " ".join("".join(rng.choices(keys, k=rng.randint(2, 12))) for _ in range(rng.randint(1, 3)))
    if kind == 1:
        return "".join(rng.choices(string.punctuation, k=rng.randint(2, 14)))
    name = rng.choice(OWN_TAGS)
    while not rng.reserved and name in OWN_TAGS:
        name = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 5)))
    opened, closed = rng.choice(("[]", "<>", "{}", ("</", ">"), ("<|", "|>")))
    first, number = rng.randrange(10), rng.randint(1, 8)
    numbered = rng.random() < 0.7
    return "".join(f"{opened}{name}{i if numbered else ''}{closed}" for i in range(first, first + number))


def ask_about(scene: Scene, rng: Speaker) -> tuple[str, str]:
    """Return a question about one attribute of a scene, and its answer.

    Answers are sentences: their words then begin with a space, as in captions, and are the same tokens there.
    """
    choices = [("thing", f"it is a {scene.thing}")]
    if not isinstance(scene, Sound):
        choices.append(("colour", f"it is {scene.colour}"))
        choices.append(("size", f"it is {scene.size}"))
    if isinstance(scene, Look):
        number = COUNT_WORDS[scene.count][0]
        choices.append(("count", f"there is {number}" if scene.count == 1 else f"there are {number}"))
    if isinstance(scene, Sound):
        choices.append(("times", f"it sounds {TIMES_WORDS[scene.count][0]}"))
        choices.append(("loudness", f"it is {scene.loudness}"))
    if isinstance(scene, Clip):
        choices.append(("motion", f"it is {MOTION_PHRASES[scene.motion][0]}"))
    question, answer = rng.choice(choices)
    return rng.say(QUESTIONS[question]), answer
