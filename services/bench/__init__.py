"""``patchbay bench``: speed beside a peer's, in one run on this machine. One file per bench.

A bench is a module here with ``run(preset, quick)``, which returns its rows; its name is a key of
:data:`BENCHES`. :mod:`services.bench.service` has no peer but the values that this project wants to keep.
:mod:`services.bench.full_size` is none of them: it needs no preset.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from services.errors import PresetProblem
from services.presets import Preset

GPUS = ("h200", "h100", "a100", "l40s", "l4")
"""Whose limits ``--full-size`` can name without having one; see :mod:`services.bench.forward_work`."""

BENCHES: Mapping[str, str] = {
    name: f"services.bench.{name}" for name in ("compile", "decode", "llm", "service", "turn")
}


@dataclass(frozen=True)
class BenchRow:
    """One case: our ``value`` and the peer's, in the same unit; ``details`` are figures beside it."""

    case: str
    value: float
    unit: str
    peer: str
    peer_value: float
    details: Mapping[str, float] | None = None

    @property
    def ratio(self) -> float:
        """How many times the peer's value ours is."""
        return self.value / self.peer_value

    def as_json(self) -> dict[str, Any]:
        """Return the row as ``--json`` prints it, with the ratio of ours to the peer's."""
        row = asdict(self) | {"ratio": round(self.ratio, 3)}
        return {name: value for name, value in row.items() if value is not None}


def run_bench(name: str, preset: Preset, quick: bool) -> dict[str, Any]:
    """Run one bench; return the object that ``--json`` prints.

    On a CPU, both sides have one thread, as a replica of ``patchbay serve`` has. The load of the machine is
    told as it was before the bench and as it is after it.
    """
    import torch

    before = _load_average()

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    rows: list[BenchRow] = import_module(BENCHES[name]).run(preset, quick)
    result = result_of(name, rows)
    result["machine"]["load_average_1min_before"] = before
    return result


def run_service(url: str, quick: bool) -> dict[str, Any]:
    """Ask a service that runs already; what it takes to start, and its memory, is not measured."""
    from services.bench import service

    return result_of("service", service.measure(url, quick))


def run_full_size(quick: bool, dry: bool, gpu: str, folder: Path | None = None) -> dict[str, Any]:
    """Measure models of the paper's sizes on this machine's GPU; without one, or if ``dry``, count only.

    With ``folder``, random weights are written there and read back.

    Raises:
        PresetProblem: there is a folder and nothing to write there.

    """
    import torch

    from services.bench import forward_work, full_size

    device = "cuda" if torch.cuda.is_available() and not dry else None
    if device is None and folder is not None:
        why = "--dry was given" if dry else "there is no CUDA device here"
        raise PresetProblem(
            f"--weights is {folder}, and {why}: models without numbers have no weights to write there. Leave "
            f"--weights out, or run this on a machine with a GPU.",
            code="nothing_to_write",
        )
    result = result_of("full-size", full_size.run(device, quick, gpu, folder=folder))
    if device is None:
        result["machine"]["counted_for"] = forward_work.GPUS[gpu].name
    return result


def result_of(name: str, rows: Sequence[BenchRow]) -> dict[str, Any]:
    """Return the object that ``--json`` prints."""
    return {"bench": name, "rows": [row.as_json() for row in rows], "machine": machine()}


def machine() -> dict[str, Any]:
    """Say what the figures were measured on, and with what."""
    import torch

    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "diffusers": version("diffusers"),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average_1min": _load_average(),
    }


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def table(result: Mapping[str, Any]) -> str:
    """Return a result as a Markdown table."""
    extra = list(dict.fromkeys(name for row in result["rows"] for name in row.get("details", {})))
    heads = ["case", "ours", "peer's", "unit", "ratio", "peer", *extra]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        cells = [row["case"], _figure(row["value"]), _figure(row["peer_value"]), row["unit"]]
        cells += [f"{row['ratio']:.2f}", row["peer"]]
        details = row.get("details", {})
        cells += [_figure(details[name]) if name in details else "" for name in extra]
        lines.append(f"| {' | '.join(cells)} |")
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    return "\n".join([*lines, f"\n{facts}"])


def _figure(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def write_tables(folder: Path) -> list[str]:
    """Put the table of every ``NAME.json`` in ``folder`` into its README.md, between two comments.

    The comments are ``<!-- NAME.json -->`` and ``<!-- end -->``. Returns the names of the files shown.

    Raises:
        ValueError: there is no README.md, or a comment in it names a file that is not there.

    """
    page = folder / "README.md"
    if not page.is_file():
        raise ValueError(f"{page} is missing; expected a page with comments like <!-- llm.json -->.")
    shown: list[str] = []

    def filled(found: re.Match[str]) -> str:
        path = folder / found[1]
        if not path.is_file():
            raise ValueError(f"{page} names {found[1]}, which is not in {folder}. Run that bench first.")
        shown.append(found[1])
        return f"<!-- {found[1]} -->\n{table(json.loads(path.read_text()))}\n<!-- end -->"

    page.write_text(
        re.sub(r"<!-- (\S+\.json) -->\n.*?<!-- end -->", filled, page.read_text(), flags=re.DOTALL)
    )
    return shown
