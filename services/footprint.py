"""What the boxes of a preset take, before anything is loaded: files, terms, and bytes of memory.

Shapes come from the configurations: those beside the weights, or where there are no weights yet, those
that come with the preset. The models are built on the meta device, which holds no numbers.
"""

from __future__ import annotations

import gc
import json
import math
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from decoders.pipeline_arguments import WITHOUT_TEXT_ENCODERS
from encoders.media import Modality
from services.origins import Origin
from services.presets import BoxPreset, LanguageModelPreset, Preset, QuantizationName, shown
from services.weight_files import UNFINISHED, absent_shards, damage, read_header

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
NOT_MODELS = ("scheduler", "tokenizer", "feature_extractor", "safety_checker", "image_encoder")
"""How the names of parts begin that hold no weights, or none that are used: tokenizer_2 is one too."""
LINKS_OWN, TABLES = "projection", "tables.safetensors"
NOT_BUILT = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)
"""What libraries raise on a configuration of which nothing can be built."""
TOWERS = {"vision": "vision tower", "audio": "audio tower"}
TAKEN_APART = ("StableDiffusionPipeline", "TextToVideoSDPipeline", "AudioLDMPipeline")
"""Pipelines that do not run as a whole. Their text encoder is let go when it is not needed."""


@dataclass(frozen=True)
class Part:
    """One model of a box.

    ``parameters`` is None where neither weights nor a configuration tell. ``dtype`` is that in which the
    box will hold them, ``missing`` are files that it needs and does not have. Of its weights ``matrices``
    are those that ``quantization`` replaces. ``stays`` is False for what is let go after a moment's use, or
    becomes part of another's weights. ``published`` is the dtype of the files that are downloaded; None where
    that is not known, or nothing is downloaded for it.
    """

    name: str
    parameters: int | None
    dtype: str
    on_disk: int
    missing: tuple[Path, ...]
    matrices: tuple[tuple[int, int], ...] = ()
    quantization: QuantizationName | None = None
    stays: bool = True
    published: str | None = None

    @property
    def download(self) -> int | None:
        """Bytes of its published files; None where they are not known."""
        if self.parameters is None or self.published is None:
            return None
        return self.parameters * BYTES[self.published]

    @property
    def in_memory(self) -> int:
        """Bytes of its weights once it is loaded."""
        if not self.stays or self.parameters is None:
            return 0
        size = BYTES[self.dtype]
        if self.quantization is None:
            return self.parameters * size
        from llm.quantization import quantized_bytes

        whole = self.parameters - sum(rows * columns for rows, columns in self.matrices)
        return whole * size + sum(quantized_bytes(*shape, self.quantization, size) for shape in self.matrices)


@dataclass(frozen=True)
class Box:
    """A box, its parts, and where they come from.

    In bytes: ``cache`` is what full conversations add, ``adapters`` what those of the allow-list add when
    they are loaded, ``working`` what making one thing at a time takes on top; None if that is not known.
    """

    name: str
    parts: tuple[Part, ...]
    origins: tuple[Origin, ...]
    cache: int = 0
    modality: Modality | None = None
    """What it makes, if it is a decoder."""
    adapters: int = 0
    working: int | None = None

    @property
    def in_memory(self) -> int:
        """Bytes of all weights and of the cache."""
        return sum(part.in_memory for part in self.parts) + self.cache

    @property
    def movable(self) -> int:
        """Bytes of a decoder's own weights, without those of the link to it."""
        if self.modality is None:
            return 0
        return sum(part.in_memory for part in self.parts if part.name != LINKS_OWN)

    @property
    def missing(self) -> tuple[Path, ...]:
        """All files that are not there."""
        return tuple(path for part in self.parts for path in part.missing)


def decoder_bytes(preset: Preset, modality: Modality) -> int:
    """Return the bytes that the weights of one decoder take, without the link to it."""
    return _decoder(preset, modality).movable


