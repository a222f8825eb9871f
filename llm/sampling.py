"""The next token of many replies at once.

Every reply's draw depends on its own logits, options and random numbers alone, so that the company it
is in changes nothing.

Shape letters in this file:
    R replies   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from llm.reply import Reply
from llm.tokenizer import ConversationTokenizer


class Sampler:
    """Draws tokens for replies of one model.

    Which tokens may be said depends only on which media may begin, so the masks of all cases are made
    once: row ``i`` of the table is for the media whose bits are set in ``i``.
    """

    def __init__(self, tokenizer: ConversationTokenizer, device: torch.device | str = "cpu") -> None:
        starts = tokenizer.signal_starts
        self._starts = starts
        self._bits = {modality: 1 << i for i, modality in enumerate(starts.values())}
        masks = torch.zeros(1 << len(starts), len(tokenizer))
        masks[:, list(tokenizer.unspeakable_ids)] = float("-inf")
        for start, modality in starts.items():
            closed = [i for i in range(len(masks)) if not i & self._bits[modality]]
            masks[closed, start] = float("-inf")
        self._masks = masks.to(device)
        self._each_mask = list(self._masks)

    def choose(self, logits: Tensor, replies: Sequence[Reply]) -> list[tuple[int | None, float]]:
        """Return what each reply says next, and for a block's first token how sure its medium is.

        Args:
            logits: ``(R, V)`` float32, row i for ``replies[i]``.
            replies: any of one model.

        Returns:
            Per reply the token, or None where it ends, or -1 where the logits are not finite, which is the
            model's fault; and, for a token that starts a block, its probability at temperature 1 among the
            blocks that may begin (0 for other tokens).

        """
        codes = [sum(self._bits[modality] for modality in reply.open_media()) for reply in replies]
        same = len(set(codes)) == 1
        masked = logits + (self._each_mask[codes[0]] if same else self._masks[codes])  # (R, V)
        scored = _discouraged(_penalised(masked, replies), replies)
        highest, best = scored.max(dim=-1)  # (R,)
        tokens: list[int] = best.tolist()
        sound = [isfinite(score) for score in highest.tolist()]
        for indices, nucleus in _drawn(replies, sound):
            drawn = _draw(scored[indices], [replies[i] for i in indices], nucleus)
            for i, token in zip(indices, drawn, strict=True):
                tokens[i] = token

        said = [reply.decide(token) for reply, token in zip(replies, tokens, strict=True)]
        confidence = [0.0] * len(replies)
        starts = list(self._starts)
        if beginning := {
            i: token for i, token in enumerate(said) if token is not None and token in starts and sound[i]
        }:
            shares = masked[list(beginning)][:, starts].softmax(dim=-1).tolist()  # replies x media
            for (i, token), share in zip(beginning.items(), shares, strict=True):
                confidence[i] = dict(zip(starts, share, strict=True))[token]
        return [(said[i] if sound[i] else -1, confidence[i]) for i in range(len(replies))]


def _penalised(masked: Tensor, replies: Sequence[Reply]) -> Tensor:
    rows = [i for i, reply in enumerate(replies) if reply.used is not None]
    if not rows:
        return masked
    used = torch.stack([u for reply in replies if (u := reply.used) is not None]).to(masked.device)
    penalty = masked.new_tensor([[replies[i].options.repetition_penalty] for i in rows])
    scores = masked[rows]
    worse = torch.where(scores < 0, scores * penalty, scores / penalty)
    return masked.index_copy(0, torch.tensor(rows, device=masked.device), torch.where(used, worse, scores))


def _discouraged(scores: Tensor, replies: Sequence[Reply]) -> Tensor:
    rows = [i for i, reply in enumerate(replies) if reply.counts is not None]
    if not rows:
        return scores
    counts = torch.stack([c for reply in replies if (c := reply.counts) is not None]).to(scores.device)
    presence = scores.new_tensor([[replies[i].options.presence_penalty] for i in rows])
    frequency = scores.new_tensor([[replies[i].options.frequency_penalty] for i in rows])
    worse = scores[rows] - presence * (counts > 0) - frequency * counts
    return scores.index_copy(0, torch.tensor(rows, device=scores.device), worse)


def _drawn(replies: Sequence[Reply], sound: Sequence[bool]) -> list[tuple[list[int], bool]]:
    """Return the replies that are not greedy, those that need their tokens sorted apart from the others."""
    plain: list[int] = []
    sorted_: list[int] = []
    for i, reply in enumerate(replies):
        options = reply.options
        if options.temperature > 0 and sound[i]:
            (sorted_ if options.top_k or options.top_p < 1 else plain).append(i)
    return [(indices, nucleus) for indices, nucleus in ((plain, False), (sorted_, True)) if indices]


def _draw(scores: Tensor, replies: Sequence[Reply], nucleus: bool) -> list[int]:
    """Draw one token per row of ``scores`` ``(R, V)`` by inverting its distribution at one random number."""
    options = [reply.options for reply in replies]
    values = scores / scores.new_tensor([[o.temperature] for o in options])
    ids = None
    if nucleus:
        values, ids = values.sort(descending=True, stable=True)
        num_tokens = values.shape[1]
        top_k = torch.tensor([[o.top_k or num_tokens] for o in options], device=scores.device)
        values = values.masked_fill(torch.arange(num_tokens, device=scores.device) >= top_k, float("-inf"))
    kept = values.softmax(dim=-1)
    if nucleus:
        before = kept.cumsum(dim=-1) - kept
        kept = kept * (before < kept.new_tensor([[o.top_p] for o in options]))  # the likeliest always stays
    reached = kept.double().cumsum(dim=-1)
    total = reached[:, -1:]
    wanted = total * reached.new_tensor([[reply.random.random()] for reply in replies])
    last = (reached < total).sum(dim=-1)  # rounding may carry `wanted` up to the total
    index = torch.minimum((reached <= wanted).sum(dim=-1), last)[:, None]
    tokens: list[int] = (index if ids is None else ids.gather(1, index))[:, 0].tolist()
    return tokens
