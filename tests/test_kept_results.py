from pathlib import Path

import pytest

from alignment.kept_results import KeptResults, digest_of
from alignment.shared_work import share


class Interrupted(Exception):
    pass


def weights(folder: Path, value: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(value)
    return folder


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path: Path) -> None:
    measured = [weights(tmp_path / "weights", b"1")]
    done: list[int] = []

    def worker(task: int) -> dict[str, int]:
        if task == 3 and len(done) == 3:
            raise Interrupted
        done.append(task)
        return {"square": task * task}

    with pytest.raises(Interrupted):
        share("squares", range(5), lambda: worker, kept=KeptResults(tmp_path / "kept", measured))
    assert done == [0, 1, 2]
    done.append(-1)

    found = share("squares", range(5), lambda: worker, kept=KeptResults(tmp_path / "kept", measured))

    assert found == [{"square": task * task} for task in range(5)]
    assert done == [0, 1, 2, -1, 3, 4]


def test_its_time_is_that_of_all_its_runs(tmp_path: Path) -> None:
    kept = KeptResults(tmp_path / "kept", [])
    kept._began -= 100
    kept.put("t", 1, 1)
    assert 100 <= KeptResults(tmp_path / "kept", []).seconds < 150


def test_results_of_other_weights_or_settings_are_refused(tmp_path: Path) -> None:
    measured = [weights(tmp_path / "weights", b"1")]
    KeptResults(tmp_path / "kept", measured, "steps 10").put("t", 1, 1)
    assert KeptResults(tmp_path / "kept", measured, "steps 10").get("t", 1) == 1
    with pytest.raises(ValueError, match="results of other settings; expected those of this preset"):
        KeptResults(tmp_path / "kept", measured, "steps 20")
    weights(tmp_path / "weights", b"2")
    with pytest.raises(ValueError, match="results of other weights;"):
        KeptResults(tmp_path / "kept", measured, "steps 10")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files; expected an empty folder"):
        KeptResults(tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_digest_follows_names_and_contents(tmp_path: Path) -> None:
    one, other = weights(tmp_path / "a", b"1"), weights(tmp_path / "b", b"1")
    assert digest_of([one]) == digest_of([other])
    assert digest_of([one, other]) != digest_of([one])
    (other / "model.safetensors").rename(other / "weights.safetensors")
    assert digest_of([one]) != digest_of([other])
