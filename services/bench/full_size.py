"""The three benches with models of the paper's true sizes and random weights, which cost as much to run.

Shapes come from the configurations of the preset ``nextgpt-7b``; nothing is downloaded. On a machine with
a GPU the encoder, the language-model engine, the denoising engines and a turn of three media run for real, in
bfloat16, plain and with CUDA graphs, and every rate stands beside the limit of that machine: what its memory
could deliver or its arithmetic could do, whichever is less, both measured in the same run. What all of it
takes in memory stands beside what ``patchbay doctor`` says before. Without a GPU, or with ``--dry``, the
models are built on PyTorch's meta device, which holds shapes and no numbers; operations and bytes are
counted, and the limits of a named GPU follow from its data sheet.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from statistics import median

import torch

from decoders.condition import Condition
from decoders.engine import DenoisingEngine, EngineConfig
from decoders.settings import DecodeSettings
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Medium, Modality
from llm.async_engine import AsyncEngine
from llm.engine import Engine
from llm.model import LanguageModel
from llm.reply import Finished, GenerationOptions
from llm.template import MediaTokens, Message
from services.bench import BenchRow
from services.bench.forward_work import (
    COMPUTE,
    GPUS,
    MEMORY,
    Device,
    Work,
    medium_work,
    reading_work,
    step_work,
)
from services.bench.full_size_models import (
    Sizes,
    build_base,
    build_decoder,
    build_encoder,
    build_language_model,
    media_to_read,
)
from services.bench.residence import (
    Resident,
    predicted_rows,
    resident_rows,
    settle,
    taken,
    together_row,
)
from services.compiling import Compile, compile_if_possible
from services.errors import PresetProblem

logger = logging.getLogger(__name__)

FIRST_TOKEN, TURN = "first token", "1 turn, three media"


def run(
    device: str | None, quick: bool, gpu: str, sizes: Sizes | None = None, folder: Path | None = None
) -> list[BenchRow]:
    """Measure on ``device``, or with None count for the data sheet of ``gpu``.

    With ``folder``, an empty one, weights are written there and read back.
    """
    sizes = (sizes or Sizes()).quick() if quick else sizes or Sizes()
    return counted(sizes, GPUS[gpu]) if device is None else measured(sizes, device, folder)


# --- counting ---------------------------------------------------------------------------------------


def counted(sizes: Sizes, gpu: Device) -> list[BenchRow]:
    """Count on the meta device; the value is what the arithmetic of ``gpu`` allows, the peer its memory."""
    base = build_base(sizes, "meta")
    position = sizes.prompt_tokens + sizes.new_tokens // 2
    rows = [_allowed(_streams(n), n, "tokens/s", step_work(base, n, position), gpu) for n in sizes.streams]
    first = step_work(base, 1, 0, sizes.prompt_tokens)
    seconds, unit = first.limits(gpu), f"s at the {COMPUTE}"
    rows.append(BenchRow(FIRST_TOKEN, seconds[COMPUTE], unit, MEMORY, seconds[MEMORY], _details(first, 1)))
    turn = first.least_s(gpu) + sizes.new_tokens * step_work(base, 1, position).least_s(gpu)
    for modality, work in reading_work(build_encoder(sizes, "meta")).items():
        rows.append(_allowed(f"{modality.value} read", 1, "media/s", work, gpu))
        turn += work.least_s(gpu)
    longest = 0.0
    for modality, _ in sizes.settings:
        decoder = build_decoder(sizes, modality, "meta")
        work = medium_work(decoder, sizes.wish(modality))
        for count in sizes.at_once:
            rows.append(
                _allowed(f"{modality.value} {count} at once", count, "media/s", work.times(count), gpu)
            )
        turn += work.least_s(gpu)
        longest = max(longest, work.least_s(gpu))
    rows.append(BenchRow(TURN, turn, "s", "its longest medium alone", longest))
    return [*rows, *predicted_rows(sizes, gpu)]


def _streams(count: int) -> str:
    return f"{count} stream{'s' if count > 1 else ''}"


def _allowed(case: str, made: int, unit: str, work: Work, gpu: Device) -> BenchRow:
    seconds = work.limits(gpu)
    unit, peer_value = f"{unit} at the {COMPUTE}", made / seconds[MEMORY]
    return BenchRow(case, made / seconds[COMPUTE], unit, MEMORY, peer_value, _details(work, made))


def _details(work: Work, made: int) -> dict[str, float]:
    """Return operations per token or medium, and what is read from memory for all that are made at once."""
    return {"gflop each": work.flop / made / 1e9, "gigabytes read": work.bytes / 1e9}


# --- measuring --------------------------------------------------------------------------------------


def measured(sizes: Sizes, device: str, folder: Path | None = None) -> list[BenchRow]:
    """Run everything on ``device``; the peer is the limit that binds, on this very device."""
    limit = probe(device, sizes)
    rows = [*language_rows(sizes, device, limit), *reading_rows(sizes, device, limit)]
    for modality, _ in sizes.settings:
        rows += medium_rows(sizes, modality, device, limit)
    resident, residence = resident_rows(sizes, device, limit, folder)
    return [*rows, *turn_rows(sizes, device, limit, resident), *residence]


def probe(device: str, sizes: Sizes) -> Device:
    """Measure how fast a device multiplies matrices of ``sizes.dtype``, its memory, and the way there."""
    one = torch.randn(sizes.probe, sizes.probe, device=device, dtype=sizes.dtype)
    other, out = torch.randn_like(one), torch.empty_like(one)
    product_s = _seconds(device, lambda: torch.mm(one, other, out=out))
    much = torch.zeros(8 * sizes.probe, sizes.probe, device=device, dtype=sizes.dtype)
    copy = torch.empty_like(much)
    copy_s = _seconds(device, lambda: copy.copy_(much))
    in_host = torch.zeros_like(much, device="cpu")
    link_s = _seconds(device, lambda: copy.copy_(in_host))
    size = much.numel() * much.element_size()
    # A copy within the device is read there and written there.
    return Device(device, 2 * size / copy_s, 2 * sizes.probe**3 / product_s, size / link_s)


def _seconds(device: str, work: Callable[[], object], rounds: int = 7) -> float:
    """Return the least seconds of several calls, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        settle(device)
        began = time.perf_counter()
        work()
        settle(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _held(case: str, made: int, seconds: float, unit: str, work: Work, limit: Device) -> BenchRow:
    """Hold a rate against the limit that binds."""
    allowed = work.limits(limit)
    binding = max(allowed, key=lambda name: allowed[name])
    return BenchRow(case, made / seconds, unit, binding, made / allowed[binding], _details(work, made))


# --- the language model -----------------------------------------------------------------------------


def _prompt(sizes: Sizes, letter: str = "b") -> list[Message]:
    return [Message("user", [letter * sizes.prompt_tokens])]


def _options(sizes: Sizes) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=sizes.new_tokens, allowed=frozenset())


