"""The language model as transformers alone would run it: the yardstick of the engine.

Shape letters in this file:
    B rows   T positions   V vocabulary
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel

from llm.model import LanguageModel
from llm.tokenizer import ConversationTokenizer


def plain_model(model: LanguageModel) -> PreTrainedModel:
    """Return a copy of the base whose own tables hold the added tokens' rows, in evaluation mode.

    Raises:
        ValueError: there is LoRA that is not merged into the base.

    """
    if model.base is not model.causal_lm:
        raise ValueError("The model has LoRA beside its base; call merge_adapter() first.")
    plain: PreTrainedModel = copy.deepcopy(model.causal_lm)
    n = model.tokenizer.base_vocabulary
    rows = model.signal_rows
    with torch.no_grad():
        for old, new, put in (
            (plain.get_input_embeddings(), rows.embedding, plain.set_input_embeddings),
            (plain.get_output_embeddings(), rows.head, plain.set_output_embeddings),
        ):
            weight = cast(Tensor, old.weight)
            table = torch.cat([weight[:n], new.to(weight.dtype)])
            if isinstance(old, nn.Embedding):
                grown: nn.Module = nn.Embedding.from_pretrained(table)
            else:
                grown = nn.Linear(table.shape[1], table.shape[0], bias=False)
                grown.weight = nn.Parameter(table, requires_grad=False)
            put(grown)
    plain.config.vocab_size = len(model.tokenizer)
    plain.eval()
    return plain


class WholeBlocks(LogitsProcessor):
    """Lets ``generate()`` say what the engine may say: no role or media tokens, and blocks only whole."""

    def __init__(self, tokenizer: ConversationTokenizer) -> None:
        size = len(tokenizer)
        self._mask = torch.zeros(size)
        self._mask[list(tokenizer.unspeakable_ids)] = float("-inf")
        self._following = torch.full((size,), -1)
        for modality in tokenizer.signals.modalities:
            block = torch.tensor(tokenizer.signal_ids(modality))
            self._following[block[:-1]] = block[1:]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the scores ``(B, V)`` for the token after ``input_ids`` ``(B, T)``."""
        forced: Tensor = self._following[input_ids[:, -1]]
        scores = scores + self._mask
        if bool((forced >= 0).any()):
            within = (forced >= 0).nonzero()[:, 0]
            scores[within] = float("-inf")
            scores[within, forced[within]] = 0.0
        return scores
