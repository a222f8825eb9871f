"""The three benches with models of the paper's true sizes and random weights, which cost as much to run.

Shapes come from the configurations of the preset ``nextgpt-7b``; nothing is downloaded. On a machine with
a GPU the language-model engine, the denoising engines and a turn of three media run for real, in bfloat16,
plain and with CUDA graphs, and every rate stands beside the limit of that machine: what its memory could
deliver or its arithmetic could do, whichever is less, both measured in the same run. Without a GPU, or with
``--dry``, the models are built on PyTorch's meta device, which holds shapes and no numbers; operations are
counted, and the limits of a named GPU follow from its data sheet.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from decoders.condition import Condition
from decoders.configured_folder import ConfiguredFolder
from decoders.engine import DenoisingEngine, EngineConfig
from decoders.latent_decoder import LatentDecoder
from decoders.settings import DecodeSettings
from encoders.media import Modality
from llm.async_engine import AsyncEngine
from llm.engine import Engine
from llm.model import LanguageModel
from llm.reply import Finished, GenerationOptions
from llm.template import Message
from llm.tokenizer import ConversationTokenizer, train_tokenizer
from services.bench import BenchRow
from services.compiling import Compile, compile_if_possible
from services.errors import PresetProblem
from services.local_decoder import decoder_class
from services.presets import SHIPPED

logger = logging.getLogger(__name__)

SIZES = SHIPPED / "nextgpt-7b"
MEMORY, COMPUTE = "memory-bandwidth limit", "compute limit"


@dataclass(frozen=True)
class Device:
    """What a device can do at most: bytes per second from its memory, operations per second."""

    name: str
    bytes_per_s: float
    flop_per_s: float


GPUS = {
    "h200": Device("NVIDIA H200 SXM", 4.8e12, 989e12),
    "h100": Device("NVIDIA H100 SXM", 3.35e12, 989e12),
    "a100": Device("NVIDIA A100 SXM 80 GB", 2.039e12, 312e12),
    "l40s": Device("NVIDIA L40S", 0.864e12, 362e12),
    "l4": Device("NVIDIA L4", 0.3e12, 121e12),
}
"""From the makers' data sheets: memory bandwidth, and dense bfloat16 with sums in float32."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured. The defaults are the paper's; tests take smaller ones.

    ``folder`` holds the configurations of language model and decoders. ``prompt_tokens`` and
    ``new_tokens`` are those of one reply, ``settings`` those of one medium. ``probe`` is the side of the
    matrices that tell how fast a device is.
    """

    folder: Path = SIZES
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


def run(device: str | None, quick: bool, gpu: str, sizes: Sizes | None = None) -> list[BenchRow]:
    """Measure on ``device``, or with None count for the data sheet of ``gpu``."""
    sizes = (sizes or Sizes()).quick() if quick else sizes or Sizes()
    return counted(sizes, GPUS[gpu]) if device is None else measured(sizes, device)


# --- models -----------------------------------------------------------------------------------------


def build_decoder(sizes: Sizes, modality: Modality, device: str) -> LatentDecoder:
    """Return a decoder with random weights; on ``meta`` it holds shapes only."""
    folder = ConfiguredFolder(sizes.folder / modality.value, device, sizes.dtype)
    return decoder_class(modality)(folder)


def build_base(sizes: Sizes, device: str) -> Any:
    """Return a causal LM with random weights; on ``meta`` it holds shapes only."""
    values: dict[str, Any] = json.loads((sizes.folder / "llm" / "base" / "config.json").read_text())
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(sizes.dtype)
    try:
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config, dtype=sizes.dtype)
    finally:
        torch.set_default_dtype(usual)
    return base.eval().requires_grad_(False)


# --- counting ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What something takes: operations, and bytes of weights and cache that must be read."""

    flop: float
    bytes: float

    def times(self, count: int) -> Work:
        """Return what ``count`` of it take in one batch: the operations of all, the weights read once."""
        return Work(count * self.flop, self.bytes)

    def limits(self, device: Device) -> dict[str, float]:
        """Return the seconds that each of the two limits allows, by the limit's name."""
        return {COMPUTE: self.flop / device.flop_per_s, MEMORY: self.bytes / device.bytes_per_s}

    def least_s(self, device: Device) -> float:
        """Return the seconds of the limit that binds."""
        return max(self.limits(device).values())


def step_work(base: Any, streams: int, position: int, fed: int = 1) -> Work:
    """Return what the language model takes to feed ``fed`` tokens to each of ``streams`` replies.

    Weights are read once for all streams, the cache of each reply once; the table of input
    embeddings is not read, but looked up.
    """
    config = base.config
    ids = torch.zeros(1, fed, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, fed, fed, dtype=base.dtype, device="meta")  # transformers would look into it
    flop = _flop(lambda: base(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False))
    table = base.get_input_embeddings().weight
    tied = table is base.get_output_embeddings().weight
    item = table.element_size()
    weights = sum(p.numel() for p in base.parameters()) - (0 if tied else table.numel())
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * shared * head * position * item
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head * position * fed
    return Work(streams * (flop + attention), weights * item + streams * cache)


def medium_work(decoder: LatentDecoder, wish: DecodeSettings) -> Work:
    """Return what one medium takes: all its steps with guidance, and the way from latents to pixels."""
    owner: Any = decoder
    spec = decoder.condition_spec
    plan = decoder.plan(Condition(torch.zeros(spec.tokens, spec.width)), wish)
    device, dtype = decoder.folder.device, decoder.folder.dtype
    rows = int(plan.rows)
    latents = torch.empty(rows, *plan.shape, dtype=dtype, device=device)
    conditions = torch.empty(rows, spec.tokens, spec.width, dtype=dtype, device=device)
    times = torch.empty(rows, device=device)
    a_step = _flop(lambda: owner._predict(latents, times, conditions))
    finish = _flop(lambda: decoder.finish(latents[:1]))
    network = _size(owner._network)
    last = _size(owner.vae.decoder) + (_size(owner.vocoder) if hasattr(owner, "vocoder") else 0)
    return Work(plan.steps * a_step + finish, float(plan.steps * network + last))


