"""Who gets the next free slot: of those who wait, the user for whom least was done so far.

A user's virtual time is the number of positions that the model was fed for them. Whoever comes, also back
after a pause, starts at the virtual time of those who are served now, so a pause saves nothing up. Requests
of one user go in the order in which they came. Loads no torch.

Source: Goyal, Vin and Cheng 1997, "Start-time Fair Queueing" (IEEE/ACM ToN 5(5)).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

R = TypeVar("R")


class FairLine(Generic[R]):
    """Requests that wait, by user, and what was done for the users who have requests at all."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[R]] = {}  # of those who wait; who waits longest comes first
        self._served: Counter[str] = Counter()
        self._virtual: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __iter__(self) -> Iterator[R]:
        for line in self._lines.values():
            yield from line

    def add(self, user: str, request: R) -> None:
        """Let a request of ``user`` wait."""
        if not self._is_here(user):
            now = min((self._virtual[other] for other in self._virtual if self._is_here(other)), default=0)
            self._virtual[user] = max(self._virtual.get(user, 0), now)
        self._lines.setdefault(user, deque()).append(request)

    def next(self) -> R:
        """Take the request that is served next; its user is served until :meth:`leave`.

        Of users with equal virtual times, the one with fewer requests that are served goes first, so that who
        fills the slots at the moment does not go before who has just come.
        """
        user = min(self._lines, key=lambda user: (self._virtual[user], self._served[user]))
        request = self._lines[user].popleft()
        if not self._lines[user]:
            del self._lines[user]
        self._served[user] += 1
        return request

    def charge(self, user: str, positions: int) -> None:
        """Book what was done for a user who is served."""
        self._virtual[user] += positions

    def leave(self, user: str) -> None:
        """Note that a request of ``user`` that was served has ended."""
        self._served[user] -= 1
        self._forget()

    def drop(self, unwanted: Callable[[R], bool]) -> list[R]:
        """Remove those who wait and are ``unwanted``; return them."""
        dropped = [request for request in self if unwanted(request)]
        for user, line in list(self._lines.items()):
            self._lines[user] = deque(request for request in line if not unwanted(request))
            if not self._lines[user]:
                del self._lines[user]
        self._forget()
        return dropped

    def clear(self) -> None:
        """Forget everything."""
        self._lines.clear()
        self._served.clear()
        self._virtual.clear()

    def _is_here(self, user: str) -> bool:
        return user in self._lines or self._served[user] > 0

    def _forget(self) -> None:
        """Drop users without requests once the others have caught up with them."""
        here = [self._virtual[user] for user in self._virtual if self._is_here(user)]
        now = min(here, default=float("inf"))
        for user in [user for user in self._virtual if not self._is_here(user)]:
            if self._virtual[user] <= now:
                del self._virtual[user], self._served[user]
