"""The language-model engine beside transformers' own ``generate()``, on the same prompts and weights.

The engine is compiled as the preset says, the peer is as transformers loads it. On a CPU, the engine has
one thread and takes all cores for large passes where that is faster, as in ``patchbay serve``; the peer
has all cores.

Every case is a number of clients, each of which sends its next prompt when its reply is complete. All
replies are greedy and end by themselves or after 64 tokens. The peer is the same model with all rows in
its own tables and the same rules for signal blocks; it is given its prompts one at a time, or in batches
of as many as there are clients, padded at the left. Tokens are those of the replies, padding left out.
The time to the first token is the mean over clients, from sending to the first event; there, a ratio below
1 is ours. Clients of padded batches all send when the batch before is done, and wait for its longest reply.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from alignment.toybox.directions import make
from alignment.toybox.exercise import FreshScenes
from llm.engine import Engine
from llm.engine_request import Request
from llm.model import LanguageModel
from llm.plain import WholeBlocks, plain_model
from llm.reply import Finished, GenerationOptions
from llm.template import Message
from services.bench import BenchRow
from services.compiling import Compile, compile_if_possible
from services.doctor import expect_files
from services.presets import Preset

DIRECTIONS = ("text-to-image", "text-to-video", "text-to-audio", "text-to-many", "decision")
STREAMS = (1, 8, 32)
MAX_NEW_TOKENS = 128
ALONE, PADDED = "transformers generate(), one at a time", "transformers generate(), padded batches"


@dataclass
class Measured:
    """What one side did with all prompts: ids per reply, seconds in all and to each first token."""

    replies: list[tuple[int, ...]]
    seconds: float
    first_token_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Reply tokens per second."""
        return sum(map(len, self.replies)) / self.seconds


def run(preset: Preset, quick: bool) -> list[BenchRow]:
    """Measure every case; with ``quick`` once and with few prompts, otherwise the median of three rounds."""
    expect_files(preset)
    model = LanguageModel.from_pretrained(preset.language_model_folder, preset.device)
    model.merge_adapter()
    peer = Peer(model)
    how = preset.language_model.compile
    per_client, rounds = (2, 1) if quick else (4, 3)
    run_engine(model, prompts(8, seed=1), 8, how)  # warm up
    peer.one_by_one(prompts(2, seed=1), 1)
    rows: list[BenchRow] = []
    for streams in STREAMS:
        texts = prompts(max(16, per_client * streams), seed=0)
        ours, alone, padded = [], [], []
        for _ in range(rounds):
            ours.append(run_engine(model, texts, streams, how))
            alone.append(peer.one_by_one(texts, streams))
            if streams > 1:
                padded.append(peer.padded(texts, streams))
        case = f"{streams} stream{'s' if streams > 1 else ''}"
        rows.append(BenchRow(case, _rate(ours), "tokens/s", ALONE, _rate(alone)))
        if padded:
            rows.append(BenchRow(f"{case}, padded", _rate(ours), "tokens/s", PADDED, _rate(padded)))
        rows.append(BenchRow(f"{case}, first token", _first_ms(ours), "ms", ALONE, _first_ms(alone)))
        if padded:
            first = f"{case}, padded, first token"
            rows.append(BenchRow(first, _first_ms(ours), "ms", PADDED, _first_ms(padded)))
    return rows


def _rate(rounds: Sequence[Measured]) -> float:
    return round(statistics.median(each.tokens_per_s for each in rounds), 2)


def _first_ms(rounds: Sequence[Measured]) -> float:
    return round(1e3 * statistics.median(statistics.mean(each.first_token_s) for each in rounds), 2)


def prompts(count: int, seed: int) -> list[str]:
    """Return what people could say first, in words alone."""
    rng = random.Random(f"bench-{seed}")
    texts: list[str] = []
    while len(texts) < count:
        turns = make(DIRECTIONS[len(texts) % len(DIRECTIONS)], rng, FreshScenes(rng)).turns
        texts.append(" ".join(part for part in turns[0].parts if isinstance(part, str)))
    return texts


