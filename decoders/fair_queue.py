"""Who is served by the next step: start-time fair queueing by user, one latent shape and LoRA at a time.

A user's virtual time is the seconds of work done for them: what it would have taken if they had been alone,
with only their own requests for company. The next step goes to the user with the least, and to as many other
requests of the same latent shape and LoRA as there is room for, unless they would slow down somebody for
whom less was done. Whoever comes back after a pause starts at the virtual time of those who are served now,
so a pause saves nothing up. Requests of one user are served in the order in which they came. Loads no torch.

Source: Goyal, Vin and Cheng 1997, "Start-time Fair Queueing" (IEEE/ACM ToN 5(5)), with a denoising step
of one request for a packet. As there, what counts is how long the work is and not how long it took: a machine
that hesitates does so at nobody's expense.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from decoders.cost import CostModel, Shape, StepKind, kind_of_step

FORECAST_PARTS = 32
"""The part of the steps from now to then by which :meth:`FairQueue.forecast` may be wrong about a step."""


@dataclass(eq=False, slots=True)
class Work:
    """What the queue knows of a request: whose, the latent shape, rows per step, steps to go, its LoRA.

    In every ``deep_every`` of its steps deep features are computed, first in the first.
    """

    user: str
    shape: Shape
    rows: float
    steps_left: int
    lora: str | None = None
    deep_every: int = 1
    steps_done: int = 0

    def advance(self, steps: int) -> None:
        """Note that ``steps`` more are done."""
        self.steps_left -= steps
        self.steps_done += steps


class FairQueue:
    """The requests that are not done."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.works: list[Work] = []
        self._virtual_s: dict[str, float] = {}
        self._now_s = 0.0
        """The least virtual time when the last turn began; nobody who comes starts before it."""

    def add(self, work: Work) -> None:
        """Take a request."""
        if all(work.user != other.user for other in self.works):
            self._virtual_s[work.user] = max(self._virtual_s.get(work.user, 0.0), self._now_s)
        self.works.append(work)

    def remove(self, work: Work) -> None:
        """Drop a request. A user without requests is forgotten once the others have caught up."""
        self.works.remove(work)
        busy = {other.user for other in self.works}
        for user in list(self._virtual_s):
            if user not in busy and (not busy or self._virtual_s[user] <= self._now_s):
                del self._virtual_s[user]

    def pick(self, most: int) -> list[Work]:
        """Return the requests of the next step: at most ``most``, all of one latent shape and LoRA.

        Those whose latents are clean go first, so that they leave; no more of them than can be made in the
        time of a full step. In a step, who has no more requests to add is not slowed down by requests of
        users who are ahead of them by a medium or more.
        """
        clean = [work for work in self.works if not work.steps_left]
        works = clean or self.works
        if not works:
            return []
        self._now_s = min(self._virtual_s[work.user] for work in self.works)
        first = min(works, key=lambda work: self._virtual_s[work.user])
        lines: dict[str, list[Work]] = {}
        for work in reversed(works):
            if _kin(work) == _kin(first):
                lines.setdefault(work.user, []).append(work)
        prices = {user: self._row_s(line[: -most - 1 : -1]) for user, line in lines.items()}
        order = [(self._virtual_s[user], user != first.user, user) for user in lines]
        heapq.heapify(order)
        lead_s = self.cost.finish_s(first.shape)
        if clean:
            step_s = self.cost.step_s(first.shape, first.rows * most)
            most = min(most, max(1, int(step_s / max(lead_s, 1e-6))))
        limit_s = float("inf")
        picked: list[Work] = []
        while order and len(picked) < most:
            virtual_s, other, user = heapq.heappop(order)
            if virtual_s >= limit_s and not clean:
                break
            work = lines[user].pop()
            picked.append(work)
            virtual_s += work.rows * prices[user]
            if lines[user]:
                heapq.heappush(order, (virtual_s, other, user))
            else:
                limit_s = min(limit_s, virtual_s + lead_s)
        return picked

    def prices(self, picked: Sequence[Work], most: int) -> dict[Work, float]:
        """Return the seconds that a turn is worth to each of those who were picked for it.

        Their medium where latents are clean, else a step, as it would be in the company of the user's own
        requests, ``most`` at once. All are 0 while nothing is known.
        """
        if not self.cost.known or not picked:
            return dict.fromkeys(picked, 0.0)
        if not picked[0].steps_left:
            return {work: self.cost.finish_s(work.shape) for work in picked}
        lines: dict[str, list[Work]] = {work.user: [] for work in picked}
        for work in self.works:
            if work.user in lines and work.steps_left and _kin(work) == _kin(picked[0]):
                lines[work.user].append(work)
        prices = {user: self._row_s(line[:most]) for user, line in lines.items()}
        return {work: work.rows * prices[work.user] for work in picked}

    def charge(self, prices: Mapping[Work, float], seconds: float | None = None) -> None:
        """Book a turn: the prices, or ``seconds`` in proportion to them where it was not as foreseen."""
        if seconds is not None:
            parts = prices if any(prices.values()) else {work: work.rows for work in prices}
            total = sum(parts.values())
            prices = {work: seconds * part / total for work, part in parts.items()}
        for work, price in prices.items():
            # To the nanosecond, so that equal is equal in whatever order it was added up.
            self._virtual_s[work.user] = round(self._virtual_s[work.user] + price, 9)

    def forecast(self, most: int, *, running: Work | None = None) -> dict[Work, float]:
        """Return in how many seconds each request will be done if no other comes.

        Where requests are not served by step but whole, one after the other, ``running`` is the one that is
        served now.
        """
        users_alternate = running is None and len({work.user for work in self.works}) > 1
        originals = {}
        play = FairQueue(self.cost)
        play._virtual_s = dict(self._virtual_s)
        for work in self.works:
            copy = replace(work)
            originals[copy] = work
            play.works.append(copy)
        now_s, steps_played, done_s = 0.0, 0, {}
        first = [copy for copy, work in originals.items() if work is running]
        while play.works:
            picked = first or play.pick(most)
            first = []
            shape = picked[0].shape
            steps = min(work.steps_left for work in picked)
            if users_alternate:
                steps = min(steps, 1 + steps_played // FORECAST_PARTS)
            steps_played += steps
            prices = play.prices(picked, most)
            play.charge({work: max(1, steps) * price for work, price in prices.items()})
            now_s += self._steps_s(picked, steps) if steps else self.cost.finish_s(shape, len(picked))
            for work in picked:
                if steps:
                    work.advance(steps)
                else:
                    done_s[originals[work]] = now_s
                    play.works.remove(work)
        return done_s

    def _steps_s(self, works: Sequence[Work], steps: int) -> float:
        """Return the seconds of the next ``steps`` steps that works of one shape take together."""
        shape = works[0].shape
        if all(work.deep_every == 1 for work in works):
            return steps * self.cost.step_s(shape, sum(work.rows for work in works))
        batches = (rows_by_kind(works, later) for later in range(steps))
        return sum(self.cost.batch_step_s(shape, rows) for rows in batches)

    def _row_s(self, works: Sequence[Work]) -> float:
        """Return what each row takes of a step of these works of one user; 1 while nothing is known."""
        rows = sum(work.rows for work in works)
        seconds = sum(
            work.rows / rows * self.cost.step_s(work.shape, rows, work.deep_every) for work in works
        )
        return seconds / rows if seconds else 1.0


def rows_by_kind(works: Iterable[Work], later: int = 0) -> dict[StepKind, float]:
    """Return the rows of each kind in a step that works take together, so many steps ``later``.

    One call of the network computes all rows that do not reuse anything, and keeps features of all or none.
    """
    rows: dict[StepKind, float] = {}
    for work in works:
        kind = kind_of_step(work.steps_done + later, work.deep_every)
        rows[kind] = rows.get(kind, 0) + work.rows
    if "keeping" in rows:
        rows["keeping"] += rows.pop("plain", 0)
    return rows


def _kin(work: Work) -> tuple[Shape, str | None]:
    """What must be the same in one step."""
    return work.shape, work.lora
