"""Children of a process that was killed do not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.orphans import end_with_parent

SHARED = """
import os, sys, time
from pathlib import Path

from alignment.shared_work import share

def work(number):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)

def worker():
    return work

if __name__ == "__main__":
    share("waiting", [0, 1], worker, jobs=2)
"""
STEPS = """
import os, sys, time
from pathlib import Path

from alignment.step_order import run_in_order

def work(step):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    run_in_order({"one": (), "other": ()}, work, 2, Path(sys.argv[2]))
"""


@pytest.mark.parametrize("program", [SHARED, STEPS])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_children_end_with_a_parent_that_is_killed(program: str, how: signal.Signals, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    script = tmp_path / "program.py"
    script.write_text(program)
    root = Path(__file__).resolve().parents[1]
    parent = subprocess.Popen(
        [sys.executable, script, marks, tmp_path / "logs"], env={**os.environ, "PYTHONPATH": str(root)}
    )
    try:
        _wait(lambda: len(list(marks.iterdir())) == 2)
        children = [int(mark.name) for mark in marks.iterdir()]

        parent.send_signal(how)
        parent.wait(20)

        _wait(lambda: not any(_runs(child) for child in children))
    finally:
        parent.kill()


def test_only_a_child_can_end_with_its_parent() -> None:
    with pytest.raises(RuntimeError, match="no child"):
        end_with_parent()


def _wait(come: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.1)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
