"""Reading what others saved with ``torch.save``, tensors only, and turning it into safetensors.

This is the one place where a pickle is opened, and it is opened with ``weights_only=True``: a file that
would run code is refused.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_SHARD = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin$")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a flat ``torch.save`` file, left on the disk until they are used if possible.

    Raises:
        ValueError: no such file, no pickle of PyTorch, one that holds more than tensors, or an empty one.

    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file. Give the path of the file that was downloaded.")
    try:
        content: Any = _load(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as tensors alone: {_first_line(error)} It may run code when it is "
            f"opened, or be cut off. Download it again from its authors."
        ) from error
    except Exception as error:  # bytes that are no pickle make the reader fail in any way
        raise ValueError(f"{path} is no file of torch.save, or cut off: {_first_line(error)}") from error
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a table of tensors by name.")
    if wrong := [str(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{path} holds other things than tensors under {', '.join(wrong[:5])}; expected a flat table of "
            f"tensors by name. If the table is inside, save that alone first."
        )
    return {str(name): value.detach() for name, value in content.items()}


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _first_line(error: BaseException) -> str:
    line = " ".join(str(error).strip().splitlines()[:1]) or type(error).__name__
    return line if line.endswith(".") else f"{line}."


def convert_pickles(folder: Path) -> list[Path]:
    """Write safetensors beside every ``.bin`` of a saved model, pipeline or adapter, unless they are there.

    The pickles stay. Parts of a pipeline that hold no weights are left alone.

    Raises:
        ValueError: no such folder, no pickle in it, or one that holds more than tensors.

    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a saved model or pipeline.")
    written: list[Path] = []
    found = False
    for source, target in _pairs(folder):
        found = True
        if not target.exists():
            _write(read_pickle(source), target)
            written.append(target)
    if not found:
        raise ValueError(
            f"{folder} holds none of pytorch_model*.bin, diffusion_pytorch_model.bin, adapter_model.bin and "
            f"pytorch_lora_weights.bin."
        )
    for index in sorted(folder.rglob("pytorch_model.bin.index.json")):
        target = index.with_name("model.safetensors.index.json")
        if not target.exists():
            values = json.loads(index.read_text(encoding="utf-8"))
            names = {name: _safe_name(file) for name, file in values["weight_map"].items()}
            target.write_text(json.dumps(values | {"weight_map": names}, indent=2) + "\n", encoding="utf-8")
            written.append(target)
    return written


def _pairs(folder: Path) -> Iterator[tuple[Path, Path]]:
    for source in sorted(folder.rglob("*.bin")):
        if (name := _safe_name(source.name)) != source.name:
            yield source, source.with_name(name)


def _safe_name(name: str) -> str:
    if name in ("diffusion_pytorch_model.bin", "adapter_model.bin", "pytorch_lora_weights.bin"):
        return name.replace(".bin", ".safetensors")
    if match := _SHARD.fullmatch(name):
        return f"model{match[1] or ''}.safetensors"
    return name


def _write(tensors: dict[str, Tensor], target: Path) -> None:
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():  # safetensors knows no two names for one storage
        storage = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    unfinished = target.with_name(target.name + ".part")
    save_file(own, unfinished, metadata={"format": "pt"})
    unfinished.replace(target)
