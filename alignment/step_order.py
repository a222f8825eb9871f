"""Run steps that build on one another, several at a time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from alignment.chatter import hush
from alignment.orphans import end_with_parent

Needs = Mapping[str, Sequence[str]]


def run_in_order(needs: Needs, work: Callable[[str], None], jobs: int, logs: Path) -> None:
    """Run every step once all that it needs has ended; the earliest in ``needs`` goes first.

    Args:
        needs: step -> the steps that it builds on.
        work: runs one step. It is pickled for the processes.
        jobs: how many steps run at the same time.
        logs: receives ``<step>.log``, what a step prints.

    Raises:
        ValueError: ``needs`` names a step that it does not list, or goes in a circle.
        Exception: of the first step that failed, when the steps beside it have ended; no other is
            started then.

    """
    for step, earlier in needs.items():
        for name in earlier:
            if name not in needs:
                raise ValueError(f"{step} needs {name!r}, which is no step; there are {', '.join(needs)}.")
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
    left, ended = list(needs), set[str]()
    running: dict[Future[float], str] = {}
    with ProcessPoolExecutor(jobs, context, _begin, max_tasks_per_child=1) as pool:
        while left or running:
            ready = [step for step in left if ended.issuperset(needs[step])][: jobs - len(running)]
            if not ready and not running:
                raise ValueError(f"These steps need one another in a circle: {', '.join(left)}.")
            for step in ready:
                log = logs / f"{step}.log"
                print(f"{step}: started, see {log}", flush=True)
                running[pool.submit(_logged, work, step, log)] = step
                left.remove(step)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                seconds = future.result()
                ended.add(step)
                print(f"{step}: {seconds:.0f} s, {len(ended)} of {len(needs)} steps done", flush=True)


def _begin() -> None:
    end_with_parent()
    hush()


def _logged(work: Callable[[str], None], step: str, log: Path) -> float:
    began = time.monotonic()
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            work(step)
        finally:
            sys.stdout.flush()
    return time.monotonic() - began
