"""``patchbay eval judge``: how often the judge is right about true renderings, whose scene is known.

Files are judged as they are written, then as others pass them on: pictures as JPEG, videos compressed
again and at another frame rate, sounds at other sample rates. As a control, files are held against the
scene of another file: the judge must then be right no more often than two random scenes agree.
"""

from __future__ import annotations

import io
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import PIL.Image

from alignment.shared_work import share
from alignment.toybox.exercise import FreshScenes, judged
from alignment.toybox.media import Finding, Value, compare, judge, render, to_bytes
from alignment.toybox.world import Scene, attributes
from encoders.media import Audio, Image, Medium, Video, read_media, resample

AT_LEAST = {"written": 0.99, "passed on": 0.98}
SCENES_PER_TASK = 20
CONTROL = "scenes shuffled"


@dataclass(frozen=True, slots=True)
class Case:
    """One way in which a rendering reaches the judge."""

    name: str
    kind: str
    encode: Callable[[Medium], bytes]
    goal: float


def jpeg(medium: Medium, quality: int) -> bytes:
    """Return a picture as JPEG."""
    assert isinstance(medium, Image)
    buffer = io.BytesIO()
    PIL.Image.fromarray(medium.pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def mp4(medium: Medium, crf: int, times: int = 1) -> bytes:
    """Return a video as H.264 at a constant rate factor, every frame so many times as fast and often."""
    assert isinstance(medium, Video)
    first = read_media(to_bytes(medium))  # what is compressed again has been compressed before
    assert isinstance(first, Video)
    with TemporaryDirectory(prefix="patchbay-") as folder:
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w", format="mp4") as container:
            rate = Fraction(first.fps * times).limit_denominator(1001)
            stream: Any = container.add_stream("libx264", rate=rate)
            stream.height, stream.width = first.frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": str(crf), "threads": "1"}
            for frame in np.repeat(first.frames, times, axis=0):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        return path.read_bytes()


def wav(medium: Medium, rate: int) -> bytes:
    """Return a sound as a WAV at another sample rate."""
    assert isinstance(medium, Audio)
    return to_bytes(replace(medium, samples=resample(medium.samples, medium.rate, rate), rate=rate))


CASES = (
    Case("PNG", "look", to_bytes, AT_LEAST["written"]),
    Case("JPEG, quality 75", "look", partial(jpeg, quality=75), AT_LEAST["passed on"]),
    Case("MP4", "clip", to_bytes, AT_LEAST["written"]),
    Case("MP4 again, rate factor 23", "clip", partial(mp4, crf=23), AT_LEAST["passed on"]),
    Case("MP4 again, 24 frames a second", "clip", partial(mp4, crf=18, times=3), AT_LEAST["passed on"]),
    Case("WAV", "sound", to_bytes, AT_LEAST["written"]),
    Case("WAV at 44 100 Hz", "sound", partial(wav, rate=44_100), AT_LEAST["passed on"]),
    Case("WAV at 22 050 Hz", "sound", partial(wav, rate=22_050), AT_LEAST["passed on"]),
)
KINDS = {"look": "picture", "clip": "video", "sound": "sound"}


@dataclass(frozen=True, slots=True)
class Part:
    """Some scenes of one kind, the first of which has the number ``start``."""

    kind: str
    seed: int
    start: int
    number: int


def main_judge(samples: int, seed: int, jobs: int = 1) -> dict[str, Any]:
    """Measure the judge.

    Args:
        samples: renderings of each kind, one in five of them of held-out combinations.
        seed: of scenes and jitter.
        jobs: processes that share the work; the result is the same for every number.

    Returns:
        ``rows``, one per case: its kind, file, ``n``, how often all attributes and each of them are right,
        the ``goal`` for each attribute and whether it is ``met``. In the rows of the control, ``chance`` is
        how often two random scenes have the same value, and ``met`` whether no attribute is further from
        it than so few samples explain (four standard deviations).

    """
    started = time.monotonic()
    parts = [
        Part(kind, seed, start, min(SCENES_PER_TASK, samples - start))
        for kind in KINDS
        for start in range(0, samples, SCENES_PER_TASK)
    ]
    found = share("judging", parts, _worker, jobs)
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        judged_scenes = [
            one for part, result in zip(parts, found, strict=True) if part.kind == kind for one in result
        ]
        cases = [case for case in CASES if case.kind == kind]
        for place, case in enumerate(cases):
            pairs = [(scene, verdicts[place]) for scene, verdicts in judged_scenes]
            rows.append(_row(kind, case.name, pairs) | {"goal": case.goal})
        rows.append(_control(kind, [(scene, verdicts[0]) for scene, verdicts in judged_scenes]))
    for row in rows:
        if "goal" in row:
            row["met"] = all(value >= row["goal"] for value in row["attributes"].values())
    seconds = round(time.monotonic() - started, 1)
    return {"samples": samples, "seed": seed, "rows": rows, "seconds": seconds}


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table."""
    lines = ["| medium | file | n | all right | attributes | goal for each |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        chance = row.get("chance", {})
        attributes = ", ".join(
            f"{name} {value:.1%}" + (f" (chance {chance[name]:.1%})" if name in chance else "")
            for name, value in row["attributes"].items()
        )
        goal = f"{row['goal']:.0%}" if "goal" in row else "chance"
        goal += ", met" if row["met"] else ", missed"
        lines.append(
            f"| {row['medium']} | {row['file']} | {row['n']} | {row['right']:.1%} | {attributes} | {goal} |"
        )
    return "\n".join([*lines, f"\n{result['seconds']:.0f} s, seed {result['seed']}"])


def _worker() -> Callable[[Part], list[tuple[Scene, list[dict[str, Value]]]]]:
    return _judge_part


def _judge_part(part: Part) -> list[tuple[Scene, list[dict[str, Value]]]]:
    cases = [case for case in CASES if case.kind == part.kind]
    done = []
    for index in range(part.start, part.start + part.number):
        rng = random.Random(f"judge-{part.seed}-{part.kind}-{index}")
        scenes = FreshScenes(rng, held_out=index % 5 == 4)
        draw: dict[str, Callable[[], Scene]] = {
            "look": scenes.look, "clip": scenes.clip, "sound": scenes.sound,
        }  # fmt: skip
        scene = draw[part.kind]()
        medium = render(scene, rng)
        done.append((scene, [judge(case.encode(medium)) for case in cases]))
    return done


def _row(kind: str, file: str, pairs: Sequence[tuple[Scene, Mapping[str, Value]]]) -> dict[str, Any]:
    found = [compare(verdict, scene, judged(scene)) for scene, verdict in pairs]
    return {"medium": KINDS[kind], "file": file, **_shares(found)}


def _shares(found: Sequence[Mapping[str, Finding]]) -> dict[str, Any]:
    names = dict.fromkeys(name for findings in found for name in findings)
    attributes_right = {
        name: _share([findings[name].right for findings in found if name in findings]) for name in names
    }
    right = _share([all(f.right for f in findings.values()) for findings in found])
    return {"n": len(found), "right": right, "attributes": attributes_right}


def _control(kind: str, pairs: Sequence[tuple[Scene, Mapping[str, Value]]]) -> dict[str, Any]:
    """Hold every file against the scene of the next one."""
    scenes = [scene for scene, _ in pairs]
    shifted = [(scene, verdict) for scene, (_, verdict) in zip(scenes[1:] + scenes[:1], pairs, strict=True)]
    chance = {}
    met = True
    row = _row(kind, CONTROL, shifted)
    for name in dict.fromkeys(name for scene in scenes for name in judged(scene)):
        # The judged one must have the attribute; the other one may lack it, and then never agrees.
        wanted = Counter(attributes(scene)[name] for scene in scenes if name in judged(scene))
        there = Counter(attributes(scene).get(name) for scene in scenes)
        total = sum(wanted.values()) * len(scenes)
        alike = sum(count * there[value] for value, count in wanted.items()) / total
        met &= abs(row["attributes"][name] - alike) <= 4 * (alike * (1 - alike) / sum(wanted.values())) ** 0.5
        chance[name] = round(alike, 4)
    return row | {"chance": chance, "met": met}


def _share(flags: Sequence[bool]) -> float:
    return round(sum(flags) / max(1, len(flags)), 4)
