"""What boxes of full size take in memory, and how long they take to get there, beside what was computed.

The memory of each box is what its weights and, of the language model, full caches take, and what it needs
besides while it makes one thing: the prediction of ``patchbay doctor`` beside what PyTorch's allocator gave
out.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from decoders.settings import DecodeSettings
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Modality
from llm.engine import Engine
from llm.model import LanguageModel
from llm.reply import GenerationOptions
from llm.template import Message
from services.bench import BenchRow
from services.bench.forward_work import Device
from services.bench.full_size_models import BoxKind, BuiltDecoder, Sizes, box_kinds, media_to_read
from services.errors import PresetProblem
from services.footprint import Box, boxes_of, needed
from services.presets import Preset
from services.weight_files import in_gb

PREDICTED = "doctor's prediction"
LINK, WRITTEN = "the link from the host", "its memory written once"

T = TypeVar("T")


@dataclass(frozen=True)
class Taken:
    """Bytes of a device: ``held`` stay when some work is done, ``most`` were taken at a time meanwhile.

    ``seconds`` is how long it took, on the CPU with a profiler that makes it slower.
    """

    held: int
    most: int
    seconds: float


def taken(device: str, work: Callable[[], T]) -> tuple[T, Taken]:
    """Do some work; return its result, and what PyTorch's allocator gave out for it.

    On the CPU that is what this thread asked for.
    """
    gc.collect()
    if torch.device(device).type == "cpu":
        return _taken_on_the_cpu(work)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    made = work()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    after, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return made, Taken(after - before, peak - before, seconds)


def _taken_on_the_cpu(work: Callable[[], T]) -> tuple[T, Taken]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        began = time.perf_counter()
        made = work()
        seconds = time.perf_counter() - began
    recorded: Any = profiler.profiler
    events = sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns())
    now = most = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return made, Taken(now, most, seconds)


# --- counted ----------------------------------------------------------------------------------------


def predicted_rows(sizes: Sizes, gpu: Device) -> list[BenchRow]:
    """Say what each box and all of them take, beside the memory of ``gpu``, and how fast it can be there."""
    assert gpu.memory_bytes is not None
    gpu_gb = gpu.memory_bytes / 1e9
    preset = sizes.asked_of_doctor("cuda")
    boxes = boxes_of(preset)
    whole = f"what an {gpu.name} has"
    rows: list[BenchRow] = []

    def row(name: str, value: float, weights: float, caches: float, at_work: float) -> None:
        details = {"weights GB": weights, "caches GB": caches, "at work GB": at_work}
        shown = {name: size for name, size in details.items() if size}
        rows.append(_memory_row(name, value, whole, gpu_gb, shown))

    for box in boxes:
        weights, caches, at_work = box.in_memory - box.cache, box.cache, box.working or 0
        row(box.name, *(size / 1e9 for size in (weights + caches + at_work, weights, caches, at_work)))
    together, busy = _together(preset, boxes)
    row("all resident", together, 0, 0, 0)
    row("all at work", busy, 0, 0, busy - together)
    for box in boxes:
        size = box.in_memory - box.cache
        linked, written = size / gpu.link_bytes_per_s, size / gpu.bytes_per_s
        rows.append(_load_row(box.name, "moved", linked, f"s over {LINK}", WRITTEN, written, size))
    return rows


def _together(preset: Preset, boxes: Sequence[Box]) -> tuple[float, float]:
    """Return the gigabytes that boxes hold together, and what they take when all of them work."""
    return sum(box.in_memory for box in boxes) / 1e9, needed(preset, boxes) / 1e9


def _memory_row(
    name: str, value: float, peer: str, peer_value: float, details: dict[str, float] | None = None
) -> BenchRow:
    return BenchRow(f"memory, {name}", value, "GB", peer, peer_value, details)


def _load_row(
    name: str, how: str, value: float, unit: str, peer: str, peer_value: float, size: float
) -> BenchRow:
    return BenchRow(f"load, {name}, {how}", value, unit, peer, peer_value, {"weights GB": size / 1e9})


# --- measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resident:
    """All boxes of full size in one device's memory, the language model with full caches."""

    encoder: ImageBindEncoder
    speaker: Engine
    decoders: dict[Modality, BuiltDecoder]
    preset: Preset
    boxes: Sequence[Box]
    held: int