def needed(preset: Preset, boxes: Sequence[Box]) -> int:
    """Return the bytes that the boxes of ``preset`` take on its device when all of them work.

    With ``decoders_gb`` that is less than their sum, as decoders then make room for each other.
    """
    every = sum(box.in_memory + box.adapters for box in boxes)
    movable = sum(box.movable for box in boxes)
    budget = movable if preset.decoders_gb is None else int(preset.decoders_gb * 1e9)
    return every - max(0, movable - budget) + at_work(preset, boxes)


def at_work(preset: Preset, boxes: Sequence[Box]) -> int:
    """Return the bytes that boxes take beyond what they hold, when each makes one thing at a time.

    With ``decoders_gb`` only those decoders work together whose weights fit into that together.
    """
    decoders = [box for box in boxes if box.modality]
    budget = math.inf if preset.decoders_gb is None else preset.decoders_gb * 1e9
    together = (some for count in range(len(decoders) + 1) for some in combinations(decoders, count))
    fitting = [some for some in together if sum(box.movable for box in some) <= budget]
    return sum(box.working or 0 for box in boxes if not box.modality) + max(
        sum(box.working or 0 for box in some) for some in fitting
    )


def boxes_of(preset: Preset) -> list[Box]:
    """Look at every box of ``preset``. Nothing is loaded; files that are not there are named."""
    with _uncollected():
        boxes = [_encoder(preset), _language_model(preset)]
        boxes += [_decoder(preset, modality) for modality in preset.decoders]
        return [
            replace(
                box,
                parts=tuple(replace(part, published=_published(part, box.origins)) for part in box.parts),
                adapters=_adapters(preset, box),
                working=working_bytes(preset, box),
            )
            for box in boxes
        ]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Let Python's collector rest: looking through all that libraries and networks are made of takes a
    quarter of the time, and finds nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _published(part: Part, origins: Sequence[Origin]) -> str | None:
    return next((origin.published[part.name] for origin in origins if part.name in origin.published), None)


def _adapters(preset: Preset, box: Box) -> int:
    """Return what the adapters that requests may name take together, as far as they may stay in memory."""
    name = {"language model": "language_model"}.get(box.name, str(box.modality))
    folders = [preset.weights_folder / own.folder for own in preset.adapters.values() if own.box == name]
    each = BYTES[box.parts[0].dtype]
    return min(sum((_numbers_in(f) or 0) * each for f in folders), preset.limits.max_adapter_mb * 2**20)


def working_bytes(preset: Preset, box: Box) -> int | None:
    """Count what a box takes while it works; None for what cannot be counted from its configurations."""
    from services import working_memory

    if any(part.parameters is None for part in box.parts):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what the libraries themselves use
            if box.modality is not None:
                return working_memory.decoder_bytes(preset, box.modality)
            if box.name == "encoder":
                return working_memory.encoder_bytes(preset)
            return working_memory.language_model_bytes(preset) + _whole_again(box.parts[0])
    except NOT_BUILT:
        return None


def _whole_again(base: Part) -> int:
    if base.quantization is None or not base.matrices:
        return 0
    from llm.quantization import whole_again_bytes

    return max(whole_again_bytes(*shape, base.quantization, BYTES[base.dtype]) for shape in base.matrices)


def missing_files(preset: Preset) -> list[Path]:
    """Return the files that a preset needs and does not have; no model is built for it."""
    return [path for name in _needed(preset).values() for path in name]


def unfinished_downloads(preset: Preset) -> dict[Path, int]:
    """Return the folders into which a download was broken off, and the bytes that have come."""
    folders = [preset.encoder_folder, *(preset.encoder_folder / tower for tower in TOWERS)]
    folders += [preset.base_folder, *map(preset.decoder_folder, preset.decoders)]
    folders += [preset.weights_folder / own.download.into for own in preset.origins if own.download]
    found, seen = {}, set[Path]()
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):  # a tower's before the encoder's
        partial = set(folder.rglob(f"*{UNFINISHED}")) - seen
        if partial:
            found[folder] = sum(path.stat().st_size for path in partial)
        seen |= partial
    return found


