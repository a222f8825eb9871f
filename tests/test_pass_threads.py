"""How many threads a pass of the language model takes: whichever way is faster now."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llm import pass_threads
from llm.engine import Engine
from llm.pass_threads import AGAIN, SMALLEST, PassThreads
from llm.reply import Finished, GenerationOptions
from llm.template import Message
from tests.tiny_llm import tiny_model


class Machine:
    """A clock, and passes that take as long as their threads need."""

    def __init__(self) -> None:
        self.now, self.seconds = 0.0, {1: 1.0, 2: 0.6}

    def __call__(self) -> float:
        return self.now

    def take(self, threads: PassThreads, positions: int = SMALLEST) -> int:
        """Take one pass; return how many threads it had."""
        with threads.over(positions):
            had = torch.get_num_threads()
            self.now += self.seconds[had] * positions
        return had


@pytest.fixture
def machine() -> Iterator[Machine]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Machine()
    torch.set_num_threads(before)


def test_takes_the_faster_way_and_gives_the_threads_back(machine: Machine) -> None:
    threads = PassThreads(2, machine)

    had = [machine.take(threads) for _ in range(AGAIN)]

    assert had == [1] + [2] * (AGAIN - 1)
    assert torch.get_num_threads() == 1


def test_turns_away_from_a_way_that_became_slow_and_comes_back(machine: Machine) -> None:
    threads = PassThreads(2, machine)
    for _ in range(10):
        machine.take(threads)

    machine.seconds[2] = 3.0  # another process has taken the second core
    busy = [machine.take(threads) for _ in range(20)]
    machine.seconds[2] = 0.6
    idle = [machine.take(threads) for _ in range(2 * AGAIN)]

    assert busy.count(2) == 1
    assert set(busy[1:]) == {1}
    first = idle.index(2)
    assert first < AGAIN
    assert set(idle[first : first + 10]) == {2}


def test_the_slower_way_is_seldom_tried(machine: Machine) -> None:
    machine.seconds[2] = 3.0
    threads = PassThreads(2, machine)

    had = [machine.take(threads) for _ in range(10 * AGAIN)]

    assert 5 <= had.count(2) <= 11


def test_sizes_are_measured_apart(machine: Machine) -> None:
    threads = PassThreads(2, machine)
    for _ in range(4):
        machine.take(threads, 64)
    machine.seconds[2] = 3.0

    small = [machine.take(threads, SMALLEST) for _ in range(6)]

    assert small == [1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("most", "positions"), [(1, 1000), (2, SMALLEST - 1)])
def test_leaves_alone_what_cannot_gain(machine: Machine, most: int, positions: int) -> None:
    threads = PassThreads(most, machine)

    assert {machine.take(threads, positions) for _ in range(5)} == {1}


def test_a_pass_that_fails_gives_the_threads_back(machine: Machine) -> None:
    threads = PassThreads(2, machine)
    machine.take(threads)

    def fail() -> None:
        with threads.over(SMALLEST):
            assert torch.get_num_threads() == 2
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()

    assert torch.get_num_threads() == 1


def test_replies_are_the_same_with_many_threads(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_threads, "SMALLEST", 2)
    options = GenerationOptions(max_new_tokens=12)
    model = tiny_model()
    replies = []
    for most in (1, 2):
        engine = Engine(model, slots=4, most_threads=most)
        requests = [
            engine.prepare([Message("user", [text])], options) for text in ("a", "be", "see it", "do")
        ]
        for request in requests:
            engine.submit(request)
        ids = {}
        while engine.busy:
            for request, event in engine.step():
                if isinstance(event, Finished):
                    ids[id(request)] = event.ids
        replies.append([ids[id(request)] for request in requests])

    assert replies[0] == replies[1]
