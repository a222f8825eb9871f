"""When a medium is made again: what the agent promised is held against what it sees of it.

How probable the caption is as the answer to a question about the medium, its least probable word says: one
wrong word makes a wrong medium, however sure the others are. No models here, and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from decoders.settings import MAX_SEED
from encoders.media import Modality

_STRIDE = 1_000_003  # seeds of one reply, and of media that are made side by side, follow one another


@dataclass(frozen=True, kw_only=True, slots=True)
class SecondLook:
    """Media of ``modalities`` that look less like their caption than ``below`` are made again.

    At most ``retries`` times, each with a seed that follows from the first; the one that looks most like its
    caption is kept. ``question`` is what the model is asked of a medium.
    """

    retries: int
    below: float
    question: str
    modalities: frozenset[Modality]

    def __post_init__(self) -> None:
        if self.retries < 1:
            raise ValueError(
                f"retries is {self.retries}; expected at least 1. Leave the second look out for 0."
            )
        if not 0 < self.below < 1:
            raise ValueError(f"below is {self.below}; expected a probability, above 0 and below 1.")
        if not self.question.strip():
            raise ValueError(
                "question is empty; expected what is asked of a medium, such as 'describe this'."
            )

    def looks_at(self, modality: Modality, caption: str) -> bool:
        """Whether such a medium is looked at: where nothing was promised, nothing can be held against it."""
        return modality in self.modalities and bool(caption.strip())

    def asks_again(self, likeness: float, attempts: int) -> bool:
        """Whether a medium is made again, of which the best of ``attempts`` so far has ``likeness``."""
        return likeness < self.below and attempts <= self.retries


def likeness(log_probabilities: Sequence[float]) -> float:
    """Return how much a medium looks like its caption, in [0, 1]: the probability of its least probable word.

    ``log_probabilities`` are those of the caption's tokens, its end included.
    """
    return math.exp(min(log_probabilities))


def next_seed(first: int, attempt: int) -> int:
    """Return the seed of an attempt, 0 for the first: always the same, and far from other media's."""
    return (first + _STRIDE * attempt) % (MAX_SEED + 1)