def damaged_files(preset: Preset) -> dict[Path, str]:
    """Say of the files of a preset that are there and not whole what is wrong; nothing is loaded."""
    return dict(damage(_folders(preset)))


def bytes_to_load(preset: Preset) -> int:
    """Return how large all files of weights are that a preset reads when it starts; no model is built."""
    return sum(_weight(folder) for folder in _folders(preset))


def _folders(preset: Preset) -> list[Path]:
    """Return every folder in which weights of a preset lie, each once."""
    encoder, own = preset.encoder_folder, preset.bridge_folder
    folders = [encoder, *(encoder / tower for tower in TOWERS), preset.base_folder, own]
    folders += [preset.language_model_folder, preset.language_model_folder / "adapter"]
    for modality, decoder in preset.decoders.items():
        folder = preset.decoder_folder(modality)
        folders += [folder, *(folder / part for part in _models(_json(folder / "model_index.json")))]
        if decoder.link == "signal":
            folders.append(preset.projection_folder(modality))
    return list(dict.fromkeys(folders))


def _needed(preset: Preset) -> dict[str, list[Path]]:
    """Return the missing files of each part, by ``box/part``."""
    encoder, llm, own = preset.encoder_folder, preset.language_model_folder, preset.bridge_folder
    manifest = _configured(preset, own, "bridge.json")
    lora = [llm / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    base = [preset.base_folder / "config.json", preset.base_folder / "tokenizer.json"]
    missing = {
        **{f"encoder/{part}": _absent(files) for part, (_, files) in _encoder_parts(preset, encoder).items()},
        "language model/bridge": _absent([own / "bridge.json", own / "bridge.safetensors"]),
        "language model/LoRA": _absent(lora if manifest.get("lora") else []),
        "language model/tables": _absent([llm / TABLES] if manifest.get("base_tables") else []),
        "language model/base": _absent(base) + _without_weights(preset.base_folder),
    }
    for modality, decoder in preset.decoders.items():
        box = f"{modality.value} decoder"
        folder = preset.decoder_folder(modality)
        if not (folder / "model_index.json").is_file():
            missing[f"{box}/pipeline"] = [folder / "model_index.json"]
        for part in _models(_json(folder / "model_index.json")):
            config = _absent([folder / part / "config.json"])
            missing[f"{box}/{part}"] = config or _without_weights(folder / part)
        if decoder.link == "signal":
            link = preset.projection_folder(modality)
            missing[f"{box}/projection"] = _absent([link / "config.json", link / "model.safetensors"])
    return missing


def faults_of_adapter(folder: Path) -> list[str]:
    """Say what of an adapter's files is missing or not whole."""
    plain = folder / "pytorch_lora_weights.safetensors"
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    missing = [] if plain.is_file() else _absent(files)
    return [f"{path} is missing" for path in missing] or list(dict(damage([folder])).values())


def _encoder_parts(preset: Preset, folder: Path) -> dict[str, tuple[str, list[Path]]]:
    """Return the kind and the files of each part of the encoder: of its towers, or of an ImageBind."""
    towers = {name: kind for name, kind in TOWERS.items() if _configured(preset, folder / name)}
    if not towers:
        return {"towers": ("ImageBind", [folder / "config.json", folder / "model.safetensors"])}
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    return {
        f"{name} tower": (kind, [folder / name / file for file in names]) for name, kind in towers.items()
    }


def _encoder(preset: Preset) -> Box:
    folder, dtype, needed = preset.encoder_folder, preset.encoder.dtype or "float32", _needed(preset)
    parts = []
    for name, (kind, (config, *_)) in _encoder_parts(preset, folder).items():
        own = config.parent
        count, _ = _counted(own, _configured(preset, own), kind)
        parts.append(Part(name, count, dtype, _weight(own), tuple(needed[f"encoder/{name}"])))
    return Box("encoder", tuple(parts), preset.encoder.origins)


def _language_model(preset: Preset) -> Box:
    needed, llm = _needed(preset), preset.language_model_folder
    dtype = preset.language_model_dtype
    config, own = _configured(preset, preset.base_folder), preset.bridge_folder
    manifest = _configured(preset, own, "bridge.json")
    count, matrices = _counted(preset.base_folder, config, "language model")
    base = Part(
        "base",
        count,
        dtype,
        _weight(preset.base_folder),
        tuple(needed["language model/base"]),
        matrices,
        preset.language_model.quantization,
    )
    bridge = Part(
        "bridge",
        _counted(own, manifest, "bridge")[0],
        "float32",
        _weight(own, "bridge.safetensors"),
        tuple(needed["language model/bridge"]),
    )
    parts = [base, bridge]
    if manifest.get("lora"):
        adapter = llm / "adapter"
        added = _configured(preset, adapter, "adapter_config.json")
        count = _numbers_in(adapter) or _lora_numbers(json.dumps(config), json.dumps(added))
        missing = tuple(needed["language model/LoRA"])
        parts.append(Part("LoRA", count, dtype, _weight(adapter), missing, stays=False))
    if manifest.get("base_tables"):
        rows, width = (manifest.get(name) for name in ("base_vocabulary", "llm_width"))
        count = 2 * rows * width if isinstance(rows, int) and isinstance(width, int) else None
        missing = tuple(needed["language model/tables"])
        parts.append(Part("tables", count, dtype, _weight(llm, TABLES), missing, stays=False))
    return Box(
        "language model",
        tuple(parts),
        preset.language_model.origins,
        _cache(config, dtype, preset.language_model),
    )


def _decoder(preset: Preset, modality: Modality) -> Box:
    name, decoder, folder = (
        f"{modality.value} decoder",
        preset.decoders[modality],
        preset.decoder_folder(modality),
    )
    needed, dtype = _needed(preset), decoder.dtype or "float32"
    index = _configured(preset, folder, "model_index.json")
    kind, parts = index.get("_class_name"), []
    for part in _models(index):
        config = _configured(preset, folder / part)
        count, _ = _counted(folder / part, config, index[part][1])
        missing = tuple(needed.get(f"{name}/{part}", [folder / part / "config.json"]))
        let_go = part.startswith("text_encoder") and kind in (*TAKEN_APART, *WITHOUT_TEXT_ENCODERS)
        stays = not let_go or decoder.link == "caption"
        parts.append(Part(part, count, dtype, _weight(folder / part), missing, stays=stays))
    if not parts:
        parts.append(Part("pipeline", None, dtype, 0, tuple(needed.get(f"{name}/pipeline", ()))))
    if decoder.link == "signal":
        link = preset.projection_folder(modality)
        count, _ = _counted(link, _configured(preset, link), LINKS_OWN)
        missing = tuple(needed[f"{name}/projection"])
        parts.append(Part(LINKS_OWN, count, "float32", _weight(link), missing))
    return Box(name, tuple(parts), decoder.origins, modality=modality)


def _configured(preset: Preset, folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return a configuration from beside the weights, else from the preset; empty if there is none."""
    return _json(preset.described_in(folder, name) / name)


def _json(path: Path) -> dict[str, Any]:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _models(index: dict[str, Any]) -> Iterator[str]:
    for part, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[1] and not part.startswith(NOT_MODELS):
            yield part


def _absent(paths: list[Path]) -> list[Path]:
    return [path for path in paths if not path.is_file()]


def _without_weights(folder: Path) -> list[Path]:
    if absent := absent_shards(folder):
        return absent
    return [] if any(folder.glob("*.safetensors")) else [folder / "model.safetensors"]


def _weight(folder: Path, name: str = "*.safetensors") -> int:
    return sum(path.stat().st_size for path in folder.glob(name))


Matrices = tuple[tuple[int, int], ...]


def _counted(folder: Path, config: dict[str, Any], kind: str) -> tuple[int | None, Matrices]:
    """Count what ``config`` describes; where that is not known, what the files hold."""
    found, matrices = _described(kind, json.dumps(config)) if config else (None, ())
    return _numbers_in(folder) if found is None else found, matrices


@lru_cache(maxsize=256)
def _described(kind: str, config: str) -> tuple[int | None, Matrices]:
    """Build a network on the meta device; return its parameters and what of it can be quantised."""
    import torch

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what the libraries themselves use
            model = _build(kind, json.loads(config))
    except NOT_BUILT:
        return None, ()
    if model is None:
        return None, ()
    matrices: Matrices = ()
    if kind == "language model":
        from llm.quantization import quantizable

        matrices = tuple((layer.out_features, layer.in_features) for _, layer in quantizable(model))
    return sum(parameter.numel() for parameter in model.parameters()), matrices


@lru_cache(maxsize=32)
def _lora_numbers(base: str, lora: str) -> int | None:
    """Count what LoRA of a configuration adds to a base."""
    import torch

    try:
        values = json.loads(lora)
        rank, targets = int(values["r"]), tuple(values["target_modules"])
        with torch.device("meta"):
            model = _build("language model", json.loads(base))
    except NOT_BUILT:
        return None
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(targets)
    ]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def _numbers_in(folder: Path) -> int | None:
    """Return how many numbers the safetensors of a folder hold, from their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            header = read_header(path)
        except ValueError:
            continue  # no more is known of a damaged file; expect_files names it
        total += sum(math.prod(tensor["shape"]) for tensor in header.values())
    return total or None


def _build(kind: str, values: dict[str, Any]) -> Any:
    """Build a network of a kind that is known here, by its configuration; None for any other class."""
    match kind:
        case "ImageBind":
            from encoders.imagebind import ImageBind, ImageBindConfig

            return ImageBind(ImageBindConfig.from_json(values["model"]))
        case "language model":
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.for_model(values.pop("model_type"), **values)
            return AutoModelForCausalLM.from_config(config)
        case "bridge":
            return _bridge(values)
        case "projection":
            from decoders.projection import OutputProjection, OutputProjectionConfig

            return OutputProjection(OutputProjectionConfig(**values))
        case "vision tower":
            from transformers import SiglipVisionConfig, SiglipVisionModel

            return SiglipVisionModel(SiglipVisionConfig(**values.get("vision_config", values)))
        case "audio tower":
            from transformers import ClapAudioConfig, ClapAudioModelWithProjection

            return ClapAudioModelWithProjection(ClapAudioConfig(**values.get("audio_config", values)))
    return _of_a_library(kind, values)


def _of_a_library(kind: str, values: dict[str, Any]) -> Any:
    """Build a network of diffusers or transformers; None for a class that neither has."""
    import diffusers
    import transformers

    if (model := getattr(diffusers, kind, None)) is not None and hasattr(model, "from_config"):
        return model.from_config(values)
    if (model := getattr(transformers, kind, None)) is not None and hasattr(model, "config_class"):
        return model(model.config_class.from_dict(values))
    return None


def _bridge(values: dict[str, Any]) -> Any:
    from torch import nn

    from llm.checkpoint import Manifest
    from llm.projectors import build_projector

    manifest = Manifest(**values)
    rows = nn.Embedding(2 * len(manifest.added_tokens), manifest.llm_width)
    return nn.ModuleList([rows, *map(build_projector, manifest.projector_configs.values())])


def _cache(config: dict[str, Any], dtype: str, options: LanguageModelPreset) -> int:
    """Return the bytes of keys and values when a slot is full: all of them are as long as the longest."""
    try:
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        shared = config.get("num_key_value_heads") or heads
        positions, layers = config["max_position_embeddings"], config["num_hidden_layers"]
        positions = min(positions, options.context or positions)
        return int(2 * layers * shared * width * positions * options.slots * BYTES[dtype])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0


def commands(box: BoxPreset, preset: Preset) -> list[str]:
    """Return what to type to get those weights of a box that are not downloaded."""
    weights = shlex.quote(shown(preset.weights_folder))
    return [origin.command(weights, preset.as_argument) for origin in box.origins if origin.get]
