"""Looks whether this machine and a preset's weights can run, and says what to do if not."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.errors import PresetProblem, ServiceError
from services.presets import Preset

LIBRARIES = ("torch", "transformers", "diffusers", "peft", "ray", "gradio", "fastapi", "av", "soundfile")
SERVICE_MB = 6000  # what `patchbay serve` takes besides the weights, with all its processes


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str


def missing_files(preset: Preset) -> list[Path]:
    """Return the files that a preset needs and does not have."""
    llm = preset.language_model_folder
    needed = [
        preset.encoder_folder / "config.json",
        preset.encoder_folder / "model.safetensors",
        llm / "bridge.json",
        llm / "bridge.safetensors",
        llm / "base" / "config.json",
        llm / "base" / "tokenizer.json",
    ]
    missing = [path for path in needed if not path.is_file()]
    if not any((llm / "base").glob("*.safetensors")):
        missing.append(llm / "base" / "model.safetensors")
    for modality, decoder in preset.decoders.items():
        missing += _missing_parts(preset.decoder_folder(modality))
        if decoder.link == "signal":
            folder = preset.projections_folder / modality.value
            projection = (folder / "config.json", folder / "model.safetensors")
            missing += [path for path in projection if not path.is_file()]
    return missing


def _missing_parts(folder: Path) -> Iterator[Path]:
    index = folder / "model_index.json"
    if not index.is_file():
        yield index
        return
    for part, value in json.loads(index.read_text(encoding="utf-8")).items():
        is_model = isinstance(value, list) and len(value) == 2 and value[1]
        if not is_model or part in ("scheduler", "tokenizer", "feature_extractor", "safety_checker"):
            continue
        if not (folder / part / "config.json").is_file():
            yield folder / part / "config.json"
        elif not any((folder / part).glob("*.safetensors")):
            yield folder / part / "model.safetensors"


def expect_files(preset: Preset) -> None:
    """Raise PresetProblem when the weights are not all there."""
    missing = missing_files(preset)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PresetProblem(
            f"The preset {preset.name!r} lacks {missing[0]}{more}. Restore the folder "
            f"{preset.weights_folder}, or train it with `patchbay train all --preset {preset.name}`.",
            code="weights_missing",
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


def examine(preset: Preset, host: str = "127.0.0.1", port: int = 8000) -> Iterator[Check]:
    """Look at everything, one check after the other; the last ones load the models."""
    version = ".".join(str(number) for number in sys.version_info[:3])
    yield Check("Python", sys.version_info >= (3, 11), f"{version}; 3.11 or newer is needed")
    for name in LIBRARIES:
        try:
            yield Check(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, "not installed; run `make run`, or pip install -r requirements.lock")
    yield _memory()
    free_mb = shutil.disk_usage(preset.file.parent).free // 2**20
    yield Check("disk", free_mb > 500, f"{free_mb} MB free")
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
    yield from _load(preset)


def _memory() -> Check:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return Check("memory", True, "unknown on this system")
    values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free_mb = int(values["MemAvailable"].split()[0]) // 1024
    return Check("memory", free_mb > SERVICE_MB, f"{free_mb} MB free; serving takes about {SERVICE_MB} MB")


def _load(preset: Preset) -> Iterator[Check]:
    import tempfile

    from services.artefacts import ArtefactStore
    from services.local_decoder import LocalDecoder
    from services.local_encoder import LocalEncoder
    from services.local_language_model import LocalLanguageModel

    with tempfile.TemporaryDirectory(prefix="patchbay-") as folder:
        store = ArtefactStore(Path(folder).as_uri())
        boxes: list[tuple[str, LocalEncoder | LocalLanguageModel | LocalDecoder]] = [
            ("encoder", LocalEncoder(preset, store)),
            ("language model", LocalLanguageModel(preset)),
        ]
        boxes += [
            (f"{modality.value} decoder", LocalDecoder(preset, modality, store))
            for modality in preset.decoders
        ]
        for name, box in boxes:
            try:
                box.load()
                yield Check(name, True, "loads")
            except PresetProblem as error:
                yield Check(name, False, error.message)
