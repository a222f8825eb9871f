"""An agent over models in this process."""

from __future__ import annotations

from services.agent import Agent
from services.artefacts import ArtefactStore
from services.local_decoder import LocalDecoder
from services.local_encoder import LocalEncoder
from services.local_language_model import LocalLanguageModel
from services.presets import Preset


def local_agent(preset: Preset, store: ArtefactStore) -> Agent:
    """Return an agent over models in this process; the language model is loaded at once."""
    language_model = LocalLanguageModel(preset)
    language_model.load()
    return Agent(
        encode=LocalEncoder(preset, store),
        generate=language_model,
        decode={modality: LocalDecoder(preset, modality, store) for modality in preset.decoders},
        store=store,
        inputs=preset.encoder.modalities,
        generation=preset.generation,
        limits=preset.limits,
        cost_limits={modality: decoder.limits for modality, decoder in preset.decoders.items()},
        adapters=preset.adapters,
    )
