"""A preset that cuts pictures: from the bytes of a picture to the reply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from decoders.writing import to_png
from encoders.media import Image
from services import working_memory
from services.errors import PresetProblem
from services.presets import SHIPPED, load_preset
from services.session import Session
from tests.test_tiler import noise
from tests.tiny import tiny_values

WEIGHTS = SHIPPED.parent / "weights" / "toybox"


def toybox(folder: Path, **encoder: Any) -> str:
    """Write the embedded preset with changes under ``encoder``; return the path of the YAML."""
    values = yaml.safe_load((SHIPPED / "toybox.yaml").read_text())
    values |= {"weights": str(WEIGHTS), "examples": []}
    values["encoder"] |= encoder
    values["language_model"] |= {"compile": False}
    path = folder / "cut.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_the_embedded_model_reads_a_cut_picture_with_as_many_positions_as_planned(tmp_path: Path) -> None:
    lengths = []
    with Session.open(toybox(tmp_path, tiling={"name": "slices", "most": 6})) as session:
        for height, width in ((64, 64), (128, 192)):  # fits one square, and six
            parts = [
                {"type": "image", "data": to_png(Image(noise(height, width)), {})},
                {"type": "text", "text": "what is this?"},
            ]
            reply = session.chat([{"role": "user", "content": parts}])
            assert reply.text
            lengths.append(reply.usage["prompt_tokens"])

    bridge = json.loads((WEIGHTS / "llm" / "bridge.json").read_text())
    per_slice = bridge["projectors"]["image"]["num_queries"]
    words = 4 + 2  # a comma after two slices of each row, a line break after the third
    assert lengths[1] - lengths[0] == 6 * per_slice + words


def test_a_preset_whose_projector_reads_whole_pictures_says_so_before_it_serves(tiny_preset: Path) -> None:
    path = tiny_preset.parent / "cut.yaml"
    values = tiny_values() | {"name": "cut", "encoder": {"tiling": {"name": "any_res"}}}
    path.write_text(yaml.safe_dump(values))

    with pytest.raises(PresetProblem, match=r"'cut' cuts pictures \(any_res\), and its projector reads"):
        Session.open(str(path))


@pytest.mark.parametrize(
    ("tiling", "match"),
    [({"name": "puzzle"}, "any_res"), ({"name": "slices", "most": 1}, "greater than or equal to 2")],
)
def test_a_wrong_tiling_is_refused_with_the_preset(tmp_path: Path, tiling: Any, match: str) -> None:
    with pytest.raises(PresetProblem, match=match):
        load_preset(toybox(tmp_path, tiling=tiling))


def test_the_memory_of_a_cut_picture_is_counted(tmp_path: Path) -> None:
    whole = working_memory.encoder_bytes(load_preset(toybox(tmp_path)))
    cut = working_memory.encoder_bytes(load_preset(toybox(tmp_path, tiling={"name": "slices", "most": 64})))

    assert cut > 2 * whole
