"""What of a preset to change so that it fits into less memory, and what each setting takes.

Everything is computed from shapes: weights, full caches, adapters, and what each box needs while it makes one
thing at a time. Larger batches and the libraries of a GPU are not; a share of the memory is left to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from encoders.media import Modality
from services.footprint import Box, at_work, boxes_of, needed, working_bytes
from services.presets import Preset

LEFT_FREE = 0.1
"""Share of the memory that is left to what cannot be counted: larger batches, and what libraries keep."""

FEW_SLOTS = 2

LEAVE_OUT = object()
"""As the value of a change: what is named goes away."""

Changes = Mapping[str, Any]
"""Values by their place in the YAML, with dots: ``{"language_model.quantization": "int8"}``."""


@dataclass(frozen=True)
class Plan:
    """A preset that was changed for a memory of ``room`` bytes, what was changed, and in words."""

    preset: Preset
    changes: Changes
    words: tuple[str, ...]
    needed: int
    room: int

    @property
    def fits(self) -> bool:
        """Whether the changes are enough."""
        return fits(self.needed, self.room)


def fits(size: int, room: int) -> bool:
    """Whether ``size`` bytes fit into ``room`` bytes and leave something to work with."""
    return size <= room * (1 - LEFT_FREE)


def changed(preset: Preset, changes: Changes) -> Preset:
    """Return a preset with some values replaced."""
    values = preset.model_dump(mode="json")
    _apply(values, changes)
    return Preset(**values, file=preset.file)


def plan_for(preset: Preset, room: int, spare: int | None) -> Plan:
    """Change ``preset`` until it fits into ``room`` bytes, what hurts least first.

    ``spare`` is what the memory of the CPU has for decoders that wait there, None if that is not known.
    """
    changes: dict[str, Any] = {}
    words: list[str] = []
    plan = Plan(preset, {}, (), needed(preset, boxes_of(preset)), room)
    for step in _steps(spare):
        while not plan.fits:
            boxes = boxes_of(plan.preset)
            found = step(plan.preset, boxes)
            if found is None:
                break
            more, said = found
            changes |= more
            words.append(said)
            after = changed(preset, changes)
            plan = Plan(after, dict(changes), tuple(words), needed(after, boxes_of(after)), room)
    return plan


_Step = Callable[[Preset, Sequence[Box]], tuple[Changes, str] | None]


def _steps(spare: int | None) -> Iterator[_Step]:
    yield _in_half
    yield _one_by_one
    yield lambda preset, boxes: _in_turns(preset, boxes, spare)
    yield _fewer_slots
    yield lambda preset, boxes: _quantized(preset, "int8")
    yield lambda preset, boxes: _quantized(preset, "nf4")
    yield _without_the_largest


def _in_half(preset: Preset, boxes: Sequence[Box]) -> tuple[Changes, str] | None:
    half = "bfloat16" if preset.device == "cpu" else "float16"
    changes = {}
    if (preset.encoder.dtype or "float32") == "float32":
        changes["encoder.dtype"] = half
    if preset.language_model_dtype == "float32":
        changes["language_model.dtype"] = half
    for modality, decoder in preset.decoders.items():
        if (decoder.dtype or "float32") == "float32":
            changes[f"decoders.{modality.value}.dtype"] = half
    return (changes, f"{half} instead of float32") if changes else None


def _one_by_one(preset: Preset, boxes: Sequence[Box]) -> tuple[Changes, str] | None:
    """Slice where that helps: the denoising network of a decoder may take more than its VAE."""
    changes: dict[str, Any] = {}
    for box in boxes:
        if box.modality not in (Modality.IMAGE, Modality.VIDEO) or not box.working:
            continue
        if preset.decoders[box.modality].vae == "whole":
            change = {f"decoders.{box.modality.value}.vae": "sliced"}
            sliced = working_bytes(changed(preset, change), box)
            if sliced is not None and sliced < box.working:
                changes |= change
    return (changes, "pictures and frames go through the VAE one at a time") if changes else None


def _in_turns(preset: Preset, boxes: Sequence[Box], spare: int | None) -> tuple[Changes, str] | None:
    if preset.decoders_gb is not None or len(preset.decoders) < 2:
        return None
    movable = [box.movable for box in boxes]
    if not max(movable):
        return None  # nothing is known of their sizes
    budget = math.ceil(max(movable) / 1e7) / 100  # the largest, rounded up
    changes: dict[str, Any] = {"decoders_gb": budget}
    place = "on the disk"
    if preset.device != "cpu":
        waits_in = "cpu" if spare is None or sum(movable) < spare else "disk"
        place = "in the memory of the CPU" if waits_in == "cpu" else place
        changes |= {f"decoders.{modality.value}.waits_in": waits_in for modality in preset.decoders}
    return changes, f"decoders take turns within {budget:g} GB and wait {place}"


def _fewer_slots(preset: Preset, boxes: Sequence[Box]) -> tuple[Changes, str] | None:
    if preset.language_model.slots <= FEW_SLOTS:
        return None
    return {"language_model.slots": FEW_SLOTS}, f"{FEW_SLOTS} replies at a time"


def _quantized(preset: Preset, kind: str) -> tuple[Changes, str] | None:
    if preset.language_model.quantization in (kind, "nf4"):
        return None
    bits = {"int8": 8, "nf4": 4}[kind]
    return {"language_model.quantization": kind}, f"the language model in {bits} bits"


def _without_the_largest(preset: Preset, boxes: Sequence[Box]) -> tuple[Changes, str] | None:
    if not preset.decoders:
        return None
    largest = max((box for box in boxes if box.modality), key=lambda box: box.in_memory)
    assert largest.modality is not None
    changes: dict[str, Any] = {f"decoders.{largest.modality.value}": LEAVE_OUT}
    if preset.decoders_gb is not None:
        left = [box.movable for box in boxes if box.modality and box is not largest]
        changes["decoders_gb"] = math.ceil(max(left) / 1e7) / 100 if left else None
    return changes, f"no {largest.modality.value} decoder"


def write_preset(plan: Plan, path: Path) -> None:
    """Write the YAML of a plan: the preset's own with the changes, and folders that hold from anywhere."""
    source = plan.preset
    values: dict[str, Any] = yaml.safe_load(source.file.read_text(encoding="utf-8"))
    _apply(values, plan.changes)
    values["weights"] = str(source.weights_folder)
    if source.sizes_folder is not None:
        values["sizes"] = str(source.sizes_folder)
    for example in values.get("examples", ()):
        example["files"] = [str(source.file.parent / name) for name in example.get("files", ())]
    said = "".join(f"#   {words}\n" for words in plan.words)
    head = f"# {source.file.name}, changed to take {plan.needed / 1e9:.1f} GB on {source.device}:\n{said}"
    path.write_text(head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _apply(values: dict[str, Any], changes: Changes) -> None:
    # What is left out comes last, so that a change within it does not bring it back.
    for place, value in sorted(changes.items(), key=lambda change: change[1] is LEAVE_OUT):
        *sections, name = place.split(".")
        section = values
        for key in sections:
            section = section.setdefault(key, {})
        if value is LEAVE_OUT:
            section.pop(name, None)
        else:
            section[name] = value


@dataclass(frozen=True)
class Row:
    """What one setting takes, in bytes.

    ``language_model`` and ``decoders`` are weights with their adapters, ``cache`` is full, and ``working`` is
    what all boxes need while each makes one thing at a time.
    """

    setting: str
    encoder: int
    language_model: int
    cache: int
    decoders: int
    working: int
    total: int


def rows(preset: Preset) -> list[Row]:
    """Compute what usual settings of ``preset`` take."""
    boxes = boxes_of(preset)
    half = "bfloat16" if preset.device == "cpu" else "float16"
    found = [_row("as the preset says", preset)]
    for dtype in ("float32", half):
        every = {"encoder.dtype": dtype, "language_model.dtype": dtype} | {
            f"decoders.{modality.value}.dtype": dtype for modality in preset.decoders
        }
        whole = changed(preset, every)
        found.append(_row(dtype, whole))
    in_turns = _in_turns(whole, boxes_of(whole), None)
    turns = dict(in_turns[0]) if in_turns else {}
    few = {"language_model.slots": min(FEW_SLOTS, preset.language_model.slots)}
    slices = {
        f"decoders.{modality.value}.vae": "sliced"
        for modality in preset.decoders
        if modality is not Modality.AUDIO
    }
    tiles = dict.fromkeys(slices, "tiled")
    fitted = slices | turns | few
    for words, changes in (
        ("VAE sliced", slices),
        ("VAE tiled", tiles),
        ("VAE sliced, decoders in turns", slices | turns),
        (f"VAE sliced, decoders in turns, {FEW_SLOTS} replies at a time", fitted),
        ("language model in int8", {"language_model.quantization": "int8"}),
        ("all three, and int8", fitted | {"language_model.quantization": "int8"}),
        ("language model in nf4", {"language_model.quantization": "nf4"}),
        ("all three, and nf4", fitted | {"language_model.quantization": "nf4"}),
    ):
        after = changed(whole, changes)
        if changes is not tiles or _is_known(after):  # not every VAE can be tiled
            found.append(_row(f"{half}, {words}", after))
    if any(box.modality is Modality.VIDEO for box in boxes) and len(preset.decoders) > 1:
        slices.pop("decoders.video.vae", None)
        fewest = slices | few | {"language_model.quantization": "nf4", "decoders.video": LEAVE_OUT}
        least = changed(whole, fewest)
        again = _in_turns(least, boxes_of(least), None)
        if again:
            least = changed(least, again[0])
        found.append(_row(f"{half}, all three, nf4, and no video", least))
    return found


def _is_known(preset: Preset) -> bool:
    return all(box.working is not None for box in boxes_of(preset))


def _row(setting: str, preset: Preset) -> Row:
    boxes = boxes_of(preset)
    encoder, speaker, *_ = boxes
    total, working = needed(preset, boxes), at_work(preset, boxes)
    thinking = speaker.in_memory + speaker.adapters
    return Row(
        setting,
        encoder.in_memory,
        thinking - speaker.cache,
        speaker.cache,
        total - working - encoder.in_memory - thinking,
        working,
        total,
    )


def table(found: Sequence[Row]) -> str:
    """Return rows as a table in Markdown, in GB, or in MB where all is small."""
    largest = max(row.total for row in found)
    unit, size, digits = ("GB", 1e9, 2) if largest >= 1e9 else ("MB", 1e6, 1)
    lines = [
        f"| setting | encoder | language model | its cache | decoders | at work | in all, {unit} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        sizes = (row.encoder, row.language_model, row.cache, row.decoders, row.working, row.total)
        cells = " | ".join(f"{value / size:.{digits}f}" for value in sizes)
        lines.append(f"| {row.setting} | {cells} |")
    return "\n".join(lines)
