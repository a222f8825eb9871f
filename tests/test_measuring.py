import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from alignment.system import System
from decoders.condition import Condition
from decoders.settings import DecodeSettings
from encoders.media import Image, Modality
from services import cli
from services.measuring import folders_of
from services.presets import load_preset
from tests.tiny import tiny_values

Captured = pytest.CaptureFixture[str]


def measured(capsys: Captured, *words: str) -> dict[str, Any]:
    assert cli.main(["eval", *words, "--samples", "1", "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_directions_are_measured_on_any_preset_over_several_seeds(
    tiny_preset: Path, capsys: Captured
) -> None:
    names = "decision,chain image,text-to-image"
    words = ["toybox", "--preset", str(tiny_preset), "--directions", names, "--seeds", "2"]
    result = measured(capsys, *words)
    assert (result["seeds"], result["wordings"]) == ([0, 1], "reserved")
    rows = result["directions"]
    assert list(rows) == names.split(",")
    assert all(row["seen"]["n"] == row["held_out"]["n"] == 2 for row in rows.values())
    assert all(len(row["seen"]["right_by_seed"]) == 2 for row in rows.values())
    assert rows["decision"]["decision"]["n"] == rows["decision"]["asking"]["n"] == 2
    assert rows["chain image"]["drift"]["right"].keys() == {"1", "3", "5", "10"}
    assert rows["text-to-image"]["ceiling"] is not None


def test_what_is_measured_is_the_bridge_that_was_trained_for_the_preset_with_its_settings(
    tiny_preset: Path, tmp_path: Path
) -> None:
    values = tiny_values() | {"name": "mine", "weights": str(tiny_preset.parent / "weights")}
    values["decoders"]["image"] |= {"steps": 2, "guidance_scale": 1.5, "width_px": 24}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    preset = load_preset(str(path))
    for own, others in (
        (preset.bridges_folder / "llm", preset.language_model_folder),
        (preset.bridges_folder / "projections" / "image", preset.projections_folder / "image"),
    ):
        own.mkdir(parents=True)
        for file in others.glob("*.json"):
            shutil.copy(file, own)
        for file in others.glob("*.safetensors"):
            save_file({name: tensor * 0 + 0.5 for name, tensor in load_file(file).items()}, own / file.name)

    system = System(folders_of(preset))

    weights = [*system.projections[Modality.IMAGE].parameters(), system.llm.signal_rows.head]
    assert all(bool((weight == 0.5).all()) for weight in weights)
    spec = system.decoders[Modality.IMAGE].condition_spec
    condition = Condition(torch.randn(spec.tokens, spec.width))
    wish = DecodeSettings(seed=3, steps=2, guidance_scale=1.5, width_px=24)
    expected = system.decoders[Modality.IMAGE].decode(condition, wish).medium
    (made,) = system.make(Modality.IMAGE, [condition], 3)
    assert isinstance(made, Image)
    assert isinstance(expected, Image)
    assert np.array_equal(made.pixels, expected.pixels)


def test_links_and_phrasings_are_measured_on_any_preset(tiny_preset: Path, capsys: Captured) -> None:
    links = measured(capsys, "links", "--preset", str(tiny_preset))
    assert links["chosen"] == {"image": "signal", "video": "signal", "audio": "signal"}
    for row in links["directions"].values():
        assert row["seen"]["links"].keys() == {"signal", "caption"}
        assert row["seen"]["chosen"] == row["seen"]["links"]["signal"]
        assert row["seen"]["caption_keeping"] == row["seen"]["links"]["caption"]
    phrasings = measured(capsys, "phrasings", "--preset", str(tiny_preset))
    assert phrasings["directions"].keys() == {"text-to-image", "text-to-video", "text-to-audio"}
    assert 0 <= phrasings["directions"]["text-to-image"]["asked at once"]["spread"] <= 0.5


def test_an_ability_that_cannot_be_compared_is_one_line(tiny_preset: Path, capsys: Captured) -> None:
    assert cli.main(["eval", "ability", "--preset", str(tiny_preset), "--samples", "1"]) == 1
    assert "holds no adapter" in capsys.readouterr().err


def test_the_judge_is_measured_without_a_preset_and_printed_as_a_table(capsys: Captured) -> None:
    assert cli.main(["eval", "judge", "--samples", "1"]) == 0
    assert "| picture | PNG | 1 | 100.0% |" in capsys.readouterr().out


def test_report_names_the_documents_that_it_wrote(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "evaluation.md").write_text("# Nothing marked\n")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'evaluation.md'}\n"


def test_a_dry_run_of_what_trains_nothing_is_one_line(capsys: Captured) -> None:
    assert cli.main(["train", "export", "--dry-run"]) == 1
    assert "no training to rehearse for 'export'" in capsys.readouterr().err


def test_a_decoder_that_runs_as_a_whole_is_refused_with_what_can_be_done(
    tiny_preset: Path, tmp_path: Path, capsys: Captured
) -> None:
    shutil.copytree(tiny_preset.parent / "weights", tmp_path / "weights")
    path = tmp_path / tiny_preset.name
    shutil.copyfile(tiny_preset, path)
    index = tmp_path / "weights" / "image" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))

    assert cli.main(["eval", "toybox", "--preset", str(path)]) == 1

    error = capsys.readouterr().err
    assert "is a FluxPipeline, which runs as a whole; expected one that is made in batches" in error
    assert f"`patchbay chat --preset {path}`" in error
