"""Reading what others saved with ``torch.save``, tensors only, and turning it into safetensors.

This is the one place where a pickle is opened, and it is opened with ``weights_only=True``: a file that
would run code is refused.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_SHARD = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin$")
_FOREIGN = re.compile(r"GLOBAL ([\w.]+)")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a flat ``torch.save`` file, left on the disk until they are used if possible.

    Raises:
        ValueError: no such file, no pickle of PyTorch, a damaged one, one that holds more than tensors, or
            one that holds none.

    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no plain file" if path.exists() else "not there"
        raise ValueError(f"{path} is {what}; expected a file of torch.save. Give the path of the download.")
    if (other := _something_else(path)) is not None:
        raise ValueError(f"{path} is {other}; expected a file of torch.save. Download that file itself.")
    content = _load(path)
    if not isinstance(content, Mapping) or not content:
        nothing = "an empty" if isinstance(content, Mapping) else "a"
        raise ValueError(
            f"{path} holds {nothing} {type(content).__name__}; expected a table of tensors by name. Use the "
            f"file as its authors published it."
        )
    if wrong := [str(name) for name, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{path} holds other things than tensors under {', '.join(wrong[:5])}; expected a flat table of "
            f"tensors by name. {_way_to_the_table(path, content)}"
        )
    if odd := [str(name) for name, value in content.items() if not _is_plain(value)]:
        raise ValueError(
            f"{path}: {', '.join(odd[:5])} is sparse, quantised or without numbers of its own; expected "
            f"plain tensors. Use the file as its authors published it."
        )
    return {str(name): value.detach() for name, value in content.items()}


def _something_else(path: Path) -> str | None:
    """Say what a file is that people take for a checkpoint; None for what may be one."""
    size = path.stat().st_size
    if size == 0:
        return "empty"
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS and not the file that it stands for"
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "a web page"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "a safetensors file"
    return None


def _load(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _expect_checksums(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles from elsewhere, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # bytes that are no pickle make the reader fail in any way
        if isinstance(error, pickle.UnpicklingError) and (foreign := _FOREIGN.search(str(error))):
            raise ValueError(
                f"{path} asks for {foreign[1]}, so it may run code when it is opened, and was not opened. "
                f"Expected tensors alone. Use the file that its authors published, or save its state_dict()."
            ) from error
        raise _unreadable(path) from error


def _expect_checksums(path: Path) -> None:
    """Read the archive once: the reader of PyTorch would take damaged numbers for numbers."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing; what claims to hold more than the file has bytes is a trap.
            inside = sum(entry.file_size for entry in archive.infolist())
            if inside > path.stat().st_size:
                raise ValueError(f"{inside:,} bytes in it")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _unreadable(path) from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} in it has another checksum. Download it again.")


def _unreadable(path: Path) -> ValueError:
    return ValueError(
        f"{path} ({path.stat().st_size:,} bytes) cannot be read as tensors alone: it is no file of "
        f"torch.save, is cut off or damaged, or would run code when it is opened, which it was not. Compare "
        f"its size with the published one and download it again."
    )


def _way_to_the_table(path: Path, content: Mapping[Any, Any]) -> str:
    for name, value in content.items():
        if isinstance(value, Mapping) and all(isinstance(inner, Tensor) for inner in value.values()):
            return (
                f'The table under {name!r} may be it; save that alone: python -c "import torch; '
                f"torch.save(torch.load({str(path)!r}, weights_only=True)[{name!r}], 'tensors.pt')\""
            )
    return "Use the file as its authors published it."


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


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
            values = _read_index(index)
            names = {name: safe_name(file) for name, file in values["weight_map"].items()}
            target.write_text(json.dumps(values | {"weight_map": names}, indent=2) + "\n", encoding="utf-8")
            written.append(target)
    return written


def _read_index(path: Path) -> dict[str, Any]:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        names = values["weight_map"].values()
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a name that is no text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of a saved model. Download it again.") from error
    if absent := [str(name) for name in names if not (path.parent / str(name)).is_file()]:
        raise ValueError(f"{path} names {absent[0]}, which is not beside it. Download the whole folder.")
    assert isinstance(values, dict)
    return values


def _pairs(folder: Path) -> Iterator[tuple[Path, Path]]:
    for source in sorted(folder.rglob("*.bin")):
        if (name := safe_name(source.name)) != source.name:
            yield source, source.with_name(name)


def safe_name(name: str) -> str:
    """Return the name of the safetensors that take the place of a pickle; its own if it is not converted."""
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
    try:
        save_file(own, unfinished, metadata={"format": "pt"})
        unfinished.replace(target)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{target} cannot be written: {error}. Make room, or look at its rights.") from error
    finally:
        unfinished.unlink(missing_ok=True)
