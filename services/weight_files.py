"""Whether files of weights are whole, from their beginnings alone: nothing is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

INDEX = "*.safetensors.index.json"
UNFINISHED = ".incomplete"
"""How the names of files end that are still being downloaded."""
CONVERTED = "converted.json"
"""The record that a conversion leaves, last of all."""
MOST_HEADER_BYTES = 100_000_000
"""A longer beginning is refused by the format itself."""


def read_header(path: Path) -> dict[str, Any]:
    """Return names, shapes and places of the tensors in a safetensors file.

    Raises:
        ValueError: it is no such file, or shorter or longer than it says.

    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, MOST_HEADER_BYTES):
            raise ValueError(f"{path} is no safetensors file, or is cut off. Copy or download it again.")
        try:
            header: Any = json.loads(file.read(length))
            tensors = {name: value for name, value in header.items() if name != "__metadata__"}
            end = max((value["data_offsets"][1] for value in tensors.values()), default=0)
            counts = [number for value in tensors.values() for number in value["shape"]]
            if not all(isinstance(number, int) and number >= 0 for number in counts):
                raise ValueError("a shape that is none")
        except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise ValueError(f"{path} is no safetensors file. Copy or download it again.") from error
    if (expected := 8 + length + end) != size:
        raise ValueError(
            f"{path} has {size:,} bytes; its header says {expected:,}. Copy or download it again."
        )
    return tensors


def absent_shards(folder: Path) -> list[Path]:
    """Return the files that an index in ``folder`` names and that are not there."""
    absent: set[Path] = set()
    for index in folder.glob(INDEX):
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # what is wrong with it, damage() says
        absent |= {folder / str(name) for name in names if not (folder / str(name)).is_file()}
    return sorted(absent)


def damage(folders: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield each damaged configuration, index or weights right inside ``folders``, and what is wrong."""
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            try:
                values: Any = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                yield path, f"{path} is no JSON: {error}. Copy or download it again."
                continue
            if path.match(INDEX) and not (
                isinstance(values, dict)
                and isinstance(values.get("weight_map"), dict)
                and isinstance(values.get("metadata"), dict)
            ):
                wanted = "expected weight_map and metadata"
                yield path, f"{path} is no index of weights: {wanted}. Download it again."
        for path in sorted(folder.glob("*.safetensors")):
            try:
                read_header(path)
            except ValueError as error:
                yield path, str(error)


def in_gb(size: int) -> str:
    """Return a number of bytes in GB or MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
