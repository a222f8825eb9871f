"""A language model from its base and a published delta: the sum of both, tensor by tensor.

So Vicuna v0 was published, as LLaMA's weights may not be. Its tables have a row more than LLaMA's, for a
token of padding; the base counts as zero there (FastChat 0.1.10, fastchat/model/apply_delta.py). The whole
model is never in memory: what is added up is written in files of at most two gigabytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from services.convert import made_by, unfinished, with_digests
from services.pickles import read_pickle
from services.weight_files import absent_shards, read_header

FILE_BYTES = 2 * 10**9
WANTED = "LLaMA-1 7B (the hub's huggyllama/llama-7b) and lmsys/vicuna-7b-delta-v0"
TABLES = ("embed_tokens.weight", "lm_head.weight")
COMPARED_ROWS = 512
MOST_LIKENESS = 0.5
COMPUTED = ".rotary_emb.inv_freq"
"""How names end of what older files hold, and every model computes on its own."""

Tensors = Mapping[str, Callable[[], Tensor]]


def convert_delta(delta: Path, base: Path, out: Path) -> dict[str, Any]:
    """Write the sum of two folders of weights to the folder ``out``; return the record of it.

    Args:
        delta: what was published, with its configuration; safetensors or pickles.
        base: what it was taken from, the same; the tokenizer is its own.
        out: a folder that is not there yet.

    Raises:
        ValueError: a folder lacks something, the two do not belong together, the sum is not finite, or
            ``out`` is there.

    """
    config = delta / "config.json"
    if not config.is_file():
        raise ValueError(f"{config} is missing; expected the folder of a delta. Use {WANTED}.")
    _expect_object(config)
    if not base.is_dir():
        raise ValueError(f"{base} is not a folder; expected that of the base. Use {WANTED}.")
    tokenizers = [base / name for name in ("tokenizer.model", "tokenizer.json") if (base / name).is_file()]
    if not tokenizers:
        raise ValueError(
            f"{base} has no tokenizer; expected tokenizer.model or tokenizer.json there. Copy it from where "
            f"the weights came from."
        )
    added, own = _tensors(delta), _tensors(base)
    _expect_same_names(delta, added, base, own)
    _expect_a_delta(delta, added, base, own)
    with unfinished(out.parent, (out.name,)) as folder:
        target = folder / out.name
        target.mkdir()
        shutil.copyfile(config, target / "config.json")
        for path in tokenizers:
            shutil.copyfile(path, target / path.name)
        _write(_sums(delta, added, base, own), target)
        record = {
            "format": 1,
            "made_by": made_by(),
            "layout": "base and delta",
            "licence": "that of the base: for LLaMA-1, research only",
            "source": {"delta": str(delta), "base": str(base)},
            "tensors": {"base and delta": len(added)},
        }
        return with_digests(folder, record, out.name)


def _expect_object(config: Path) -> None:
    try:
        values: Any = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is no JSON: {error}. Copy or download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{config} holds a {type(values).__name__}; expected an object. Download it again.")


def _tensors(folder: Path) -> Tensors:
    """Return what reads each tensor of a folder, from safetensors or, without any, from pickles."""
    if absent := absent_shards(folder):
        raise ValueError(
            f"{absent[0]} is missing, and an index beside it names it ({len(absent)} such files). Copy or "
            f"download the whole folder."
        )
    found: dict[str, Callable[[], Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {name: _from_file(path, name) for name in read_header(path)}
    for path in sorted(folder.glob("pytorch_model*.bin")) if not found else []:
        found |= {name: _held(tensor) for name, tensor in read_pickle(path).items()}
    if not found:
        raise ValueError(
            f"{folder} holds no weights; expected *.safetensors or pytorch_model*.bin. Use {WANTED}."
        )
    return {name: read for name, read in found.items() if not name.endswith(COMPUTED)}


def _from_file(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}. Copy or download it again.") from error
        return tensor

    return read


def _held(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _expect_same_names(delta: Path, added: Tensors, base: Path, own: Tensors) -> None:
    for one, other, has, needed in ((base, delta, own, added), (delta, base, added, own)):
        if lacking := needed.keys() - has.keys():
            raise ValueError(
                f"{one} lacks {min(lacking)}, which {other} has ({len(lacking)} such tensors). They do not "
                f"belong together, or a file is missing. Use {WANTED}."
            )


def _expect_a_delta(delta: Path, added: Tensors, base: Path, own: Tensors) -> None:
    """Refuse weights that are whole already: they point where the base does, which a difference does not."""
    for name in (name for name in added if name.endswith(TABLES[0])):
        change, tensor = added[name](), own[name]()
        rows = min(COMPARED_ROWS, len(change), len(tensor)) if change.ndim == tensor.ndim == 2 else 0
        if not rows or change.shape[1] != tensor.shape[1]:
            continue  # which its shape will say
        likeness = float(F.cosine_similarity(change[:rows].float(), tensor[:rows].float(), dim=-1).mean())
        if likeness > MOST_LIKENESS:
            raise ValueError(
                f"{name} of {delta} has a mean cosine of {likeness:.2f} with that of {base}; expected at "
                f"most {MOST_LIKENESS}, as a delta is a difference. These are whole weights, which need no "
                f"base; or use {WANTED}."
            )


def _sums(delta: Path, added: Tensors, base: Path, own: Tensors) -> Iterator[tuple[str, Tensor]]:
    for name, read in added.items():
        change, tensor = read(), own[name]()
        for folder, given in ((delta, change), (base, tensor)):
            if not given.is_floating_point():
                raise ValueError(
                    f"{name} of {folder} is {str(given.dtype).removeprefix('torch.')}; expected numbers in "
                    f"floating point. Use {WANTED}."
                )
        rows = len(change) - len(tensor) if change.ndim and tensor.ndim else 0
        if rows > 0 and name.endswith(TABLES) and change.shape[1:] == tensor.shape[1:]:
            tensor = torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])
        if change.shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in {base} and {tuple(change.shape)} in {delta}; "
                f"expected the same. They are of models of other sizes. Use {WANTED}."
            )
        total = tensor.to(change.dtype) + change
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"{name}: the sum of {base} and {delta} holds values that are not finite numbers. One of the "
                f"two is damaged, or they do not belong together. Use {WANTED}."
            )
        yield name, total


def _write(sums: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write tensors in files of at most :data:`FILE_BYTES`, or of one tensor, and an index of them."""
    places: dict[str, str] = {}
    batch: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(batch, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(batch, name))
        batch.clear()

    for name, tensor in sums:
        if batch and size + tensor.nbytes > FILE_BYTES:
            close()
            size = 0
        batch[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    close()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