def _engine(model: LanguageModel, sizes: Sizes, slots: int, how: Compile = False) -> Engine:
    length = len(model.encode(_prompt(sizes), open_reply=True).ids)
    context = min(length + sizes.new_tokens, model.context_length)
    engine = Engine(model, slots=slots, context=context, step_tokens=max(512, 2 * slots))
    compile_if_possible("language model", how, engine)
    return engine


def _ways(device: str) -> dict[Compile, str]:
    """Return how networks run on ``device``, and what that adds to the name of a case."""
    return {False: "", "graphs": ", CUDA graphs"} if torch.device(device).type == "cuda" else {False: ""}


def language_rows(sizes: Sizes, device: str, limit: Device) -> list[BenchRow]:
    """Measure steps of the engine in which every stream is given one token, and a reply's first token."""
    model = build_language_model(sizes, device)
    shapes = build_base(sizes, "meta")
    length = len(model.encode(_prompt(sizes), open_reply=True).ids)
    rows = []
    for how, suffix in _ways(device).items():
        for streams in sizes.streams:
            times = [second for _ in range(sizes.rounds) for second in _steps(model, sizes, streams, how)]
            work = step_work(shapes, streams, length + sizes.new_tokens // 2)
            case = f"{_streams(streams)}{suffix}"
            rows.append(_held(case, streams, median(times), "tokens/s", work, limit))
    work = step_work(shapes, 1, 0, length)
    allowed = work.limits(limit)
    binding = max(allowed, key=lambda name: allowed[name])
    first = _first_token_s(model, sizes)
    return [*rows, BenchRow(FIRST_TOKEN, first, "s", binding, allowed[binding], _details(work, 1))]


def _first_token_s(model: LanguageModel, sizes: Sizes) -> float:
    """Return the seconds from a prompt to the first token of its reply, without company."""
    engine, times = _engine(model, sizes, 1), []
    for letter in "bglired"[: sizes.rounds + 1]:  # none begins as the one before, of which the cache knows
        request = engine.prepare(_prompt(sizes, letter), _options(sizes))
        began = time.perf_counter()
        engine.submit(request)
        while not request.reply.ids:
            _expect_no_error(engine.step())
        times.append(time.perf_counter() - began)
        while engine.busy:
            _expect_no_error(engine.step())
    return median(times[1:])


def _steps(model: LanguageModel, sizes: Sizes, streams: int, how: Compile) -> list[float]:
    """Return the seconds of the steps that took all ``streams`` one token further."""
    engine = _engine(model, sizes, streams, how)
    requests = [engine.prepare(_prompt(sizes), _options(sizes)) for _ in range(streams)]
    for request in requests:
        engine.submit(request)
    times = []
    while engine.busy:
        all_speak = all(request.reply.ids for request in requests)
        began = time.perf_counter()
        events = engine.step()
        seconds = time.perf_counter() - began
        _expect_no_error(events)
        if all_speak and engine.stats.running == streams:
            times.append(seconds)
    if not times:
        raise PresetProblem("No step served all streams; allow more new tokens.", code="bench_failed")
    return times


# --- the encoder ------------------------------------------------------------------------------------


def reading_rows(sizes: Sizes, device: str, limit: Device) -> list[BenchRow]:
    """Measure the encoder on one medium after the other, from pixels or samples to tokens."""
    encoder, rows = build_encoder(sizes, device), []
    media = media_to_read(sizes)
    for modality, work in reading_work(build_encoder(sizes, "meta")).items():
        seconds = _seconds(device, partial(encoder.encode, media[modality]), sizes.rounds)
        rows.append(_held(f"{modality.value} read", 1, seconds, "media/s", work, limit))
    return rows


# --- decoders ---------------------------------------------------------------------------------------


def medium_rows(sizes: Sizes, modality: Modality, device: str, limit: Device) -> list[BenchRow]:
    """Measure one decoder; batches that do not fit into memory are made smaller by the engine."""
    decoder = build_decoder(sizes, modality, device)
    work = medium_work(build_decoder(sizes, modality, "meta"), sizes.wish(modality))
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=max(sizes.at_once), max_wait_s=1e6))
    rows = []
    for how, suffix in _ways(device).items():
        compile_if_possible(f"{modality.value} decoder", how, decoder)
        for count in sizes.at_once if not how else sizes.at_once[:1]:  # large batches have no graphs
            times = []
            for number in range(max(1, sizes.rounds // count) + 1):
                began = time.perf_counter()
                asyncio.run(_media(engine, sizes.wish(modality), count, first_seed=number * count))
                times.append(time.perf_counter() - began)
            case = f"{modality.value} {count} at once{suffix}"
            rows.append(_held(case, count, median(times[1:]), "media/s", work.times(count), limit))
    engine.close()
    return rows


async def _media(engine: DenoisingEngine, wish: DecodeSettings, count: int, first_seed: int) -> None:
    spec = engine.decoder.condition_spec
    conditions = [Condition(torch.randn(spec.tokens, spec.width)) for _ in range(count)]
    seeds = range(first_seed, first_seed + count)
    made = (_medium(engine, wish.with_seed(seed), c) for seed, c in zip(seeds, conditions, strict=True))
    await asyncio.gather(*made)


async def _medium(engine: DenoisingEngine, wish: DecodeSettings, condition: Condition) -> None:
    async with aclosing(engine.decode(condition, wish)) as stream:
        async for _ in stream:
            pass


# --- all together -----------------------------------------------------------------------------------


def turn_rows(sizes: Sizes, device: str, limit: Device, resident: Resident) -> list[BenchRow]:
    """Measure a turn with all boxes in memory: how long it takes, and what the boxes take meanwhile.

    A picture, a video and a sound are read; then a reply makes one of each, while its text goes on.
    """
    speaking = AsyncEngine(resident.speaker, "language-model")
    engines = {modality: DenoisingEngine(own.decoder) for modality, own in resident.decoders.items()}
    media = media_to_read(sizes).values()

    async def say(prompt: list[Message]) -> int:
        async for event in speaking.stream(prompt, _options(sizes)):
            if isinstance(event, Finished):
                return len(event.ids)
        return 0

    async def turn() -> int:
        read = [await asyncio.to_thread(_read, resident.encoder, medium) for medium in media]
        saying = asyncio.create_task(say([Message("user", [*read, *_prompt(sizes)[0].parts])]))
        await asyncio.gather(
            *(
                _medium(engine, sizes.wish(modality).with_seed(0), resident.decoders[modality].condition())
                for modality, engine in engines.items()
            )
        )
        return await saying

    asyncio.run(turn())
    # Boxes work in threads of their own, of which the profiler of the CPU sees nothing.
    is_seen = torch.device(device).type != "cpu"
    began = time.perf_counter()
    said, memory = taken(device, lambda: asyncio.run(turn())) if is_seen else (asyncio.run(turn()), None)
    seconds = time.perf_counter() - began
    speaking.close()
    for engine in engines.values():
        engine.close()
    shapes, position = build_base(sizes, "meta"), sizes.prompt_tokens + said // 2
    least = step_work(shapes, 1, 0, sizes.prompt_tokens).least_s(limit)
    least += said * step_work(shapes, 1, position).least_s(limit)
    least += sum(work.least_s(limit) for work in reading_work(build_encoder(sizes, "meta")).values())
    for modality, _ in sizes.settings:
        shape = build_decoder(sizes, modality, "meta")
        least += medium_work(shape, sizes.wish(modality)).least_s(limit)
    rows = [BenchRow(TURN, seconds, "s", "limits of its forward passes", least)]
    return [*rows, together_row(resident, memory)] if memory else rows


def _read(encoder: ImageBindEncoder, medium: Medium) -> MediaTokens:
    features = encoder.encode(medium)
    return MediaTokens(features.modality, features.tokens, features.pooled, features.blocks)


def _expect_no_error(events: Sequence[tuple[object, object]]) -> None:
    for _, event in events:
        if isinstance(event, Exception):
            raise PresetProblem(
                f"The language model failed on random weights: {event}", code="bench_failed"
            ) from event
