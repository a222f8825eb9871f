"""How much memory a box needs beyond its weights and caches while it makes one thing at a time.

Networks are built from their configurations on the meta device and run there: shapes are computed, numbers
are not, and the tensors that live at the same time are counted. The functions that yield work take models on
any device, so that what is counted can be held against what is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ClapAudioConfig,
    ClapAudioModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from decoders.condition import Condition
from decoders.configured_folder import ConfiguredFolder
from decoders.configured_pipeline import ConfiguredPipeline
from decoders.latent_decoder import LatentDecoder, VaeUse
from decoders.settings import DecodeSettings
from encoders.imagebind import ImageBind, ImageBindConfig
from encoders.media import Modality
from encoders.preprocess import PreprocessConfig
from encoders.towers import AT_ONCE, NUMBERS_FILE, TOWER_FOLDERS, VISION, TowerNumbers
from llm.model import LanguageModel
from llm.slots import SlotModel
from llm.tokenizer import ConversationTokenizer, train_tokenizer
from services.allocations import peak_bytes
from services.local_decoder import decoder_class
from services.presets import Preset

Work = Callable[[], object]
Model = TypeVar("Model", bound=nn.Module)


def most(works: Iterator[Work]) -> int:
    """Return the bytes of what takes the most; one is done after the other."""
    return max(map(peak_bytes, works))


# --- the encoder ------------------------------------------------------------------------------------


def encoder_bytes(preset: Preset) -> int:
    """Count what the largest medium takes that the encoder reads."""
    folder, dtype = preset.encoder_folder, getattr(torch, preset.encoder.dtype or "float32")
    found = {name: preset.described_in(folder / name) / "config.json" for name in TOWER_FOLDERS}
    slices = 1 + preset.tiling.most if preset.tiling else 1
    configs = tuple((name, path.read_text()) for name, path in found.items() if path.is_file())
    if configs:
        return _tower_bytes(configs, TowerNumbers.read(folder / NUMBERS_FILE), dtype, slices)
    return _imagebind_bytes((preset.described_in(folder) / "config.json").read_text(), dtype, slices)


@lru_cache(maxsize=32)
def _imagebind_bytes(config: str, dtype: torch.dtype, slices: int) -> int:
    values = json.loads(config)
    with torch.device("meta"):
        model = ImageBind(ImageBindConfig.from_json(values["model"])).to(dtype).eval()
    return most(encoder_work(model, PreprocessConfig.from_json(values["preprocessing"]), slices))


@lru_cache(maxsize=32)
def _tower_bytes(
    configs: tuple[tuple[str, str], ...], numbers: TowerNumbers, dtype: torch.dtype, slices: int
) -> int:
    works = []
    for name, text in configs:
        values = json.loads(text)
        own = values.get(f"{name}_config", values)
        with torch.device("meta"):
            if name == VISION:
                vision = SiglipVisionModel(SiglipVisionConfig(**own))
                works.append(vision_work(_ready(vision, dtype), numbers, slices))
            else:
                audio = ClapAudioModelWithProjection(ClapAudioConfig(**own))
                works.append(audio_work(_ready(audio, dtype), numbers))
    return most(iter(works))


def _ready(model: Model, dtype: torch.dtype) -> Model:
    nn.Module.to(model, dtype)  # that of transformers is typed as if it took a model
    model.eval()
    return model


def vision_work(model: SiglipVisionModel, numbers: TowerNumbers, slices: int = 1) -> Work:
    """Return the reading of a video, or of an image in so many slices if these are more."""
    config: Any = model.config
    shape = min(max(numbers.video_frames, slices), AT_ONCE), 3, config.image_size, config.image_size
    return lambda: model(next(model.parameters()).new_zeros(shape)).last_hidden_state.float()


def audio_work(model: ClapAudioModelWithProjection, numbers: TowerNumbers) -> Work:
    """Return the reading of a long sound."""
    config: Any = model.config
    clips, bands = min(numbers.audio_clips, AT_ONCE), config.num_mel_bins
    shape = clips, 1, config.spec_size * (config.spec_size // bands), bands
    longer = torch.zeros(clips, 1, dtype=torch.bool)
    return lambda: model.audio_model(
        input_features=next(model.parameters()).new_zeros(shape), is_longer=longer
    ).last_hidden_state.float()


def encoder_work(model: ImageBind, numbers: PreprocessConfig, slices: int = 1) -> Iterator[Work]:
    """Yield the reading of one medium of each kind, as long as it may be; of an image in so many slices."""
    side, frames = numbers.image_size, numbers.video_clip_frames
    clips = numbers.video_clips * numbers.video_crops
    shapes = [
        ("vision", (slices, 3, side, side)),
        ("vision", (1, clips, 3, frames, side, side)),
        ("audio", (1, numbers.audio_clips, 1, numbers.num_mel_bins, numbers.num_mel_frames)),
    ]
    weight = next(model.parameters())

    def read(tower: str, shape: tuple[int, ...]) -> None:
        model.embed_tokens({tower: weight.new_zeros(shape)})[tower].float()

    for tower, shape in shapes:
        if tower in model.modality_trunks:
            yield partial(read, tower, shape)


# --- the language model -----------------------------------------------------------------------------


def language_model_bytes(preset: Preset) -> int:
    """Count what a step of the engine takes: a piece of a prompt, or a token for every slot."""
    options = preset.language_model
    return _language_model_bytes(
        (preset.described_in(preset.base_folder) / "config.json").read_text(),
        preset.language_model_dtype,
        options.slots,
        options.context,
        options.step_tokens,
        preset.device,
    )


@lru_cache(maxsize=64)
def _language_model_bytes(
    config: str, dtype: str, slots: int, context: int | None, step_tokens: int, device: str
) -> int:
    values = json.loads(config)
    tokenizer = ConversationTokenizer(train_tokenizer(["any"], 300))
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        model = LanguageModel(base.to(getattr(torch, dtype)), tokenizer, {}).eval()
    seen = min(context or model.context_length, model.context_length)
    return most(language_model_work(model, slots, seen, step_tokens, torch.device(device)))


def language_model_work(
    model: LanguageModel, slots: int, context: int, step_tokens: int, runs_on: torch.device | None = None
) -> Iterator[Work]:
    """Yield the passes of an engine whose cache is full; what its last growth took is less."""
    speaker = SlotModel(model, slots, context, runs_on=runs_on)
    with torch.inference_mode():
        speaker.run(torch.zeros(1, 1, model.width, device=model.device), [0], [context - 1])

    def feed(rows: int, length: int) -> None:
        states = torch.zeros(rows, length, model.width, device=model.device)
        hidden = speaker.run(states, range(rows), [context - length] * rows)
        model.logits(hidden[:, -1])

    yield partial(feed, 1, min(step_tokens, context))
    yield partial(feed, slots, max(1, min(step_tokens // slots, context)))


# --- a decoder --------------------------------------------------------------------------------------


def decoder_bytes(preset: Preset, modality: Modality) -> int:
    """Count what one medium takes, of the size and with the guidance that the preset asks for."""
    chosen = preset.decoders[modality]
    folder = preset.described_in(preset.decoder_folder(modality), "model_index.json")
    configs = tuple(
        path.read_text() for path in sorted(folder.rglob("*.json")) if not path.name.startswith("tokenizer")
    )
    return _decoder_bytes(
        folder, configs, modality, chosen.fill(DecodeSettings()), chosen.dtype or "float32", chosen.vae
    )


@lru_cache(maxsize=64)
def _decoder_bytes(
    folder: Path, configs: tuple[str, ...], modality: Modality, wish: DecodeSettings, dtype: str, vae: VaeUse
) -> int:
    """Count; ``configs`` are what the folder held, so that another folder of that name is counted anew."""
    known, found = decoder_class(modality), ConfiguredFolder(folder, "meta", getattr(torch, dtype))
    if found.pipeline_class not in known.pipelines:
        whole = ConfiguredPipeline(folder, getattr(torch, dtype))
        whole.use_vae(vae)
        return peak_bytes(whole.work(wish))
    decoder = known(found)
    decoder.use_vae(vae)
    return most(decoder_work(decoder, wish, sliced=vae != "whole"))


def decoder_work(decoder: LatentDecoder, wish: DecodeSettings, *, sliced: bool = False) -> Iterator[Work]:
    """Yield a denoising step, and the way from clean latents to pictures or samples."""
    spec, device, dtype = decoder.condition_spec, decoder.folder.device, decoder.folder.dtype
    plan = decoder.plan(Condition(torch.zeros(spec.tokens, spec.width)), wish)
    rows = 2 if (plan.settings.guidance_scale or 0) > 1 else 1

    def step() -> None:
        latents = torch.zeros(rows, *plan.shape, dtype=dtype, device=device)
        conditions = torch.zeros(rows, spec.tokens, spec.width, dtype=dtype, device=device)
        decoder._predict(latents, torch.zeros(rows, device=device), conditions)

    yield step
    yield lambda: decoder.finish(torch.zeros(1, *plan.shape, dtype=dtype, device=device), sliced=sliced)
