"""An agent over models in this process."""

from __future__ import annotations

from services.agent import Agent
from services.artefacts import ArtefactStore
from services.decoder_pool import DecoderPool
from services.local_decoder import LocalDecoder, pool_for
from services.local_encoder import LocalEncoder
from services.local_language_model import LocalLanguageModel
from services.presets import Preset


def local_agent(preset: Preset, store: ArtefactStore, pool: DecoderPool | None = None) -> Agent:
    """Return an agent over models in this process; the language model is loaded at once.

    Agents that are given the same ``pool`` share decoders; without one, the preset's own budget counts.
    """
    pool = pool_for(preset) if pool is None else pool
    language_model = LocalLanguageModel(preset)
    language_model.load()
    return Agent(
        encode=LocalEncoder(preset, store),
        generate=language_model,
        decode={modality: LocalDecoder(preset, modality, store, pool) for modality in preset.decoders},
        store=store,
        inputs=preset.encoder.modalities,
        generation=preset.generation,
        second_look=preset.second_look,
        limits=preset.limits,
        cost_limits={modality: decoder.limits for modality, decoder in preset.decoders.items()},
        adapters=preset.adapters,
    )
