"""Ways to say one thing, and who says them.

Every kind of phrase comes in two groups (:class:`Phrases`): those that training says, and reserved ones that
only tests say, so that a test shows what was understood and not what was learnt by heart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Phrases:
    """Ways to say one thing: those that training uses, and those that are kept for tests alone."""

    training: tuple[str, ...]
    reserved: tuple[str, ...] = ()


def ways(*patterns: str, reserved: Sequence[str]) -> Phrases:
    """Return all that the patterns spell out, without what is reserved.

    ``(a|b)`` in a pattern stands for either; an alternative that is written twice is said twice as often.
    """
    spelled = [phrase for pattern in patterns for phrase in _spelled_out(pattern)]
    return Phrases(
        tuple(phrase for phrase in spelled if not phrase or phrase not in reserved), tuple(reserved)
    )


def _spelled_out(pattern: str) -> list[str]:
    literals_and_choices = re.split(r"\(([^()]*)\)", pattern)
    alternatives = [piece.split("|") if i % 2 else [piece] for i, piece in enumerate(literals_and_choices)]
    return ["".join(pieces) for pieces in product(*alternatives)]


class Speaker(random.Random):
    """A source of chance that also chooses words; with ``reserved`` it says what training never said."""

    reserved: bool = False

    @classmethod
    def drawn_from(cls, rng: random.Random, *, reserved: bool) -> Speaker:
        """Return a speaker whose choices follow from the state of ``rng``."""
        speaker = cls(rng.getrandbits(64))
        speaker.reserved = reserved
        return speaker

    def say(self, phrases: Phrases) -> str:
        """Choose one phrase."""
        return self.choice(phrases.reserved if self.reserved and phrases.reserved else phrases.training)
