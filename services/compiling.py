"""Boxes whose preset says ``compile``: made faster where that can be done, as they are where it cannot."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

logger = logging.getLogger(__name__)

Compile = Literal["trace", "graphs"] | bool
"""``True`` is torch.compile. ``trace`` records what a network does and repeats it without Python; ``graphs``
are CUDA graphs, which a GPU repeats without the CPU."""


class Compilable(Protocol):
    """An engine or a decoder. Where a method cannot do it, it raises RuntimeError and changes nothing."""

    def compile(self) -> None:
        """Make code for it."""

    def trace(self) -> None:
        """Record it."""

    def graph(self, capture: Callable[..., Callable[..., Any]]) -> None:
        """Capture it."""


def compile_if_possible(box: str, how: Compile, model: Compilable) -> None:
    """Make the model of a box faster; where that fails, say so and why, and leave it as it is."""
    if not how:
        return
    began = time.monotonic()
    done, way_out = "compiled", "Install a C++ compiler such as g++, or take compile out of the preset."
    if how is not True:
        done, way_out = {"trace": "recorded", "graphs": "captured"}[how], "Take compile out of the preset."
    try:
        if how == "trace":
            model.trace()
        elif how == "graphs":
            from services.cuda_graphs import capture

            model.graph(capture)
        else:
            model.compile()
    except RuntimeError as error:
        told = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]  # what follows is for developers of torch
        reason = " ".join(told.split()) or type(error).__name__
        logger.warning(
            "The %s could not be %s and runs as it is: %s. %s", box, done, reason.rstrip("."), way_out
        )
    else:
        logger.info("The %s was %s in %.1f s.", box, done, time.monotonic() - began)
