"""What ``compile`` of a preset gains, network by network: recorded, captured or compiled beside plain.

The denoising networks take a step of few and of many rows; the language model answers prompts in its
engine. The time that recording, capturing or compiling took stands beside each row and is not part of the
rates.

Inductor compiles with dynamic shapes, since batches grow and shrink, and each network in a process of its
own, which is ended after :data:`COMPILE_LIMIT_S`. A rate of 0 says that it had not ended compiling then.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch

from decoders.condition import Condition
from decoders.latent_decoder import LatentDecoder
from decoders.quick_network import GRAPH_ROWS, QuickNetwork
from encoders.media import Modality
from llm.engine import Engine
from llm.model import LanguageModel
from services.bench import BenchRow
from services.bench.llm import answer, prompts
from services.compiling import Compile
from services.cuda_graphs import capture
from services.doctor import expect_files
from services.local_decoder import decoder_class
from services.presets import Preset

BACKEND = "inductor"
ROWS = (2, 32)
STREAMS = (1, 32)
PEER = "not compiled"
COMPILE_LIMIT_S, QUICK_LIMIT_S = 120.0, 20.0

Box = Modality | None
"""None is the language model."""


def run(preset: Preset, quick: bool) -> list[BenchRow]:
    """Measure what is quickly made for all networks, then what Inductor makes of each."""
    expect_files(preset)
    boxes: list[Box] = [*preset.decoders, None]
    rounds, limit_s = (5, QUICK_LIMIT_S) if quick else (30, COMPILE_LIMIT_S)
    hows: list[Compile] = ["trace", "graphs"] if preset.device.startswith("cuda") else ["trace"]
    rows = [row for how in hows for box in boxes for row in box_rows(preset, box, how, rounds)]
    recorded = [row for row in rows if row.case.endswith(_suffix("trace"))]
    for box in boxes:
        rows += bounded(preset, box, rounds, limit_s, [row for row in recorded if _is_of(box, row)])
    return rows


def _is_of(box: Box, row: BenchRow) -> bool:
    return row.unit == "tokens/s" if box is None else row.case.startswith(f"{box.value} ")


def box_rows(preset: Preset, box: Box, how: Compile, rounds: int) -> list[BenchRow]:
    """Load one network and measure it made faster beside plain."""
    if box is None:
        model = LanguageModel.from_pretrained(preset.language_model_folder, preset.device)
        model.merge_adapter()
        return model_rows(model, how, max(3, rounds // 10))
    decoder = decoder_class(box).load(preset.decoder_folder(box), preset.device)
    return decoder_rows(decoder, how, rounds)


def bounded(
    preset: Preset, box: Box, rounds: int, limit_s: float, recorded: Sequence[BenchRow]
) -> list[BenchRow]:
    """Measure one network compiled, in a process of its own.

    If that takes too long, rates are 0 beside those of the plain network in ``recorded``; if it fails, there
    are no rows.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_compiled, args=(theirs, preset, box, rounds))
    process.start()
    theirs.close()
    rows: list[BenchRow] = []
    if ours.poll(limit_s):
        with suppress(EOFError):  # the process has ended, and has told why
            rows = ours.recv()
    else:
        details = {"compile_s": limit_s}
        for row in recorded:
            case = row.case.removesuffix(_suffix("trace"))
            rows.append(BenchRow(case, 0.0, row.unit, PEER, row.peer_value, details))
        try:
            os.killpg(process.pid or 0, signal.SIGKILL)  # its compilers, too
        except ProcessLookupError:  # it had no time yet to make a group
            process.kill()
    process.join()
    return rows


def _compiled(told: Connection, preset: Preset, box: Box, rounds: int) -> None:
    os.setsid()
    told.send(box_rows(preset, box, True, rounds))


def decoder_rows(decoder: LatentDecoder, how: Compile, rounds: int) -> list[BenchRow]:
    """Measure steps of one denoising network."""
    owner: Any = decoder
    spec = decoder.condition_spec
    shape = decoder.plan(Condition(torch.zeros(spec.tokens, spec.width))).shape
    device, dtype = decoder.folder.device, decoder.folder.dtype
    states = owner._prepared(torch.zeros(1, spec.tokens, spec.width, device=device, dtype=dtype))[0]
    plain, quick = (QuickNetwork(owner._network, owner._run, shape, states) for _ in range(2))
    details = {"compile_s": _make_faster(quick, how)}
    result = []
    for count in (count for count in ROWS if how != "graphs" or count in GRAPH_ROWS):
        latents = torch.randn(count, *shape, device=device, dtype=dtype)
        times = torch.full((count,), 500.0, device=device)
        rows = (latents, times, states.expand(count, *states.shape).contiguous())
        ours_s, theirs_s = _alternating(_settled(quick, rows), _settled(plain, rows), rounds)
        case = f"{decoder.modality.value} step of {count} rows{_suffix(how)}"
        result.append(BenchRow(case, 1 / ours_s, "steps/s", PEER, 1 / theirs_s, details))
    return result


def _settled(network: QuickNetwork, rows: tuple[Any, ...]) -> Callable[[], object]:
    def call() -> None:
        network(*rows)
        if rows[0].device.type != "cpu":
            torch.accelerator.synchronize()

    return call


@torch.inference_mode()
def _alternating(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Return the median seconds of both, after one call of each that does not count."""
    ours()
    theirs()
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for times, work in zip(spent, (ours, theirs), strict=True):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return median(spent[0]), median(spent[1])


def model_rows(model: LanguageModel, how: Compile, rounds: int) -> list[BenchRow]:
    """Measure the engine over one language model, made faster and plain."""
    rows = []
    for streams in STREAMS:
        texts = prompts(max(8, streams), seed=0)
        quick, plain = (Engine(model, slots=max(8, streams)) for _ in range(2))
        details = {"compile_s": _make_faster(quick, how)}
        rates: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds + 1):
            for found, engine in zip(rates, (quick, plain), strict=True):
                tokens_per_s = answer(engine, texts, streams).tokens_per_s
                if number:  # the first round does not count: what is kept of prompts is for all others
                    found.append(tokens_per_s)
        case = f"{streams} stream{'s' if streams > 1 else ''}{_suffix(how)}"
        rows.append(BenchRow(case, median(rates[0]), "tokens/s", PEER, median(rates[1]), details))
    return rows


def _make_faster(network: QuickNetwork | Engine, how: Compile) -> float:
    """Return the seconds that took."""
    began = time.perf_counter()
    match how:
        case "trace":
            network.trace()
        case "graphs":
            network.graph(capture)
        case _:
            network.compile(BACKEND)
    return time.perf_counter() - began


def _suffix(how: Compile) -> str:
    return {"trace": ", recorded", "graphs": ", CUDA graphs"}.get(str(how), "")