def _flop(work: Callable[[], object]) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def counted(sizes: Sizes, gpu: Device) -> list[BenchRow]:
    """Count on the meta device; the value is what the arithmetic of ``gpu`` allows, the peer its memory."""
    base = build_base(sizes, "meta")
    position = sizes.prompt_tokens + sizes.new_tokens // 2
    rows = [_allowed(_streams(n), n, "tokens/s", step_work(base, n, position), gpu) for n in sizes.streams]
    turn = step_work(base, 1, 0, sizes.prompt_tokens).least_s(gpu)
    turn += sizes.new_tokens * step_work(base, 1, position).least_s(gpu)
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
    return [*rows, BenchRow("1 turn, three media", turn, "s", "its longest medium alone", longest)]


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


def measured(sizes: Sizes, device: str) -> list[BenchRow]:
    """Run everything on ``device``; the peer is the limit that binds, on this very device."""
    limit = probe(device, sizes)
    rows = [*language_rows(sizes, device, limit)]
    for modality, _ in sizes.settings:
        rows += medium_rows(sizes, modality, device, limit)
    return [*rows, turn_row(sizes, device, limit)]


def probe(device: str, sizes: Sizes) -> Device:
    """Measure how fast a device multiplies matrices of ``sizes.dtype``, and how fast its memory is."""
    one = torch.randn(sizes.probe, sizes.probe, device=device, dtype=sizes.dtype)
    other, out = torch.randn_like(one), torch.empty_like(one)
    product_s = _seconds(device, lambda: torch.mm(one, other, out=out))
    much = torch.zeros(8 * sizes.probe, sizes.probe, device=device, dtype=sizes.dtype)
    copy = torch.empty_like(much)
    copy_s = _seconds(device, lambda: copy.copy_(much))
    moved = 2 * much.numel() * much.element_size()  # read and written
    return Device(device, moved / copy_s, 2 * sizes.probe**3 / product_s)


def _seconds(device: str, work: Callable[[], object], rounds: int = 7) -> float:
    """Return the least seconds of several calls, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        _settle(device)
        began = time.perf_counter()
        work()
        _settle(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _settle(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def build_language_model(sizes: Sizes, device: str) -> LanguageModel:
    """Return a language model with random weights and a small vocabulary in front of a full-size head."""
    tokenizer = ConversationTokenizer(train_tokenizer(["a big red bell"], 300))
    return LanguageModel(build_base(sizes, device), tokenizer, {}).to(device).eval()


def _prompt(sizes: Sizes) -> list[Message]:
    return [Message("user", ["b" * sizes.prompt_tokens])]


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
    """Measure steps of the engine in which every stream is given one token."""
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
    return rows


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
        if any(isinstance(event, Exception) for _, event in events):
            raise PresetProblem("The language model failed on random weights.", code="bench_failed")
        if all_speak and engine.stats.running == streams:
            times.append(seconds)
    if not times:
        raise PresetProblem("No step served all streams; allow more new tokens.", code="bench_failed")
    return times


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
    await asyncio.gather(*(_medium(engine, wish.with_seed(first_seed + i)) for i in range(count)))


async def _medium(engine: DenoisingEngine, wish: DecodeSettings) -> None:
    spec = engine.decoder.condition_spec
    states = torch.randn(spec.tokens, spec.width)
    async with aclosing(engine.decode(Condition(states), wish)) as stream:
        async for _ in stream:
            pass


def turn_row(sizes: Sizes, device: str, limit: Device) -> BenchRow:
    """Measure a reply with a picture, a video and a sound, all of which begin while the text goes on."""
    model = build_language_model(sizes, device)
    engine = _engine(model, sizes, slots=8)
    speaking = AsyncEngine(engine, "language-model")
    media = {m: DenoisingEngine(build_decoder(sizes, m, device)) for m, _ in sizes.settings}

    async def say() -> int:
        async for event in speaking.stream(_prompt(sizes), _options(sizes)):
            if isinstance(event, Finished):
                return len(event.ids)
        return 0

    async def turn() -> int:
        saying = asyncio.create_task(say())
        await asyncio.gather(*(_medium(one, sizes.wish(m).with_seed(0)) for m, one in media.items()))
        return await saying

    asyncio.run(turn())
    began = time.perf_counter()
    said = asyncio.run(turn())
    seconds = time.perf_counter() - began
    speaking.close()
    for one in media.values():
        one.close()
    shapes, position = build_base(sizes, "meta"), sizes.prompt_tokens + said // 2
    least = step_work(shapes, 1, 0, sizes.prompt_tokens).least_s(limit)
    least += said * step_work(shapes, 1, position).least_s(limit)
    for modality, _ in sizes.settings:
        shape = build_decoder(sizes, modality, "meta")
        least += medium_work(shape, sizes.wish(modality)).least_s(limit)
    return BenchRow("1 turn, three media", seconds, "s", "limits of its forward passes", least)


def _held(case: str, made: int, seconds: float, unit: str, work: Work, limit: Device) -> BenchRow:
    """Hold a rate against the limit that binds."""
    allowed = work.limits(limit)
    binding = max(allowed, key=lambda name: allowed[name])
    return BenchRow(case, made / seconds, unit, binding, made / allowed[binding], _details(work, made))
