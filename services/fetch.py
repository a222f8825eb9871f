"""From a preset's origins to its weights: what is missing is downloaded, converted, and put in its place.

Everything can be broken off and run again: what is whole stays, what was begun goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from services.downloads import RemoteFile, begun_bytes, bring, listing
from services.errors import PresetProblem
from services.footprint import Part, damaged_files, missing_files
from services.origins import Download, Origin
from services.presets import Preset, shown
from services.weight_files import CONVERTED, in_gb

SPARE_BYTES = 500 * 2**20
"""What stays free on the disk when all is done."""

PICKLES = (".bin", ".pth", ".pt")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """One origin, which of its files are there, and which are to come.

    ``begun`` bytes of those to come are there.
    """

    origin: Origin
    download: Download
    there: tuple[RemoteFile, ...]
    to_come: tuple[RemoteFile, ...]
    begun: int

    @property
    def bytes_to_come(self) -> int:
        """Bytes that are downloaded, as far as is known."""
        return max(0, _total(self.to_come) - self.begun)

    @property
    def bytes_made(self) -> int:
        """Bytes that its conversion writes at the most."""
        if self.download.convert is None:
            return 0
        pickles = [file for file in (*self.there, *self.to_come) if file.name.endswith(PICKLES)]
        return _total(pickles)

    @property
    def is_sized(self) -> bool:
        """Whether it is known how large every file is that is to come."""
        return all(file.size is not None for file in self.to_come)

    @property
    def in_words(self) -> str:
        """What will be done."""
        files = f"{len(self.to_come)} file{'' if len(self.to_come) == 1 else 's'}"
        words = f"{files} to download, {in_gb(self.bytes_to_come)}" if self.to_come else "downloaded"
        if self.there and self.to_come:
            words += f" ({len(self.there)} more are there)"
        if self.download.convert:
            words += f"; then patchbay convert {self.download.convert}"
        return f"{self.origin.model}: {words}"


@dataclass(frozen=True)
class Plan:
    """What is to be done for a preset, in this order, and how much disk it takes at the most."""

    preset: Preset
    steps: tuple[Step, ...]
    most_bytes: int

    def in_words(self) -> Iterator[str]:
        """Yield what will be done, one line for each origin and one for all."""
        for step in self.steps:
            yield step.in_words
        to_come = sum(step.bytes_to_come for step in self.steps)
        folder, most = shown(self.preset.weights_folder), in_gb(self.most_bytes)
        yield f"in all {in_gb(to_come)} to download; up to {most} more on the disk, in {folder}"


def fetchable(preset: Preset) -> tuple[Origin, ...]:
    """Return the origins that would have to be downloaded, as something is missing of what they fill.

    Nothing is asked of the network.
    """
    weights = preset.weights_folder
    lacking = [*missing_files(preset), *damaged_files(preset)]
    wanted: list[Origin] = []
    bases: set[str] = set()
    for origin in reversed(preset.origins):
        if (download := origin.download) is None:
            continue
        unfilled = any(path.is_relative_to(weights / own) for path in lacking for own in download.fills)
        unmade = bases.intersection(download.fills) and not _is_made(weights, download)
        if unfilled or unmade:
            wanted.append(origin)
            bases |= {download.base} if download.base else set()
    return tuple(reversed(wanted))


def fetching(preset: Preset) -> str:
    """Return the command that gets what :func:`fetchable` names."""
    return f"patchbay fetch --preset {preset.as_argument}"


def plan(preset: Preset, keep_downloads: bool = False) -> Plan:
    """Ask the origins what of them is missing here.

    Raises:
        PresetProblem: one of them cannot be reached, lets nobody in, or lacks a file; or a conversion would
            write where something is already.

    """
    origins = fetchable(preset)
    for origin in origins:
        _expect_room_for_made(preset, _download(origin))
    steps = [_step(preset, origin) for origin in origins]
    return Plan(preset, tuple(steps), _most_bytes(steps, keep_downloads))


def expected(preset: Preset, parts: Sequence[Part]) -> Plan:
    """Return what :func:`plan` would, without asking anybody: each origin is one file of about its size.

    Sizes are those that the preset tells, or follow from the shapes of the missing ``parts`` and the dtype in
    which they are published; where neither is known, they are None.
    """
    steps = []
    for origin in fetchable(preset):
        download = _download(origin)
        name = next((name for name in (origin.source, *download.files) if name.endswith(PICKLES)), "weights")
        file = RemoteFile(PurePosixPath(name).name, _expected_bytes(preset, origin, parts))
        steps.append(Step(origin, download, (), (file,), 0))
    return Plan(preset, tuple(steps), _most_bytes(steps, keep_downloads=False))


def filled_by(preset: Preset, download: Download, parts: Sequence[Part]) -> list[Part]:
    """Return those parts of which a missing file lies in a folder that ``download`` fills."""
    folders = [preset.weights_folder / own for own in download.fills]
    return [
        part
        for part in parts
        if any(path.is_relative_to(folder) for path in part.missing for folder in folders)
    ]


def _expected_bytes(preset: Preset, origin: Origin, parts: Sequence[Part]) -> int | None:
    download = _download(origin)
    if download.size_bytes is not None:
        return download.size_bytes
    if download.about_gb is not None:
        return round(download.about_gb * 1e9)
    sizes = [part.download for part in filled_by(preset, download, parts)]
    known = [size for size in sizes if size is not None]
    return sum(known) if sizes and len(known) == len(sizes) else None


def expect_disk(found: Plan) -> None:
    """Raise PresetProblem when the disk is too small for a plan."""
    folder = found.preset.weights_folder
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < found.most_bytes + SPARE_BYTES:
        short = found.most_bytes + SPARE_BYTES - free
        raise PresetProblem(
            f"{in_gb(free)} are free in {place}; downloading and converting {found.preset.name!r} takes "
            f"up to {in_gb(found.most_bytes)}, with {in_gb(SPARE_BYTES)} to spare. Nothing was "
            f"downloaded. Make room for {in_gb(short)} more, or name a folder on another disk under weights "
            f"in a copy of the preset.",
            code="disk_full",
        )


def fetch(found: Plan, say: Say, keep_downloads: bool = False) -> None:
    """Carry a plan out.

    Raises:
        PresetProblem: something could not be downloaded, or is not what it should be.
        ValueError: something could not be converted.

    """
    weights = found.preset.weights_folder
    for number, step in enumerate(found.steps, 1):
        say(f"{number} of {len(found.steps)}: {step.in_words}")
        if step.to_come:
            bring(step.origin, step.to_come, weights / step.download.into)
        if step.download.convert is None:
            continue
        _convert(found.preset, step)
        if not keep_downloads:
            for folder in _spent(step.download):
                shutil.rmtree(weights / folder, ignore_errors=True)
    left = weights / "downloads"
    if left.is_dir() and not any(left.iterdir()):
        left.rmdir()


def _step(preset: Preset, origin: Origin) -> Step:
    download = _download(origin)
    folder = preset.weights_folder / download.into
    there: list[RemoteFile] = []
    to_come: list[RemoteFile] = []
    for file in listing(origin):
        is_there = file.is_whole(folder / file.name) or _was_converted(download, folder / file.name)
        (there if is_there else to_come).append(file)
    begun = sum(begun_bytes(file, folder) for file in to_come)
    return Step(origin, download, tuple(there), tuple(to_come), begun)


def _was_converted(download: Download, path: Path) -> bool:
    """Whether a pickle is gone because its safetensors lie in its place."""
    if download.convert != "pickles" or path.exists():
        return False
    from services.pickles import safe_name
    from services.weight_files import read_header

    made = path.with_name(safe_name(path.name))
    try:
        return made.is_file() and bool(read_header(made))
    except ValueError:
        return False


def _most_bytes(steps: Sequence[Step], keep_downloads: bool) -> int:
    """Return the most that the disk must take in at any time."""
    held = most = 0
    freed = {own: 0 for step in steps for own in (step.download.into, *step.download.makes)}
    for step in steps:
        held += step.bytes_to_come + step.bytes_made
        most = max(most, held)
        freed[step.download.into] += _total((*step.there, *step.to_come))
        for own in step.download.makes[:1]:
            freed[own] += step.bytes_made
        if step.download.convert not in (None, "pickles") and not keep_downloads:
            # A base is linked to, not copied, so that letting go of it frees nothing.
            linked = step.download.base if step.download.convert == "nextgpt" else None
            held -= sum(freed.get(folder, 0) for folder in _spent(step.download) if folder != linked)
    return most


def _spent(download: Download) -> list[str]:
    """Return the folders that nothing needs when a conversion is done."""
    if download.convert in (None, "pickles"):
        return []
    return [download.into, *([download.base] if download.base else [])]


def _expect_room_for_made(preset: Preset, download: Download) -> None:
    record = [CONVERTED] if download.convert == "nextgpt" else []
    for name in (*download.makes, *record):
        folder = preset.weights_folder / name
        if folder.exists():
            raise PresetProblem(
                f"{shown(folder)} is there, though {', '.join(download.makes)} are not whole; patchbay "
                f"convert {download.convert} writes all of that at once, and over nothing. Nothing was "
                f"downloaded. Add by hand what `patchbay doctor --preset {preset.as_argument}` misses, or "
                f"move it away; then run this again.",
                code="weights_incomplete",
            )


def _is_made(weights: Path, download: Download) -> bool:
    return bool(download.makes) and all((weights / own / CONVERTED).is_file() for own in download.makes)


def _convert(preset: Preset, step: Step) -> None:
    from services import convert

    weights, download = preset.weights_folder, step.download
    folder = weights / download.into
    match download.convert:
        case "pickles":
            from services.pickles import convert_pickles

            convert_pickles(folder)
        case "imagebind":
            import torch

            dtype = preset.encoder.dtype
            file = folder / _only(step).name
            convert.convert_imagebind(file, weights, dtype=getattr(torch, dtype) if dtype else None)
        case "delta":
            from services.weight_delta import convert_delta

            convert_delta(folder, _base(weights, download), weights / download.makes[0])
        case "nextgpt":
            base = str(_base(weights, download))
            convert.convert_nextgpt(folder / _only(step).name, weights, base)


def _only(step: Step) -> RemoteFile:
    (file,) = (*step.there, *step.to_come)
    return file


def _base(weights: Path, download: Download) -> Path:
    assert download.base is not None
    return weights / download.base


def _download(origin: Origin) -> Download:
    assert origin.download is not None
    return origin.download


def _total(files: Sequence[RemoteFile]) -> int:
    return sum(file.size or 0 for file in files)
