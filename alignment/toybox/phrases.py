"""Ways to say one thing, and who says them.

Every kind of phrase comes in three groups (:class:`Phrases`): patterns, which spell out many phrases that are
alike, and what people would type, which is in the phrase book; training says both. The third group is
reserved for tests, so that a test shows what was understood and not what was learnt by heart. It was written
without knowing how the model does, or what else training says.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

PHRASE_BOOK = Path(__file__).with_name("phrase_book.json")
NAMES = Path(__file__).with_name("names.json")
TYPED_SHARE = 0.6
"""How much of what training says is as people would type it, where the phrase book has it."""
OTHER_NAMES_SHARE = 0.4
"""How often training calls a value by one of its many names, in place of the few that all else uses."""


@dataclass(frozen=True)
class Phrases:
    """Ways to say one thing: two groups that training uses, and those that are kept for tests alone."""

    spelled: tuple[str, ...]
    typed: tuple[str, ...]
    reserved: tuple[str, ...]

    @property
    def training(self) -> tuple[str, ...]:
        """All that training says."""
        return self.spelled + self.typed


def ways(name: str, *patterns: str) -> Phrases:
    """Return all that the patterns spell out, and what the phrase book has under a name.

    ``(a|b)`` in a pattern stands for either; an alternative that is written twice is said twice as often.
    Nothing that is reserved is said in training, whatever spells it out.
    """
    typed, reserved = (tuple(phrases) for phrases in _read(PHRASE_BOOK)[name].values())
    spelled = [phrase for pattern in patterns for phrase in spelled_out(pattern)]
    kept = {phrase for phrase in reserved if phrase}
    return Phrases(
        tuple(phrase for phrase in spelled if phrase not in kept),
        tuple(phrase for phrase in typed if phrase not in kept),
        reserved,
    )


@cache
def _read(path: Path) -> dict[str, dict[str, list[str]]]:
    listed: dict[str, dict[str, list[str]]] = json.loads(path.read_text(encoding="utf-8"))
    return listed


def spelled_out(pattern: str) -> list[str]:
    """Return every phrase that a pattern spells out, in order."""
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
        if self.reserved:
            return self.choice(phrases.reserved)
        if phrases.typed and (not phrases.spelled or self.random() < TYPED_SHARE):
            return self.choice(phrases.typed)
        return self.choice(phrases.spelled)

    def name(self, attribute: str, value: str | int, usual: Sequence[str]) -> str:
        """Choose what to call a value: one of the ``usual`` names, or in training one of many others.

        ``attribute`` is a key of ``names.json``.
        """
        if not self.reserved and self.random() < OTHER_NAMES_SHARE:
            return self.choice(_read(NAMES)[attribute][str(value)])
        return self.choice(usual)
