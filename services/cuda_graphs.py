"""CUDA graphs: what a network asks of a GPU is captured once, and asked for again at one go.

A small batch keeps a GPU busy for less time than Python needs to ask for its operations one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UPS = 2
"""Calls before the capture, in which libraries choose their ways and take their memory."""


def capture(work: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Return a function that repeats ``work`` for other tensors of the shapes of ``inputs``.

    Whatever else ``work`` uses must stay where it is in memory. The function is for one thread at a time, and
    its result is the caller's own.

    Raises:
        RuntimeError: the inputs are not on a GPU of NVIDIA, or ``work`` does what cannot be captured.

    """
    device = inputs[0].device
    if device.type != "cuda":
        raise RuntimeError(f"CUDA graphs are for an NVIDIA GPU, and the network is on the {device.type}")
    with torch.cuda.device(device):
        kept = [tensor.clone() for tensor in inputs]
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work(*kept)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other boxes go on meanwhile
            output = work(*kept)

    def replay(*given: Tensor) -> Tensor:
        for ours, theirs in zip(kept, given, strict=True):
            ours.copy_(theirs)
        graph.replay()
        return output.clone()

    return replay
