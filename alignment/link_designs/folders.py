"""Where the designs of a run lie."""

from __future__ import annotations

from pathlib import Path

NULLS_FILE = "nulls.safetensors"
"""In the folder of a design that has learned what decoders guide away from: ``(Q, E)`` by modality."""


def home(run: Path) -> Path:
    """Return the folder of all designs of a run."""
    return run / "link-designs"


def step_name(design: str, seed: int) -> str:
    """Return the name of a design with a seed, as a step of training and as a folder."""
    return f"{design.replace(',', '').replace(' ', '-')}-seed-{seed}"


def folder_of(run: Path, design: str, seed: int) -> Path:
    """Return where a design of a run lies."""
    return home(run) / step_name(design, seed)
