"""Media per second and latency of the denoising engine, beside the diffusers pipelines called one by one.

Both sides hold the same networks and get the same text states, so neither pays for reading a caption. Ours
are compiled as the preset says.
They take turns, and take turns at being first, so that what else the machine does hits both.

The latency is the mean over media that are asked for at once, from asking to having; those of the peer wait
in a line. There, a ratio below 1 is ours.
:mod:`services.bench.caching` adds what reusing deep features gains and costs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from statistics import mean, median

from decoders.condition import Condition
from decoders.engine import DenoisingEngine, EngineConfig
from decoders.latent_decoder import LatentDecoder
from decoders.settings import DecodeSettings
from services.bench import BenchRow, caching
from services.bench.pipelines import CAPTION, Call, parts_of, pipeline
from services.compiling import compile_if_possible
from services.errors import PresetProblem
from services.loading import loading
from services.local_decoder import decoder_class
from services.presets import Preset

logger = logging.getLogger(__name__)

AT_ONCE = (1, 4, 16)
ROUNDS, QUICK_ROUNDS = 9, 2
PEERS_PER_ROUND = 2
PEER = "diffusers pipeline, one by one"


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
        compile_if_possible(f"{modality.value} decoder", preset.decoders[modality].compile, decoder)
        rows += measure(decoder, QUICK_ROUNDS if quick else ROUNDS)
        rows += caching.measure(decoder, quick)
    return rows


def measure(decoder: LatentDecoder, rounds: int) -> list[BenchRow]:
    """Measure one decoder at its default settings."""
    condition = decoder.encode_caption(CAPTION)
    peer = pipeline(decoder, parts_of(decoder))
    peer(condition, 0)
    return asyncio.run(_measured(decoder, condition, peer, rounds))


async def _measured(decoder: LatentDecoder, condition: Condition, peer: Call, rounds: int) -> list[BenchRow]:
    """Measure in one event loop, as a server has one."""
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=max(AT_ONCE), max_wait_s=1e6))

    async def ours(count: int) -> tuple[float, float]:
        """Return the seconds per medium and the mean seconds from asking to having."""
        began = time.perf_counter()
        waits = await together(engine, condition, count)
        return (time.perf_counter() - began) / count, mean(waits)

    def theirs(first_seed: int) -> float:
        began = time.perf_counter()
        for seed in range(PEERS_PER_ROUND):
            peer(condition, first_seed + seed)
        return (time.perf_counter() - began) / PEERS_PER_ROUND

    rows = []
    for count in AT_ONCE:
        await ours(count)
        found, peer_seconds = [], []
        for number in range(rounds if count < max(AT_ONCE) else max(1, rounds // 2)):
            if number % 2:
                found.append(await ours(count))
            peer_seconds.append(theirs(number * PEERS_PER_ROUND))
            if not number % 2:
                found.append(await ours(count))
        each_s, wait_s = (median(times) for times in zip(*found, strict=True))
        peer_s = median(peer_seconds)
        case = f"{decoder.modality.value} {count} at once"
        in_line_s = peer_s * (count + 1) / 2  # the nth of them has waited for n
        rows += [
            BenchRow(case, 1 / each_s, "media/s", PEER, 1 / peer_s),
            BenchRow(f"{case}, latency", wait_s, "s", PEER, in_line_s),
        ]
    engine.close()
    return rows


async def together(
    engine: DenoisingEngine, condition: Condition, count: int, settings: DecodeSettings | None = None
) -> list[float]:
    """Make ``count`` media, all asked for at once; return the seconds after which each was there."""
    wish = settings or DecodeSettings()
    began = time.perf_counter()

    async def one(seed: int) -> float:
        async with aclosing(engine.decode(condition, wish.with_seed(seed))) as stream:
            async for _ in stream:
                pass
        return time.perf_counter() - began

    return await asyncio.gather(*(one(seed) for seed in range(count)))
