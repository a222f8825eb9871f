"""Tasks shared among processes; the results are the same for every number of them."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from alignment.chatter import hush
from alignment.kept_results import KeptResults
from alignment.orphans import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")

_worker_here: list[Callable[[Any], Any]] = []  # the worker of a child process


def share(
    title: str,
    tasks: Sequence[Task],
    make_worker: Callable[[], Callable[[Task], Result]],
    jobs: int = 1,
    kept: KeptResults | None = None,
) -> list[Result]:
    """Run a worker on every task.

    Args:
        title: shown beside the progress bar.
        tasks: what to do, picklable. A task brings its own seed.
        make_worker: called once per process to load what the tasks need; picklable.
        jobs: processes; 1 works in this one. A process computes with one thread, so that sums are made
            in the same order everywhere.
        kept: where results that are there already come from, and new ones go; then they must be JSON.

    Returns:
        The results in the order of the tasks.

    """
    results: dict[int, Result] = {}
    if kept is not None:
        found = {index: kept.get(title, task) for index, task in enumerate(tasks)}
        results = {index: result for index, result in found.items() if result is not None}
    left = {index: task for index, task in enumerate(tasks) if index not in results}

    def take(index: int, result: Result) -> None:
        results[index] = result
        if kept is not None:
            kept.put(title, tasks[index], result)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task(title, total=len(tasks), completed=len(results))
        if jobs == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                worker = make_worker() if left else None
                for index, task in left.items():
                    assert worker is not None
                    take(index, worker(task))
                    progress.advance(bar)
            finally:
                torch.set_num_threads(threads)
        else:
            context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
            with ProcessPoolExecutor(jobs, context, _prepare, (pickle.dumps(make_worker),)) as pool:
                running = {pool.submit(_work, task): index for index, task in left.items()}
                for done in as_completed(running):
                    take(running[done], done.result())
                    progress.advance(bar)
    return [results[index] for index in range(len(tasks))]


def _prepare(pickled: bytes) -> None:
    end_with_parent()
    hush()  # before the modules that the worker needs are imported, which is when it is unpickled
    torch.set_num_threads(1)
    make_worker: Callable[[], Callable[[Any], Any]] = pickle.loads(pickled)
    _worker_here.append(make_worker())


def _work(task: Any) -> Any:
    return _worker_here[0](task)
