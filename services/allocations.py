"""How many bytes of tensors some work holds at its peak, counted as it runs, on any device.

On the meta device nothing is allocated and nothing is computed, but the count is the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], object]) -> int:
    """Run ``work`` without gradients; return the most bytes of new tensors that it held at a time.

    What kernels take for themselves is not seen, but for two: those of convolutions bring input and weight
    into an order of their own, and the one that lays pieces over each other copies them twice.
    """
    counting = _Allocations()
    with torch.inference_mode(), counting:
        work()
    return counting.most


class _Allocations(TorchDispatchMode):
    """Follows the storages that operations make, from their making to the end of their last tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            if (key := _key(tensor)) not in given and key not in self._sizes:
                self._begin(key, tensor)
        self.most = max(self.most, self.now + _scratch(func.name(), args))
        return made

    def _begin(self, key: int, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _scratch(name: str, args: tuple[Any, ...]) -> int:
    """Return the bytes that a kernel takes for itself, as far as is known here."""
    if name.startswith("aten::conv"):
        return int(args[0].nbytes + args[1].nbytes)
    return int(2 * args[0].nbytes) if name.startswith("aten::col2im") else 0


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
