import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from alignment.embedded.dialogues import MODALITY
from alignment.evaluation import asking_of, asking_table, over_seeds, table
from alignment.samples import Sample, Tally, decode, findings, right_media
from alignment.toybox.directions import DIRECTIONS, make
from alignment.toybox.exercise import Exercise, FreshScenes, Turn
from alignment.toybox.grammar import caption
from alignment.toybox.media import Finding, judge, render, to_bytes
from alignment.toybox.world import Scene, Sound, attributes
from encoders.media import Audio, Image, Medium, Modality, read_media
from llm.signals import Signal


def signal(modality: Modality, text: str = "") -> Signal:
    return Signal(modality, text, torch.zeros(1, 2), torch.zeros(1, 2))


def verdicts(sample: Sample) -> dict[str, bool]:
    return {name: finding.right for name, finding in findings(sample).items()}


def perfect(exercise: Exercise, rng: random.Random, shown: Sequence[Scene] | None = None) -> Sample:
    """What a flawless system would make of an exercise; ``shown`` puts other scenes into its media."""
    scenes = exercise.scenes if shown is None else shown
    jitter = f"jitter-{rng.random()}"
    inputs = {
        scene: render(scene, random.Random(jitter))
        for turn in exercise.turns
        for scene in turn.parts
        if not isinstance(scene, str)
    }
    return Sample(
        exercise,
        inputs,
        spoken=[p if isinstance(p, str) else signal(MODALITY[type(p)]) for p in exercise.answer],
        made=[to_bytes(render(scene, random.Random(jitter))) for scene in scenes],
    )


@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_a_flawless_answer_is_right(direction: str) -> None:
    rng = random.Random(direction)
    done = [perfect(make(direction, rng, FreshScenes(rng)), rng) for _ in range(4)]
    wrong = [(sample.exercise, verdicts(sample)) for sample in done if not all(verdicts(sample).values())]
    assert not wrong


@pytest.mark.parametrize("direction", ["text-to-image", "text-to-audio", "text-to-video", "audio-to-image"])
def test_the_answer_to_another_request_is_wrong(direction: str) -> None:
    rng = random.Random(direction)
    exercises = [make(direction, rng, FreshScenes(rng)) for _ in range(8)]
    shuffled = [
        perfect(mine, rng, shown=other.scenes)
        for mine, other in zip(exercises, exercises[1:] + exercises[:1], strict=True)
    ]
    assert sum(all(verdicts(sample).values()) for sample in shuffled) <= 1


def test_a_medium_of_the_wrong_kind_makes_everything_wrong() -> None:
    rng = random.Random(1)
    sample = perfect(make("text-to-image", rng, FreshScenes(rng)), rng)
    sample.spoken[-1] = signal(Modality.AUDIO)
    assert not any(verdicts(sample).values())


def test_words_are_read_for_what_they_state() -> None:
    rng = random.Random(2)
    exercise = make("image-to-text", rng, FreshScenes(rng))
    assert exercise.stated is not None
    right = Sample(exercise, {}, spoken=[caption(exercise.stated)])
    wrong = Sample(exercise, {}, spoken=["something else entirely"])
    assert all(verdicts(right).values())
    assert not all(verdicts(wrong).values())


def test_the_decision_is_right_only_for_exactly_what_was_asked() -> None:
    rng = random.Random(3)
    exercise = next(
        e for e in iter(lambda: make("decision", rng, FreshScenes(rng)), None) if len(e.scenes) == 2
    )
    sample = perfect(exercise, rng)
    assert all(verdicts(sample).values())
    sample.spoken = [part for part in sample.spoken if isinstance(part, str)]
    assert verdicts(sample)["exactly"] is False


def test_files_are_judged_not_tensors() -> None:
    rng = random.Random(4)
    scene = FreshScenes(rng).sound()
    assert judge(to_bytes(render(scene, rng)))["thing"] == scene.thing


class Painter:
    """A system that paints a grey picture for each call, and remembers what it was to edit."""

    decoders = (Modality.IMAGE,)

    def __init__(self, *edits: Modality) -> None:
        self.edits = frozenset(edits)
        self.sources: list[Sequence[Medium | None]] = []

    def condition(self, signal: Signal, link: None) -> None:
        return None

    def make(
        self, modality: Modality, conditions: Any, seed: int, sources: Any, captions: Any
    ) -> list[Medium]:
        if not conditions:
            return []
        self.sources.append(sources)
        shade = len(self.sources)
        return [Image(np.full((64, 64, 3), shade, np.uint8)) for _ in conditions]


