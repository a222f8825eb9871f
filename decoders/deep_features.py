"""Deep features of a U-Net, kept from one denoising step for the next few.

What the inner levels of a U-Net compute changes slowly from step to step. So a request may have them
computed in every n-th step only; in between, the outermost level works with the kept ones.

Source: Ma, Fang and Wang 2023, "DeepCache" (arXiv 2312.00858), section 3.3 with the outermost branch. There
the pipeline is patched; here the same modules are hung into a second, shallow U-Net.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn


class DeepFeatures:
    """A U-Net's shallow twin, and what goes into its last level.

    The rows of features may be used by one call of the twin, or by several, one after the other.
    """

    def __init__(self, network: UNet2DConditionModel) -> None:
        """Build the twin of a U-Net of two levels or more; it shares all weights."""
        unet: Any = network
        if len(unet.up_blocks) < 2:
            raise ValueError("This decoder's U-Net has one level only: it has no deep features to reuse.")
        self._recorded: list[Tensor] | None = None
        self._middle = _Kept()
        first = _twin(unet.down_blocks[0])
        first._modules["downsamplers"] = None
        shallow = _twin(unet)
        shallow._modules |= {
            "down_blocks": nn.ModuleList([first]),
            "mid_block": self._middle,
            "up_blocks": nn.ModuleList([unet.up_blocks[-1]]),
        }
        self.shallow = shallow
        """Called like the U-Net, after :meth:`recall`."""
        unet.up_blocks[-1].register_forward_pre_hook(self._on_last_level, with_kwargs=True)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Collect the features of each call of the whole U-Net, ``(rows, channels, h, w)``."""
        recorded: list[Tensor] = []
        self._recorded = recorded
        try:
            yield recorded
        finally:
            self._recorded = None

    def recall(self, features: Tensor) -> None:
        """Give the shallow twin features for as many rows as it will be called with."""
        self._middle.features, self._middle.used = features, 0

    def _on_last_level(self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._recorded is not None:
            self._recorded.append(named["hidden_states"])


class _Kept(nn.Module):
    """Stands in for all inner levels."""

    features: Tensor
    used: int

    def forward(self, sample: Tensor, emb: Tensor) -> Tensor:
        start, self.used = self.used, self.used + len(sample)
        return self.features[start : self.used]


def _twin(module: Any) -> Any:
    """Return a copy that shares all parts, in which parts can be exchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
