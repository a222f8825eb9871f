"""What work costs before it is done: seconds per denoising step and per finished medium.

A step of a batch takes ``fixed + unit * size`` seconds, where the size is the number of latent values
of all rows (height x width x frames x channels), the unguided rows counted too. What is done with clean
latents takes ``finish_unit`` seconds per latent value. Requests that have their deep features computed in
every n-th step only take steps of two more kinds, those that keep features and those that reuse them, with a
``fixed`` and a ``unit`` of their own. All are measured once, and the ratio of what steps of a shape and kind
took to what was predicted for them corrects the rest. Loads no torch.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal, NamedTuple

RATIOS_KEPT = 9
ERRORS_KEPT = 200
SHAPES_KEPT = 32

Shape = tuple[int, ...]
StepKind = Literal["plain", "keeping", "reusing"]
"""A step computes all and keeps nothing, computes all and keeps deep features, or reuses those."""

USUAL_SHARES: dict[StepKind, float] = {"plain": 1.0, "keeping": 1.0, "reusing": 0.5}
"""What a step takes of a plain one, about, for as long as nobody has measured it."""


class _Line(NamedTuple):
    """Seconds of a step: these, and so many per latent value of all rows."""

    fixed_s: float
    unit_s: float


_Ratios = OrderedDict[tuple[Shape, StepKind], deque[float]]
"""Actual by predicted seconds of the last batches, by latent shape and kind of step, the latest last."""


class CostModel:
    """Predicts seconds, and learns from what really happened.

    Nothing is known before :meth:`calibrate` or the first :meth:`observe_step`.
    """

    def __init__(self) -> None:
        self._lines: dict[StepKind, _Line] = {}
        self._finish_unit_s = 0.0
        self._ratios: _Ratios = OrderedDict()
        self._finish_ratios: _Ratios = OrderedDict()
        self._errors: deque[float] = deque(maxlen=ERRORS_KEPT)

    @property
    def known(self) -> bool:
        """Whether predictions are more than a guess."""
        return bool(self._lines)

    def calibrate(
        self, shape: Shape, step_s: Mapping[StepKind, Sequence[tuple[int, float]]], finish_s: float
    ) -> None:
        """Set the model from measured seconds.

        Args:
            shape: latent shape of one request.
            step_s: by kind of step, (rows, seconds of one step) for two different numbers of rows; the kinds
                that the network has, the plain one in any case.
            finish_s: seconds to make a medium of one request's clean latents.

        """
        size = math.prod(shape)
        self.forget()
        for kind, measured in step_s.items():
            (few, short), (many, long) = sorted(measured)
            slope = max((long - short) / (many - few), 0.05 * long / many)
            self._lines[kind] = _Line(max(long - slope * many, 0.0), slope / size)
        self._finish_unit_s = finish_s / size

    def forget(self) -> None:
        """Know nothing again."""
        self._lines = {}
        self._finish_unit_s = 0.0
        self._ratios.clear()
        self._finish_ratios.clear()
        self._errors.clear()

    def step_s(self, shape: Shape, rows: float, deep_every: int = 1) -> float:
        """Return the seconds of one step of ``rows`` rows; 0 while nothing is known.

        With ``deep_every`` above 1, of the mean of so many steps.
        """
        return self.steps_s(shape, rows, deep_every, deep_every) / deep_every

    def steps_s(self, shape: Shape, rows: float, steps: int, deep_every: int = 1, *, done: int = 0) -> float:
        """Return the seconds of the next ``steps`` steps after ``done`` ones."""
        if deep_every == 1:
            return steps * self._kind_s(shape, rows, "plain")
        keeping = math.ceil((done + steps) / deep_every) - math.ceil(done / deep_every)
        reused_s = (steps - keeping) * self._kind_s(shape, rows, "reusing")
        return keeping * self._kind_s(shape, rows, "keeping") + reused_s

    def batch_step_s(self, shape: Shape, rows: Mapping[StepKind, float]) -> float:
        """Return the seconds of one step of a batch with so many ``rows`` of each kind."""
        return sum(self._kind_s(shape, number, kind) for kind, number in rows.items())

    def finish_s(self, shape: Shape, requests: int = 1) -> float:
        """Return the seconds that the media of ``requests`` clean latents take."""
        predicted = self._finish_unit_s * math.prod(shape) * requests
        return predicted * _ratio(self._finish_ratios, shape, "plain")

    def request_s(self, shape: Shape, rows: float, steps: int, deep_every: int = 1) -> float:
        """Return the seconds of one request alone; ``rows`` are those of one step."""
        return self.steps_s(shape, rows, steps, deep_every) + self.finish_s(shape)

    def observe_step(self, shape: Shape, rows: Mapping[StepKind, float], seconds: float) -> None:
        """Learn from a step of a batch with so many ``rows`` of each kind.

        Where there are several kinds, each is believed to be wrong by as much as their sum.
        """
        if not self._lines:
            size = math.prod(shape) * sum(USUAL_SHARES[kind] * number for kind, number in rows.items())
            self._lines["plain"] = _Line(0.0, seconds / size)
        predicted = self.batch_step_s(shape, rows)
        self._errors.append(abs(predicted - seconds) / seconds)
        for kind, ratio in {kind: _ratio(self._ratios, shape, kind) for kind in rows}.items():
            _keep(self._ratios, shape, kind, ratio * seconds / predicted)

    def observe_finish(self, shape: Shape, requests: int, seconds: float) -> None:
        """Learn from a batch of media that was made."""
        if not self._finish_unit_s:
            self._finish_unit_s = seconds / (math.prod(shape) * requests)
        predicted = self._finish_unit_s * math.prod(shape) * requests
        _keep(self._finish_ratios, shape, "plain", seconds / predicted)

    def error(self) -> float | None:
        """Return the median of ``|predicted - actual| / actual`` over the last steps."""
        return median(self._errors) if self._errors else None

    def _kind_s(self, shape: Shape, rows: float, kind: StepKind) -> float:
        """Return the seconds of a step of ``rows`` rows, all of one kind."""
        if not self._lines:
            return 0.0
        line, share = self._lines.get(kind), 1.0
        if line is None:
            line, share = self._lines["plain"], USUAL_SHARES[kind]
        measured = line.fixed_s + line.unit_s * math.prod(shape) * rows
        return share * measured * _ratio(self._ratios, shape, kind)


def kind_of_step(done: int, deep_every: int) -> StepKind:
    """Return what the step after ``done`` ones is, of a request with deep features in so few steps."""
    if deep_every == 1:
        return "plain"
    return "reusing" if done % deep_every else "keeping"


def _ratio(ratios: _Ratios, shape: Shape, kind: StepKind) -> float:
    """Return the ratio of a shape and kind.

    Of the latest one of that shape for a new kind, and of the latest of all for a new shape, as a busy
    machine is slow for all.
    """
    known = ratios.get((shape, kind))
    if known is None:
        latest = list(reversed(ratios.items()))
        known = next(
            (kept for (other, _), kept in latest if other == shape), latest[0][1] if latest else None
        )
    return 1.0 if known is None else median(known)


def _keep(ratios: _Ratios, shape: Shape, kind: StepKind, ratio: float) -> None:
    ratios.setdefault((shape, kind), deque(maxlen=RATIOS_KEPT)).append(ratio)
    ratios.move_to_end((shape, kind))
    if len(ratios) > SHAPES_KEPT:
        ratios.popitem(last=False)
