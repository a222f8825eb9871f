"""``patchbay bench``: speed beside a peer's, in one run on this machine. One file per bench.

A bench is a module here with ``run(preset, quick)``, which returns its rows; its name is a key of
:data:`BENCHES`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from services.presets import Preset

BENCHES: Mapping[str, str] = {"decode": "services.bench.decode", "llm": "services.bench.llm"}


@dataclass(frozen=True)
class BenchRow:
    """One case: our ``value`` and the peer's, in the same unit."""

    case: str
    value: float
    unit: str
    peer: str
    peer_value: float

    @property
    def ratio(self) -> float:
        """How many times the peer's value ours is."""
        return self.value / self.peer_value

    def as_json(self) -> dict[str, Any]:
        """Return the row as ``--json`` prints it, with the ratio of ours to the peer's."""
        return asdict(self) | {"ratio": round(self.ratio, 3)}


def run_bench(name: str, preset: Preset, quick: bool) -> dict[str, Any]:
    """Run one bench; return the object that ``--json`` prints."""
    rows: list[BenchRow] = import_module(BENCHES[name]).run(preset, quick)
    return {"bench": name, "rows": [row.as_json() for row in rows], "machine": machine()}


def machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
    import torch

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average_1min": load,
    }


def table(result: Mapping[str, Any]) -> str:
    """Return a result as a Markdown table."""
    lines = ["| case | ours | peer's | unit | ratio | peer |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['case']} | {row['value']:g} | {row['peer_value']:g} | {row['unit']} | {row['ratio']:.2f} "
        f"| {row['peer']} |"
        for row in result["rows"]
    ]
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    return "\n".join([*lines, f"\n{facts}"])
