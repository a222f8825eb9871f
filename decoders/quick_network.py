"""A denoising network that is called in the quickest way that a call allows.

Compiled by torch.compile, recorded (see :mod:`decoders.recorded`), or as CUDA graphs: each is right for some
calls only, and the network itself is right for all. Where nothing was asked for, it is the network.

Shape letters in this file:
    B rows of one call of the network   ... latent shape, channels first   S, E condition tokens and width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decoders.recorded import ROUNDING, RecordedNetwork, Run

Work = Callable[[Tensor, Tensor, Tensor], Tensor]
Capture = Callable[[Work, Sequence[Tensor]], Callable[..., Tensor]]
"""Makes one graph of what ``work`` does with tensors like these; it takes others of the same shapes."""

GRAPH_ROWS = (1, 2, 4, 8)
"""Larger batches keep a GPU busy for longer than it takes to ask for them."""


class QuickNetwork:
    """Calls a network.

    Args:
        network: its weights may be moved later. Graphs are gone then, as they know where weights were.
        run: calls it.
        shape: of the latents of one request, at the usual size.
        condition: ``(S, E)``, any that the network takes; it says dtype and device, too.

    """

    def __init__(self, network: nn.Module, run: Run, shape: tuple[int, ...], condition: Tensor) -> None:
        self.network, self.run = network, run
        self._shape, self._condition = shape, condition
        self._compiled: Any = None
        self._recorded: RecordedNetwork | None = None
        self._graphs: dict[int, Callable[..., Tensor]] = {}
        self._weights: list[tuple[nn.Parameter, int]] = []
        """Where they were when graphs were made."""

    def __call__(
        self, latents: Tensor, timesteps: Tensor, conditions: Tensor, *, plain: bool = False
    ) -> Tensor:
        """Return what the network makes of ``(B, ...)``, ``(B,)`` and ``(B, S, E)``.

        ``plain`` keeps out of code other than Python's, which knows nothing of hooks.
        """
        if plain or self.network._forward_hooks or self.network._forward_pre_hooks:
            return self.run(self.network, latents, timesteps, conditions)
        is_usual = tuple(latents.shape[1:]) == self._shape
        if is_usual and (graph := self._graph_of(len(latents))) is not None:
            return graph(latents, timesteps, conditions)
        if is_usual and self._recorded is not None:
            return self._recorded(latents, timesteps, conditions)
        network = self.network if self._compiled is None else self._compiled
        return self.run(network, latents, timesteps, conditions)

    def compile(self, backend: str | Callable[..., Any]) -> None:
        """Compile the network for any size; takes calls, so that what cannot be compiled is known at once.

        Raises:
            RuntimeError: it cannot be compiled. Calls go on as before.

        """
        self._compiled = torch.compile(self.network.forward, dynamic=True, backend=backend)
        try:
            with torch.inference_mode():
                for rows in (1, 2):  # one row is a case of its own
                    self(*self._example(rows))
        except Exception:
            self._compiled = None
            raise

    def trace(self) -> None:
        """Record the network at the usual size.

        Raises:
            RuntimeError: it cannot be recorded. Calls go on as before.

        """
        self._recorded = RecordedNetwork(self.network, self.run, self._shape, self._condition)

    def graph(self, capture: Capture) -> None:
        """Make graphs of calls of few rows at the usual size.

        Raises:
            RuntimeError: there is no GPU, or a call cannot be captured. Calls go on as before.

        """

        def work(latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
            return self.run(self.network, latents, timesteps, conditions)

        graphs = {}
        with torch.inference_mode():
            for rows in GRAPH_ROWS:
                example = self._example(rows)
                graphs[rows] = capture(work, example)
                wanted = work(*example)
                if not (graphs[rows](*example) - wanted).abs().max() <= ROUNDING * wanted.abs().max():
                    raise RuntimeError(
                        f"the graph of a {type(self.network).__name__} computes something else for {rows} "
                        f"rows"
                    )
        self._weights = [(weight, weight.data_ptr()) for weight in self.network.parameters()]
        self._graphs = graphs

    def _graph_of(self, rows: int) -> Callable[..., Tensor] | None:
        if self._graphs and any(weight.data_ptr() != place for weight, place in self._weights):
            self._graphs = {}
        return self._graphs.get(rows)

    def _example(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rows)
        latents = torch.randn((rows, *self._shape), generator=generator).to(self._condition)
        timesteps = torch.linspace(900, 10, rows, device=latents.device)
        return latents, timesteps, self._condition.expand(rows, *self._condition.shape).contiguous()
