"""``patchbay train bridge``: join an exchanged part of a preset to the rest, training nothing else.

What is written lies beside the preset's file, in ``bridges/NAME``, and is used from then on in place of what
comes with the weights. To undo it, remove that folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from alignment.bridges import BRIDGE_CONFIG, Bridge, new_projection, new_projectors, train_bridge
from alignment.caption_pairs import (
    Dialogues,
    pairs_that_ask,
    pairs_that_tell,
    read_pairs,
    toybox_that_asks,
    toybox_that_tells,
)
from alignment.embedded.pools import PoolSizes
from alignment.training import TrainOptions
from decoders.latent_decoder import LatentDecoder
from decoders.projection import OutputProjection, OutputProjectionConfig
from decoders.whole_pipeline import WholePipeline
from encoders.encoder import Encoder, load_encoder
from encoders.media import Modality
from llm import checkpoint
from llm.model import LanguageModel
from llm.template import Dialogue
from llm.tokenizer import ConversationTokenizer
from services.errors import BadRequest
from services.loading import loading
from services.local_decoder import load_decoder
from services.presets import Preset

PartName = Literal["image", "video", "audio", "encoder", "language_model"]
DIALOGUES_PER_STEP = 32
POOLS, SMALL_POOLS = (
    PoolSizes(looks=4000, clips=2000, sounds=2000),
    PoolSizes(looks=200, clips=100, sounds=100),
)


def train(preset: Preset, part: PartName, options: TrainOptions, captions: Path | None = None) -> Path:
    """Train the bridge to one part of ``preset`` and write it; return the folder where it lies.

    Args:
        preset: with the new part in it.
        part: a modality for its decoder, ``encoder`` or ``language_model``.
        options: where to work, and how long.
        captions: a file as :mod:`alignment.caption_pairs` describes it; None for Toybox.

    Raises:
        BadRequest: the preset has no such part, or its link needs no bridge.
        PresetProblem: a part cannot be loaded.

    """
    makes = _made(preset, part)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    reads = part in ("encoder", "language_model")
    decoders = {modality: _decoder(preset, modality) for modality in makes}
    encoder = _encoder(preset) if reads else None
    with loading("language model"):
        llm = _anew(preset, encoder) if part == "language_model" else _as_it_is(preset)
    if part == "encoder":
        assert encoder is not None
        llm.add_projectors(new_projectors(encoder, llm.width, llm.projector_configs))
    projections = {
        modality: new_projection(decoder, llm.width, _former(preset, modality))
        for modality, decoder in decoders.items()
    }
    folder = options.runs / preset.name / f"bridge-{part}-{_mark(preset, part)}"
    draws = _draws(makes, encoder, captions, folder / "pools", SMALL_POOLS if options.small else POOLS)
    config = replace(BRIDGE_CONFIG, max_minutes=options.max_minutes, seed=options.seed)
    if options.num_steps is not None:
        config = replace(config, num_steps=options.num_steps)

    def dialogues(step: int) -> Sequence[Dialogue]:
        rng = config.randomness(step)
        each = DIALOGUES_PER_STEP // len(draws)
        return [dialogue for draw in draws for dialogue in draw(rng, each)]

    rows = None if part == "language_model" else frozenset(makes)
    bridge = Bridge(llm=llm, rows=rows, projectors=reads, projections=projections, decoders=decoders)
    train_bridge(f"bridge to {part}", bridge, dialogues, folder, config)

    llm.save_bridge(preset.bridges_folder / "llm", preset.base_folder)
    for modality, projection in projections.items():
        projection.save_pretrained(preset.bridges_folder / "projections" / modality.value)
    return preset.bridges_folder


def _made(preset: Preset, part: PartName) -> list[Modality]:
    """Return the modalities whose projections are trained with ``part``."""
    signals = [m for m, decoder in preset.decoders.items() if decoder.link == "signal"]
    if part == "encoder":
        return []
    if part == "language_model":
        return signals
    modality = Modality(part)
    if modality not in preset.decoders:
        raise BadRequest(
            f"The preset {preset.name!r} has no {part} decoder; it has "
            f"{', '.join(preset.decoders) or 'none'}. Name one of these.",
            code="unknown_part",
        )
    if modality not in signals:
        raise BadRequest(
            f"The {part} decoder of the preset {preset.name!r} has the link caption, which reads words and "
            f"needs no bridge. Serve it as it is, or set link: signal.",
            code="no_bridge_needed",
        )
    return [modality]


def _decoder(preset: Preset, modality: Modality) -> LatentDecoder | WholePipeline:
    chosen = preset.decoders[modality]
    with loading(f"{modality.value} decoder"):
        dtype = getattr(torch, chosen.dtype or "float32")
        return load_decoder(modality, preset.decoder_folder(modality), preset.device, dtype)


def _encoder(preset: Preset) -> Encoder:
    with loading("encoder"):
        dtype = getattr(torch, preset.encoder.dtype or "float32")
        return load_encoder(preset.encoder_folder, preset.device, dtype, preset.tiling)


def _as_it_is(preset: Preset) -> LanguageModel:
    """Return the language model with its bridge, so that what is not trained stays."""
    dtype = torch.float32 if preset.device == "cpu" else torch.bfloat16
    return LanguageModel.from_pretrained(
        preset.language_model_folder, dtype=dtype, base=preset.base_folder, bridge=preset.bridge_folder
    )


def _anew(preset: Preset, encoder: Encoder | None) -> LanguageModel:
    """Return the base with fresh rows and projectors, and no LoRA. Signals are those of the former bridge."""
    assert encoder is not None
    dtype = torch.float32 if preset.device == "cpu" else torch.bfloat16
    former = preset.language_model_folder / checkpoint.MANIFEST
    manifest = checkpoint.Manifest.model_validate_json(former.read_bytes()) if former.is_file() else None
    signals = manifest.signal_vocabulary if manifest else None
    base = checkpoint.load_base(preset.base_folder, dtype)
    llm = LanguageModel(base, ConversationTokenizer.load(preset.base_folder, signals), {})
    llm.add_projectors(new_projectors(encoder, llm.width, manifest.projector_configs if manifest else {}))
    return llm


def _former(preset: Preset, modality: Modality) -> OutputProjectionConfig | None:
    """Return the sizes of the projection that there was, for new ones to be as large inside."""
    folder = preset.projection_folder(modality)
    return OutputProjection.from_pretrained(folder).config if (folder / "config.json").is_file() else None


def _mark(preset: Preset, part: PartName) -> str:
    """Return 8 digits that change with the files of the part, so that no run goes on with another part."""
    folder = {"encoder": preset.encoder_folder, "language_model": preset.base_folder}.get(part)
    found = hashlib.sha256(repr(preset.tiling).encode() if part == "encoder" and preset.tiling else b"")
    for path in sorted((folder or preset.decoder_folder(Modality(part))).rglob("*")):
        if path.is_file():
            found.update(f"{path.name} {path.stat().st_size}".encode())
            if path.suffix == ".json":
                found.update(path.read_bytes())
    return found.hexdigest()[:8]


def _draws(
    makes: Sequence[Modality], encoder: Encoder | None, captions: Path | None, cache: Path, sizes: PoolSizes
) -> list[Dialogues]:
    """Return the sources of dialogues that the bridge is trained on."""
    if captions is not None:
        pairs = read_pairs(captions)
        found = [pairs_that_ask(pairs, makes)] if makes else []
        return found + ([pairs_that_tell(pairs, encoder)] if encoder else [])
    found = [toybox_that_asks(makes)] if makes else []
    return found + ([toybox_that_tells(encoder, cache, sizes)] if encoder else [])
