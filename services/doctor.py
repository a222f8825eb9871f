"""Looks whether this machine and a preset's weights can run, and says what to do if not."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.errors import PresetProblem, ServiceError
from services.footprint import BYTES, Box, Part, boxes_of, commands, missing_files
from services.presets import BoxPreset, Preset

LIBRARIES = ("torch", "transformers", "diffusers", "peft", "ray", "gradio", "fastapi", "av", "soundfile")
SERVICE_MB = 6000  # what `patchbay serve` takes besides the weights, with all its processes


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str


def expect_files(preset: Preset) -> None:
    """Raise PresetProblem when the weights are not all there."""
    missing = missing_files(preset)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        way = f"or train it with `patchbay train all --preset {preset.name}`"
        if preset.encoder.origins or preset.language_model.origins:
            way = f"or see with `patchbay doctor --preset {preset.name}` how to get it"
        raise PresetProblem(
            f"The preset {preset.name!r} lacks {missing[0]}{more}. Restore the folder "
            f"{preset.weights_folder}, {way}.",
            code="weights_missing",
        )


def expect_free_port(host: str, port: int) -> None:
    """Raise PresetProblem when another program listens on the port, or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PresetProblem(
                f"Cannot listen on {host}:{port}: {error.strerror}. Stop the program that uses it, or "
                f"choose another with --port.",
                code="port_in_use",
            ) from error


def examine(preset: Preset, host: str = "127.0.0.1", port: int = 8000) -> Iterator[Check]:
    """Look at everything, one check after the other; the last ones load the models."""
    version = ".".join(str(number) for number in sys.version_info[:3])
    yield Check("Python", sys.version_info >= (3, 11), f"{version}; 3.11 or newer is needed")
    for name in LIBRARIES:
        try:
            yield Check(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, "not installed; run `make run`, or pip install -r requirements.lock")
    yield _memory()
    free_mb = shutil.disk_usage(preset.file.parent).free // 2**20
    yield Check("disk", free_mb > 500, f"{free_mb} MB free")
    try:
        expect_free_port(host, port)
        yield Check("port", True, f"{host}:{port} is free")
    except ServiceError as error:
        yield Check("port", False, error.message)
    try:
        expect_files(preset)
        yield Check("weights", True, str(preset.weights_folder))
    except ServiceError as error:
        yield Check("weights", False, error.message)
        return
    fits = fitting(preset.device, sum(box.in_memory for box in boxes_of(preset)))
    yield fits
    if fits.ok:
        yield from _load(preset)


def _memory() -> Check:
    free = _free_memory()
    if free is None:
        return Check("memory", True, "unknown on this system")
    free_mb = free // 2**20
    return Check("memory", free_mb > SERVICE_MB, f"{free_mb} MB free; serving takes about {SERVICE_MB} MB")


def _free_memory() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(values["MemAvailable"].split()[0]) * 1024


def fitting(device: str, needed: int) -> Check:
    """Say whether ``needed`` bytes of weights fit into what is free on ``device``."""
    name, free = f"room on {device}", _free_memory()
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            return Check(name, False, f"{_gb(needed)} are needed; there is no CUDA device here")
        free = torch.cuda.mem_get_info(torch.device(device))[0]
    if free is None:
        return Check(name, True, f"{_gb(needed)} are needed; what is free is unknown on this system")
    detail = f"{_gb(needed)} are needed for weights and caches, {_gb(free)} are free"
    if needed > free:
        detail += f"; {_gb(needed - free)} are short, and nothing is offloaded or quantised by itself"
    return Check(name, needed <= free, detail)


