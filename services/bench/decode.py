"""Media per second of the denoising engine, beside the diffusers pipelines called one by one.

Both sides hold the same networks and get the same text states, so neither pays for reading a caption.
They take turns, so that what else the machine does hits both.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from statistics import median
from typing import Any

import torch
from diffusers import AudioLDMPipeline, StableDiffusionPipeline, TextToVideoSDPipeline

from decoders.condition import Condition
from decoders.denoising import make_scheduler
from decoders.engine import DenoisingEngine, EngineConfig
from decoders.latent_decoder import LatentDecoder
from decoders.settings import DecodeSettings
from decoders.stacked_video import TextToStackedVideoPipeline
from encoders.media import Modality
from services.bench import BenchRow
from services.errors import PresetProblem
from services.loading import loading
from services.local_decoder import decoder_class
from services.presets import Preset

logger = logging.getLogger(__name__)

AT_ONCE = (1, 4, 16)
ROUNDS, QUICK_ROUNDS = 5, 2
PEERS_PER_ROUND = 2
CAPTION = "a big red bell"


def run(preset: Preset, quick: bool) -> list[BenchRow]:
    """Measure every decoder of the preset that loads; the others are named in a warning."""
    rows: list[BenchRow] = []
    for modality in preset.decoders:
        try:
            with loading(f"{modality.value} decoder"):
                decoder = decoder_class(modality).load(preset.decoder_folder(modality), preset.device)
        except PresetProblem as error:
            logger.warning("%s It is left out.", error.message)
            continue
        rows += measure(decoder, QUICK_ROUNDS if quick else ROUNDS)
    return rows


def measure(decoder: LatentDecoder, rounds: int) -> list[BenchRow]:
    """Measure one decoder at its default settings."""
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=max(AT_ONCE), max_wait_s=1e6))
    condition = decoder.encode_caption(CAPTION)
    peer = _peer(decoder, condition)
    peer(0)
    rows = []
    for count in AT_ONCE:
        asyncio.run(_together(engine, condition, count))
        ours, theirs = [], []
        for number in range(rounds if count < max(AT_ONCE) else max(1, rounds // 2)):
            began = time.perf_counter()
            for seed in range(PEERS_PER_ROUND):
                peer(number * PEERS_PER_ROUND + seed)
            between = time.perf_counter()
            asyncio.run(_together(engine, condition, count))
            theirs.append((between - began) / PEERS_PER_ROUND)
            ours.append((time.perf_counter() - between) / count)
        rows.append(
            BenchRow(
                case=f"{decoder.modality.value} {count} at once",
                value=1 / median(ours),
                unit="media/s",
                peer="diffusers pipeline, one by one",
                peer_value=1 / median(theirs),
            )
        )
    engine.close()
    return rows


async def _together(engine: DenoisingEngine, condition: Condition, count: int) -> None:
    """Make ``count`` media, all asked for at once."""

    async def one(seed: int) -> None:
        async with aclosing(engine.decode(condition, DecodeSettings(seed=seed))) as stream:
            async for _ in stream:
                pass

    await asyncio.gather(*(one(seed) for seed in range(count)))


def _peer(decoder: LatentDecoder, condition: Condition) -> Callable[[int], object]:
    """Return a call of the diffusers pipeline over the decoder's own networks, for one seed."""
    networks: Any = decoder
    usual = decoder.defaults
    scheduler = make_scheduler(decoder.folder.scheduler_config(), usual.scheduler)
    null = decoder.embed_captions([""])
    prompt = condition.embeddings[None].to(null)
    options: dict[str, Any] = {
        "num_inference_steps": usual.steps,
        "guidance_scale": usual.guidance_scale,
    }
    tokenizer, text_encoder = networks._text
    parts: dict[str, Any] = {
        "vae": networks.vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }
    match decoder.modality:
        case Modality.IMAGE:
            pipeline: Any = StableDiffusionPipeline(
                **parts,
                unet=networks.unet,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        case Modality.AUDIO:
            pipeline = AudioLDMPipeline(**parts, unet=networks.unet, vocoder=networks.vocoder)
            prompt, null = prompt[:, 0], null[:, 0]  # one vector each
            options["audio_length_in_s"] = usual.duration_s
        case _ if decoder.folder.pipeline_class == "TextToVideoSDPipeline":
            pipeline = TextToVideoSDPipeline(**parts, unet=networks.network)
            options["num_frames"] = decoder.plan(condition).shape[1]
        case _:
            frames, size = decoder.plan(condition).shape[1:3]
            pipeline = TextToStackedVideoPipeline(
                **parts, unet=networks.network, sample_size=size, num_frames=frames
            )
            states = torch.cat([prompt, null])
            pipeline.encode_prompt = lambda prompt: states
            pipeline.set_progress_bar_config(disable=True)
            return lambda seed: pipeline(CAPTION, generator=torch.Generator().manual_seed(seed), **options)
    pipeline.set_progress_bar_config(disable=True)

    def call(seed: int) -> object:
        generator = torch.Generator().manual_seed(seed)
        return pipeline(prompt_embeds=prompt, negative_prompt_embeds=null, generator=generator, **options)

    return call
