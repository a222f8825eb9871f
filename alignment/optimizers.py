"""The optimiser of a training run: AdamW for all, or Muon for what is a matrix and AdamW for the rest.

Muon takes steps of orthogonal matrices, in which all directions of a layer move alike (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon). Here it needs a fifth of AdamW's steps, see docs/log.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm.model import SignalRows

TABLES = (nn.Embedding, SignalRows)
"""Their rows are looked up, each for its own token: matrices in shape alone, and left to AdamW."""
LEAST_SIDE = 32
"""A matrix with a shorter side than this is left to AdamW: its few rows are features of their own."""


class Optimizer:
    """Several optimisers that step as one, each with its parameters.

    Muon sees a convolution's kernel ``(out, in, ...)`` as the matrix ``(out, in * ...)`` that it is.

    Args:
        module: whose parameters are trained, those that require gradients.
        learning_rate: the base rate; see :meth:`set_rate`.
        factors: of the rate, by the beginning of a parameter's name; 1 where none matches.
        muon: let Muon train the matrices, with updates of the size that AdamW's have.
        betas, weight_decay: of AdamW; Muon takes the latter too.

    """

    def __init__(
        self,
        module: nn.Module,
        *,
        learning_rate: float,
        factors: Mapping[str, float],
        muon: bool,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        tables = {
            id(row) for part in module.modules() if isinstance(part, TABLES) for row in part.parameters()
        }
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                matches = [factor for prefix, factor in factors.items() if name.startswith(prefix)]
                is_matrix = muon and id(parameter) not in tables and _is_matrix(parameter)
                groups.setdefault((is_matrix, matches[0] if matches else 1.0), []).append(parameter)
        self._views: list[tuple[nn.Parameter, nn.Parameter]] = []
        plain, matrices = [], []
        for (is_matrix, factor), parameters in groups.items():
            if is_matrix:
                matrices.append({"params": [self._view(p) for p in parameters], "factor": factor})
            else:
                plain.append({"params": parameters, "factor": factor})
        self.parts: list[torch.optim.Optimizer] = []
        if plain:
            self.parts.append(
                torch.optim.AdamW(plain, lr=learning_rate, betas=betas, weight_decay=weight_decay)
            )
        if matrices:
            self.parts.append(
                torch.optim.Muon(
                    matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )

    def _view(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.ndim == 2:
            return parameter
        view = nn.Parameter(parameter.detach().view(len(parameter), -1))  # shares its memory
        self._views.append((parameter, view))
        return view

    def set_rate(self, rate: float) -> None:
        """Set the base rate of the next step."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate * group["factor"]

    def step(self) -> None:
        """Take a step along the gradients, and forget them."""
        for parameter, view in self._views:
            view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)
        for parameter, _ in self._views:
            parameter.grad = None

    def state(self) -> list[dict[str, Any]]:
        """Return what :meth:`restore` needs to go on."""
        return [part.state_dict() for part in self.parts]

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from a state of the same parameters and options.

        Raises:
            ValueError: it is of other optimisers.

        """
        if len(states) != len(self.parts):
            raise ValueError(
                f"The checkpoint is of {len(states)} optimisers, and this run has {len(self.parts)}. "
                f"It is of another recipe: remove the folder or choose another run name."
            )
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def _is_matrix(parameter: Tensor) -> bool:
    if parameter.ndim < 2:
        return False
    rows = len(parameter)
    return min(rows, parameter.numel() // rows) >= LEAST_SIDE
