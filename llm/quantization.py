"""Weights of the base in 8 or 4 bits, by torchao, and how many bytes that makes.

Only the weights of linear layers inside the base are replaced; embeddings, the head, norms, biases and the
bridge stay as they are. Weights are made whole again for each product, so that states keep their dtype.

``int8``  a scale per row, symmetric
``nf4``   blocks of 64 that share a scale, of 16 levels (Dettmers et al. 2023, arXiv 2305.14314, section 3)
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm.adapters import is_adapter_name

Quantization = Literal["int8", "nf4"]

BLOCK = 64
SCALES_PER_BLOCK = 256  # scales of NF4 are themselves quantised, in blocks of so many at most
LIBRARY = "torchao"


def quantize(base: PreTrainedModel, kind: Quantization, device: torch.device | str = "cpu") -> None:
    """Replace the weights of ``base`` in place, one at a time, each on ``device``.

    Merge LoRA first: what is added to quantised weights is lost in their steps.

    Raises:
        ValueError: torchao is not installed.

    """
    library = _library(kind)
    for _, linear in quantizable(base):
        weight = linear.weight.detach().to(device)
        linear.weight = nn.Parameter(_quantized(weight, kind, library), requires_grad=False)
    base.to(device)  # type: ignore[arg-type]


def quantizable(base: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name and module of every linear layer whose weight :func:`quantize` replaces."""
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if (
            isinstance(module, nn.Linear)
            and module is not head
            and not is_adapter_name(name)
            and module.weight.numel() % BLOCK == 0
        ):
            yield name, module


def quantized_bytes(rows: int, columns: int, kind: Quantization, dtype_bytes: int) -> int:
    """Return the bytes of a quantised weight ``(rows, columns)`` of a dtype of so many bytes."""
    if kind == "int8":
        return rows * columns + 5 * rows  # a float32 scale and an int8 zero point
    blocks = rows * columns // BLOCK
    factors = blocks // _scales_per_block(blocks)
    return rows * columns // 2 + blocks + (factors + 1 + 16) * dtype_bytes  # a mean and 16 levels


def whole_again_bytes(rows: int, columns: int, kind: Quantization, dtype_bytes: int) -> int:
    """Return about how many bytes a product with a quantised weight takes to make the weight whole again."""
    each = dtype_bytes if kind == "int8" else 2 * dtype_bytes + 2  # nf4: levels are looked up, then scaled
    return rows * columns * each


def is_installed() -> bool:
    """Whether the library that quantises is there."""
    return importlib.util.find_spec(LIBRARY) is not None


def _library(kind: str) -> Any:
    if not is_installed():
        raise ValueError(
            f"quantization is {kind!r}, which needs {LIBRARY}, and that is not installed. Install it with "
            f"`pip install -r requirements.lock`, or take quantization out of the preset."
        )
    return importlib.import_module(f"{LIBRARY}.quantization")


def _quantized(weight: Tensor, kind: Quantization, library: Any) -> Tensor:
    made: Any
    if kind == "int8":
        made = library.Int8Tensor.from_hp(weight, granularity=library.PerRow())
    else:
        blocks = weight.numel() // BLOCK
        made = library.NF4Tensor.from_tensor(weight.contiguous(), BLOCK, _scales_per_block(blocks))
        # A view of a value per block, which would keep them all: a sixteenth of the whole weight.
        made.quantization_factor = made.quantization_factor.clone()
    quantized: Tensor = made
    return quantized


def _scales_per_block(blocks: int) -> int:
    """Return the largest power of two up to 256 that divides the number of blocks."""
    size = SCALES_PER_BLOCK
    while blocks % size:
        size //= 2
    return size
