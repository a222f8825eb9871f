"""Looks whether this machine and a preset's weights can run, and says what to do if not."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from services.errors import PresetProblem, ServiceError
from services.fetch import SPARE_BYTES, Step, expected, fetchable, fetching, filled_by
from services.footprint import (
    Box,
    Part,
    boxes_of,
    commands,
    damaged_files,
    faults_of_adapter,
    missing_files,
    needed,
    unfinished_downloads,
)
from services.memory_plan import LEFT_FREE, Plan, fits, plan_for
from services.presets import Preset
from services.weight_files import in_gb

QUANTIZER = "torchao"
OWN_LICENCE = "Apache-2.0"
LIBRARIES = ("torch", "transformers", "diffusers", "peft", "ray", "gradio", "fastapi", "av", "soundfile")
SERVICE_MB = 6000  # what `patchbay serve` takes besides the weights, with all its processes


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str


def expect_files(preset: Preset) -> None:
    """Raise PresetProblem when the weights are not all there, or one of the files is not whole."""
    missing = missing_files(preset)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PresetProblem(
            f"The preset {preset.name!r} lacks {missing[0]}{more}. {_broken_off(preset)}"
            f"{_way_to_files(preset)}",
            code="weights_missing",
        )
    if damaged := damaged_files(preset):
        more = f" ({len(damaged) - 1} more files are damaged.)" if len(damaged) > 1 else ""
        way = f" {_way_to_files(preset)}" if fetchable(preset) else ""
        raise PresetProblem(f"{next(iter(damaged.values()))}{more}{way}", code="weights_invalid")


def _broken_off(preset: Preset) -> str:
    folders = ", ".join(str(folder) for folder in unfinished_downloads(preset))
    return f"A download into {folders} was broken off; the same command goes on with it. " if folders else ""


def _way_to_files(preset: Preset) -> str:
    folder = preset.weights_folder
    if fetchable(preset):
        return f"Download and convert what is missing: `{fetching(preset)}`."
    if preset.origins:
        look = f"patchbay doctor --preset {preset.as_argument}"
        return f"Restore the folder {folder}, or see with `{look}` how to get it."
    if _is_trained_here(preset):
        return f"Restore the folder {folder}, or train it with `patchbay train all --preset {preset.name}`."
    return f"Put it there, or correct the folders in {preset.file}."


def steps_after_fetching(preset: Preset) -> list[str]:
    """Return what to type when all that can be fetched was.

    Raises:
        PresetProblem: something is missing that no origin brings, or is not whole.

    """
    lacking = any(missing_files(preset))
    steps = [step for box in preset.boxes for step in commands(box, preset)] if lacking else []
    if not steps:
        expect_files(preset)
    return steps or [f"patchbay serve --preset {preset.as_argument}"]


def _is_trained_here(preset: Preset) -> bool:
    """Whether the weights are those that `patchbay train all` makes; a copy with other parts has others."""
    return preset.shipped and preset.weights_folder.name == preset.name


def expect_trainable(preset: Preset) -> None:
    """Raise PresetProblem when training would put parts of the toy box in place of weights of others."""
    if origins := preset.origins:
        raise PresetProblem(
            f"The preset {preset.name!r} is made of published weights ({origins[0].model} and "
            f"{len(origins) - 1} more); `patchbay train` makes parts of a toy box from nothing, and would "
            f"put them into {preset.weights_folder}. Train the preset toybox, or a copy of its YAML with "
            "another folder of weights.",
            code="not_trainable",
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


def examine(
    preset: Preset,
    host: str = "127.0.0.1",
    port: int = 8000,
    memory: int | None = None,
    boxes: Sequence[Box] | None = None,
) -> Iterator[Check]:
    """Look at everything, one check after the other; the last ones load the models.

    With ``memory``, bytes of another machine, nothing is loaded. ``boxes`` are those of a survey, if there
    was one.
    """
    boxes = boxes or boxes_of(preset)
    version = ".".join(str(number) for number in sys.version_info[:3])
    yield Check("Python", sys.version_info >= (3, 11), f"{version}; 3.11 or newer is needed")
    quantizes = (QUANTIZER,) if preset.language_model.quantization else ()
    for name in (*LIBRARIES, *quantizes):
        try:
            yield Check(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, "not installed; run `make run`, or pip install -r requirements.lock")
    yield _memory()
    yield _disk(preset, boxes)
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
    for name, adapter in preset.adapters.items():
        faults = faults_of_adapter(preset.weights_folder / adapter.folder)
        yield Check(f"adapter {name}", not faults, "; ".join(faults) or "its files are there")
    room = _room(preset, boxes, memory)
    yield room
    if tight := too_large_for_turns(preset, boxes):
        yield Check("decoders_gb", False, tight)
    elif room.ok and memory is None:
        yield from _load(preset)


def too_large_for_turns(preset: Preset, boxes: Sequence[Box]) -> str | None:
    """Say which decoder is larger than all of them may be together; None if each fits alone."""
    largest = max(boxes, key=lambda box: box.movable)
    if preset.decoders_gb is None or largest.movable <= preset.decoders_gb * 1e9:
        return None
    return (
        f"the {largest.name} takes {in_gb(largest.movable)}, and decoders_gb lets all decoders together take "
        f"{preset.decoders_gb:g} GB. Raise it to {math.ceil(largest.movable / 1e7) / 100:g} or more"
    )


def _disk(preset: Preset, boxes: Sequence[Box]) -> Check:
    place = next(path for path in (preset.weights_folder, *preset.weights_folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    missing = _missing(boxes)
    downloads = expected(preset, missing)
    sized = [step for step in downloads.steps if step.is_sized]
    brought = [part for step in sized for part in filled_by(preset, step.download, missing)]
    as_held = sum(_as_held(part) for part in missing if part not in brought)
    wanted = ""
    if downloads.most_bytes:
        most = in_gb(downloads.most_bytes)
        wanted += f"; downloading and converting what is missing takes up to about {most}"
    if as_held:
        wanted += f"; {in_gb(as_held)} more are for weights that no download of known size brings"
    return Check(
        "disk",
        free > downloads.most_bytes + as_held + SPARE_BYTES,
        f"{in_gb(free)} free in {place}{wanted}",
    )


def _missing(boxes: Sequence[Box]) -> list[Part]:
    return [part for box in boxes for part in box.parts if part.missing]


def _memory() -> Check:
    free = _free_memory()
    if free is None:
        return Check("memory", True, "unknown on this system")
    free_mb = free // 2**20
    return Check(
        "memory",
        free_mb > SERVICE_MB,
        f"{free_mb} MB free; the processes take about {SERVICE_MB} MB, large models not counted",
    )


def _free_memory() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(values["MemAvailable"].split()[0]) * 1024


def room_on(device: str, memory: int | None = None) -> int | None:
    """Return the bytes that are free on ``device``, or ``memory`` if that is given; None if unknown."""
    if memory is not None:
        return memory
    if device == "cpu":
        return _free_memory()
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info(torch.device(device))[0])


def _room(preset: Preset, boxes: Sequence[Box], memory: int | None) -> Check:
    """Say whether all boxes fit, and of which nothing is known."""
    check = fitting(preset.device, needed(preset, boxes), memory)
    unknown = [f"{box.name}: {part.name}" for box in boxes for part in box.parts if part.parameters is None]
    if not unknown:
        return check
    names = ", ".join(unknown)
    return replace(check, detail=f"{check.detail}; not counted, as no sizes are known: {names}")


def fitting(device: str, size: int, memory: int | None = None) -> Check:
    """Say whether ``size`` bytes fit into what is free on ``device``, or into ``memory`` bytes."""
    name, room = f"room on {device}", room_on(device, memory)
    if room is None and device != "cpu":
        return Check(name, False, f"{in_gb(size)} are needed; there is no CUDA device here")
    if room is None:
        return Check(name, True, f"{in_gb(size)} are needed; what is free is unknown on this system")
    there = "free" if memory is None else "given"
    detail = f"{in_gb(size)} are needed, {in_gb(room)} are {there}"
    if not fits(size, room):
        short = size - int(room * (1 - LEFT_FREE))
        detail += f"; {in_gb(short)} are short, with {LEFT_FREE:.0%} left to larger batches and to libraries"
    return Check(name, fits(size, room), detail)


@dataclass(frozen=True)
class Survey:
    """A preset before anything is loaded: its boxes, whether they fit, and what to type next."""

    preset: Preset
    boxes: tuple[Box, ...]
    fits: Check
    next_steps: tuple[str, ...]
    downloads: tuple[Step, ...] = ()
    """What would have to be downloaded, with sizes as far as they are known without asking."""
    plan: Plan | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values; sizes are bytes."""
        return {
            "preset": self.preset.name,
            "device": self.preset.device,
            "boxes": [
                {
                    "name": box.name,
                    "in_memory": box.in_memory,
                    "in_all": box.in_memory + box.adapters + (box.working or 0),
                    "cache": box.cache,
                    "adapters": box.adapters,
                    "working": box.working,
                    "origins": [origin.model_dump() for origin in box.origins],
                    "parts": [
                        {
                            "name": part.name,
                            "parameters": part.parameters,
                            "dtype": part.dtype,
                            "in_memory": part.in_memory,
                            "on_disk": part.on_disk,
                            "download": part.download,
                            "missing": [str(path) for path in part.missing],
                        }
                        for part in box.parts
                    ],
                }
                for box in self.boxes
            ],
            "downloads": [
                {"model": step.origin.model, "bytes": step.bytes_to_come if step.is_sized else None}
                for step in self.downloads
            ],
            "fits": {"ok": self.fits.ok, "detail": self.fits.detail},
            "plan": None
            if self.plan is None
            else {
                "fits": self.plan.fits,
                "needed": self.plan.needed,
                "changes": list(self.plan.words),
            },
            "next": list(self.next_steps),
        }

    def table(self) -> str:
        """Return everything but what to type next as lines of text."""
        rows = [("part", "files", "parameters", "in memory", "as")]
        for box in self.boxes:
            for part in box.parts:
                rows.append(
                    (f"{box.name}: {part.name}", _files(part), *_size(part), part.quantization or part.dtype)
                )
            if box.cache:
                slots = self.preset.language_model.slots
                rows.append((f"{box.name}: cache", "", "", in_gb(box.cache), f"{slots} conversations"))
            if box.adapters:
                rows.append((f"{box.name}: adapters", "", "", in_gb(box.adapters), "those of the allow-list"))
            working = "unknown" if box.working is None else in_gb(box.working)
            rows.append((f"{box.name}: at work", "", "", working, "one thing at a time"))
            whole = box.in_memory + box.adapters + (box.working or 0)
            rows.append((f"{box.name}: in all", "", "", in_gb(whole), ""))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[4]]))
        lines.append(f"{self.fits.name}: {self.fits.detail}.")
        if self.plan is not None:
            lines += [f"to fit: {words}" for words in self.plan.words]
            enough = "which fits" if self.plan.fits else "which is still too much"
            lines.append(f"to fit: then {in_gb(self.plan.needed)} are needed, {enough}")
        lines.append(
            "Counted from shapes, one medium at a time per decoder; each one more takes as much again."
        )
        sizes = {step.origin.model: _to_download(step) for step in self.downloads}
        for box in self.boxes:
            for origin in box.origins:
                lines.append(origin.terms + sizes.get(origin.model, ""))
                if origin.gated:
                    lines.append(f"{origin.model}: gated. Before you download it, {origin.gate}")
        if _is_trained_here(self.preset) and not any(box.origins for box in self.boxes):
            lines.append(f"{self.preset.name}: {OWN_LICENCE}. All of it was trained by this repository")
        for folder, size in unfinished_downloads(self.preset).items():
            lines.append(
                f"broken off: a download into {folder}, of which {in_gb(size)} wait for the rest; the same "
                f"command goes on with it"
            )
        if self.downloads:
            lines.append(_in_all(self.preset, self.downloads))
        return "\n".join(line.rstrip() for line in lines)


