"""Deep features of a U-Net, kept from one denoising step for the next few.

What the inner levels of a U-Net compute changes slowly from step to step. So a request may have them
computed in every n-th step only; in between, the outermost level works with the kept ones.

Source: Ma, Fang and Wang 2023, "DeepCache" (arXiv 2312.00858), section 3.3 with the outermost branch. There
the pipeline is patched; here the same modules are hung into a second, shallow U-Net.

Shape letters in this file:
    R rows   F frames, 1 for a picture   C channels   h, w height and width

Inside a 3-D U-Net the frames of all rows stand one after the other, R * F of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor, nn

from decoders.denoising import Denoising, Predict, step


class DeepFeatures:
    """A U-Net's shallow twin, and what goes into its last level.

    The rows of features may be used by one call of the twin, or by several, one after the other.
    """

    def __init__(self, network: UNet2DConditionModel | UNet3DConditionModel) -> None:
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
        self._last_level: nn.Module = unet.up_blocks[-1]

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Collect the features of each call of the whole U-Net, ``(R, F, C, h, w)``."""
        recorded: list[Tensor] = []
        self._recorded = recorded
        # Only for the time being: a network that was compiled without a hook would be compiled anew for one.
        hook = self._last_level.register_forward_pre_hook(self._on_last_level, with_kwargs=True)
        try:
            yield recorded
        finally:
            hook.remove()
            self._recorded = None

    @property
    def is_recording(self) -> bool:
        """Whether calls of the whole U-Net are listened to."""
        return self._recorded is not None

    def recall(self, features: Tensor) -> None:
        """Give the shallow twin features ``(R, F, C, h, w)`` for as many rows as it will be called with."""
        self._middle.features, self._middle.used = features, 0

    def _on_last_level(self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._recorded is not None:
            features = named["hidden_states"]  # (R * F, C, h, w)
            self._recorded.append(features.unflatten(0, (-1, named.get("num_frames", 1))))


def step_reusing(
    deep: DeepFeatures,
    predict: Predict,
    predict_shallow: Predict,
    runs: Sequence[Denoising],
    every: Sequence[int],
    null: Tensor,
    *,
    halves_apart: bool = False,
) -> None:
    """Take one step of every run, each of which has its deep features computed in every n-th step only.

    Args:
        deep: of the network that ``predict`` runs; ``predict_shallow`` runs its twin.
        predict, runs, null, halves_apart: as in :func:`decoders.denoising.step`.
        every: that n, one per run; 1 computes them always, and keeps none.

    """
    pairs = list(zip(runs, every, strict=True))
    shallow = [run for run, n in pairs if run.done % n and run.kept is not None]
    whole = [(run, n) for run, n in pairs if run not in shallow]
    keeping = [run for run, n in whole if n > 1]
    if keeping:
        with deep.recording() as recorded:
            step(predict, [run for run, _ in whole], null, halves_apart=halves_apart)
        _keep([run for run, _ in whole], keeping, torch.cat(recorded))
    elif whole:
        step(predict, [run for run, _ in whole], null, halves_apart=halves_apart)
    if shallow:
        kept = [run.kept for run in shallow if run.kept is not None]
        deep.recall(torch.cat([guided for guided, _ in kept] + [rows for _, rows in kept]))
        step(predict_shallow, shallow, null, halves_apart=halves_apart)


def _keep(runs: Sequence[Denoising], keeping: Sequence[Denoising], features: Tensor) -> None:
    """Give each run that keeps features its own: those of all guided rows come first, as in ``step``."""
    guided = [len(run.guided) for run in runs]
    parts = features.split([*guided, *(len(run.latents) for run in runs)])
    for place, run in enumerate(runs):
        if run in keeping:
            run.kept = parts[place], parts[len(runs) + place]


class _Kept(nn.Module):
    """Stands in for all inner levels; takes what a 2-D or 3-D U-Net gives to its middle."""

    features: Tensor
    used: int

    def forward(
        self,
        sample: Tensor,
        emb: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        start, self.used = self.used, self.used + len(sample) // num_frames
        return self.features[start : self.used].flatten(0, 1)  # (R * F, C, h, w)


def _twin(module: Any) -> Any:
    """Return a copy that shares all parts, in which parts can be exchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