def run_engine(model: LanguageModel, texts: Sequence[str], streams: int, how: Compile = False) -> Measured:
    """Let ``streams`` clients send ``texts`` to a fresh engine, compiled as ``how`` says beforehand."""
    engine = Engine(model, slots=max(8, streams), most_threads=_cores())
    compile_if_possible("language model", how, engine)
    return answer(engine, texts, streams)


def answer(engine: Engine, texts: Sequence[str], streams: int) -> Measured:
    """Let ``streams`` clients send ``texts`` to an engine that is idle."""
    options = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS, max_signals=MAX_NEW_TOKENS)
    queue = deque(enumerate(texts))
    sent: dict[int, float] = {}
    first: dict[int, float] = {}
    number: dict[int, int] = {}
    requests: dict[int, Request] = {}  # keeps their identities apart
    replies: dict[int, tuple[int, ...]] = {}

    def send() -> None:
        if queue:
            index, text = queue.popleft()
            sent[index] = time.perf_counter()
            request = requests[index] = engine.prepare([Message("user", [text])], options)
            number[id(request)] = index
            engine.submit(request)

    started = time.perf_counter()
    for _ in range(streams):
        send()
    while engine.busy:
        events = engine.step()
        now = time.perf_counter()
        for request, event in events:
            index = number[id(request)]
            if isinstance(event, Exception):
                raise event
            first.setdefault(index, now)
            if isinstance(event, Finished):
                replies[index] = event.ids
                send()
    seconds = time.perf_counter() - started
    waits = [first[index] - sent[index] for index in range(len(texts))]
    return Measured([replies[index] for index in range(len(texts))], seconds, waits)


class Peer:
    """Transformers' ``generate()`` with the same weights, prompts and rules."""

    def __init__(self, model: LanguageModel) -> None:
        self.tokenizer = model.tokenizer
        self.encode = model.encode
        self.model: Any = plain_model(model)
        self.blocks = WholeBlocks(model.tokenizer)

    def one_by_one(self, texts: Sequence[str], streams: int) -> Measured:
        """Answer one prompt after the other; ``streams`` clients wait in a line for their turn."""
        replies, waits = [], []
        sent: deque[float] = deque([time.perf_counter()] * streams)
        started = time.perf_counter()
        for ids in self._rows(texts):
            clock = _FirstToken()
            replies += self._generate([ids], clock)
            waits.append(clock.at - sent.popleft())
            sent.append(time.perf_counter())
        return Measured(replies, time.perf_counter() - started, waits)

    def padded(self, texts: Sequence[str], streams: int) -> Measured:
        """Answer the prompts in batches of ``streams``, each batch until its longest reply ends."""
        replies, waits = [], []
        started = time.perf_counter()
        rows = list(self._rows(texts))
        for start in range(0, len(rows), streams):
            clock, sent = _FirstToken(), time.perf_counter()
            batch = rows[start : start + streams]
            replies += self._generate(batch, clock)
            waits += [clock.at - sent] * len(batch)
        return Measured(replies, time.perf_counter() - started, waits)

    def _rows(self, texts: Sequence[str]) -> Iterator[list[int]]:
        for text in texts:
            yield self.encode([Message("user", [text])], open_reply=True).ids

    def _generate(
        self, rows: Sequence[list[int]], streamer: BaseStreamer | None = None
    ) -> list[tuple[int, ...]]:
        longest = max(map(len, rows))
        pad, eos = self.tokenizer.pad_id, self.tokenizer.eos_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        present = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        usual = torch.get_num_threads()
        torch.set_num_threads(_cores())
        try:
            said: Tensor = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=present.to(self.model.device),
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=eos,
                pad_token_id=pad,
                logits_processor=[self.blocks],
                streamer=streamer,
            )
        finally:
            torch.set_num_threads(usual)
        tails: list[list[int]] = said[:, longest:].tolist()
        return [tuple(tail[: tail.index(eos) + 1] if eos in tail else tail) for tail in tails]


def _cores() -> int:
    return os.cpu_count() or 1


class _FirstToken(BaseStreamer):
    """Notes when the first token after the prompt comes."""

    def __init__(self) -> None:
        self.puts = 0
        self.at = 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token after token."""
        self.puts += 1
        if self.puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Do nothing at the end."""
