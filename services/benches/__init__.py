"""Measurements, each beside a peer and in one run. One file per bench, with ``run(preset, quick)``."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

from services.errors import BadRequest
from services.presets import Preset

BENCHES = ("decode",)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case: a value of ours and the peer's, in the same unit; more is better."""

    case: str
    value: float
    unit: str
    peer: str
    peer_value: float

    @property
    def ratio(self) -> float:
        """How many times the peer's value ours is."""
        return self.value / self.peer_value


def run_bench(name: str, preset: Preset, quick: bool) -> dict[str, Any]:
    """Run the bench ``name`` and return its rows and the machine they were measured on."""
    if name not in BENCHES:
        raise BadRequest(
            f"There is no bench {name!r}. Choose one of {', '.join(BENCHES)}.", code="unknown_bench"
        )
    rows: list[Row] = importlib.import_module(f"services.benches.{name}").run(preset, quick)
    return {
        "bench": name,
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def table(result: dict[str, Any]) -> str:
    """Return the rows as lines for a terminal."""
    lines = [f"{'case':24} {'ours':>9} {'peer':>9} {'ratio':>6}  unit, peer"]
    lines += [
        f"{row['case']:24} {row['value']:9.3g} {row['peer_value']:9.3g} {row['ratio']:6.2f}  "
        f"{row['unit']}, {row['peer']}"
        for row in result["rows"]
    ]
    about = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    return "\n".join([*lines, f"({about})"])
