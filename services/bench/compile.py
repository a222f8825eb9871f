"""What ``compile`` of a preset gains, network by network: compiled or recorded beside plain.

The denoising networks take a step of few and of many rows; the language model answers prompts in its
engine. Compiled with dynamic shapes, since batches grow and shrink. The time that compiling or recording took
stands beside each row and is not part of the rates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from decoders.latent_decoder import LatentDecoder
from decoders.recorded import RecordedNetwork
from llm.model import LanguageModel
from services.bench import BenchRow
from services.bench.llm import prompts, run_engine
from services.bench.pipelines import CAPTION
from services.compiling import Compile
from services.doctor import expect_files
from services.local_decoder import decoder_class
from services.presets import Preset

BACKEND = "inductor"
ROWS = (2, 32)
STREAMS = (1, 32)
PEER = "not compiled"


def run(preset: Preset, quick: bool) -> list[BenchRow]:
    """Measure all denoising networks, then the language model."""
    expect_files(preset)
    rounds = 5 if quick else 30
    rows: list[BenchRow] = []
    for modality in preset.decoders:
        decoder = decoder_class(modality).load(preset.decoder_folder(modality), preset.device)
        rows += decoder_rows(decoder, rounds)
    one, other = (LanguageModel.load(preset.language_model_folder, preset.device) for _ in range(2))
    for model in (one, other):
        model.merge_adapter()
    return rows + model_rows(one, other, 1 if quick else 3) + recorded_model_rows(other, 1 if quick else 3)


def decoder_rows(decoder: LatentDecoder, rounds: int) -> list[BenchRow]:
    """Measure steps of one denoising network."""
    owner: Any = decoder
    plain = owner._network
    compiled = torch.compile(plain, dynamic=True, backend=BACKEND)
    condition = decoder.encode_caption(CAPTION)
    shape = decoder.plan(condition).shape
    began = time.perf_counter()
    recorded = RecordedNetwork(plain, owner._run, shape, condition.embeddings.to(decoder.folder.device))
    trace_s = time.perf_counter() - began
    result = []
    for count in ROWS:
        latents = torch.randn(count, *shape, device=decoder.folder.device)
        times = torch.full((count,), 500.0, device=decoder.folder.device)
        states = condition.embeddings.expand(count, -1, -1).to(latents)

        rows = (latents, times, states)

        def step(network: Any, rows: tuple[Any, ...] = rows) -> object:
            return owner._run(network, *rows)

        compile_s, seconds = _alternating(lambda: step(compiled), lambda: step(plain), rounds)
        result.append(
            BenchRow(
                f"{decoder.modality.value} step of {count} rows",
                1 / seconds[0],
                "steps/s",
                PEER,
                1 / seconds[1],
                {"compile_s": compile_s},
            )
        )
        _, seconds = _alternating(partial(recorded, *rows), partial(step, plain), rounds)
        result.append(
            BenchRow(
                f"{decoder.modality.value} step of {count} rows, recorded",
                1 / seconds[0],
                "steps/s",
                PEER,
                1 / seconds[1],
                {"compile_s": trace_s},
            )
        )
    return result


@torch.inference_mode()
def _alternating(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> tuple[float, tuple[float, float]]:
    """Return the seconds of the first call of ``ours``, and the median seconds of later ones of both."""
    began = time.perf_counter()
    ours()
    first = time.perf_counter() - began
    theirs()
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for times, work in zip(spent, (ours, theirs), strict=True):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return first, (median(spent[0]), median(spent[1]))


def model_rows(compiled: LanguageModel, plain: LanguageModel, rounds: int) -> list[BenchRow]:
    """Measure the engine over two copies of a language model, the first of which gets compiled."""
    compiled.causal_lm.base_model.compile(dynamic=True, backend=BACKEND)
    rows = []
    for streams in STREAMS:
        texts = prompts(max(8, streams), seed=0)
        began = time.perf_counter()
        run_engine(compiled, texts, streams)
        compile_s = time.perf_counter() - began
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for found, model in zip(rates, (compiled, plain), strict=True):
                found.append(run_engine(model, texts, streams).tokens_per_s)
        case = f"{streams} stream{'s' if streams > 1 else ''}"
        ours, theirs = median(rates[0]), median(rates[1])
        rows.append(BenchRow(case, ours, "tokens/s", PEER, theirs, {"compile_s": compile_s}))
    return rows


def recorded_model_rows(model: LanguageModel, rounds: int) -> list[BenchRow]:
    """Measure the engine over one language model, recorded and plain."""
    rows = []
    for streams in STREAMS:
        texts = prompts(max(8, streams), seed=0)
        rates: dict[Compile, list[float]] = {"trace": [], False: []}
        for _ in range(rounds):
            for how, found in rates.items():
                found.append(run_engine(model, texts, streams, how).tokens_per_s)
        case = f"{streams} stream{'s' if streams > 1 else ''}, recorded"
        ours, theirs = median(rates["trace"]), median(rates[False])
        rows.append(BenchRow(case, ours, "tokens/s", PEER, theirs))
    return rows
