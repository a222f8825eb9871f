"""Released checkpoints of others, checked tensor by tensor and written in this program's own layout.

Nothing is written before everything is known to fit. Beside the result stands ``converted.json``: where
it came from, what is in it, what was left out and why, and a SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from decoders import nextgpt_release as output_side
from decoders.projection import OutputProjectionConfig
from encoders import imagebind_release
from encoders.imagebind_config import ImageBindConfig
from encoders.media import Modality
from encoders.preprocess import PreprocessConfig
from llm import nextgpt_release as llm_side
from llm.nextgpt_release import ReleaseSizes
from services.pickles import read_pickle
from services.weight_files import CONVERTED

REWRITTEN_BASE = "Vicuna-7B v1.5"
LICENCES = {
    "nextgpt": "CC-BY-NC-SA-4.0: not for commercial use",
    "imagebind": "CC-BY-NC-4.0: not for commercial use",
}
WANTED = {
    "nextgpt": "pytorch_model.pt of the hub's ChocoWu/nextgpt_7b_tiva_v0",
    "rewritten": f"mm_output_projector.bin of the 2024 code, for {REWRITTEN_BASE} and Stable Diffusion 2",
    "imagebind": "imagebind_huge.pth",
}
NAMES_SHOWN = 6
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


def convert_nextgpt(
    file: Path,
    out: Path,
    base: str | None = None,
    *,
    whole_tables: bool = True,
    sizes: ReleaseSizes | None = None,
    outputs: Mapping[Modality, OutputProjectionConfig] = output_side.RELEASED,
    rewritten: Mapping[Modality, OutputProjectionConfig] = output_side.REWRITTEN,
) -> dict[str, Any]:
    """Convert a NExT-GPT checkpoint into ``out/llm`` and ``out/projections``; return the record of it.

    Args:
        file: ``pytorch_model.pt`` of the 2023 code, or ``mm_output_projector.bin`` of the 2024 rewrite.
        out: folder of a preset's weights.
        base: folder of the base model, or the hub id of one that is in the local cache.
        whole_tables: keep all rows of embedding and head, and not only those of the added tokens.
        sizes: what the language model's share must measure; the release's if None.
        outputs: what the output projections must measure.
        rewritten: the same for the rewrite.

    Raises:
        ValueError: the file, a tensor of it, or the base is not what it must be; or ``out`` has a result.

    """
    sizes = sizes or ReleaseSizes()
    tensors = read_pickle(file)
    if any(".mm_" in f".{name}" for name in tensors):
        if base is not None:
            raise ValueError(
                f"{file} is of the 2024 rewrite, of which only the output projections are converted, which "
                f"need no base. Leave --base {base} out, or use {WANTED['nextgpt']}."
            )
        return _convert_rewritten(file, tensors, out, rewritten)
    plain = _named(file, tensors, lambda name: output_side.plain_name(llm_side.plain_name(name)))
    shapes = {**llm_side.released_shapes(sizes), **output_side.released_shapes(outputs)}
    groups = check_tensors(file, plain, shapes, WANTED["nextgpt"], needed=("tables",))
    base_folder = None if base is None else find_base(base)
    agreement = None if base_folder is None else llm_side.check_base(base_folder, plain, sizes)
    record = {
        **_source(file, "nextgpt", "2023 code" if "lora" in groups else "2023 code, before LoRA"),
        "tensors": groups,
        "absent": [name for name in shapes if name not in groups],
        "tables": "whole" if whole_tables else "rows of the added tokens",
        "base": {"needed": llm_side.BASE_NAME, "given": base, "mean_cosine_of_embeddings": agreement},
    }
    with unfinished(out, ("llm", "projections", CONVERTED)) as folder:
        llm_side.write_folder(plain, folder / "llm", sizes, base_folder, whole_tables)
        output_side.write_folders(plain, folder / "projections", outputs)
        return with_digests(folder, record)


def _convert_rewritten(
    file: Path,
    tensors: Mapping[str, Tensor],
    out: Path,
    outputs: Mapping[Modality, OutputProjectionConfig],
) -> dict[str, Any]:
    plain = _named(file, tensors, output_side.plain_name)
    ours = {name: value for name, value in plain.items() if name.split(".")[0] in {str(m) for m in outputs}}
    if not ours:
        raise ValueError(
            f"{file} is of the 2024 rewrite and holds {_some(sorted(plain))}; expected "
            f"mm_output_*_projector. Of that code only the output projections have a counterpart here: "
            f"its input projector reads patch tokens in groups, and its signals have other words and "
            f"positions. Use the 2023 release."
        )
    left_out = sorted(plain.keys() - ours.keys())
    known = ("embed_tokens", "embed_in", "lm_head", "mm_input_projector", "lora_")
    if foreign := [name for name in left_out if not any(part in name for part in known)]:
        raise ValueError(f"{file} holds {_some(foreign)}, which no NExT-GPT code is known to save.")
    groups = check_tensors(file, ours, output_side.released_shapes(outputs), WANTED["rewritten"])
    record = {
        **_source(file, "nextgpt", "2024 rewrite"),
        "tensors": groups,
        "left_out": {"why": "the rewrite's language model side has no counterpart here", "names": left_out},
        "base": {"needed": REWRITTEN_BASE, "given": None, "mean_cosine_of_embeddings": None},
    }
    with unfinished(out, ("projections", CONVERTED)) as folder:
        output_side.write_folders(ours, folder / "projections", outputs)
        return with_digests(folder, record)


def convert_imagebind(
    file: Path,
    out: Path,
    towers: Sequence[str] = ("vision", "audio"),
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    *,
    release: ImageBindConfig | None = None,
    preprocessing: PreprocessConfig | None = None,
) -> dict[str, Any]:
    """Convert ``imagebind_huge.pth`` into ``out/encoder``; return the record of it.

    All six towers of the file are checked; ``towers`` are kept, in ``dtype`` or the file's own.

    Raises:
        ValueError: the file or a tensor of it is not what it must be; an unknown tower; a text tower
            without ``tokenizer``; or ``out`` has an encoder.

    """
    release = release or ImageBindConfig.huge()
    kept = release.with_towers(towers)
    imagebind_release.check_tokenizer(kept, tokenizer)
    tensors = read_pickle(file)
    shapes = {"ImageBind": imagebind_release.released_shapes(release)}
    mask = (imagebind_release.MASK,)
    check_tensors(file, tensors, shapes, WANTED["imagebind"], needed=("ImageBind",), endless=mask)
    wanted = imagebind_release.released_shapes(kept)
    record = {
        **_source(file, "imagebind", "imagebind_huge.pth"),
        "towers": list(towers),
        "tensors": {"kept": len(wanted), "left out with their towers": len(tensors) - len(wanted)},
    }
    with unfinished(out, ("encoder",)) as folder:
        imagebind_release.write_folder(
            tensors, folder / "encoder", kept, preprocessing or PreprocessConfig.huge(), tokenizer, dtype
        )
        return with_digests(folder, record, "encoder")


def check_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    shapes: Shapes,
    wanted: str,
    needed: Sequence[str] = (),
    endless: Sequence[str] = (),
) -> dict[str, int]:
    """Account for every tensor: each belongs to a group, and each group is there whole or not at all.

    ``wanted`` says what to use instead of a file that is refused; only ``endless`` ones may be infinite.

    Returns:
        The number of tensors of each group that is there.

    Raises:
        ValueError: a foreign, missing or misshapen tensor, one of integers or with values that are not
            finite, or a needed group that is absent.

    """
    expected = {name: shape for group in shapes.values() for name, shape in group.items()}
    if foreign := sorted(tensors.keys() - expected.keys()):
        raise ValueError(
            f"{file} holds {_some(foreign)}, which this layout has no place for. {_guess(foreign, wanted)}"
            f"Use {wanted}, as its authors published it."
        )
    found: dict[str, int] = {}
    for title, group in shapes.items():
        missing = [name for name in group if name not in tensors]
        if len(missing) == len(group) and title not in needed:
            continue
        if missing:
            raise ValueError(
                f"{file} lacks {_some(missing)} of its {title} ({len(missing)} of {len(group)} tensors). "
                f"Use {wanted}; if it is that, download its last upload again."
            )
        found[title] = len(group)
    for name, value in tensors.items():
        if tuple(value.shape) != expected[name]:
            raise ValueError(
                f"{file}: {name} has shape {tuple(value.shape)}; expected {expected[name]}. "
                f"This is a checkpoint of other sizes or another vocabulary. Use {wanted}."
            )
        if value.dtype not in DTYPES:
            raise ValueError(
                f"{file}: {name} is {str(value.dtype).removeprefix('torch.')}; expected float16, bfloat16 or "
                f"float32. Use {wanted}, as its authors published it."
            )
        if name not in endless and not all(
            bool(part.isfinite().all()) for part in value.reshape(-1).split(2**24)
        ):
            raise ValueError(
                f"{file}: {name} holds values that are not finite numbers (NaN or infinite); expected none. "
                f"Download it again, or if you trained it, take an earlier checkpoint."
            )
    return found


def _guess(foreign: Sequence[str], wanted: str) -> str:
    """Say what names that fit nothing look like, where ``wanted`` is another thing."""
    first, wants_imagebind = foreign[0], wanted == WANTED["imagebind"]
    is_imagebind = first.startswith(("modality_heads.", "modality_preprocessors.", "modality_trunks."))
    if is_imagebind and not wants_imagebind:
        return "It looks like ImageBind: patchbay convert imagebind. "
    if wants_imagebind and first.startswith(("gen_text_hidden_fcs", "llama_model.", "llama_proj.")):
        return "It looks like NExT-GPT: patchbay convert nextgpt. "
    wrapper = first.split(".")[0]
    if wrapper in ("module", "_orig_mod", "model") and all(n.startswith(f"{wrapper}.") for n in foreign):
        return f"All of these begin with {wrapper!r}, as if a wrapper had been saved. "
    return ""


def find_base(name: str) -> Path:
    """Return the folder ``name``, or that of the hub id ``name`` in the local cache.

    Raises:
        ValueError: it is neither.

    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise ValueError(
            f"{name} is a file; expected the folder of {llm_side.BASE_NAME}, with config.json, tokenizer and "
            f"weights. Give that folder, or a hub id."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except IncompleteSnapshotError as error:
        raise ValueError(
            f"{name} is in the local cache in part: its download was broken off. Expected the whole of "
            f"{llm_side.BASE_NAME}. The same command goes on with it: hf download {name}"
        ) from error
    except HFValidationError as error:
        raise ValueError(
            f"{name} is no folder here, and no hub id either, which looks like owner/name. Expected "
            f"{llm_side.BASE_NAME}. Give its folder, or the id of a model in the local cache."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} is no folder here, and no model of that name is in the local cache. Expected "
            f"{llm_side.BASE_NAME}. Give the folder that `patchbay convert delta` made, or if {name} holds "
            f"just that, fetch it first: hf download {name}"
        ) from error


