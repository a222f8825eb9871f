"""Who is served by the next step: start-time fair queueing by user, one latent shape and LoRA at a time.

A user's virtual time is the seconds of work done for them. The next step goes to the user with the
least, and to as many other requests of the same latent shape and LoRA as there is room for. Whoever
comes back after a pause starts at the virtual time of those who are served now, so a pause saves nothing up.
Requests of one user are served in the order in which they came. Loads no torch.

Source: Goyal, Vin and Cheng 1997, "Start-time Fair Queueing" (IEEE/ACM ToN 5(5)), with a denoising step
of one request for a packet.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace

from decoders.cost import CostModel, Shape

FORECAST_TURNS = 64
"""Turns in which :meth:`FairQueue.forecast` plays a crowded queue to its end, about."""


@dataclass(eq=False, slots=True)
class Work:
    """What the queue knows of a request: whose, the latent shape, rows per step, steps to go, its LoRA."""

    user: str
    shape: Shape
    rows: float
    steps_left: int
    lora: str | None = None


class FairQueue:
    """The requests that are not done."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.works: list[Work] = []
        self._virtual_s: dict[str, float] = {}

    def add(self, work: Work) -> None:
        """Take a request."""
        busy = {other.user for other in self.works}
        if work.user not in busy:
            now = min((self._virtual_s[user] for user in busy), default=0.0)
            self._virtual_s[work.user] = max(self._virtual_s.get(work.user, 0.0), now)
        self.works.append(work)

    def remove(self, work: Work) -> None:
        """Drop a request. A user without requests is forgotten once the others have caught up."""
        self.works.remove(work)
        busy = {other.user for other in self.works}
        now = min((self._virtual_s[user] for user in busy), default=float("inf"))
        for user in list(self._virtual_s):
            if user not in busy and self._virtual_s[user] <= now:
                del self._virtual_s[user]

    def pick(self, most: int) -> list[Work]:
        """Return the requests of the next step: at most ``most``, all of one latent shape and LoRA.

        Those whose latents are clean go first, so that they leave.
        """
        works = [work for work in self.works if not work.steps_left] or self.works
        if not works:
            return []
        first = min(works, key=lambda work: self._virtual_s[work.user])
        lines: dict[str, list[Work]] = {}
        for work in reversed(works):
            if (work.shape, work.lora) == (first.shape, first.lora):
                lines.setdefault(work.user, []).append(work)
        order = [(self._virtual_s[user], user != first.user, user) for user in lines]
        heapq.heapify(order)
        picked: list[Work] = []
        while order and len(picked) < most:
            virtual_s, other, user = heapq.heappop(order)
            work = lines[user].pop()
            picked.append(work)
            if lines[user]:
                heapq.heappush(order, (virtual_s + self._price_s(work), other, user))
        return picked

    def charge(self, works: Iterable[Work], seconds: float) -> None:
        """Book ``seconds`` that were spent on these requests together."""
        served = list(works)
        total = sum(work.rows for work in served)
        for work in served:
            self._virtual_s[work.user] += seconds * work.rows / total

    def forecast(self, most: int, *, running: Work | None = None) -> dict[Work, float]:
        """Return in how many seconds each request will be done if no other comes.

        Where requests are not served by step but whole, one after the other, ``running`` is the one that is
        served now.
        """
        if running is None and len({work.user for work in self.works}) > 1:
            turn_steps = 1 + sum(work.steps_left for work in self.works) // (FORECAST_TURNS * most)
        else:
            turn_steps = max((work.steps_left for work in self.works), default=1)
        originals = {}
        play = FairQueue(self.cost)
        play._virtual_s = dict(self._virtual_s)
        for work in self.works:
            copy = replace(work)
            originals[copy] = work
            play.works.append(copy)
        now_s, done_s = 0.0, {}
        first = [copy for copy, work in originals.items() if work is running]
        while play.works:
            picked = first or play.pick(most)
            first = []
            shape = picked[0].shape
            steps = min(turn_steps, *(work.steps_left for work in picked))
            spent_s = steps * self.cost.step_s(shape, sum(work.rows for work in picked))
            for work in picked:
                work.steps_left -= steps
            finished = [work for work in picked if not work.steps_left]
            spent_s += self.cost.finish_s(shape, len(finished))
            now_s += spent_s
            play.charge(picked, spent_s)
            for work in finished:
                done_s[originals[work]] = now_s
                play.works.remove(work)
        return done_s

    def _price_s(self, work: Work) -> float:
        return self.cost.step_s(work.shape, work.rows) or float(work.rows)