def resident_rows(
    sizes: Sizes, device: str, limit: Device, folder: Path | None
) -> tuple[Resident, list[BenchRow]]:
    """Build all boxes, one after the other; return them, and what each took: time, and memory at work too.

    Each is moved to the host's memory and back, which is what a decoder does that waits there. With
    ``folder`` it is written there first, and read back from it.

    Raises:
        PresetProblem: the folder is not empty, or the disk too small.

    """
    preset = sizes.asked_of_doctor(device)
    boxes, kinds = boxes_of(preset), box_kinds(sizes)
    if folder is not None:
        expect_room(folder, boxes)
    memory: list[BenchRow] = []
    loads: list[BenchRow] = []
    built: dict[str, Any] = {}
    held = 0
    for box, kind in zip(boxes, kinds, strict=True):
        size = box.in_memory - box.cache
        made, weights = taken(device, partial(kind.build, sizes, device))
        loads.append(
            _load_row(
                box.name, "built", weights.seconds, "s", WRITTEN, size / limit.bytes_per_s, weights.held
            )
        )
        least = size / limit.link_bytes_per_s
        loads.append(_load_row(box.name, "moved", _move(kind, made, device), "s", LINK, least, weights.held))
        if folder is not None:
            kind.write(made, folder)
            seconds = _read(kind, sizes, folder, device)
            loads.append(_load_row(box.name, "read", seconds, "s", LINK, least, weights.held))
        used, at_work = _used(made, sizes, preset, box, device)
        value = weights.held + at_work.most
        expected = box.in_memory + (box.working or 0)
        details = {"weights GB": weights.held / 1e9, "at work GB": at_work.most / 1e9}
        if box.cache:
            details = {"weights GB": weights.held / 1e9, "caches GB": at_work.held / 1e9}
            details["at work GB"] = (at_work.most - at_work.held) / 1e9
        memory.append(_memory_row(box.name, value / 1e9, PREDICTED, expected / 1e9, details))
        built[box.name], held = used, held + weights.held + at_work.held
    together, _ = _together(preset, boxes)
    memory.append(_memory_row("all resident", held / 1e9, PREDICTED, together))
    decoders = {m: built[f"{m.value} decoder"] for m in preset.decoders}
    resident = Resident(built["encoder"], built["language model"], decoders, preset, boxes, held)
    return resident, [*memory, *loads]


def together_row(resident: Resident, turn: Taken) -> BenchRow:
    """Hold what all boxes took during a turn against what they need when all of them work."""
    _, predicted = _together(resident.preset, resident.boxes)
    value = (resident.held + turn.most) / 1e9
    return _memory_row("all at work", value, PREDICTED, predicted, {"at work GB": turn.most / 1e9})


def expect_room(folder: Path, boxes: Sequence[Box]) -> None:
    """Raise PresetProblem unless ``folder`` is empty, or can be made, and what boxes weigh fits there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PresetProblem(
            f"{folder} is not an empty folder; expected one, or none, as random weights are written there. "
            f"Name another with --weights.",
            code="folder_not_empty",
        )
    size = sum(box.in_memory - box.cache for box in boxes)
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise PresetProblem(
            f"{in_gb(free)} are free in {place}; the random weights take {in_gb(size)} there. Make room, or "
            f"name a folder on another disk with --weights.",
            code="disk_full",
        )
    folder.mkdir(parents=True, exist_ok=True)


def _move(kind: BoxKind, built: Any, device: str) -> float:
    """Return the seconds from the host's memory to the device's."""
    for network in kind.networks(built):
        network.to("cpu")
    settle(device)
    began = time.perf_counter()
    for network in kind.networks(built):
        network.to(device)
    settle(device)
    return time.perf_counter() - began


def _read(kind: BoxKind, sizes: Sizes, folder: Path, device: str) -> float:
    began = time.perf_counter()
    kind.read(folder, sizes, device)
    settle(device)
    return time.perf_counter() - began


def settle(device: str) -> None:
    """Wait until ``device`` has done what it was asked to do."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def _used(built: Any, sizes: Sizes, preset: Preset, box: Box, device: str) -> tuple[Any, Taken]:
    """Let a box work at what the preset asks for; return what a turn uses of it, and what that took."""
    if isinstance(built, ImageBindEncoder):
        media = media_to_read(sizes).values()
        return built, taken(device, lambda: [built.encode(medium) for medium in media] and None)[1]
    if isinstance(built, LanguageModel):
        return taken(device, lambda: _full(built, preset))
    assert isinstance(built, BuiltDecoder)
    assert box.modality is not None
    wish = replace(preset.decoders[box.modality].fill(DecodeSettings()), steps=2, seed=0)
    work = partial(built.decoder.decode, built.condition(), wish)
    work()  # what is made once and kept is not what a medium takes
    return built, taken(device, work)[1]


def _full(model: LanguageModel, preset: Preset) -> Engine:
    """Return an engine of which every slot has held a conversation of full length."""
    options = preset.language_model
    engine = Engine(model, slots=options.slots, context=options.context, step_tokens=options.step_tokens)
    wishes = GenerationOptions(max_new_tokens=2, allowed=frozenset())
    around = len(model.encode([Message("user", ["b"])], open_reply=True).ids) - 1
    prompt = [Message("user", ["b" * (engine.context - around - wishes.max_new_tokens)])]
    for _ in range(options.slots):
        engine.submit(engine.prepare(prompt, wishes))
    while engine.busy:
        if any(isinstance(event, Exception) for _, event in engine.step()):
            raise PresetProblem("The language model failed on random weights.", code="bench_failed")
    return engine
