import numpy as np
import pytest

from alignment.toybox import judge_check
from alignment.toybox.judge_check import CASES, CONTROL, main_judge, table
from alignment.toybox.media import Value
from encoders.media import Audio, Image, Video, read_media

SMALL = 16


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    return main_judge(samples=SMALL, seed=5)


def test_the_judge_is_right_about_true_files_however_they_were_passed_on(result: dict) -> None:
    rows = [row for row in result["rows"] if row["file"] != CONTROL]
    assert [row["file"] for row in rows] == [case.name for case in CASES]
    for row in rows:
        assert row["n"] == SMALL
        assert all(value >= 1 - 1 / SMALL for value in row["attributes"].values()), row


def test_with_shuffled_scenes_the_judge_is_right_by_chance_only(result: dict) -> None:
    for row in result["rows"]:
        if row["file"] == CONTROL:
            assert row["right"] <= 1 / SMALL
            assert row["met"], row
            assert row["chance"]["thing"] < 0.3


def test_the_result_is_the_same_with_any_number_of_processes(result: dict) -> None:
    assert main_judge(samples=4, seed=5, jobs=2)["rows"] == main_judge(samples=4, seed=5)["rows"]


def test_a_judge_that_is_wrong_misses_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(data: bytes) -> dict[str, Value]:
        return {"thing": "bell"}

    monkeypatch.setattr(judge_check, "judge", blind)  # it is right in one thing of twelve
    rows = main_judge(samples=2, seed=0)["rows"]
    assert not any(row["met"] for row in rows if "goal" in row)
    assert "missed" in table({"rows": rows, "seconds": 0.0, "seed": 0})


def test_passing_on_changes_the_file_and_not_what_it_is() -> None:
    rng = np.random.default_rng(0)
    picture = Image(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    video = Video(rng.integers(0, 255, (8, 64, 64, 3), dtype=np.uint8), 8)
    sound = Audio(rng.uniform(-0.5, 0.5, 40_960).astype(np.float32), 16_000)

    jpeg = read_media(judge_check.jpeg(picture, 75))
    assert isinstance(jpeg, Image)
    assert jpeg.pixels.shape == picture.pixels.shape
    assert (jpeg.pixels != picture.pixels).any()
    faster = read_media(judge_check.mp4(video, crf=18, times=3))
    assert isinstance(faster, Video)
    assert (len(faster.frames), round(faster.fps)) == (24, 24)
    resampled = read_media(judge_check.wav(sound, 22_050))
    assert isinstance(resampled, Audio)
    assert (resampled.rate, len(resampled.samples)) == (22_050, 56_448)
