"""The models of a preset with random weights, of its true sizes: each box as the service holds it.

Shapes come from the preset's configurations; nothing is downloaded. On the meta device models hold shapes
only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from decoders.condition import Condition
from decoders.configured_folder import ConfiguredFolder
from decoders.latent_decoder import LatentDecoder
from decoders.pipeline_folder import PipelineFolder
from decoders.projection import OutputProjection, OutputProjectionConfig
from decoders.settings import DecodeSettings
from encoders.encoder import load_encoder
from encoders.imagebind import ImageBind, ImageBindConfig
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Audio, Image, Medium, Modality, Video
from encoders.preprocess import PreprocessConfig
from llm.checkpoint import Manifest
from llm.model import LanguageModel
from llm.tokenizer import ConversationTokenizer, train_tokenizer
from services.local_decoder import decoder_class, load_decoder
from services.memory_plan import changed
from services.presets import Preset, load_preset


def _papers() -> Preset:
    return load_preset("nextgpt-7b")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured. The defaults are the paper's; tests take smaller ones.

    ``preset`` names the configurations. ``prompt_tokens`` and ``new_tokens`` are those of one reply,
    ``settings`` those of one medium. ``probe`` is the side of the matrices that tell how fast a device is.
    """

    preset: Preset = field(default_factory=_papers)
    dtype: torch.dtype = torch.bfloat16
    streams: tuple[int, ...] = (1, 8, 32)
    at_once: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 128
    new_tokens: int = 128
    steps: int = 50
    guidance_scale: float = 7.5
    rounds: int = 3
    probe: int = 8192
    settings: tuple[tuple[Modality, DecodeSettings], ...] = (
        (Modality.IMAGE, DecodeSettings(width_px=512, height_px=512)),
        (Modality.VIDEO, DecodeSettings(width_px=576, height_px=320, num_frames=24)),
        (Modality.AUDIO, DecodeSettings(duration_s=10.0)),
    )

    def wish(self, modality: Modality) -> DecodeSettings:
        """Return the settings of one medium, all but its seed."""
        wish = dict(self.settings)[modality]
        return replace(wish, steps=self.steps, guidance_scale=self.guidance_scale, scheduler="dpmsolver++")

    def quick(self) -> Sizes:
        """Return the same models with less to do: a few steps, and no large batches."""
        return replace(self, streams=self.streams[:2], at_once=self.at_once[:2], steps=5, rounds=1)

    def asked_of_doctor(self, device: str) -> Preset:
        """Return the preset on ``device``, with every box in :attr:`dtype`, as it is measured here."""
        dtype = str(self.dtype).removeprefix("torch.")
        changes = {"device": device, "encoder.dtype": dtype, "language_model.dtype": dtype}
        changes |= {f"decoders.{modality.value}.dtype": dtype for modality in self.preset.decoders}
        return changed(self.preset, changes)


@contextmanager
def _made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Let modules be born on ``device`` in ``dtype``, so that none is there twice."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(usual)


def _configuration(sizes: Sizes, folder: Path, name: str = "config.json") -> dict[str, Any]:
    values: dict[str, Any] = json.loads((sizes.preset.described_in(folder, name) / name).read_text())
    return values


def build_encoder(sizes: Sizes, device: str) -> ImageBindEncoder:
    """Return an ImageBind with random weights, and its preprocessing."""
    values = _configuration(sizes, sizes.preset.encoder_folder)
    with _made_on(device, sizes.dtype):
        model = ImageBind(ImageBindConfig.from_json(values["model"]))
    model = model.to(sizes.dtype).eval().requires_grad_(False)
    return ImageBindEncoder(model, PreprocessConfig.from_json(values["preprocessing"]), None)


def build_base(sizes: Sizes, device: str) -> Any:
    """Return a causal LM with random weights."""
    values = _configuration(sizes, sizes.preset.base_folder)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with _made_on(device, sizes.dtype):
        base = AutoModelForCausalLM.from_config(config, dtype=sizes.dtype)
    return base.eval().requires_grad_(False)


def build_language_model(sizes: Sizes, device: str) -> LanguageModel:
    """Return a language model with random weights and bridge; of its full-size head it knows few words."""
    manifest = Manifest(**_configuration(sizes, sizes.preset.bridge_folder, "bridge.json"))
    tokenizer = ConversationTokenizer(
        train_tokenizer(["a big red bell"], 300), manifest.signal_vocabulary, manifest.role_words
    )
    base = build_base(sizes, device)
    model = LanguageModel(base, tokenizer, manifest.projector_configs)
    return model.to(device).eval().requires_grad_(False)


def build_decoder(sizes: Sizes, modality: Modality, device: str) -> LatentDecoder:
    """Return a decoder with random weights."""
    own = sizes.preset.decoder_folder(modality)
    folder = ConfiguredFolder(sizes.preset.described_in(own, "model_index.json"), device, sizes.dtype)
    return decoder_class(modality)(folder)