def survey(preset: Preset, memory: int | None = None) -> Survey:
    """Look at files, terms and memory, of this machine or of one with ``memory`` bytes. Loads nothing."""
    boxes = tuple(boxes_of(preset))
    check = _room(preset, boxes, memory)
    steps = [fetching(preset)] if fetchable(preset) else []
    steps += [
        step
        for box, setting in zip(boxes, preset.boxes, strict=True)
        if box.missing
        for step in commands(setting, preset)
    ]
    if any(box.missing for box in boxes) and not steps:
        all_of_it = f"patchbay train all --preset {preset.as_argument}"
        steps.append(all_of_it if _is_trained_here(preset) else f"correct the folders in {preset.file}")
    elif not steps and (damaged := damaged_files(preset)):
        steps.append(f"replace what is damaged: {next(iter(damaged.values()))}")
    room, plan, asked = room_on(preset.device, memory), None, f"patchbay doctor --preset {preset.as_argument}"
    if not check.ok and room is not None:
        plan = plan_for(preset, room, _free_memory())
        given = "" if memory is None else f" --memory {memory / 1e9:g}GB"
        if plan.fits:
            steps.append(f"{asked}{given} --write fitted.yaml")
            steps.append("patchbay serve --preset fitted.yaml")
        else:
            steps.append(f"{asked} --table  # and choose a machine with more memory or a smaller preset")
    elif not check.ok:
        steps.append(f"{asked} --memory 24GB  # to see what would fit on a machine with that")
    if tight := too_large_for_turns(preset, boxes):
        steps.append(f"in {preset.file}: {tight}")
    return Survey(
        preset,
        boxes,
        check,
        tuple(steps or [f"patchbay serve --preset {preset.as_argument}"]),
        expected(preset, _missing(boxes)).steps,
        plan,
    )


