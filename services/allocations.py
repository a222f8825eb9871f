"""How many bytes of tensors some work holds at its peak, counted as it runs, on any device.

On the meta device nothing is allocated and nothing is computed, but the count is the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Size, strides and dtype of a tensor."""


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
        self._made: dict[Any, tuple[Shape, ...]] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        made = self._run(func, args, kwargs or {})
        for tensor in _tensors(made):
            if (key := _key(tensor)) not in given and key not in self._sizes:
                self._begin(key, tensor)
        self.most = max(self.most, self.now + _scratch(func.name(), args))
        return made

    def _run(self, func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation; on the meta device, where finding shapes is slow, each one only once."""
        if not _makes_anew(func):
            return func(*args, **kwargs)
        question = (func, _signature(args), _signature(tuple(kwargs.items())))
        if (shapes := self._made.get(question)) is not None:
            again = [
                torch.empty_strided(size, stride, dtype=dtype, device="meta")
                for size, stride, dtype in shapes
            ]
            return again[0] if len(again) == 1 else tuple(again)
        made = func(*args, **kwargs)
        several = made if isinstance(made, tuple) else (made,)
        if all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in several):
            self._made[question] = tuple((one.shape, one.stride(), one.dtype) for one in several)
        return made

    def _begin(self, key: int, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@cache
def _makes_anew(func: OpOverload) -> bool:
    """Whether all that an operation returns is new and it changes nothing, so that only shapes matter."""
    schema = func._schema
    return not schema.is_mutable and all(one.alias_info is None for one in schema.returns)


def _signature(value: Any) -> Any:
    """Return what the shapes of results depend on: 1 and 1.0 are equal, and are not the same."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    return type(value), value


def _scratch(name: str, args: tuple[Any, ...]) -> int:
    """Return the bytes that a kernel takes for itself, as far as is known here."""
    if name.startswith("aten::conv"):
        return int(args[0].nbytes + args[1].nbytes)
    return int(2 * args[0].nbytes) if name.startswith("aten::col2im") else 0


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