def build_projection(sizes: Sizes, modality: Modality, device: str) -> OutputProjection:
    """Return the output projection to a decoder with random weights, in float32 as the service has it."""
    values = _configuration(sizes, sizes.preset.projection_folder(modality))
    with _made_on(device, torch.float32):
        projection = OutputProjection(OutputProjectionConfig(**values))
    return projection.eval().requires_grad_(False)


@dataclass(frozen=True)
class BuiltDecoder:
    """A decoder and the projection that conditions it."""

    decoder: LatentDecoder
    projection: OutputProjection

    def condition(self) -> Condition:
        """Return what the projection makes of a random signal."""
        weight = self.projection.fc.weight
        signal = torch.randn(1, 4, weight.shape[1], device=weight.device)
        with torch.inference_mode():
            states = self.projection(signal, signal)[0]
        return Condition(states.float().cpu())


@dataclass(frozen=True)
class BoxKind:
    """How one box is built, which networks it has, and how it is written to a folder and read from there."""

    name: str
    build: Callable[[Sizes, str], Any]
    networks: Callable[[Any], list[nn.Module]]
    write: Callable[[Any, Path], None]
    read: Callable[[Path, Sizes, str], Any]


def box_kinds(sizes: Sizes) -> list[BoxKind]:
    """Return the boxes in the order and under the names that ``patchbay doctor`` has for them."""
    encoder = BoxKind(
        "encoder",
        build_encoder,
        lambda built: [built.model],
        lambda built, folder: built.save_pretrained(folder / "encoder", sizes.dtype),
        lambda folder, sizes, device: load_encoder(folder / "encoder", device, sizes.dtype),
    )
    speaker = BoxKind(
        "language model",
        build_language_model,
        lambda built: [built],
        lambda built, folder: built.save_pretrained(folder / "llm", sizes.dtype),
        lambda folder, sizes, device: LanguageModel.from_pretrained(
            folder / "llm", device, dtype=sizes.dtype
        ),
    )
    return [encoder, speaker, *map(_decoder_kind, sizes.preset.decoders)]


def _decoder_kind(modality: Modality) -> BoxKind:
    def build(sizes: Sizes, device: str) -> BuiltDecoder:
        decoder = build_decoder(sizes, modality, device)
        return BuiltDecoder(decoder, build_projection(sizes, modality, device))

    def read(folder: Path, sizes: Sizes, device: str) -> BuiltDecoder:
        decoder = load_decoder(modality, folder / modality.value, device, sizes.dtype)
        assert isinstance(decoder, LatentDecoder)
        link = OutputProjection.from_pretrained(folder / "projections" / modality.value, device)
        return BuiltDecoder(decoder, link)

    return BoxKind(
        f"{modality.value} decoder",
        build,
        lambda built: [*_networks(built.decoder).values(), built.projection],
        lambda built, folder: _write_decoder(built, modality, folder),
        read,
    )


def _networks(decoder: LatentDecoder) -> dict[str, Any]:
    """Return the networks of a decoder by the names of its pipeline's parts."""
    return {name: value for name, value in vars(decoder).items() if isinstance(value, nn.Module)}


def _write_decoder(built: BuiltDecoder, modality: Modality, folder: Path) -> None:
    """Write a decoder as diffusers saves its pipeline, without text encoder."""
    decoder, own = built.decoder, folder / modality.value
    networks = _networks(decoder)
    for name, network in networks.items():
        network.save_pretrained(own / name)
    kept = ("_class_name", "_diffusers_version", *networks)
    index = {name: value for name, value in decoder.folder.index.items() if name in kept}
    (own / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (own / "scheduler").mkdir()
    (own / "scheduler" / "scheduler_config.json").write_text(json.dumps(decoder.folder.scheduler_config()))
    null = decoder.folder.saved_null()
    assert null is not None
    PipelineFolder(own).write_null(null)
    built.projection.save_pretrained(folder / "projections" / modality.value)


def media_to_read(sizes: Sizes) -> dict[Modality, Medium]:
    """Return a picture, a video and a sound of noise, of the sizes that decoders make."""
    noise = np.random.default_rng(0)
    media: dict[Modality, Medium] = {}
    for modality, wish in sizes.settings:
        if modality is Modality.AUDIO:
            samples = noise.uniform(-1, 1, int(16_000 * (wish.duration_s or 1.0))).astype(np.float32)
            media[modality] = Audio(samples, 16_000)
            continue
        shape = wish.height_px or 1, wish.width_px or 1, 3
        if modality is Modality.IMAGE:
            media[modality] = Image(noise.integers(0, 256, shape, dtype=np.uint8))
        else:
            frames = noise.integers(0, 256, (wish.num_frames or 1, *shape), dtype=np.uint8)
            media[modality] = Video(frames, 8.0)
    return media
