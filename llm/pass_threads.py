"""How many CPU threads a large pass takes: one, or as many as there may be, whichever is faster now.

Two threads take two thirds of one's time over 32 rows where the second core is idle, and three times as long
where another process works on it, such as a decoder. Which of these is so changes all the time, and no
process knows of the others. So it is measured, pass by pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

SMALLEST = 16
"""Positions of the smallest pass for which threads are tried; in smaller ones they wait more than work."""
AGAIN = 64
"""Passes of one size after which the slower way is tried again."""
NEWEST = 0.3
"""Weight of the newest pass in the mean of its way."""


class PassThreads:
    """Chooses the number of threads for passes, which are all taken by one thread of Python.

    Args:
        most: threads that a pass may take. Not more than PyTorch takes already: nothing is tried.
        clock: returns seconds.

    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most, self.clock = most, clock
        self._sizes: dict[int, _Ways] = {}

    @contextmanager
    def over(self, positions: int) -> Iterator[None]:
        """Take a pass over so many positions with the threads that have been faster for such passes."""
        usual = torch.get_num_threads()
        if positions < SMALLEST or self.most <= usual:
            yield
            return
        ways = self._sizes.setdefault(positions.bit_length(), _Ways())
        many = ways.choose()
        began = self.clock()
        try:
            if many:
                torch.set_num_threads(self.most)
            yield
            ways.note(many, (self.clock() - began) / positions)
        finally:
            if many:
                torch.set_num_threads(usual)


class _Ways:
    """Seconds per position of passes of about one size, with the usual threads and with many."""

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}
        self._since = 0

    def choose(self) -> bool:
        """Return whether the next pass takes many threads."""
        if len(self._seconds) < 2:
            return False in self._seconds
        faster = self._seconds[True] < self._seconds[False]
        self._since += 1
        if self._since < AGAIN:
            return faster
        self._since = 0
        return not faster

    def note(self, many: bool, seconds: float) -> None:
        """Note what a pass took. Better than thought is believed at once, worse little by little."""
        known = self._seconds.get(many, seconds)
        self._seconds[many] = min(seconds, known + NEWEST * (seconds - known))
