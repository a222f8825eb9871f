import json
from pathlib import Path
from typing import Any

import pytest

from alignment.report import DOCUMENTS, PLACES, RESULTS, draw_losses, filled, worst_attributes, write_report

DOCS = Path(__file__).resolve().parent.parent / "docs"


def split(found: dict[str, Any]) -> dict[str, Any]:
    return {"n": 4, "right": 0.5, "attributes": {"thing": 0.5}, "found": found}


def evaluation() -> dict[str, Any]:
    things = {"thing": {"bell": {"bell": 3, "drum": 1}}, "tempo": {"slow": {"slow": 1, "fast": 3}}}
    entry: dict[str, Any] = {
        "said": "draw | a bell",
        "answer": "a bell",
        "wrong": ["thing"],
        "shown": None,
        "made": "a-1.png",
    }
    row = {"seen": split(things), "held_out": split(things), "ceiling": 0.75, "gallery": [entry]}
    many = {"audio tempo": {"slow": {"slow": 4}}, "colour": {"red": {"red": 2, "blue": 1}}}
    other = {"seen": split(many), "held_out": split(many), "ceiling": None}
    directions = {"text-to-image": row, "text-to-many": other}
    run = {"samples": 4, "seed": 0, "seeds": [0], "wordings": "reserved"}
    return {**run, "directions": directions, "seconds": 3.0}


def test_marked_places_are_written_and_prose_stays(tmp_path: Path) -> None:
    text = "# Title\n\nProse.\n\n<!-- begin directions -->\nold\n<!-- end directions -->\n\nMore prose.\n"
    (tmp_path / "evaluation.md").write_text(text)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))

    assert write_report(tmp_path) == [tmp_path / "evaluation.md"]
    written = (tmp_path / "evaluation.md").read_text()
    assert written.startswith("# Title\n\nProse.\n\n<!-- begin directions -->\n")
    assert written.endswith("<!-- end directions -->\n\nMore prose.\n")
    assert "| text-to-image | 50.0% of 4 | 50.0% of 4 | 75.0% |" in written
    assert "old" not in written
    write_report(tmp_path)
    assert (tmp_path / "evaluation.md").read_text() == written


def test_a_place_without_its_result_is_left_alone() -> None:
    text = "<!-- begin judge -->\nwhat was here\n<!-- end judge -->\n"
    assert filled(text, {}, "x.md") == text


def test_an_unknown_place_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"x\.md has a place 'moods'; expected one of directions"):
        filled("<!-- begin moods -->\n<!-- end moods -->", {}, "x.md")


def test_a_folder_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither evaluation\.md nor toybox\.md"):
        write_report(tmp_path)


def test_the_worst_attributes_come_once_each_and_worst_first() -> None:
    worst = worst_attributes(evaluation(), 2)
    assert [(name, attribute, right) for name, attribute, _, right in worst] == [
        ("text-to-image", "tempo", 0.25),
        ("text-to-many", "colour", pytest.approx(2 / 3)),
    ]


def test_the_gallery_shows_the_words_and_the_verdict() -> None:
    text = filled("<!-- begin gallery -->\n<!-- end gallery -->", {"evaluation": evaluation()}, "x.md")
    picture = "![](evaluation/gallery/a-1.png)"
    assert f"| text-to-image | draw / a bell |  | {picture} | a bell | wrong: thing |" in text


def test_confusions_count_what_was_found_for_each_wish() -> None:
    text = filled("<!-- begin confusions -->\n<!-- end confusions -->", {"evaluation": evaluation()}, "x.md")
    assert "### tempo in text-to-image: 25.0% right" in text
    assert "| slow | **1** | 3 |" in text


def test_losses_of_all_steps_are_drawn_into_one_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no losses"):
        draw_losses(tmp_path, tmp_path / "losses.png")
    for step in ("one", "two"):
        (tmp_path / step).mkdir()
        lines = [json.dumps({"step": i, "seconds": 0.0, "rate": 0.1, "words": 1 / (i + 1)}) for i in range(3)]
        (tmp_path / step / "losses.jsonl").write_text("\n".join(lines) + "\n")
    draw_losses(tmp_path, tmp_path / "drawn" / "losses.png")
    assert (tmp_path / "drawn" / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_documents_say_what_the_committed_results_say(name: str) -> None:
    results = {
        key: json.loads((DOCS / file).read_text()) for key, file in RESULTS.items() if (DOCS / file).exists()
    }
    text = (DOCS / name).read_text()
    assert "<!-- begin" in text
    assert filled(text, results, name) == text, f"run `patchbay report {DOCS.name}`"
    assert PLACES.keys() >= {line.split()[2] for line in text.splitlines() if line.startswith("<!-- begin")}
