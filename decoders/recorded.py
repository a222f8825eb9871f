"""A denoising network that was recorded once and is repeated without Python.

Small networks on a CPU spend a third of their time in Python between the operations, and hold its lock
there, so that two of them in one process wait for each other. A recording does the same operations with
the same weights in memory; results differ by rounding at most.

Shape letters in this file:
    B rows of one call of the network   ... latent shape, channels first   S, E condition tokens and width
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(network, latents ``(B, ...)``, timesteps ``(B,)``, conditions ``(B, S, E)``) -> ``(B, ...)``."""

ROUNDING = 1e-2
"""How much of the largest value may be rounding, in half precision too."""

_ROWS, _CHECKED_ROWS = 3, (1, 2, 4)


class RecordedNetwork:
    """Repeats a network for any number of rows of one latent shape.

    Args:
        network: its weights may be moved later, and are used from where they are.
        run: calls it.
        shape: of the latents of one request.
        condition: ``(S, E)``, any that the network takes; it says dtype and device, too.

    Raises:
        RuntimeError: the network cannot be recorded, or does something else when it is repeated.

    """

    def __init__(self, network: nn.Module, run: Run, shape: tuple[int, ...], condition: Tensor) -> None:
        self.shape = shape
        self._condition = condition
        plain = _Call(network, run).eval()
        try:
            with warnings.catch_warnings(), torch.inference_mode():
                # TorchScript is deprecated for torch.compile, which needs a C++ compiler and takes longer.
                warnings.simplefilter("ignore")
                self._recording: Any = torch.jit.trace(plain, self._example(_ROWS), check_trace=False)
        except Exception as error:
            raise RuntimeError(f"a {type(network).__name__} cannot be recorded: {error}") from error
        with torch.inference_mode():
            for rows in _CHECKED_ROWS:
                example = self._example(rows)
                wanted = plain(*example)
                if not (self(*example) - wanted).abs().max() <= ROUNDING * wanted.abs().max():
                    raise RuntimeError(
                        f"the recording of a {type(network).__name__} computes something else for {rows} rows"
                    )

    def fits(self, latents: Tensor) -> bool:
        """Whether latents ``(B, ...)`` have the shape that was recorded."""
        return tuple(latents.shape[1:]) == self.shape

    def __call__(self, latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """Return what the network would."""
        # Optimising gains nothing here, and the first steps of every batch size would take long.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            predicted: Tensor = self._recording(latents, timesteps, conditions)
        return predicted

    def _example(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rows)
        latents = torch.randn((rows, *self.shape), generator=generator).to(self._condition)
        timesteps = torch.linspace(900, 10, rows, device=latents.device)
        return latents, timesteps, self._condition.expand(rows, *self._condition.shape).contiguous()


class _Call(nn.Module):
    def __init__(self, network: nn.Module, run: Run) -> None:
        super().__init__()
        self.network, self.run = network, run

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        return self.run(self.network, latents, timesteps, conditions)