@dataclass(frozen=True)
class Survey:
    """A preset before anything is loaded: its boxes, whether they fit, and what to type next."""

    preset: Preset
    boxes: tuple[Box, ...]
    fits: Check
    next_steps: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; sizes are bytes."""
        return {
            "preset": self.preset.name,
            "device": self.preset.device,
            "boxes": [
                {
                    "name": box.name,
                    "in_memory": box.in_memory,
                    "cache": box.cache,
                    "origins": [origin.model_dump() for origin in box.origins],
                    "parts": [
                        {
                            "name": part.name,
                            "parameters": part.parameters,
                            "dtype": part.dtype,
                            "in_memory": part.in_memory,
                            "on_disk": part.on_disk,
                            "missing": [str(path) for path in part.missing],
                        }
                        for part in box.parts
                    ],
                }
                for box in self.boxes
            ],
            "fits": {"ok": self.fits.ok, "detail": self.fits.detail},
            "next": list(self.next_steps),
        }

    def table(self) -> str:
        """Return everything as lines of text."""
        rows = [("part", "files", "parameters", "in memory", "as")]
        for box in self.boxes:
            for part in box.parts:
                rows.append((f"{box.name}: {part.name}", _files(part), *_size(part), part.dtype))
            if box.cache:
                rows.append((f"{box.name}: cache", "", "", _gb(box.cache), "full context"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[4]]))
        lines.append(f"{self.fits.name}: {self.fits.detail}.")
        lines.append("What a request needs while it is made comes on top.")
        for box in self.boxes:
            for origin in box.origins:
                use = "" if origin.commercial else "; NOT for commercial use"
                lines.append(f"{origin.model}: {origin.licence}{use}. From {origin.source}")
        lines += [f"next: {step}" for step in self.next_steps]
        return "\n".join(line.rstrip() for line in lines)


def survey(preset: Preset) -> Survey:
    """Look at files, terms and memory. Loads nothing."""
    boxes = tuple(boxes_of(preset))
    fits = fitting(preset.device, sum(box.in_memory for box in boxes))
    settings: list[BoxPreset] = [preset.encoder, preset.language_model, *preset.decoders.values()]
    steps = [
        step
        for box, setting in zip(boxes, settings, strict=True)
        if box.missing
        for step in commands(setting, preset)
    ]
    if any(box.missing for box in boxes) and not steps:
        steps.append(f"patchbay train all --preset {preset.name}")
    if not fits.ok:
        steps.append(_way_out(preset, boxes))
    return Survey(preset, boxes, fits, tuple(steps or [f"patchbay serve --preset {preset.name}"]))


def _way_out(preset: Preset, boxes: tuple[Box, ...]) -> str:
    in_half = sum(min(BYTES[part.dtype], 2) * (part.parameters or 0) for box in boxes for part in box.parts)
    return (
        f"copy {preset.file.name} and, in the copy, name another device, leave decoders out, or give boxes "
        f"the dtype bfloat16 (with it in all of them the weights take {_gb(in_half)})"
    )


def _files(part: Part) -> str:
    if not part.missing:
        return f"there, {_gb(part.on_disk)}"
    return f"missing, {len(part.missing)} file{'s' if len(part.missing) > 1 else ''}"


def _size(part: Part) -> tuple[str, str]:
    if part.parameters is None:
        return "unknown", "unknown"
    return f"{part.parameters:,}", _gb(part.in_memory)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _load(preset: Preset) -> Iterator[Check]:
    import tempfile

    from services.artefacts import ArtefactStore
    from services.local_decoder import LocalDecoder
    from services.local_encoder import LocalEncoder
    from services.local_language_model import LocalLanguageModel

    with tempfile.TemporaryDirectory(prefix="patchbay-") as folder:
        store = ArtefactStore(Path(folder).as_uri())
        boxes: list[tuple[str, LocalEncoder | LocalLanguageModel | LocalDecoder]] = [
            ("encoder", LocalEncoder(preset, store)),
            ("language model", LocalLanguageModel(preset)),
        ]
        boxes += [
            (f"{modality.value} decoder", LocalDecoder(preset, modality, store))
            for modality in preset.decoders
        ]
        for name, box in boxes:
            try:
                box.load()
                yield Check(name, True, "loads")
            except PresetProblem as error:
                yield Check(name, False, error.message)
