"""What tokens are read from and said with: the base's tables, and the rows of the added tokens beside them.

Shape letters in this file:
    B rows   T positions   D LLM width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Tables:
    """The tables of one model, found once: finding them takes longer than looking a word up.

    ``new_embedding`` and ``new_head`` are the rows ``(added tokens, D)`` of the ids from ``num_old`` up.
    """

    embedding: nn.Module
    head: nn.Module
    num_old: int
    new_embedding: Tensor
    new_head: Tensor
    scaling: Scaling

    def embed(self, ids: Tensor) -> Tensor:
        """Return input embeddings ``(..., D)`` float32 of ``ids`` ``(...)``, base rows and new rows alike."""
        n = self.num_old
        old = self.embedding(ids.clamp(max=n - 1))
        new = F.embedding((ids - n).clamp(min=0), self.new_embedding)
        return torch.where((ids >= n)[..., None], new, old.to(new.dtype))

    def embed_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return what :meth:`embed` does, for rows of one length; the base's words alone take one look-up."""
        tokens = torch.tensor(ids, device=self.new_embedding.device)  # (B, T)
        if max(map(max, ids)) >= self.num_old:
            return self.embed(tokens)
        words: Tensor = self.embedding(tokens)
        return words.to(self.new_embedding.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``(..., V)`` float32 over base and added tokens for ``hidden`` ``(..., D)``."""
        old: Tensor = self.head(hidden)
        if old.shape[-1] > self.num_old:
            old = old[..., : self.num_old]
        new = F.linear(hidden.to(self.new_head.dtype), self.new_head)
        return self.scaling(torch.cat([old.float(), new.float()], dim=-1))


@dataclass(frozen=True, slots=True)
class Scaling:
    """What Cohere, Granite and Gemma 2 do between the head and the logits."""

    factor: float
    divisor: float
    cap: float

    @classmethod
    def of(cls, config: Any) -> Scaling:
        """Read a text configuration; nothing is done by those that do not ask for it."""
        names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        return cls(*(getattr(config, name, None) or 0.0 for name in names))

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the logits as the base's own head would give them."""
        if self.factor:
            logits = logits * self.factor
        if self.divisor:
            logits = logits / self.divisor
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits
