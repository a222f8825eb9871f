"""Boxes whose preset says ``compile``: made faster where that can be done, as they are where it cannot."""

from __future__ import annotations

import logging
import time
from typing import Literal, Protocol

logger = logging.getLogger(__name__)

Compile = Literal["trace"] | bool
"""``True`` is torch.compile. ``trace`` records what a network does and repeats it without Python."""


class Compilable(Protocol):
    """An engine or a decoder. Where a method cannot do it, it raises RuntimeError and changes nothing."""

    def compile(self) -> None:
        """Make code for it."""

    def trace(self) -> None:
        """Record it."""


def compile_if_possible(box: str, how: Compile, model: Compilable) -> None:
    """Make the model of a box faster; where that fails, say so and why, and leave it as it is."""
    if not how:
        return
    began = time.monotonic()
    done, way_out = "compiled", "Install a C++ compiler such as g++, or take compile out of the preset."
    if how == "trace":
        done, way_out = "recorded", "Take compile out of the preset."
    try:
        if how == "trace":
            model.trace()
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
