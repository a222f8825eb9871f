"""What optional libraries say when they are imported, and how to keep it from the terminal."""

from __future__ import annotations

import logging

CHATTERERS = ("torchao", "torch.utils._pytree")
"""Loggers that warn of machines that this one is not: transformers imports torchao wherever it is there."""


def hush() -> None:
    """Let these libraries report errors only. Call it in every process, before they are imported."""
    for name in CHATTERERS:
        logging.getLogger(name).setLevel(logging.ERROR)
