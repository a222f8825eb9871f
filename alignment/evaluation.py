"""``patchbay eval toybox``: how often the outputs are right, direction by direction.

A sample is right when every judged attribute is. Every medium is written to a file's bytes and
read again before it is judged. Seen and held-out combinations are counted apart.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from alignment.embedded.dialogues import MODALITY
from alignment.system import Folders, Spoken, System
from alignment.toybox.cycles import CYCLES, run_cycle
from alignment.toybox.exercises import DIRECTIONS, Exercise, FreshScenes, Turn, make
from alignment.toybox.grammar import caption, read_text
from alignment.toybox.judge_sound import measure_sound
from alignment.toybox.judge_visual import measure_look
from alignment.toybox.media import judge, render, to_bytes
from alignment.toybox.world import Scene
from encoders.media import Audio, Image, Medium, read_media
from llm.generate import ContextTooLong
from llm.signals import Signal
from llm.template import Dialogue, MediaTokens, Message, SignalPart

HELD_OUT_SHARE = 4  # one held-out sample for so many seen ones
CEILINGS = ("text-to-image", "text-to-video", "text-to-audio")
HUE_TOLERANCE_DEGREES, CENTRE_TOLERANCE_PX, TUNING_TOLERANCE_SEMITONES = 12.0, 3.0, 1.0


@dataclass
class Sample:
    """One exercise on its way through the system."""

    exercise: Exercise
    media: dict[Scene, Medium]
    spoken: list[Spoken] = field(default_factory=list)
    made: list[bytes] = field(default_factory=list)

    @property
    def signals(self) -> list[Signal]:
        """The signals of the reply, in order."""
        return [part for part in self.spoken if isinstance(part, Signal)]

    @property
    def text(self) -> str:
        """The words of the reply."""
        return " ".join(part for part in self.spoken if isinstance(part, str))


@dataclass
class Tally:
    """Counts of one direction and split."""

    n: int = 0
    right: int = 0
    attributes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, verdicts: Mapping[str, bool]) -> None:
        """Count one sample: right when every verdict is."""
        self.n += 1
        self.right += all(verdicts.values())
        for name, verdict in verdicts.items():
            self.attributes[name].append(int(verdict))

    def summary(self) -> dict[str, Any]:
        """Return the counts as fractions."""
        fractions = {name: round(sum(v) / len(v), 4) for name, v in self.attributes.items()}
        return {"n": self.n, "right": round(self.right / max(1, self.n), 4), "attributes": fractions}


def main_toybox(
    folders: Folders,
    directions: Sequence[str] | None,
    samples: int,
    seed: int,
    sheets: Path | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Measure a preset on Toybox.

    Args:
        folders: where its parts lie.
        directions: names, or None for all of them.
        samples: seen samples of each direction; a quarter as many held-out ones are added.
        seed: of scenes, wordings, jitter and decoders.
        sheets: a folder for contact sheets of what was made, or None.
        jobs: processes that share the directions; the result is the same for every number.

    Returns:
        The object that ``--json`` prints (see the README).

    Raises:
        ValueError: for a direction that does not exist.

    """
    known = (*DIRECTIONS, *CYCLES)
    chosen = list(directions) if directions is not None else list(known)
    for name in chosen:
        if name not in known:
            raise ValueError(f"There is no direction {name!r}; expected some of {', '.join(known)}.")
    started = time.monotonic()
    results: dict[str, Any] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("directions", total=len(chosen))
        for name, result in _measured(folders, chosen, samples, seed, sheets, jobs):
            results[name] = result
            progress.advance(task)
    results = {name: results[name] for name in chosen}
    return {
        "samples": samples,
        "seed": seed,
        "directions": results,
        "seconds": round(time.monotonic() - started, 1),
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table with a line per direction."""
    lines = ["| direction | seen | held out | ceiling | attributes (seen) |", "|---|---|---|---|---|"]
    for name, row in result["directions"].items():
        ceiling = "" if row["ceiling"] is None else f"{row['ceiling']:.1%}"
        attributes = ", ".join(f"{key} {value:.1%}" for key, value in row["seen"]["attributes"].items())
        seen, held_out = (f"{row[split]['right']:.1%} of {row[split]['n']}" for split in ("seen", "held_out"))
        lines.append(f"| {name} | {seen} | {held_out} | {ceiling} | {attributes} |")
    return "\n".join([*lines, f"\n{result['seconds']:.0f} s, seed {result['seed']}"])


def _measured(
    folders: Folders, names: Sequence[str], samples: int, seed: int, sheets: Path | None, jobs: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure directions in this process, or in ``jobs`` others; yields each as it is done."""
    if jobs == 1:
        system = System(folders)
        for name in names:
            yield name, _measure(system, name, samples, seed, sheets)
        return
    context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
    with ProcessPoolExecutor(jobs, context, _load_once, (folders,)) as pool:
        running = {pool.submit(_measure_there, name, samples, seed, sheets): name for name in names}
        for done in as_completed(running):
            yield running[done], done.result()


_system_there: list[System] = []  # the system of a worker process


def _load_once(folders: Folders) -> None:
    torch.set_num_threads(1)
    _system_there.append(System(folders))


def _measure_there(name: str, samples: int, seed: int, sheets: Path | None) -> dict[str, Any]:
    return _measure(_system_there[0], name, samples, seed, sheets)


def _measure(system: System, name: str, samples: int, seed: int, sheets: Path | None) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {}
    ceiling: float | None = None
    for split, number in (("seen", samples), ("held_out", max(1, samples // HELD_OUT_SHARE))):
        rng = random.Random(f"evaluation-{seed}-{name}-{split}")
        scenes = FreshScenes(rng, held_out=split == "held_out")
        tally = Tally()
        if name in CYCLES:
            for index in range(number):
                tally.add(run_cycle(name, system, rng, scenes, seed + index))
        else:
            done = [_prepared(make(name, rng, scenes), rng) for _ in range(number)]
            _run(system, done, seed)
            for sample in done:
                tally.add(verdicts(sample))
            if name in CEILINGS and split == "seen":
                ceiling = _ceiling(system, done, seed)
            if sheets is not None and split == "seen":
                from alignment.sheets import write_sheet

                write_sheet(sheets / f"{name}.png", done, [all(verdicts(sample).values()) for sample in done])
        splits[split] = tally.summary()
    return {**splits, "ceiling": ceiling}


def _prepared(exercise: Exercise, rng: random.Random) -> Sample:
    shown = [part for turn in exercise.turns if turn.role == "user" for part in turn.parts]
    media = {s: read_media(to_bytes(render(s, rng))) for s in shown if not isinstance(s, str)}
    return Sample(exercise, media)


def _run(system: System, samples: Sequence[Sample], seed: int) -> None:
    """Let the system answer every sample; what it makes is decoded in batches."""
    for sample in samples:
        sample.spoken = converse(system, sample)
    for modality in system.decoders:
        placed = [(s, i, g) for s in samples for i, g in enumerate(s.signals) if g.modality == modality]
        media = system.make(modality, [system.condition(signal) for _, _, signal in placed], seed)
        for (sample, place, _), medium in zip(placed, media, strict=True):
            sample.made += [b""] * (place + 1 - len(sample.made))
            sample.made[place] = to_bytes(medium)


def converse(system: System, sample: Sample) -> list[Spoken]:
    """Hold the conversation of a sample, with the system's own earlier replies."""
    read = {scene: system.read(medium) for scene, medium in sample.media.items()}
    dialogue: Dialogue = []
    spoken: list[Spoken] = []
    for turn in sample.exercise.turns:
        if turn.role == "user":
            dialogue.append(_user(turn, read))
            try:
                spoken = system.speak(dialogue)
            except ContextTooLong:  # only a babbling model talks itself out of its context
                return []
            parts: list[str | MediaTokens | SignalPart] = [
                SignalPart(part.modality) if isinstance(part, Signal) else part for part in spoken
            ]
            dialogue.append(Message("assistant", parts))
    return spoken


def _user(turn: Turn, read: Mapping[Scene, MediaTokens]) -> Message:
    return Message("user", [part if isinstance(part, str) else read[part] for part in turn.parts])


def verdicts(sample: Sample) -> dict[str, bool]:
    """Judge a finished sample: attribute -> right. With several media, names carry the modality."""
    exercise = sample.exercise
    wanted = [MODALITY[type(scene)] for scene in exercise.scenes]
    got = [signal.modality for signal in sample.signals]
    if exercise.direction == "decision":
        return {str(m): (m in wanted) == (m in got) for m in MODALITY.values()} | {"exactly": got == wanted}
    if not wanted:
        stated = read_text(sample.text)
        names = exercise.judged[0] if exercise.judged else ()
        return {"modalities": not got} | {
            name: stated.get(name) == getattr(exercise.stated, name) for name in names
        }
    result = {"modalities": got == wanted}
    for place, (scene, names) in enumerate(zip(exercise.scenes, exercise.judged, strict=True)):
        prefix = f"{wanted[place]} " if len(wanted) > 1 else ""
        made = sample.made[place] if got == wanted else b""
        for name, verdict in _medium_verdicts(sample, scene, names, made).items():
            result[prefix + name] = verdict
    return result


def _medium_verdicts(sample: Sample, scene: Scene, names: Sequence[str], made: bytes) -> dict[str, bool]:
    if not made:
        return dict.fromkeys(names, False)
    seen = judge(made)
    exact = [name for name in names if name in ("hue", "centre", "fundamental")]
    result = {name: seen.get(name) == getattr(scene, name) for name in names if name not in exact}
    if exact:
        result |= _near(sample.media[scene], read_media(made), exact)
    return result


def _near(source: Medium, made: Medium, names: Sequence[str]) -> dict[str, bool]:
    """Compare continuous measurements of a medium with those of its source."""
    if isinstance(source, Audio) and isinstance(made, Audio):
        before, after = measure_sound(source.samples, source.rate), measure_sound(made.samples, made.rate)
        ratio = after["hz"] / before["hz"]
        semitones = 12 * abs(math.log2(ratio)) if ratio > 0 else math.inf
        return {"fundamental": semitones <= TUNING_TOLERANCE_SEMITONES}
    if not (isinstance(source, Image) and isinstance(made, Image)):
        return dict.fromkeys(names, False)
    was, now = measure_look(source.pixels), measure_look(made.pixels)
    if was is None or now is None:
        return dict.fromkeys(names, False)
    turn = abs(was.hue_degrees - now.hue_degrees) % 360
    colourless = max(was.body_rgb) - min(was.body_rgb) < 30
    distance = max(abs(a - b) for a, b in zip(was.centre_px, now.centre_px, strict=True))
    return {
        "hue": colourless or min(turn, 360 - turn) <= HUE_TOLERANCE_DEGREES,
        "centre": distance <= CENTRE_TOLERANCE_PX,
    }


def _ceiling(system: System, samples: Sequence[Sample], seed: int) -> float:
    """Return how often the decoder is right when its own text encoder reads the true caption."""
    scenes = [sample.exercise.scenes[0] for sample in samples]
    modality = MODALITY[type(scenes[0])]
    conditions = [system.decoders[modality].encode_caption(caption(scene)) for scene in scenes]
    right = 0
    for sample, scene, medium in zip(samples, scenes, system.make(modality, conditions, seed), strict=True):
        right += all(_medium_verdicts(sample, scene, sample.exercise.judged[0], to_bytes(medium)).values())
    return round(right / len(samples), 4)
