"""``patchbay train --dry-run``: how long training would take and how much memory, before it starts.

Every step is run for a moment in a folder that is thrown away: on small pools, with the recipe's batches,
each in a fresh process whose memory is read at its end. What a step prepares from the pools is timed apart
and scaled to their full size. Pools that are mapped from disk do not count as memory: they are read anew
where it is short.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track

from alignment.chatter import hush
from alignment.embedded import pools
from alignment.fitting import as_time
from alignment.toybox.world import IMAGE_SIDE_PX, VIDEO_FRAMES
from alignment.training import NEEDS, RECIPES, Run, TrainOptions, train_step

TIMED_STEPS = 8  # of the kinds of batches that take turns, each comes at least once
SMALL = pools.PoolSizes(looks=64, clips=64, sounds=64)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one step would need: seconds to prepare and to train, and bytes of memory."""

    name: str
    num_steps: int
    prepare_s: float
    step_s: float
    memory_bytes: int
    gpu_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Time from start to end."""
        return self.prepare_s + self.num_steps * self.step_s


@dataclass(frozen=True, slots=True)
class _Measured:
    load_s: float
    encode_s: float  # what is made of the small pools, once
    step_s: float
    memory_bytes: int
    gpu_bytes: int


def estimate(stage: str, options: TrainOptions) -> list[Estimate]:
    """Rehearse a stage and all that it builds on; return what the stage itself would need.

    Args:
        stage: a step, or ``all``.
        options: as for the real run; ``num_steps``, ``max_minutes`` and ``threads`` count.

    Raises:
        ValueError: for an unknown stage, or for ``export``, which trains nothing.

    """
    if stage not in (*RECIPES, "all"):
        raise ValueError(
            f"There is no training to rehearse for {stage!r}; expected all or one of {', '.join(RECIPES)}."
        )
    wanted = list(NEEDS) if stage == "all" else [stage]
    with tempfile.TemporaryDirectory(prefix="patchbay-") as folder:
        here = Path(folder)
        work = Run(here, here / "weights", SMALL, TIMED_STEPS, seed=options.seed, logs_every_step=True)
        began = time.monotonic()
        with (here / "log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            pools.render(work.cache, SMALL)
            rendering_s = (time.monotonic() - began) * _share_of_pools(options)
        found = {}
        context = multiprocessing.get_context("spawn")
        for step in track(in_order(wanted), description="rehearsing", transient=True):
            # A process of its own: memory is what it had at its peak.
            with ProcessPoolExecutor(1, context, hush) as alone:
                found[step] = alone.submit(_rehearse, step, work, options.threads).result()
    clip_bytes = options.pool_sizes.clips * VIDEO_FRAMES * IMAGE_SIDE_PX**2 * 3
    rendering = Estimate("pools", 0, rendering_s, 0.0, clip_bytes)  # the largest is rendered in memory
    rows = [_scaled(step, found[step], options) for step in wanted]
    return [rendering, *rows]


def in_order(wanted: Sequence[str]) -> list[str]:
    """Return steps with all that they build on, each after what it needs."""
    listed: list[str] = []

    def add(step: str) -> None:
        for earlier in NEEDS[step]:
            add(earlier)
        if step not in listed:
            listed.append(step)

    for step in wanted:
        add(step)
    return listed


def critical_path_s(rows: Sequence[Estimate], jobs: int) -> float:
    """Return how long the steps take when ``jobs`` of them run at the same time, in the order of training."""
    seconds = {row.name: row.seconds for row in rows if row.name in NEEDS}
    rendering = sum(row.seconds for row in rows if row.name not in NEEDS)
    ended: dict[str, float] = {}
    running: dict[str, float] = {}
    left = [step for step in NEEDS if step in seconds]
    now = 0.0
    while left or running:
        ready = [s for s in left if all(e in ended or e not in seconds for e in NEEDS[s])]
        for step in ready[: jobs - len(running)]:
            running[step] = now + seconds[step]
            left.remove(step)
        step = min(running, key=lambda name: running[name])
        now = running.pop(step)
        ended[step] = now
    return rendering + now


def table(rows: Sequence[Estimate], jobs: int) -> str:
    """Return the estimate as a Markdown table."""
    lines = ["| step | steps | s per step | prepare | in all | memory |", "|---|---|---|---|---|---|"]
    for row in rows:
        pace = f"{row.step_s:.3f}" if row.num_steps else ""
        memory = f"{row.memory_bytes / 2**30:.1f} GB" + (
            f", GPU {row.gpu_bytes / 2**30:.1f} GB" if row.gpu_bytes else ""
        )
        lines.append(
            f"| {row.name} | {row.num_steps or ''} | {pace} | {as_time(row.prepare_s)} "
            f"| {as_time(row.seconds)} | {memory} |"
        )
    peak = max(row.memory_bytes for row in rows) / 2**30
    together = sum(sorted((row.memory_bytes for row in rows), reverse=True)[:jobs]) / 2**30
    memory = f"{peak:.1f} GB" if jobs == 1 else f"up to {together:.1f} GB for {jobs} steps at once"
    total = as_time(critical_path_s(rows, jobs))
    return "\n".join(
        [*lines, f"\n{total} in all with --jobs {jobs}, as fast as the machine is now; {memory}."]
    )


def _share_of_pools(options: TrainOptions) -> float:
    """How many times the scenes of the rehearsal the real pools hold."""
    real = options.pool_sizes
    return (real.looks + real.clips + real.sounds) / (SMALL.looks + SMALL.clips + SMALL.sounds)


def _scaled(step: str, measured: _Measured, options: TrainOptions) -> Estimate:
    num_steps = options.num_steps or RECIPES[step].num_steps
    if options.max_minutes is not None:
        num_steps = min(num_steps, max(1, round(60 * options.max_minutes / measured.step_s)))
    prepare_s = measured.load_s + measured.encode_s * _share_of_pools(options)
    return Estimate(step, num_steps, prepare_s, measured.step_s, measured.memory_bytes, measured.gpu_bytes)


def _rehearse(step: str, work: Run, threads: int) -> _Measured:
    torch.set_num_threads(threads)
    with (work.folder / f"{step}.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        before = set(work.cache.iterdir())
        _timed(step, work)  # also imports and warms up, which is no part of a long run
        shutil.rmtree(work.folder / step)
        made = set(work.cache.iterdir()) - before
        for path in made:
            path.unlink()
        whole_s = _timed(step, work)
        load_s = _timed(step, work)  # everything is there, and nothing is left to train
    rows = [json.loads(line) for line in (work.folder / step / "losses.jsonl").read_text().splitlines()]
    starts = [float(row["seconds"]) for row in rows]
    step_s = statistics.fmean(later - earlier for earlier, later in itertools.pairwise(starts))
    encode_s = max(0.0, whole_s - load_s - (starts[-1] + step_s)) if made else 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return _Measured(load_s, encode_s, step_s, peak, gpu)


def _timed(step: str, work: Run) -> float:
    began = time.monotonic()
    train_step(step, work)
    return time.monotonic() - began
