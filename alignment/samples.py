"""One exercise on its way through the system: what was shown, said and made, and whether it is right.

Every medium is written to a file's bytes and read again before it is judged.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignment.embedded.dialogues import MODALITY
from alignment.system import LinkName, Spoken, System
from alignment.toybox.exercise import Exercise, Turn
from alignment.toybox.grammar import read_text
from alignment.toybox.judge_sound import measure_sound
from alignment.toybox.judge_visual import measure_look
from alignment.toybox.media import Finding, Value, compare, fitted, judge, lengthened, render, to_bytes
from alignment.toybox.world import Scene
from encoders.media import Audio, Image, Medium, Modality, read_media
from llm.generate import ContextTooLong
from llm.signals import Signal
from llm.template import Dialogue, MediaTokens, Message, SignalPart
from llm.template import Part as DialoguePart

TOLERANCES: Mapping[str, float] = {"hue": 4.0, "centre": 1.0, "fundamental": 0.25}
"""In degrees, pixels and semitones: less than what two media of one caption are apart, half of the time."""


@dataclass
class Sample:
    """One exercise: ``heard`` is the conversation up to the last reply, ``ids`` the tokens of that reply.

    ``replies`` are the signals of every reply, ``confidence`` is that of each signal of the last one.
    """

    exercise: Exercise
    media: dict[Scene, Medium]
    spoken: list[Spoken] = field(default_factory=list)
    replies: list[list[Signal]] = field(default_factory=list)
    made: list[bytes] = field(default_factory=list)
    heard: Dialogue = field(default_factory=list)
    ids: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()
    _seen: dict[bytes, dict[str, Value]] = field(default_factory=dict)

    @property
    def signals(self) -> list[Signal]:
        """The signals of the reply, in order."""
        return [part for part in self.spoken if isinstance(part, Signal)]

    @property
    def text(self) -> str:
        """The words of the reply."""
        return " ".join(part for part in self.spoken if isinstance(part, str))

    @property
    def said(self) -> str:
        """The words of the person, turn by turn."""
        turns = [turn for turn in self.exercise.turns if turn.role == "user"]
        return " / ".join(" ".join(p for p in turn.parts if isinstance(p, str)) for turn in turns)

    def shown(self, turn: int) -> list[Medium]:
        """Return the media that the person shows in a turn of theirs, in order."""
        asked = [t for t in self.exercise.turns if t.role == "user"][turn : turn + 1]
        return [self.media[part] for t in asked for part in t.parts if not isinstance(part, str)]

    def keep(self, turn: int, place: int, data: bytes) -> None:
        """Keep the file of a medium, if it is part of the last reply."""
        if turn == len(self.replies) - 1:
            self.made += [b""] * (place + 1 - len(self.made))
            self.made[place] = data

    def judged(self, made: bytes) -> dict[str, Value]:
        """Return what the judge says of a file, asking it once."""
        if made not in self._seen:
            self._seen[made] = judge(made)
        return self._seen[made]


@dataclass
class Tally:
    """Counts of one direction and split."""

    n: int = 0
    right: int = 0
    attributes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    pairs: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)

    def add(self, findings: Mapping[str, Finding]) -> None:
        """Count one sample: right when every finding is."""
        self.n += 1
        self.right += all(finding.right for finding in findings.values())
        for name, finding in findings.items():
            self.attributes[name].append(int(finding.right))
            if finding.wanted is not None:
                found = self.pairs.setdefault(name, {}).setdefault(str(finding.wanted), {})
                found[str(finding.found)] = found.get(str(finding.found), 0) + 1

    def summary(self) -> dict[str, Any]:
        """Return the counts as fractions, and for attributes with names what was found for each."""
        fractions = {name: round(sum(v) / len(v), 4) for name, v in self.attributes.items()}
        right = round(self.right / max(1, self.n), 4)
        return {"n": self.n, "right": right, "attributes": fractions, "found": self.pairs}


def prepare(exercise: Exercise, rng: random.Random) -> Sample:
    """Render what the person shows."""
    shown = [part for turn in exercise.turns if turn.role == "user" for part in turn.parts]
    media = {s: read_media(to_bytes(render(s, rng))) for s in shown if not isinstance(s, str)}
    return Sample(exercise, media)


def decode(
    system: System,
    samples: Sequence[Sample],
    seed: int,
    *,
    links: Mapping[Modality, LinkName] | None = None,
    from_noise: bool = False,
) -> None:
    """Make every medium that the last replies ask for, in batches of one modality.

    Where media start from the newest ones of their kind, or keep something of them, those of earlier replies
    are made first.

    Args:
        system: what makes them.
        samples: finished conversations; they get their media.
        seed: of the decoders.
        links: over which link each modality goes, in place of the system's own; then media are taken as they
            come, for links are compared and not what is made up for.
        from_noise: edit nothing, whatever the preset says.

    """
    starts = frozenset() if from_noise else system.edits
    newest: list[dict[Modality, Medium]] = [{} for _ in samples]
    for turn in range(max((len(sample.replies) for sample in samples), default=0)):
        for sample, known in zip(samples, newest, strict=True):
            known.update({medium.modality: medium for medium in sample.shown(turn)})
        found: list[tuple[int, Modality, Medium]] = []
        for modality in system.decoders:
            placed = [
                (i, place, signal)
                for i, sample in enumerate(samples)
                if turn < len(sample.replies)
                if turn == len(sample.replies) - 1 or modality in starts
                for place, signal in enumerate(sample.replies[turn])
                if signal.modality == modality
            ]
            link = links[modality] if links else None
            conditions = [system.condition(signal, link) for _, _, signal in placed]
            sources = [newest[i].get(modality) for i, _, _ in placed] if modality in starts else None
            captions = None if links else [signal.caption for _, _, signal in placed]
            media = system.make(modality, conditions, seed + 1000 * turn, sources=sources, captions=captions)
            for (i, place, _), medium in zip(placed, media, strict=True):
                data = to_bytes(medium)
                samples[i].keep(turn, place, data)
                found.append((i, modality, read_media(data)))
        for i, modality, medium in found:
            newest[i][modality] = medium


def converse(system: System, sample: Sample) -> None:
    """Hold the conversation of a sample, with the system's own earlier replies."""
    read = {scene: system.read(medium) for scene, medium in sample.media.items()}
    dialogue: Dialogue = []
    for turn in sample.exercise.turns:
        if turn.role == "user":
            dialogue.append(_user(turn, read))
            sample.heard = list(dialogue)
            try:
                answer = system.answer(dialogue)
            except ContextTooLong:  # only a babbling model talks itself out of its context
                sample.spoken, sample.ids, sample.confidence = [], (), ()
                sample.replies.append([])
                return
            sample.spoken, sample.ids, sample.confidence = answer.parts, answer.ids, answer.confidence
            sample.replies.append(sample.signals)
            parts: list[DialoguePart] = [
                SignalPart(part.modality) if isinstance(part, Signal) else part for part in answer.parts
            ]
            dialogue.append(Message("assistant", parts))