def _named(file: Path, tensors: Mapping[str, Tensor], plain_name: Callable[[str], str]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = plain_name(name)
        if plain in named and not torch.equal(named[plain], value):
            raise ValueError(f"{file} holds {plain} under two names, one of them {name}, with other values.")
        named[plain] = value
    return named


def _source(file: Path, kind: str, layout: str) -> dict[str, Any]:
    return {
        "format": 1,
        "made_by": made_by(),
        "layout": layout,
        "licence": LICENCES[kind],
        "source": {"name": file.name, **_digest(file)},
    }


def made_by() -> str:
    """Return what a record says of this program."""
    return f"patchbay {importlib.metadata.version('patchbay')}"


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def with_digests(folder: Path, record: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Add every file of ``folder`` to ``record``, and write it into ``folder / where``."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    root = folder / where
    whole = {**record, "files": {str(path.relative_to(root)): _digest(path) for path in paths}}
    (root / CONVERTED).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return whole


@contextmanager
def unfinished(out: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder to write into; what is in it moves to ``out`` once all is written, the record last."""
    for name in names:
        if (out / name).exists():
            raise ValueError(f"{out / name} is there already. Remove it, or choose another --out.")
    undone = [parent for parent in (out, *out.parents) if not parent.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=out) as folder:
            yield Path(folder)
            for path in sorted(Path(folder).iterdir(), key=lambda path: (path.name == CONVERTED, path.name)):
                undone.insert(0, out / path.name)
                path.replace(out / path.name)
        undone.clear()
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Nothing was converted, as {out} cannot be written: {_reason(error)}. Choose another --out, "
            f"where you may write and where there is room, and run this again."
        ) from error
    finally:
        for path in undone:
            if path in (out, *out.parents):
                with suppress(OSError):  # something else came to lie in it
                    path.rmdir()
            else:
                shutil.rmtree(path, ignore_errors=True)


def _reason(error: OSError | SafetensorError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return str(error)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (
        ", ".join(
            name if name.isprintable() and name.split() == [name] else repr(name)
            for name in names[:NAMES_SHOWN]
        )
        + more
    )