def test_edits_start_from_what_was_shown_and_then_from_what_was_made() -> None:
    rng = random.Random(5)
    exercise = make("text+image-to-image", rng, FreshScenes(rng))
    asks_again = replace(exercise, turns=(*exercise.turns, Turn("user", ("and now blue",))))
    asked, from_noise = perfect(asks_again, rng), perfect(asks_again, rng)
    for sample in (asked, from_noise):
        sample.replies = [[signal(Modality.IMAGE)], [signal(Modality.IMAGE)]]
    editing, anew = Painter(Modality.IMAGE), Painter()

    decode(editing, [asked], 0)  # type: ignore[arg-type]
    decode(anew, [from_noise], 0)  # type: ignore[arg-type]

    first, second = [sources for sources in editing.sources if sources]
    assert first == list(asked.media.values())
    (before,) = second
    assert isinstance(before, Image)
    assert (before.pixels == 1).all()
    assert not any(anew.sources)
    last = [read_media(sample.made[0]) for sample in (asked, from_noise)]
    assert [int(picture.pixels.max()) for picture in last if isinstance(picture, Image)] == [2, 1]


def test_a_sound_that_stops_early_is_judged_with_silence_behind_it() -> None:
    short = Audio(np.zeros(100, dtype=np.float32), 16_000)
    assert judge(to_bytes(short))["thing"] == "silence"
    sound = Sound("drum", "low", 1, "fast", "loud")
    whole = render(sound, random.Random(0))
    assert isinstance(whole, Audio)
    assert judge(to_bytes(Audio(whole.samples[:12_000], 16_000))) == attributes(sound)


def test_a_sample_counts_as_right_only_when_every_attribute_is() -> None:
    tally = Tally()
    tally.add({"thing": Finding(True, "bell", "bell"), "hue": Finding(True)})
    tally.add({"thing": Finding(True, "drum", "drum"), "hue": Finding(False)})
    assert tally.summary() == {
        "n": 2,
        "right": 0.5,
        "attributes": {"thing": 1.0, "hue": 0.5},
        "found": {"thing": {"bell": {"bell": 1}, "drum": {"drum": 1}}},
    }


def result_of(right: float, wrong_bells: int) -> dict[str, Any]:
    found = {"thing": {"bell": {"bell": 4, "drum": wrong_bells}}}
    split = {"n": 10, "right": right, "attributes": {"thing": right}, "found": found}
    return {"ceiling": 0.75, "seen": split, "held_out": split}


def test_seeds_are_averaged_with_their_spread_and_their_counts_are_added() -> None:
    merged = over_seeds([result_of(0.5, 1), result_of(0.7, 2), result_of(0.9, 3)])
    seen = merged["seen"]
    assert (seen["n"], seen["right"], seen["spread"]) == (30, 0.7, 0.4)
    assert seen["right_by_seed"] == [0.5, 0.7, 0.9]
    assert seen["found"] == {"thing": {"bell": {"bell": 12, "drum": 6}}}
    assert merged["ceiling"] == 0.75


def test_asking_is_added_up_and_told_of_directions_where_something_is_wrong() -> None:
    counts = {"n": 10, "wrong": 2, "asked": {"0.99": 3}, "caught": {"0.99": 1}}
    twice = over_seeds([result_of(0.5, 1) | {"asking": counts}] * 2)
    assert twice["asking"] == {"n": 20, "wrong": 4, "asked": {"0.99": 6}, "caught": {"0.99": 2}}
    never_wrong = {"asking": {"n": 20, "wrong": 0, "asked": {"0.99": 0}, "caught": {"0.99": 0}}}
    rows = {"one": twice, "two": never_wrong, "chain": result_of(0.5, 1)}
    assert asking_table(asking_of(rows)).splitlines()[2:] == [
        "| all: asked | | 15.0% |",
        "| of the wrong | 4 of 40 | 50.0% |",
        "| one: asked | | 30.0% |",
        "| of the wrong | 4 of 20 | 50.0% |",
    ]
    assert asking_of({"chain": result_of(0.5, 1)}) == {}


def test_a_reply_is_wrong_when_its_media_are_of_other_kinds_or_in_another_order() -> None:
    rng = random.Random(3)
    sample = perfect(make("image-to-audio", rng, FreshScenes(rng)), rng)
    assert right_media(sample)
    sample.spoken.append(signal(Modality.IMAGE))
    assert not right_media(sample)
    sample.spoken = [signal(Modality.IMAGE)]
    assert not right_media(sample)


def test_the_table_has_a_line_per_direction_and_their_mean() -> None:
    rows = {"text-to-image": result_of(0.5, 1), "text-to-audio": over_seeds([result_of(0.6, 1)] * 2)}
    printed = table({"seconds": 1.0, "seed": 0, "seeds": [0, 1], "directions": rows})
    assert "| text-to-image | 50.0% of 10 | 50.0% of 10 | 75.0% | thing 50.0% |" in printed
    assert "| text-to-audio | 60.0% ± 0.0% of 20 |" in printed
    assert "| **mean of 2** | 55.0% | 55.0% | | |" in printed
