"""The model with a row of cache per slot: embeddings in, hidden states out, any rows at any positions.

The base is not forked. Its cache is a transformers ``Cache`` whose layers write each row at positions of
its own; what a row may see is an additive mask, and where it is are explicit position ids.

Shape letters in this file:
    S slots   C positions of the cache   B rows of a pass   T positions of a pass   D LLM width
    H key-value heads   K head width   L positions that a pass looks back on
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from llm.model import LanguageModel

GROWTH = 256  # the cache's first size in positions; it doubles when that is not enough


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, ``(S, C, H, K)`` each."""

    keys: Tensor
    values: Tensor

    def __init__(self, num_slots: int, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_slots, self.num_positions = num_slots, 0
        self.window = window
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for keys and values like these, ``(B, H, T, K)``."""
        self.keys, self.values = (
            states.new_zeros(self.num_slots, self.num_positions, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def grow(self, num_positions: int) -> None:
        """Make every row ``num_positions`` long."""
        # Zeros, not whatever was in memory: a masked position takes part in the sums, and NaN stays NaN.
        if self.is_initialized:
            for name in ("keys", "values"):
                old: Tensor = getattr(self, name)
                new = old.new_zeros(self.num_slots, num_positions, *old.shape[2:])
                new[:, : self.num_positions] = old
                setattr(self, name, new)
        self.num_positions = num_positions

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refuse: rows are at different positions, so :class:`SlotCache` writes.

        Raises:
            TypeError: always.

        """
        raise TypeError("This layer does not know where each row is; update its SlotCache instead.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of what a pass sees."""
        return self.num_positions, 0

    def get_seq_length(self) -> int:
        """Return 0: rows have lengths of their own, and position ids say which."""
        return 0

    def get_max_length(self) -> int:
        """Return how long a row is now."""
        return self.num_positions


class SlotCache(Cache):
    """One row per slot in every layer.

    Raises:
        ValueError: the base has layers that remember otherwise than by keys and values of all positions
            (linear attention, chunks, compression).

    """

    def __init__(self, model: LanguageModel, num_slots: int) -> None:
        kept: list[SlotLayer] = []
        for layer in DynamicCache(config=model.causal_lm.config).layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"The base has a {type(layer).__name__}; the engine keeps full and sliding attention "
                    f"only. Choose a base without linear, chunked or compressed attention."
                )
            kept.append(SlotLayer(num_slots, getattr(layer, "sliding_window", None)))
        if len({layer.window for layer in kept if layer.window is not None}) > 1:
            raise ValueError("The base has sliding windows of several sizes; the engine masks one size only.")
        super().__init__(layers=[*kept])
        self.kept = kept
        self.num_positions = 0
        self._places = torch.empty(0)
        self._rows: slice | Tensor = slice(0)
        self._seen = 0

    @torch.inference_mode()
    def reserve(self, num_positions: int, most: int) -> None:
        """Make rows at least ``num_positions`` long, and then some, but not longer than ``most``."""
        if num_positions > self.num_positions:
            self.num_positions = min(max(num_positions, 2 * self.num_positions, GROWTH), most)
            for layer in self.kept:
                layer.grow(self.num_positions)

    def aim(self, places: Tensor, rows: slice | Tensor, seen: int) -> None:
        """Say where the next pass writes and what it reads.

        ``places`` ``(B * T,)`` int64 are slot * C + position; ``rows`` are the slots of the pass, which
        look at the first ``seen`` positions.
        """
        self._places, self._rows, self._seen = places, rows, seen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write ``(B, H, T, K)`` where the pass aims; return keys and values ``(B, H, L, K)`` of its rows."""
        layer = self.kept[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        return (
            self._written(layer.keys, key_states),
            self._written(layer.values, value_states),
        )

    def _written(self, kept: Tensor, states: Tensor) -> Tensor:
        new = states.transpose(1, 2).flatten(0, 1)  # (B * T, H, K)
        kept.view(-1, *kept.shape[2:]).index_copy_(0, self._places, new)
        seen = kept[:, : self._seen]  # (S, L, H, K)
        rows = seen[self._rows] if isinstance(self._rows, slice) else seen.index_select(0, self._rows)
        return rows.transpose(1, 2)

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        for tensor in self._tensors():
            tensor[target, :length] = tensor[source, :length]

    @torch.inference_mode()
    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` positions of two slots."""
        for tensor in self._tensors():
            kept = tensor[one, :length].clone()
            tensor[one, :length] = tensor[other, :length]
            tensor[other, :length] = kept

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Zero a slot, so that nothing that is not a number stays in it."""
        for tensor in self._tensors():
            tensor[slot] = 0

    def _tensors(self) -> list[Tensor]:
        layers = [layer for layer in self.kept if layer.is_initialized]
        return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


class SlotModel:
    """Runs the base over slots.

    Args:
        model: in evaluation mode.
        num_slots: rows of the cache.
        context: positions per row, at most the model's context.

    Raises:
        ValueError: a base that takes no position ids, whose attention takes no additive mask, or whose
            layers :class:`SlotCache` cannot keep.

    """

    def __init__(self, model: LanguageModel, num_slots: int, context: int) -> None:
        self.model, self.context = model, context
        self.cache = SlotCache(model, num_slots)
        self._base = model.causal_lm.base_model
        self._dtype, self._device = model.causal_lm.dtype, model.device
        attention = model.causal_lm.config._attn_implementation
        if "position_ids" not in inspect.signature(self._base.forward).parameters:
            raise ValueError(
                f"{type(self._base).__name__} takes no position ids, which the engine needs to put requests "
                f"of different lengths into one pass. Choose a base with rotary or learned positions."
            )
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"The base was loaded with {attention!r} attention; the engine needs an additive mask. "
                f"Load it with attn_implementation='sdpa' or 'eager'."
            )
        self._windows = {
            "sliding_attention" if w.is_sliding else "full_attention": w.window for w in self.cache.kept
        }
        self._steps = torch.arange(context + 1, device=self._device)
        self._compiled: Any = None

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile passes that feed one position per row, unless they are to be ``plain``.

        Takes such passes, so that what cannot be compiled is known at once. What slots hold is lost.

        Raises:
            RuntimeError: it cannot be compiled; passes go on uncompiled.

        """
        self._compiled = torch.compile(self._base, dynamic=True, backend=backend)
        width = self.model.embed(torch.tensor([[0]], device=self._device)).shape[-1]
        try:
            for rows in {1, min(2, self.cache.kept[0].num_slots)}:  # one row is a case of its own
                row = torch.zeros(rows, 1, width, device=self._device)
                self.run(row, range(rows), [0] * rows)
        except Exception:
            self._compiled = None
            raise

    @torch.inference_mode()
    def run(
        self, embeddings: Tensor, rows: Sequence[int], starts: Sequence[int], *, plain: bool = False
    ) -> Tensor:
        """Feed some slots and return their last hidden states.

        Args:
            embeddings: ``(B, T, D)`` float32. Rows that have fewer than T positions to feed are padded at
                the right with anything finite; what padding leaves in the cache is hidden until it is
                overwritten.
            rows: the B slots, ascending. One pass over neighbours copies no cache.
            starts: for each row, how many of its positions came before.
            plain: keep out of compiled code, which knows nothing of hooks.

        Returns:
            ``(B, T, D)`` after the final norm, in the dtype of the base; an inference tensor.

        """
        length = embeddings.shape[1]
        seen = min(max(starts) + length, self.context)
        self.cache.reserve(seen + 1, self.context + 1)
        first = torch.tensor([starts], device=self._device).T  # (B, 1)
        at = first + self._steps[:length]  # (B, T)
        spare = self.cache.num_positions - 1  # padding beyond the context is written there
        positions = at.clamp(max=self.context - 1) if max(starts) + length > self.context else at
        slots = torch.tensor([rows], device=self._device).T
        places = (slots * self.cache.num_positions + at.clamp(max=spare)).view(-1)
        near = rows[-1] - rows[0] == len(rows) - 1
        self.cache.aim(places, slice(rows[0], rows[-1] + 1) if near else slots[:, 0], seen)
        base = self._base if plain or length > 1 or self._compiled is None else self._compiled
        output = base(
            inputs_embeds=embeddings.to(self._dtype),
            attention_mask=self._mask(at, seen),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _mask(self, at: Tensor, seen: int) -> Tensor | dict[str, Tensor]:
        """Return ``(B, 1, T, L)``, 0 for what a position sees; one per kind of layer if there are two."""
        back = at[:, None, :, None] - self._steps[:seen]  # (B, 1, T, L)
        zeros = torch.zeros(back.shape, dtype=self._dtype, device=self._device)
        lowest = torch.finfo(self._dtype).min
        masks = {
            kind: zeros.masked_fill(back < 0 if window is None else (back < 0) | (back >= window), lowest)
            for kind, window in self._windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))
