"""Boxes whose preset says ``compile: true``: compiled where that can be done, as they are where it cannot."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


def compile_if_possible(box: str, compile: Callable[[], None]) -> None:
    """Compile the model of a box; where that fails, say so and why, and leave it as it is."""
    began = time.monotonic()
    try:
        compile()
    except RuntimeError as error:
        told = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]  # what follows is for developers of torch
        reason = " ".join(told.split()) or type(error).__name__
        logger.warning(
            "The %s could not be compiled and runs as it is: %s. Install a C++ compiler such as g++, or take "
            "compile out of the preset.",
            box,
            reason.rstrip("."),
        )
    else:
        logger.info("The %s was compiled in %.0f s.", box, time.monotonic() - began)
