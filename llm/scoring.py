"""How probable a reply is that somebody else wrote: its words are fed, and none is chosen.

Said of a medium and a caption, that is how well the one shows the other, as the model sees it: the idea of
VQAScore (Lin et al. 2024, arXiv 2404.01291), with a caption in place of "yes".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm.batch import IGNORED
from llm.model import LanguageModel
from llm.template import Dialogue, Row


@dataclass(frozen=True, slots=True)
class Scored:
    """The natural logarithm of the probability of each token of a reply, its end included."""

    log_probabilities: tuple[float, ...]


@dataclass(eq=False, slots=True)
class GivenReply:
    """The last reply of a row, whose tokens an engine looks up in the states before them."""

    row: Row
    found: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not any(self.row.trained):
            raise ValueError(
                "The dialogue has no reply to score; end it with an assistant's message of words."
            )

    @property
    def first(self) -> int:
        """Position of the first token that is looked up; the state before it is needed."""
        return self.row.trained.index(True)

    def look_up(self, hidden: Tensor, start: int, logits: Callable[[Tensor], Tensor]) -> None:
        """Take the states ``(T, D)`` at the positions from ``start`` on, and look up what follows them."""
        after = range(start + 1, start + 1 + len(hidden))
        places = [place for place in after if self.row.trained[place]]
        if places:
            ids = torch.tensor([self.row.ids[place] for place in places], device=hidden.device)
            found = logits(hidden[[place - start - 1 for place in places]]).log_softmax(dim=-1)  # (N, V)
            self.found += found.gather(1, ids[:, None])[:, 0].tolist()


@torch.inference_mode()
def score(model: LanguageModel, dialogues: Sequence[Dialogue]) -> list[Scored]:
    """Return how probable the last reply of each dialogue is, in one pass over all of them.

    Raises:
        ValueError: a medium that the model cannot read.

    """
    batch = model.collate(dialogues, "last_assistant").to(model.device)
    output = model(batch)
    found = output.logits.log_softmax(dim=-1).gather(1, output.targets[:, None])[:, 0]
    counts = (batch.labels[:, 1:] != IGNORED).sum(dim=1)
    return [Scored(tuple(row.tolist())) for row in found.split(counts.tolist())]
