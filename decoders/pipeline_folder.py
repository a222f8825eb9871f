"""Read the parts of a diffusers pipeline from its folder, without the pipeline class.

Only safetensors and JSON are read, never a pickle. Half-precision files become float32 unless another
dtype is asked for. Every fault of the folder is an error that names the file.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from decoders.patch_autoencoder import PatchAutoencoderKL

AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "PatchAutoencoderKL": PatchAutoencoderKL}
logger = logging.getLogger(__name__)

NULL_FILE = "null.safetensors"
DEFAULTS_FILE = "patchbay.json"
MISSHAPEN = re.compile(r"(\S+) expected shape torch\.Size\(\[(.*?)\]\), but got torch\.Size\(\[(.*?)\]\)")
"""How diffusers puts it that a tensor does not fit."""


class PipelineFolder:
    """A local folder in the layout of ``DiffusionPipeline.save_pretrained``.

    Raises (here and in every method):
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: a file is damaged, or weights do not fit their configuration.

    """

    def __init__(self, path: Path | str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.path = Path(path)
        self.device = torch.device(device)
        self.dtype = dtype
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a folder; expected a saved diffusers pipeline.")
        self.index = self.json("model_index.json")
        """The pipeline's own configuration: its class and the class of every part."""

    @property
    def pipeline_class(self) -> str:
        """Name of the diffusers pipeline that the folder was saved from."""
        return str(self.index.get("_class_name"))

    def expect_pipeline(self, *names: str) -> None:
        """Raise ValueError unless the folder holds one of these pipeline classes."""
        if self.pipeline_class not in names:
            raise ValueError(
                f"{self.path} holds a {self.pipeline_class}; expected {' or '.join(names)}. "
                f"Point this decoder at a folder of its own kind."
            )

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in the file ``name`` of this folder."""
        path = self._file(name)
        try:
            value = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}). Copy the folder again.") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path} holds a {type(value).__name__}; expected an object.")
        return value

    def class_of(self, part: str) -> str:
        """Return the class name that ``model_index.json`` gives for a part."""
        entry = self.index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not entry[1]:
            raise ValueError(
                f"{self.path / 'model_index.json'} names no {part}. Save the pipeline again with all parts."
            )
        return str(entry[1])

    def model(self, part: str, model_class: Any) -> Any:
        """Load the part ``part`` as ``model_class``: frozen, in evaluation mode, on this device."""
        folder = self.path / part
        self.json(f"{part}/config.json")
        if not list(folder.glob("*.safetensors")):
            raise FileNotFoundError(
                f"{folder} holds no .safetensors file. Copy the complete folder, or convert other "
                f"formats to safetensors first."
            )
        # transformers would tell the shapes only in a table that it logs.
        wishes = {"ignore_mismatched_sizes": True} if issubclass(model_class, PreTrainedModel) else {}
        try:
            with _quiet():
                model, report = model_class.from_pretrained(
                    folder,
                    torch_dtype=self.dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                    local_files_only=True,
                    **wishes,
                )
            for name, given, expected in sorted(report["mismatched_keys"]):
                raise ValueError(_does_not_fit(name, given, expected))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = _reason(error)
            raise ValueError(f"{folder} cannot be loaded as {model_class.__name__}: {reason:.600}") from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(
                f"The weights in {folder} lack {len(missing)} tensors that its config.json asks for, "
                f"the first is {missing[0]}. Copy the folder again."
            )
        module: nn.Module = model
        return module.to(self.device).eval().requires_grad_(False)

    def pipeline(self, pipeline_class: Any, **parts: Any) -> Any:
        """Load the whole pipeline as ``pipeline_class``, without its safety checker, into the CPU's memory.

        ``parts`` take the place of those in the folder.
        """
        whole = parts | ({"safety_checker": None} if "safety_checker" in self.index else {})
        try:
            with _quiet():
                pipeline = pipeline_class.from_pretrained(
                    self.path, dtype=self.dtype, use_safetensors=True, local_files_only=True, **whole
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{self.path} cannot be loaded as {pipeline_class.__name__}: {_reason(error):.600} Copy the "
                f"complete folder, or convert other formats to safetensors first."
            ) from error
        return pipeline

    def autoencoder(self) -> Any:
        """Load the part ``vae``: diffusers' own class, or the folded one of the embedded model."""
        name = self.class_of("vae")
        if name not in AUTOENCODERS:
            raise ValueError(f"{self.path} has a {name} as vae; expected {' or '.join(AUTOENCODERS)}.")
        return self.model("vae", AUTOENCODERS[name])

    def tokenizer(self) -> Any:
        """Load the tokenizer of the text encoder."""
        self._file("tokenizer/tokenizer_config.json")
        try:
            return AutoTokenizer.from_pretrained(self.path / "tokenizer", local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path / 'tokenizer'} cannot be loaded: {error}") from error

    def scheduler_config(self) -> dict[str, Any]:
        """Return the noise schedule that the networks were trained with."""
        return self.json("scheduler/scheduler_config.json")

    def saved_null(self) -> Tensor | None:
        """Return the stored unconditional embedding ``(tokens, width)``, or None if there is none.

        Raises:
            ValueError: it was made by another text encoder than the one in the folder.

        """
        path = self.path / NULL_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                made_by = (file.metadata() or {}).get("text_encoder")
                null: Tensor = file.get_tensor("null")
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}). Delete it or copy it again.") from None
        if (self.path / "text_encoder").is_dir() and made_by != self.digest("text_encoder"):
            raise ValueError(
                f"{path} was made by another text encoder than {self.path / 'text_encoder'}. "
                f"Delete it, or write it again with save_null()."
            )
        return null.to(self.device, self.dtype)

    def write_null(self, null: Tensor) -> None:
        """Store the unconditional embedding with the digest of the text encoder that made it."""
        save_file(
            {"null": null.detach().to("cpu", torch.float32).contiguous()},
            self.path / NULL_FILE,
            metadata={"text_encoder": self.digest("text_encoder")},
        )

    @property
    def text_encoders(self) -> list[str]:
        """Names of the parts that read captions."""
        return [
            part
            for part, entry in self.index.items()
            if part.startswith("text_encoder") and isinstance(entry, list) and all(entry)
        ]

    def saved_nulls(self) -> dict[str, Tensor] | None:
        """Return what :meth:`write_nulls` stored; None if that is not there, not whole or out of date."""
        path = self.path / NULL_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                stored = file.metadata() or {}
                if any(stored.get(name) != value for name, value in self._readers().items()):
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError:
            return None

    def write_nulls(self, nulls: Mapping[str, Tensor]) -> None:
        """Store the tensors of the empty caption, if this folder may be written to."""
        path = self.path / NULL_FILE
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        tensors = {name: tensor.detach().to("cpu").clone() for name, tensor in nulls.items()}
        try:
            save_file(tensors, unfinished, metadata=self._readers())
            unfinished.replace(path)
        except (OSError, SafetensorError) as error:
            unfinished.unlink(missing_ok=True)
            logger.info("%s was not stored, so text encoders are loaded at each start: %s", path, error)

    def _readers(self) -> dict[str, str]:
        """Return what the stored tensors depend on: text encoders, as far as they are there, and a dtype."""
        there = [part for part in self.text_encoders if any((self.path / part).glob("*.safetensors"))]
        return {part: self.digest(part) for part in there} | {"dtype": str(self.dtype)}

    def digest(self, part: str = "") -> str:
        """Return 16 hex digits that name the bytes of all weights of the folder, or of one part."""
        found = hashlib.sha256()
        for path in sorted((self.path / part).rglob("*.safetensors")):
            if path.name != NULL_FILE:
                found.update(str(path.relative_to(self.path)).encode())
                state = path.stat()
                found.update(_hashed(path, state.st_size, state.st_mtime_ns))
        return found.hexdigest()[:16]

    def _file(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing. The folder is not complete; copy it again, or train it again."
            )
        return path


@lru_cache(maxsize=1024)
def _hashed(path: Path, size: int, changed_ns: int) -> bytes:
    """Return the SHA-256 of a file, which is read once as long as it stays the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loading reports and bars of both libraries; what they would tell is checked here."""
    verbosity = transformers_logging.get_verbosity()
    shown = [each for each in (transformers_logging, diffusers_logging) if each.is_progress_bar_enabled()]
    transformers_logging.set_verbosity(logging.CRITICAL)
    for each in shown:
        each.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for each in shown:
            each.enable_progress_bar()


def _reason(error: Exception) -> str:
    """Return a library's complaint in one line, without its advice to load what does not fit."""
    if found := MISSHAPEN.search(str(error)):
        name, expected, given = found.groups()
        return _does_not_fit(name, given.split(", "), expected.split(", "))
    return f"{' '.join(str(error).split()).rstrip('.')}."


def _does_not_fit(name: str, given: Sequence[int | str], expected: Sequence[int | str]) -> str:
    shapes = [f"({', '.join(map(str, sizes))})" for sizes in (given, expected)]
    return (
        f"{name} has shape {shapes[0]}; expected {shapes[1]}. The weights and the config.json belong to "
        "different models."
    )
