"""Keys and values of all slots: a transformers ``Cache`` that writes each row at positions of its own.

Shape letters in this file:
    S slots   C positions of the cache   B rows of a pass   T positions of a pass
    H key-value heads   K head width   L positions that a pass looks back on
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from llm.model import LanguageModel

GROWTH = 256  # the first size in positions; it doubles when that is not enough

Views = list[tuple[Tensor, Tensor]]
"""Keys and values of one slot in every layer, ``(1, H, C, K)`` each."""


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
        self._together: Sequence[Tensor] = ()
        self.on_cpu = model.device.type == "cpu"
        self._rows: slice | Tensor = slice(0)
        self._seen = 0
        self._alone: tuple[int, int, Views] | None = (
            None  # start and length of a pass over one slot, and its rows
        )
        self._views: tuple[int, Views] | None = None  # the rows of the slot that was last fed alone

    def reserve(self, num_positions: int, most: int) -> None:
        """Make rows at least ``num_positions`` long, and then some, but not longer than ``most``."""
        if num_positions > self.num_positions:
            self.num_positions = min(max(num_positions, 2 * self.num_positions, GROWTH), most)
            with torch.inference_mode():
                for layer in self.kept:
                    layer.grow(self.num_positions)
            self._views = None

    def aim(self, places: Tensor, rows: slice | Tensor, seen: int) -> None:
        """Say where the next pass writes and what it reads.

        ``places`` ``(B * T,)`` int64 are slot * C + position; ``rows`` are the slots of the pass, which
        look at the first ``seen`` positions.
        """
        self._places, self._rows, self._seen, self._alone = places, rows, seen, None

    def aim_alone(self, row: int, start: int, length: int) -> None:
        """Say it of ``length`` positions of one slot from ``start`` on, which needs no indices.

        Every layer must have been written to before.
        """
        if self._views is None or self._views[0] != row:
            one = slice(row, row + 1)
            views = [
                (layer.keys[one].transpose(1, 2), layer.values[one].transpose(1, 2)) for layer in self.kept
            ]
            self._views = row, views
        self._alone = start, length, self._views[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write ``(B, H, T, K)`` where the pass aims; return keys and values ``(B, H, L, K)`` of its rows."""
        if self._alone is not None:
            start, length, views = self._alone
            keys, values = views[layer_idx]
            keys.narrow(2, start, length).copy_(key_states)
            values.narrow(2, start, length).copy_(value_states)
            return keys.narrow(2, 0, start + length), values.narrow(2, 0, start + length)
        layer = self.kept[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        spare = self._together or (None, None)
        return (
            self._written(layer.keys, key_states, spare[0]),
            self._written(layer.values, value_states, spare[1]),
        )

    def _written(self, kept: Tensor, states: Tensor, spare: Tensor | None) -> Tensor:
        new = states.transpose(1, 2).flatten(0, 1)  # (B * T, H, K)
        kept.view(-1, *kept.shape[2:]).index_copy_(0, self._places, new)
        if isinstance(self._rows, slice):
            rows = kept[self._rows, : self._seen]  # (B, L, H, K)
        elif spare is None:
            rows = kept[:, : self._seen].index_select(0, self._rows)
        else:
            rows = spare[: self._rows.shape[0] * self._seen].view(-1, self._seen, *kept.shape[2:])
            torch.index_select(kept[:, : self._seen], 0, self._rows, out=rows)
        return rows.transpose(1, 2)

    def room_together(self, positions: int) -> list[Tensor]:
        """Return where a pass copies its rows together, keys and values, ``(N, H, K)`` each for N positions.

        All layers use the same: memory that was just written is near, and new memory of this size costs a
        CPU more than the copy. None before the first pass, where the allocator keeps such memory itself, and
        where layers differ in their shapes.
        """
        first = self.kept[0]
        if not first.is_initialized or not self.on_cpu or not self._same_everywhere():
            return []
        if not self._together or len(self._together[0]) < positions:
            size = (max(positions, self.num_positions), *first.keys.shape[2:])
            self._together = [kept.new_empty(size) for kept in (first.keys, first.values)]
        return [*self._together]

    def _same_everywhere(self) -> bool:
        return len({(layer.keys.shape, layer.values.shape) for layer in self.kept}) == 1

    def tensors(self) -> list[Tensor]:
        """Return keys and values of all layers, ``(S, C, H, K)`` each; none before the first pass."""
        layers = [layer for layer in self.kept if layer.is_initialized]
        return [tensor for layer in layers for tensor in (layer.keys, layer.values)]

    def hold(self, tensors: Sequence[Tensor], together: Sequence[Tensor] = ()) -> None:
        """Keep ``tensors``, in the order of :meth:`tensors`, in place of what is there."""
        self._views = None
        self._together = together
        for number, layer in enumerate(self.kept):
            layer.keys, layer.values = tensors[2 * number : 2 * number + 2]

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        for tensor in self.tensors():
            tensor[target, :length] = tensor[source, :length]

    @torch.inference_mode()
    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` positions of two slots."""
        for tensor in self.tensors():
            kept = tensor[one, :length].clone()
            tensor[one, :length] = tensor[other, :length]
            tensor[other, :length] = kept

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Zero a slot, so that nothing that is not a number stays in it."""
        for tensor in self.tensors():
            tensor[slot] = 0
