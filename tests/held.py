"""How many bytes tensors really hold, whatever they are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def held_bytes(module: nn.Module) -> int:
    """Return the bytes of the storages of all parameters, each storage once."""
    return storage_bytes(module.parameters())


def storage_bytes(tensors: Iterable[Any]) -> int:
    storages = {}
    for tensor in tensors:
        for plain in _plain(tensor.data):
            storage = plain.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _plain(tensor: Any) -> Iterable[torch.Tensor]:
    """Yield the ordinary tensors inside a tensor that is made of others."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain(getattr(tensor, name))
