import time
from functools import partial
from pathlib import Path

import pytest

from alignment.step_order import run_in_order

NEEDS = {"flour": (), "water": (), "dough": ("flour", "water"), "bread": ("dough",)}


def note(folder: Path, step: str) -> None:
    """Write when a step began and ended; the first two wait for each other."""
    began = time.time()
    print("working on", step)
    if step in ("flour", "water"):
        (folder / f"{step}.begun").touch()
        other = folder / ("water.begun" if step == "flour" else "flour.begun")
        while not other.exists():
            assert time.time() < began + 60
            time.sleep(0.02)
    (folder / f"{step}.times").write_text(f"{began} {time.time()}")


def fail_at_dough(folder: Path, step: str) -> None:
    note(folder, step)
    if step == "dough":
        raise RuntimeError("too sticky")


def test_steps_wait_for_what_they_need_and_share_the_time(tmp_path: Path) -> None:
    run_in_order(NEEDS, partial(note, tmp_path), 2, tmp_path / "logs")

    times = {step: [float(t) for t in (tmp_path / f"{step}.times").read_text().split()] for step in NEEDS}
    for step, earlier in NEEDS.items():
        assert all(times[name][1] <= times[step][0] for name in earlier)
    assert (tmp_path / "logs" / "dough.log").read_text() == "working on dough\n"


def test_nothing_is_started_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="too sticky"):
        run_in_order(NEEDS, partial(fail_at_dough, tmp_path), 2, tmp_path / "logs")

    assert not (tmp_path / "bread.times").exists()


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"bread": ("dough",)}, "bread needs 'dough', which is no step; there are bread"),
        ({"egg": ("hen",), "hen": ("egg",)}, "These steps need one another in a circle: egg, hen"),
    ],
)
def test_an_impossible_order_is_refused(
    needs: dict[str, tuple[str, ...]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_in_order(needs, print, 1, tmp_path)
