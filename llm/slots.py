"""The model with a row of cache per slot: embeddings in, hidden states out, any rows at any positions.

The base is not forked. Its cache is that of :mod:`llm.slot_cache`; what a row may see is an additive mask,
and where it is are explicit position ids.

Shape letters in this file:
    C positions of the cache   B rows of a pass   T positions of a pass   D LLM width
    L positions that a pass looks back on
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm.model import LanguageModel
from llm.slot_cache import SlotCache

COPIED_BYTES = 1 << 20
"""A pass on a CPU copies its rows together where one tensor of them is larger than this. Attention reads a
row once per head, and what has left the core's own cache in between comes slowly; a copy stays there."""
ROUNDING = 1e-2
"""How much of the largest value may be rounding, in half precision too."""

GRAPH_POSITIONS = 512
"""A graph looks back on a multiple of so many positions, so that there are few of them."""

logger = logging.getLogger(__name__)

Capture = Callable[[Callable[..., Tensor], Sequence[Tensor]], Callable[..., Tensor]]
"""Makes a graph of what a function does with tensors like these; it takes others of the same shapes."""

Bounds = tuple[int, int] | tuple[Tensor, Tensor]
"""Tensors where a pass is recorded, which would keep numbers as they were then."""


class SlotPass(nn.Module):
    """One pass of the base over slots, in which all that changes from pass to pass is a tensor.

    Args:
        base: of the model, or what stands in for it.
        cache: what the base reads and writes.
        copies: whether the rows are copied together. Else they must be neighbours.

    """

    def __init__(self, base: Any, cache: SlotCache, *, copies: bool) -> None:
        super().__init__()
        self.base, self.cache, self.copies = base, cache, copies
        self.windows = {
            "sliding_attention" if layer.is_sliding else "full_attention": layer.window
            for layer in cache.kept
        }

    def forward(
        self,
        embeddings: Tensor,
        at: Tensor,
        places: Tensor,
        rows: Tensor,
        between: Bounds,
        steps: Tensor,
        *kept: Tensor,
    ) -> Tensor:
        """Return the last hidden states ``(B, T, D)``.

        Args:
            embeddings: ``(B, T, D)`` in the dtype of the base.
            at: ``(B, T)``, where in its slot each of them is.
            places: ``(B * T,)``, where in the cache that is; see :meth:`SlotCache.aim`.
            rows: ``(B,)``, the slots.
            between: the first slot, and the first behind the last.
            steps: ``(L,)``, the positions that the pass looks back on: 0, 1, 2 and so on.
            kept: what the cache is to hold, and behind it where rows are copied together, if there is such a
                place. None leaves there what is there.

        """
        if kept:
            count = 2 * len(self.cache.kept)
            self.cache.hold(kept[:count], kept[count:])
        self.cache.aim(places, rows if self.copies else slice(*between), steps.shape[0])
        return self.take(embeddings, at, steps)

    def take(self, embeddings: Tensor, at: Tensor, steps: Tensor) -> Tensor:
        """Return the last hidden states of a pass for which the cache is aimed already."""
        output = self.base(
            inputs_embeds=embeddings,
            attention_mask=self._mask(at, steps, embeddings.dtype),
            position_ids=at,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _mask(self, at: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Return ``(B, 1, T, L)``, 0 for what a position sees; one per kind of layer if there are two."""
        if at.numel() == 1 and None in self.windows.values() and len(self.windows) == 1:
            return steps.new_zeros(1, 1, 1, steps.shape[0], dtype=dtype)  # it is the last, and sees them all
        back = at[:, None, :, None] - steps  # (B, 1, T, L)
        zeros = torch.zeros_like(back, dtype=dtype)
        lowest = torch.finfo(dtype).min
        masks = {
            kind: zeros.masked_fill(back < 0 if window is None else (back < 0) | (back >= window), lowest)
            for kind, window in self.windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))


class SlotModel:
    """Runs the base over slots.

    Args:
        model: in evaluation mode.
        num_slots: rows of the cache.
        context: positions per row, at most the model's context.
        runs_on: where the passes are meant for, if that is not where the model is: one on the meta device is
            counted for another.

    Raises:
        ValueError: a base that takes no position ids, whose attention takes no additive mask, or whose
            layers :class:`SlotCache` cannot keep.

    """

    def __init__(
        self, model: LanguageModel, num_slots: int, context: int, *, runs_on: torch.device | None = None
    ) -> None:
        self.model, self.context = model, context
        self.cache = SlotCache(model, num_slots)
        self._base = model.causal_lm.base_model
        self._dtype, self._device = model.causal_lm.dtype, model.device
        self._runs_on = runs_on or model.device
        self.cache.on_cpu = self._runs_on.type == "cpu"
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
        self._steps = torch.arange(context + 1, device=self._device)
        self._passes = self._made_of(self._base)
        self._compiled: Mapping[bool, SlotPass] | None = None
        self._traced: Mapping[bool, Any] | None = None
        self._capture: Capture | None = None
        self._graphs: dict[tuple[int, int], Callable[..., Tensor]] = {}

    def _made_of(self, base: Any) -> Mapping[bool, SlotPass]:
        """Return both ways to take a pass, by whether they copy."""
        return {way: SlotPass(base, self.cache, copies=way).eval() for way in (False, True)}

    def _expect_no_adapters(self) -> None:
        """Refuse to make faster what differs from pass to pass."""
        if self.model.adapters:
            names = ", ".join(type(adapter).__name__ for adapter in self.model.adapters)
            raise RuntimeError(f"what its adapters do ({names}) depends on each pass")

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile passes that feed one position per row, unless they are to be ``plain``.

        Takes such passes, so that what cannot be compiled is known at once. What slots hold is lost.

        Raises:
            RuntimeError: it cannot be compiled; passes go on uncompiled.

        """
        self._expect_no_adapters()
        self._compiled = self._made_of(torch.compile(self._base, dynamic=True, backend=backend))
        try:
            for rows in {1, min(2, self.cache.kept[0].num_slots)}:  # one row is a case of its own
                self.run(self._noise(rows, 1), range(rows), [0] * rows)
        except Exception:
            self._compiled = None
            raise

    @torch.inference_mode()
    def trace(self) -> None:
        """Record a pass once, to repeat it without Python, unless passes are to be ``plain``.

        What is recorded are the same operations on the same weights in memory: results differ by rounding at
        most. It takes less time where operations are small, and no other thread waits for Python meanwhile.
        What slots hold is lost.

        Raises:
            RuntimeError: the base cannot be recorded, or does something else when it is repeated; passes
                go on as before.

        """
        self._expect_no_adapters()
        num_slots = self.cache.kept[0].num_slots
        self.run(self._noise(1, 2), [0], [0])  # makes the cache
        kept = self.cache.tensors()
        example = (self._noise(num_slots, 3), list(range(num_slots)), [1] * num_slots)
        self._traced = None
        traced = {}
        try:
            with warnings.catch_warnings():
                # TorchScript is deprecated for torch.compile, which needs a C++ compiler and takes longer.
                warnings.simplefilter("ignore")
                for way, one in self._passes.items():
                    inputs = self._recorded_inputs(*example)
                    traced[way] = torch.jit.trace(one, inputs, check_trace=False)
                    self.cache.hold(kept)
            self._check_same(traced)
        except RuntimeError:
            raise
        except Exception as error:
            raise RuntimeError(f"a {type(self._base).__name__} cannot be recorded: {error}") from error
        finally:
            self.cache.hold(kept)
        self._traced = traced

    def _check_same(self, traced: Mapping[bool, Any]) -> None:
        num_slots = self.cache.kept[0].num_slots
        for rows, length, start in ((1, 1, 6), (num_slots, 1, 5), (1, 4, 0)):
            what = self._noise(rows, length), list(range(rows)), [start] * rows
            for way, repeat in traced.items():
                wanted = self._passes[way](*self._inputs(*what))
                again = repeat(*self._recorded_inputs(*what))
                _check_alike(again, wanted, f"a recorded pass of {rows} rows of {length}")

    @torch.inference_mode()
    def graph(self, capture: Capture) -> None:
        """Replay passes that feed one position to each of the first slots, unless they are to be ``plain``.

        A graph is made when its size first comes up: for a number of rows, which is a power of two or all,
        and so many positions to look back on. The cache gets its full size now.

        Raises:
            RuntimeError: there is no GPU, or a pass cannot be captured. Passes go on as before.

        """
        self._expect_no_adapters()
        self.run(self._noise(1, 2), [0], [0])  # makes the cache
        self.cache.reserve(self.context + 1, self.context + 1)
        self._graphs = {}
        self._replayed(capture, self._noise(1, 1), [1])
        self._capture = capture

    def _replayed(self, capture: Capture, embeddings: Tensor, starts: Sequence[int]) -> Tensor:
        """Feed one position to each of the first slots, ``(B, 1, D)``, by a graph of at least B rows.

        Slots that are too many write to their spare position, which nobody reads.
        """
        num_slots, count = self.cache.kept[0].num_slots, len(starts)
        size = min(1 << (count - 1).bit_length(), num_slots)
        blocks = -(-(max(starts) + 1) // GRAPH_POSITIONS)
        seen = min(blocks * GRAPH_POSITIONS, self.context)
        given = embeddings.new_zeros(size, 1, embeddings.shape[2], dtype=self._dtype)
        given[:count] = embeddings
        at = torch.tensor([*starts, *[self.context] * (size - count)], device=self._device)[:, None]
        if (size, seen) not in self._graphs:
            rows = torch.arange(size, device=self._device)
            steps, one = self._steps[:seen], self._passes[False]

            def work(embeddings: Tensor, at: Tensor) -> Tensor:
                places = self._places(rows, at)
                result: Tensor = one(
                    embeddings, at.clamp(max=self.context - 1), places, rows, (0, size), steps
                )
                return result

            graph = capture(work, (given, at))
            _check_alike(graph(given, at), work(given, at), f"a captured pass of {size} rows")
            self._graphs[size, seen] = graph
        return self._graphs[size, seen](given, at)[:count]

    def _noise(self, rows: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(rows, length, self.model.width, generator=generator).to(self._device) / 8

    @torch.inference_mode()
    def run(
        self, embeddings: Tensor, rows: Sequence[int], starts: Sequence[int], *, plain: bool = False
    ) -> Tensor:
        """Feed some slots and return their last hidden states.

        Args:
            embeddings: ``(B, T, D)`` float32. Rows that have fewer than T positions to feed are padded at
                the right with anything finite; what padding leaves in the cache is hidden until it is
                overwritten.
            rows: the B slots, ascending. One pass over neighbours copies no cache, unless that is faster.
            starts: for each row, how many of its positions came before.
            plain: keep out of compiled or recorded code, which knows nothing of hooks.

        Returns:
            ``(B, T, D)`` after the final norm, in the dtype of the base; an inference tensor.

        """
        if self._capture is not None and not plain and embeddings.shape[1] == 1 and rows[-1] < len(rows):
            try:
                return self._replayed(self._capture, embeddings, starts)
            except RuntimeError:
                logger.warning("A pass could not be captured; from now on none is replayed.", exc_info=True)
                self._capture, self._graphs = None, {}
        seen = min(max(starts) + embeddings.shape[1], self.context)
        self.cache.reserve(seen + 1, self.context + 1)
        copies = rows[-1] - rows[0] != len(rows) - 1 or self._is_long(len(rows) * seen)
        if self._traced is not None and not plain:
            # Optimising gains nothing here, and the first passes of every shape would take long.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                again: Tensor = self._traced[copies](*self._recorded_inputs(embeddings, rows, starts))
            return again
        is_compiled = self._compiled is not None and not plain and embeddings.shape[1] == 1
        if len(rows) == 1 and not (is_compiled or copies) and self._fits(starts[0] + embeddings.shape[1]):
            return self._take_alone(embeddings, rows[0], starts[0])
        if copies:
            self.cache.room_together(len(rows) * seen)
        passes = self._compiled if self._compiled is not None and is_compiled else self._passes
        hidden: Tensor = passes[copies](*self._inputs(embeddings, rows, starts))
        return hidden

    def _fits(self, end: int) -> bool:
        """Whether a pass up to ``end`` stays within the context, and every layer has its cache already."""
        return end <= self.context and all(layer.is_initialized for layer in self.cache.kept)

    def _take_alone(self, embeddings: Tensor, row: int, start: int) -> Tensor:
        """Feed one slot; numbers say where, which costs less than the tensors of a pass over several."""
        end = start + embeddings.shape[1]
        self.cache.aim_alone(row, start, embeddings.shape[1])
        at = self._steps[start:end][None]  # (1, T)
        return self._passes[False].take(embeddings.to(self._dtype), at, self._steps[:end])

    def _inputs(
        self, embeddings: Tensor, rows: Sequence[int], starts: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Bounds, Tensor]:
        """Return what a :class:`SlotPass` takes."""
        length, device = embeddings.shape[1], self._device
        slots = torch.tensor(rows, device=device)  # (B,)
        last, size = self.context - 1, self.cache.num_positions
        if length > 1:
            at = torch.tensor(starts, device=device)[:, None] + self._steps[:length]  # (B, T)
            places, at = self._places(slots, at), at.clamp(max=last)
        else:  # few enough to count without tensors
            at = torch.tensor([[min(start, last)] for start in starts], device=device)
            counted = [row * size + start for row, start in zip(rows, starts, strict=True)]
            places = torch.tensor(counted, device=device)  # (B,)
        return (
            embeddings.to(self._dtype),
            at,
            places,
            slots,
            (rows[0], rows[-1] + 1),
            self._steps[: min(max(starts) + length, self.context)],
        )

    def _places(self, rows: Tensor, at: Tensor) -> Tensor:
        """Return where in the cache positions ``at`` ``(B, T)`` of ``rows`` ``(B,)`` are, ``(B * T,)``."""
        size = self.cache.num_positions
        return (rows[:, None] * size + at.clamp(max=size - 1)).view(-1)  # the last takes what is too much

    def _recorded_inputs(
        self, embeddings: Tensor, rows: Sequence[int], starts: Sequence[int]
    ) -> tuple[Any, ...]:
        """Return what a recorded pass takes, in which everything is a tensor."""
        *first, (low, high), steps = self._inputs(embeddings, rows, starts)
        together = self.cache.room_together(len(rows) * len(steps))
        return (*first, (torch.tensor(low), torch.tensor(high)), steps, *self.cache.tensors(), *together)

    def _is_long(self, positions: int) -> bool:
        """Whether so many positions of one tensor are better copied together."""
        first = self.cache.kept[0]
        if self._runs_on.type != "cpu" or not first.is_initialized:
            return False
        return positions * first.keys.stride(1) * first.keys.itemsize > COPIED_BYTES


def _check_alike(again: Tensor, wanted: Tensor, what: str) -> None:
    if not (again - wanted).abs().max() <= ROUNDING * wanted.abs().max():
        raise RuntimeError(f"{what} computes something else when it is repeated")
