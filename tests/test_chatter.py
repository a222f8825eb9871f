"""Nothing that optional libraries say about other machines reaches the terminal."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from services.cli import QUIET

ROOT = Path(__file__).resolve().parent.parent

SHARED = """
from alignment.shared_work import share
from tests.test_chatter import imports
if __name__ == "__main__":
    share("importing", ["decoders.image"], imports, jobs=2)
"""


def imports() -> Callable[[str], None]:
    """Return what imports a module, in a process that has just imported one that imports torchao."""
    importlib.import_module("peft")
    return _imported


def _imported(module: str) -> None:
    importlib.import_module(module)


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 1), done.stderr
    return done


def test_a_command_says_on_stderr_only_what_is_its_own() -> None:
    done = ran("-m", "services.cli", "doctor", "--preset", "nextgpt-7b", "--port", "8127")
    bad = sum(line.startswith("BAD") for line in done.stdout.splitlines())
    assert bad >= 1, done.stdout
    assert done.stderr == f"patchbay: {bad} of the checks failed; the lines marked BAD say why.\n"


def test_processes_that_share_work_keep_quiet_too() -> None:
    assert ran("-c", SHARED).stderr == ""
