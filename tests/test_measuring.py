import json
from pathlib import Path
from typing import Any

import pytest

from services import cli

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
    assert rows["decision"]["decision"]["n"] == 2
    assert rows["chain image"]["drift"]["right"].keys() == {"1", "3", "5", "10"}
    assert rows["text-to-image"]["ceiling"] is not None


def test_links_and_phrasings_are_measured_on_any_preset(tiny_preset: Path, capsys: Captured) -> None:
    links = measured(capsys, "links", "--preset", str(tiny_preset))
    assert links["chosen"] == {"image": "signal", "video": "signal", "audio": "signal"}
    for row in links["directions"].values():
        assert row["seen"]["links"].keys() == {"signal", "caption"}
        assert row["seen"]["chosen"] == row["seen"]["links"]["signal"]
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
