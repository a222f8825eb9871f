import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from decoders.settings import MAX_SEED, DecoderDefaults, DecodeSettings

DEFAULTS = DecoderDefaults(steps=12, guidance_scale=3.0)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"steps": 1},
        {"steps": 1000},
        {"guidance_scale": 0},
        {"guidance_scale": 50.0},
        {"scheduler": "ddim"},
        {"width_px": 64, "height_px": 32, "num_frames": 8},
        {"duration_s": 2.56},
    ],
)
def test_sensible_wishes_are_accepted(values: dict[str, Any]) -> None:
    settings = DecodeSettings(**values)

    assert {name: getattr(settings, name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": -1}, "seed is -1; it must be a whole number from 0 to 9007199254740991"),
        ({"seed": MAX_SEED + 1}, "seed is"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"steps": 0}, "steps is 0; it must be a whole number from 1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"steps": "12"}, "steps is '12'"),
        ({"guidance_scale": -0.1}, "guidance_scale is -0.1; it must be a number from 0 to 50"),
        ({"guidance_scale": 51}, "guidance_scale is 51"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"keep_untouched": 1}, "keep_untouched is 1; it must be true or false"),
        ({"scheduler": "pndm"}, "scheduler is 'pndm'; choose one of dpmsolver"),
        ({"width_px": 0}, "width_px is 0"),
        ({"height_px": 100_000}, "height_px is 100000"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"duration_s": 0.0}, "duration_s is 0.0"),
        ({"duration_s": float("inf")}, "duration_s is inf"),
    ],
)
def test_impossible_wishes_are_named_with_their_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeSettings(**values)


def test_settings_cannot_change_after_they_were_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecodeSettings().steps = 0  # type: ignore[misc]


def test_sizes_of_another_medium_are_refused() -> None:
    DecodeSettings(width_px=64).only("width_px", "height_px")

    with pytest.raises(ValueError, match=r"has no duration_s; it takes width_px, height_px. Leave"):
        DecodeSettings(duration_s=1.0).only("width_px", "height_px")


def test_a_folder_without_the_file_keeps_the_usual_defaults(tmp_path: Path) -> None:
    assert DEFAULTS.updated(tmp_path / "patchbay.json") == DEFAULTS


def test_the_file_changes_only_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "patchbay.json"
    path.write_text(json.dumps({"guidance_scale": 2.0, "fps": 8}))

    assert DEFAULTS.updated(path) == dataclasses.replace(DEFAULTS, guidance_scale=2.0, fps=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "expected an object with keys from"),
        ('{"step": 3}', "expected an object with keys from"),
        ('{"steps": 0}', r"patchbay.json: steps is 0"),
        ('{"fps": -1}', r"patchbay.json: fps is -1"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "patchbay.json"
    path.write_text(text)

    with pytest.raises(ValueError, match=message):
        DEFAULTS.updated(path)
