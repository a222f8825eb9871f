"""Rows of ids become one padded batch.

Shape letters in this file:
    B rows   T positions (padded at the right)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm.template import MediaSlot, Row, SignalSpan

IGNORED = -100


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Dialogues ready for the model.

    ``ids`` ``(B, T)`` int64; ``present`` ``(B, T)`` bool, False where a row has ended; ``labels``
    ``(B, T)`` int64, the id where it is to be learnt and -100 elsewhere (unshifted). ``media`` and
    ``signals`` say for each medium and each signal block which row it is in, and where.
    """

    ids: Tensor
    present: Tensor
    labels: Tensor
    media: list[tuple[int, MediaSlot]]
    signals: list[tuple[int, SignalSpan]]

    def media_places(self) -> Tensor:
        """Return ``(B, T)`` bool on the device of the ids, True where tokens of a medium lie."""
        places = torch.zeros_like(self.present)
        for row, slot in self.media:
            places[row, slot.start : slot.start + slot.length] = True
        return places

    def to(self, device: torch.device | str) -> Batch:
        """Move the id tensors; the media follow when they are projected."""
        return replace(
            self, ids=self.ids.to(device), present=self.present.to(device), labels=self.labels.to(device)
        )


def collate_rows(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad ``rows`` at the right to the longest."""
    if not rows:
        raise ValueError("There are no rows to collate; expected at least one.")
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)  # (B, T)
    labels = torch.full_like(ids, IGNORED)
    present = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        length = len(row.ids)
        ids[i, :length] = torch.tensor(row.ids)
        present[i, :length] = True
        labels[i, :length] = torch.tensor(
            [token if trained else IGNORED for token, trained in zip(row.ids, row.trained, strict=True)]
        )
    media = [(i, slot) for i, row in enumerate(rows) for slot in row.media]
    signals = [(i, span) for i, row in enumerate(rows) for span in row.signals]
    return Batch(ids, present, labels, media, signals)
