"""How a decoder saves memory where there is not enough of it."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import torch
from torch import nn


class Thrift(IntEnum):
    """How far a decoder goes; each level holds those before it.

    ``SLICED`` takes the halves of guidance, and pictures in the VAE, one after the other. ``SPARSE`` cuts
    what is large into tiles in the VAE, which shows a little where tiles meet, and keeps the networks
    that do not work in main memory.
    """

    NONE = 0
    SLICED = 1
    SPARSE = 2


@contextmanager
def aside(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Keep networks in main memory while others work, and bring them back to ``device``."""
    if not networks:
        yield
        return
    for network in networks:
        network.to("cpu")
    release(device)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that did not fit
        release(device)
        raise
    finally:
        for network in networks:
            network.to(device)


def release(device: torch.device) -> None:
    """Let go of what the allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