def _files(part: Part) -> str:
    if not part.missing:
        return f"there, {in_gb(part.on_disk)}"
    files = f"missing, {len(part.missing)} file{'s' if len(part.missing) > 1 else ''}"
    if part.download is not None:
        files += f"; download about {in_gb(part.download)}"
    return (
        files if part.parameters is None else f"{files}; takes {in_gb(_as_held(part))} in {part.dtype} here"
    )


def _to_download(step: Step) -> str:
    if not step.is_sized:
        return "; how much there is to download is not known"
    return f"; {'' if step.download.size_bytes else 'about '}{in_gb(step.bytes_to_come)} to download"


def _in_all(preset: Preset, steps: Sequence[Step]) -> str:
    size = in_gb(sum(step.bytes_to_come for step in steps))
    at_least = "" if all(step.is_sized for step in steps) else " at the least"
    return (
        f"to download: about {size} in all{at_least}, as pages list it or computed from shapes; exact sizes: "
        f"{fetching(preset)} --dry-run"
    )


def _as_held(part: Part) -> int:
    """Return the bytes of weights in the dtype that the box will hold them in, before quantisation."""
    return replace(part, quantization=None, stays=True).in_memory


def _size(part: Part) -> tuple[str, str]:
    if part.parameters is None:
        return "unknown", "unknown"
    if not part.stays:
        return f"{part.parameters:,}", "none"
    return f"{part.parameters:,}", in_gb(part.in_memory)


def _load(preset: Preset) -> Iterator[Check]:
    import tempfile

    from services.artefacts import ArtefactStore
    from services.local_decoder import LocalDecoder, pool_for
    from services.local_encoder import LocalEncoder
    from services.local_language_model import LocalLanguageModel

    with tempfile.TemporaryDirectory(prefix="patchbay-") as folder:
        store, pool = ArtefactStore(Path(folder).as_uri()), pool_for(preset)
        boxes: list[tuple[str, LocalEncoder | LocalLanguageModel | LocalDecoder]] = [
            ("encoder", LocalEncoder(preset, store)),
            ("language model", LocalLanguageModel(preset)),
        ]
        boxes += [
            (f"{modality.value} decoder", LocalDecoder(preset, modality, store, pool))
            for modality in preset.decoders
        ]
        for name, box in boxes:
            try:
                box.load()
                yield Check(name, True, "loads")
            except PresetProblem as error:
                yield Check(name, False, error.message)
