"""What work costs before it is done: seconds per denoising step and per finished medium.

A step of a batch takes ``fixed + unit * size`` seconds, where the size is the number of latent values
of all rows (height x width x frames x channels), the unguided rows counted too. What is done with clean
latents takes ``finish_unit`` seconds per latent value. Both are measured once, and the ratio of what steps of
a shape took to what was predicted for them corrects the rest. Loads no torch.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from statistics import median

RATIOS_KEPT = 9
ERRORS_KEPT = 200
SHAPES_KEPT = 32

Shape = tuple[int, ...]
_Ratios = OrderedDict[Shape, deque[float]]
"""Actual by predicted seconds of the last batches, by latent shape, the latest shape last."""


class CostModel:
    """Predicts seconds, and learns from what really happened.

    Nothing is known before :meth:`calibrate` or the first :meth:`observe_step`.
    """

    def __init__(self) -> None:
        self.fixed_s = 0.0
        self.unit_s: float | None = None
        self.finish_unit_s = 0.0
        self._ratios: _Ratios = OrderedDict()
        self._finish_ratios: _Ratios = OrderedDict()
        self._errors: deque[float] = deque(maxlen=ERRORS_KEPT)

    @property
    def known(self) -> bool:
        """Whether predictions are more than a guess."""
        return self.unit_s is not None

    def calibrate(self, shape: Shape, step_s: Sequence[tuple[int, float]], finish_s: float) -> None:
        """Set the model from measured seconds.

        Args:
            shape: latent shape of one request.
            step_s: (rows, seconds of one step) for two different numbers of rows.
            finish_s: seconds to make a medium of one request's clean latents.

        """
        (few, short), (many, long) = sorted(step_s)
        size = math.prod(shape)
        slope = max((long - short) / (many - few), 0.05 * long / many)
        self.unit_s = slope / size
        self.fixed_s = max(long - slope * many, 0.0)
        self.finish_unit_s = finish_s / size
        self._ratios.clear()
        self._finish_ratios.clear()

    def step_s(self, shape: Shape, rows: float) -> float:
        """Return the seconds of one step of ``rows`` rows; 0 while nothing is known."""
        return self._step_s(shape, rows) * _ratio(self._ratios, shape)

    def finish_s(self, shape: Shape, requests: int = 1) -> float:
        """Return the seconds that the media of ``requests`` clean latents take."""
        return self.finish_unit_s * math.prod(shape) * requests * _ratio(self._finish_ratios, shape)

    def request_s(self, shape: Shape, rows: float, steps: int) -> float:
        """Return the seconds of one request alone; ``rows`` are those of one step."""
        return steps * self.step_s(shape, rows) + self.finish_s(shape)

    def observe_step(self, shape: Shape, rows: float, seconds: float) -> None:
        """Learn from a step of ``rows`` rows."""
        if self.unit_s is None:
            self.unit_s = seconds / (math.prod(shape) * rows)
        self._errors.append(abs(self.step_s(shape, rows) - seconds) / seconds)
        _keep(self._ratios, shape, seconds / self._step_s(shape, rows))

    def observe_finish(self, shape: Shape, requests: int, seconds: float) -> None:
        """Learn from a batch of media that was made."""
        if not self.finish_unit_s:
            self.finish_unit_s = seconds / (math.prod(shape) * requests)
        predicted = self.finish_unit_s * math.prod(shape) * requests
        _keep(self._finish_ratios, shape, seconds / predicted)

    def error(self) -> float | None:
        """Return the median of ``|predicted - actual| / actual`` over the last steps."""
        return median(self._errors) if self._errors else None

    def _step_s(self, shape: Shape, rows: float) -> float:
        return 0.0 if self.unit_s is None else self.fixed_s + self.unit_s * math.prod(shape) * rows


def _ratio(ratios: _Ratios, shape: Shape) -> float:
    """Return the ratio of a shape; of the latest one for a new shape, as a busy machine is slow for all."""
    if not ratios:
        return 1.0
    return median(ratios.get(shape) or next(reversed(ratios.values())))


def _keep(ratios: _Ratios, shape: Shape, ratio: float) -> None:
    ratios.setdefault(shape, deque(maxlen=RATIOS_KEPT)).append(ratio)
    ratios.move_to_end(shape)
    if len(ratios) > SHAPES_KEPT:
        ratios.popitem(last=False)