def _user(turn: Turn, read: Mapping[Scene, MediaTokens]) -> Message:
    return Message("user", [part if isinstance(part, str) else read[part] for part in turn.parts])


def findings(sample: Sample) -> dict[str, Finding]:
    """Judge a finished sample, attribute by attribute. With several media, names carry the modality."""
    exercise = sample.exercise
    wanted = [MODALITY[type(scene)] for scene in exercise.scenes]
    got = [signal.modality for signal in sample.signals]
    if exercise.direction == "decision":
        each = {str(m): Finding((m in wanted) == (m in got)) for m in MODALITY.values()}
        return each | {"exactly": Finding(got == wanted)}
    if not wanted:
        result = {"modalities": Finding(not got)}
        if exercise.judged and exercise.stated is not None:
            result |= compare(read_text(sample.text), exercise.stated, exercise.judged[0])
        else:
            result["words"] = Finding(not got and sample.text == exercise.answer[0])
        return result
    result = {"modalities": Finding(got == wanted)}
    for place, (scene, names) in enumerate(zip(exercise.scenes, exercise.judged, strict=True)):
        prefix = f"{wanted[place]} " if len(wanted) > 1 else ""
        made = sample.made[place] if got == wanted else b""
        for name, finding in medium_findings(sample, scene, names, made).items():
            result[prefix + name] = finding
    return result


def all_right(sample: Sample) -> bool:
    """Return whether every judged attribute is right."""
    return all(finding.right for finding in findings(sample).values())


def right_media(sample: Sample) -> bool:
    """Return whether the media of the reply are of the wanted kinds, in the wanted order."""
    wanted = [MODALITY[type(scene)] for scene in sample.exercise.scenes]
    return [signal.modality for signal in sample.signals] == wanted


def medium_findings(sample: Sample, scene: Scene, names: Sequence[str], made: bytes) -> dict[str, Finding]:
    """Judge one file of a sample; an empty file is wrong in everything."""
    named = [name for name in names if name not in TOLERANCES]
    measured = [name for name in names if name in TOLERANCES]
    result = compare(sample.judged(made) if made else {}, scene, named)
    if measured:
        apart = differences(sample.media[scene], read_media(made)) if made else {}
        result |= {name: Finding(apart.get(name, math.inf) <= TOLERANCES[name]) for name in measured}
    return result


def differences(source: Medium, made: Medium) -> dict[str, float]:
    """Return how far a medium is from its source in what no caption says.

    Of sounds that is the ``fundamental`` in semitones, of pictures the ``centre`` of what is drawn in pixels,
    and its ``hue`` in degrees, which is the same for all that has hardly any colour. Nothing is said of media
    of two kinds, or where nothing is to be seen.
    """
    if isinstance(source, Audio) and isinstance(made, Audio):
        return {"fundamental": semitones_between(source, made)}
    if not (isinstance(source, Image) and isinstance(made, Image)):
        return {}
    was, now = (measure_look(fitted(picture.pixels)) for picture in (source, made))
    if was is None or now is None:
        return {}
    turn = abs(was.hue_degrees - now.hue_degrees) % 360
    colourless = max(was.body_rgb) - min(was.body_rgb) < 30
    distance = max(abs(a - b) for a, b in zip(was.centre_px, now.centre_px, strict=True))
    return {"hue": 0.0 if colourless else min(turn, 360 - turn), "centre": distance}


def source_differences(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Return the median and the worst tenth of all differences from sources, by name.

    For samples that ask for one medium like the one that is shown; those that have none are left out.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.made and right_media(sample):
            (scene,) = sample.exercise.scenes
            for name, value in differences(sample.media[scene], read_media(sample.made[0])).items():
                found[name].append(value)
    return {
        name: {"median": round(float(np.median(values)), 3), "p90": round(float(np.quantile(values, 0.9)), 3)}
        for name, values in found.items()
    }


def semitones_between(source: Audio, made: Audio) -> float:
    """Return how far apart two sounds are tuned; infinity where one is silent."""
    before, after = (measure_sound(lengthened(s).samples, s.rate) for s in (source, made))
    ratio = after["hz"] / before["hz"]
    return 12 * abs(math.log2(ratio)) if ratio > 0 else math.inf
