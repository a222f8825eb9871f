"""A whole preset in one thread, and the media that it makes again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from alignment.evaluation import Wish, measure, over_seeds, table
from alignment.second_look import SecondLook, likeness, next_seed
from alignment.system import System
from alignment.toybox.media import to_bytes
from decoders.condition import Condition
from encoders.media import Image, Medium, Modality, read_media
from llm.scoring import score
from llm.template import Message
from services.measuring import folders_of
from services.presets import load_preset
from tests.tiny import tiny_values

IMAGE = Modality.IMAGE
CAPTIONS = ("It is a bell.", "Hello!", " ")


@pytest.fixture(scope="module")
def system(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> System:
    verify = {"retries": 2, "below": 0.9, "question": "what is this?", "modalities": ["image"]}
    values = tiny_values() | {"weights": str(tiny_preset.parent / "weights")}
    values["generation"] = {"verify": verify}
    path = tmp_path_factory.mktemp("verified") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return System(folders_of(load_preset(str(path))))


def conditions(system: System) -> list[Condition]:
    torch.manual_seed(0)
    spec = system.decoders[IMAGE].condition_spec
    return [Condition(torch.randn(spec.tokens, spec.width)) for _ in CAPTIONS]


def seen(system: System, medium: Medium, caption: str) -> float:
    read = system.read(read_media(to_bytes(medium)))
    dialogue = [Message("user", [read, "what is this?"]), Message("assistant", [caption])]
    return likeness(score(system.llm, [dialogue])[0].log_probabilities)


def pixels(medium: Medium) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    assert isinstance(medium, Image)
    return medium.pixels


def test_what_looks_least_like_its_caption_is_made_again_and_the_best_is_kept(system: System) -> None:
    asked, seeds = conditions(system), [4, 5, 6]
    tries = [system.make(IMAGE, asked, [next_seed(seed, k) for seed in seeds]) for k in range(3)]
    alike = [[seen(system, tries[k][i], words) for k in range(3)] for i, words in enumerate(CAPTIONS[:2])]
    first_enough = next(k for k, value in enumerate([*alike[0], 1.0]) if value >= 0.9)
    assert max(alike[1]) < 0.9  # nobody says hello to a picture
    before = system.num_looks, system.num_retries

    made = system.make(IMAGE, asked, seeds, captions=CAPTIONS)

    best = [int(np.argmax(alike[0][: first_enough + 1])), int(np.argmax(alike[1])), 0]
    for i, k in enumerate(best):
        assert np.array_equal(pixels(made[i]), pixels(tries[k][i]))
    retries = min(first_enough, 2) + 2
    assert (system.num_looks - before[0], system.num_retries - before[1]) == (2 + retries, retries)


def test_nothing_is_looked_at_without_captions_or_of_another_kind(system: System) -> None:
    before = system.num_looks
    system.make(IMAGE, conditions(system), 4)
    spec = system.decoders[Modality.AUDIO].condition_spec
    system.make(Modality.AUDIO, [Condition(torch.randn(spec.tokens, spec.width))], 4, captions=["Hello!"])
    assert system.num_looks == before


def test_how_often_media_were_made_again_is_part_of_a_measurement(system: System) -> None:
    runs = [measure(system, Wish("text-to-image", 1, seed)) for seed in (0, 1)]
    result = {"directions": {"text-to-image": over_seeds(runs)}, "seconds": 1.0, "seeds": [0, 1]}
    looked, retries = (sum(run["second_look"][key] for run in runs) for key in ("looked", "retries"))
    assert f"The system looked at {looked} media once more, and had {retries} made again." in table(result)
    assert result["directions"]["text-to-image"]["second_look"] == {"looked": looked, "retries": retries}


def test_results_with_a_second_look_are_not_those_without(tiny_preset: Path) -> None:
    bare = folders_of(load_preset(str(tiny_preset)))
    assert "second look" not in bare.how
    wish = SecondLook(retries=1, below=0.5, question="what is this?", modalities=frozenset({IMAGE}))
    others = [wish, replace(wish, retries=2), replace(wish, below=0.4), replace(wish, question="what?")]
    ways = {bare.how, *(replace(bare, second_look=look).how for look in others)}
    assert len(ways) == 5
