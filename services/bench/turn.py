"""Whole turns: how long people wait for replies, beside servers that take one request at a time.

People talk to one service at the same time. Each sends a request, waits for the whole reply, media and
all, reads for a while (a random time, one second on average), and sends the next. A third of the requests
ask for words alone, a third for one medium, a third for three. The time of a job is from sending to the
last byte. Our side is the agent in this process, with the engines that ``patchbay serve`` uses. The peers
get the same people, requests, seeds, pauses, weights and settings; see :mod:`services.bench.naive`.

A turn alone is also held against the bare forward passes that it needs: those of the language model for
its whole prompt and each of its tokens (a signal block in one), and those that its decoders really ran, each
as transformers and diffusers call it. For this, neither side is compiled or recorded, and our language
model has forgotten the turn before, so that both run the same passes. Media of one turn are made at the
same time, so three may take less than their passes one by one.

In all rows, a ratio below 1 means that we are faster.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from alignment.toybox.directions import make
from alignment.toybox.exercise import FreshScenes
from decoders.engine import DenoisingEngine
from decoders.settings import DecodeSettings
from llm.model import LanguageModel
from services.agent import Agent
from services.artefacts import ArtefactStore
from services.bench import BenchRow
from services.bench.naive import Maker, NaiveServer, Said
from services.doctor import expect_files
from services.events import PartDone, PartFailed, TurnFailed
from services.local import local_agent
from services.local_decoder import LocalDecoder
from services.local_language_model import LocalLanguageModel
from services.messages import Message, Role, TextPart, TurnOptions
from services.presets import Preset

PEOPLE = {1: 12, 8: 6, 16: 4}
"""How many requests each of so many people sends in a round."""
QUICK_PEOPLE = {1: 3, 8: 1, 16: 1}
ROUNDS = 3
KINDS = {"words": 0, "one medium": 1, "three media": 3}
READING_S = 1.0
NAIVE, RELOADED = "one request at a time", "one request at a time, pipelines reloaded"
BARE = "bare forward passes"


@dataclass(frozen=True)
class Ask:
    """One request: what is said, the seed of its reply, and the seconds of reading before it."""

    text: str
    seed: int
    pause_s: float
    kind: str


def run(preset: Preset, quick: bool) -> list[BenchRow]:
    """Measure all cases; with ``quick`` one round with few requests."""
    expect_files(preset)
    people, rounds = (QUICK_PEOPLE, 1) if quick else (PEOPLE, ROUNDS)
    with tempfile.TemporaryDirectory(prefix="patchbay-bench-") as folder:
        agent = local_agent(preset, ArtefactStore(Path(folder).as_uri()))
        with asyncio.Runner() as runner:
            ours, naive, reloaded = servers(preset, agent)
            rows: list[BenchRow] = []
            runner.run(ours(workload(1, 3, seed=99)[0][0]))  # warm up
            for count, requests in people.items():
                rounds_of = [workload(count, requests, seed) for seed in range(rounds)]
                rows += runner.run(crowd(rounds_of, ours, naive, reloaded))
            plain = local_agent(_as_it_comes(preset), ArtefactStore(Path(folder).as_uri()))
            ours, naive, _ = servers(_as_it_comes(preset), plain)
            rows += runner.run(overheads(ours, naive.server, 3 if quick else 15))
    return rows


def _as_it_comes(preset: Preset) -> Preset:
    """Return the preset with nothing compiled or recorded."""
    off = {"compile": False}
    decoders = {m: decoder.model_copy(update=off) for m, decoder in preset.decoders.items()}
    language_model = preset.language_model.model_copy(update=off)
    return preset.model_copy(update={"decoders": decoders, "language_model": language_model})


Answer = Callable[[Ask], Awaitable[list[bytes]]]


class OneAtATime:
    """Puts a naive server behind a line of people who wait for their turn."""

    def __init__(self, server: NaiveServer) -> None:
        self.server = server
        self.line = asyncio.Lock()

    async def __call__(self, ask: Ask) -> list[bytes]:
        """Answer when all who came before are served."""
        async with self.line:
            return await asyncio.to_thread(self.server.answer, ask.text, ask.seed)


class OurService:
    """The agent, asked in words."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    def forget(self) -> None:
        """Let the language model forget what it has read, so that the next prompt is read whole."""
        box = self.agent.generate
        assert isinstance(box, LocalLanguageModel)
        if box.engine is not None:
            box.engine.forget()

    async def __call__(self, ask: Ask) -> list[bytes]:
        """Answer with a turn; return the files of its media."""
        said = [Message(Role.USER, (TextPart(ask.text),))]
        media = []
        async with aclosing(self.agent.turn(said, TurnOptions(seed=ask.seed))) as events:
            async for event in events:
                match event:
                    case PartDone(artefact=artefact):
                        media.append(artefact.id)
                    case TurnFailed(error=error):
                        raise RuntimeError(f"A turn of the bench failed: {error}")
                    case PartFailed(message=message):
                        raise RuntimeError(f"A medium of the bench failed: {message}")
        return [self.agent.store.read(artefact_id) for artefact_id in media]


def servers(preset: Preset, agent: Agent) -> tuple[OurService, OneAtATime, OneAtATime]:
    """Return the agent with everything loaded, and the naive servers over its very weights."""
    options = preset.language_model
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model = LanguageModel.from_pretrained(preset.language_model_folder, preset.device, dtype=dtype)
    model.merge_adapter()
    makers = {}
    for modality, box in agent.decode.items():
        assert isinstance(box, LocalDecoder)
        box.load()
        box.warm_up()
        assert isinstance(box.engine, DenoisingEngine)
        wishes = preset.decoders[modality].fill(DecodeSettings())
        makers[modality] = Maker(box.engine.decoder, box.link(box.engine), wishes)
    naive = [
        NaiveServer(model, makers, max_new_tokens=preset.generation.max_new_tokens, reload=reload)
        for reload in (False, True)
    ]
    return OurService(agent), OneAtATime(naive[0]), OneAtATime(naive[1])


def workload(people: int, requests: int, seed: int) -> list[list[Ask]]:
    """Return what each person says; the same for the same arguments."""
    rng = random.Random(f"bench-turn-{seed}-{people}")
    kinds = [list(KINDS)[i % len(KINDS)] for i in range(people * requests)]
    rng.shuffle(kinds)
    asks = [
        Ask(_text(kind, rng), rng.randrange(2**31), rng.expovariate(1 / READING_S), kind) for kind in kinds
    ]
    return [asks[person::people] for person in range(people)]


def _text(kind: str, rng: random.Random) -> str:
    """Return what somebody could say first, in words alone, to get a reply of that kind."""
    direction = {"words": "decision", "one medium": "decision", "three media": "text-to-many"}[kind]
    while True:
        exercise = make(direction, rng, FreshScenes(rng))
        parts = exercise.turns[0].parts
        in_words = len(exercise.turns) == 1 and all(isinstance(part, str) for part in parts)
        if in_words and len(exercise.scenes) == KINDS[kind]:
            return " ".join(str(part) for part in parts)


async def crowd(
    rounds: Sequence[list[list[Ask]]], ours: Answer, naive: Answer, reloaded: Answer
) -> list[BenchRow]:
    """Let a crowd of people talk to each of the three, one after another."""
    seconds: list[list[float]] = [[], [], []]
    for people in rounds:
        for spent, answer in zip(seconds, (ours, naive, reloaded), strict=True):
            spent += await waits(people, answer)
    count = len(rounds[0])
    name = f"{count} {'person' if count == 1 else 'people'}"
    rows = []
    for suffix, peer, theirs in (("", NAIVE, seconds[1]), (", reloaded", RELOADED, seconds[2])):
        rows.append(
            BenchRow(
                f"{name} median{suffix}", statistics.median(seconds[0]), "s", peer, statistics.median(theirs)
            )
        )
        rows.append(BenchRow(f"{name} p95{suffix}", _p95(seconds[0]), "s", peer, _p95(theirs)))
    return rows


async def waits(people: Sequence[Sequence[Ask]], answer: Answer) -> list[float]:
    """Return the seconds of every job."""
    seconds: list[float] = []

    async def person(asks: Sequence[Ask]) -> None:
        for ask in asks:
            await asyncio.sleep(ask.pause_s)
            began = time.perf_counter()
            await answer(ask)
            seconds.append(time.perf_counter() - began)

    await asyncio.gather(*(person(asks) for asks in people))
    return seconds


def _p95(seconds: Sequence[float]) -> float:
    return sorted(seconds)[max(0, -(-95 * len(seconds) // 100) - 1)]


async def overheads(ours: OurService, server: NaiveServer, rounds: int) -> list[BenchRow]:
    """Hold turns alone against the forward passes that they need."""
    rows = []
    asks = [ask for person in workload(6, 3, seed=7) for ask in person]
    for kind in KINDS:
        ask = next(ask for ask in asks if ask.kind == kind)
        said = server.say(ask.text)
        with Recording(server) as recording:
            await ours(ask)
        turns, bare = [], []
        for _ in range(rounds):
            ours.forget()
            began = time.perf_counter()
            await ours(ask)
            turns.append(time.perf_counter() - began)
            began = time.perf_counter()
            await asyncio.to_thread(_bare, server, said, recording)
            bare.append(time.perf_counter() - began)
        rows.append(BenchRow(f"1 turn, {kind}", statistics.median(turns), "s", BARE, statistics.median(bare)))
    return rows


def _bare(server: NaiveServer, said: Said, recording: Recording) -> None:
    speak(server, said)
    recording.replay()


@torch.inference_mode()
def speak(server: NaiveServer, said: Said) -> None:
    """Run the language model over a prompt and, pass by pass, over the reply that is known already."""
    plain: Any = server.plain
    cache = DynamicCache(config=plain.config)
    blocks = {
        start: len(server.model.tokenizer.signal_ids(modality))
        for start, modality in server.blocks_in(said.reply)
    }
    passes, place = [said.prompt], 0
    while place < len(said.reply) - 1:  # the last token is not fed
        length = blocks.get(place, 1)
        passes.append(said.reply[place : place + length])
        place += length
    for ids in passes:
        tokens = torch.tensor([ids], device=plain.device)
        hidden: Tensor = plain.base_model(input_ids=tokens, past_key_values=cache).last_hidden_state
        plain.get_output_embeddings()(hidden[:, -1])


class Recording:
    """Writes down what the networks of the decoders are called with, to call them once more."""

    def __init__(self, server: NaiveServer) -> None:
        self.calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self.networks: list[nn.Module] = []
        for parts in server.parts.values():
            self.networks += [parts.unet, parts.vae.decoder, *filter(None, [parts.vocoder])]
        self.hooks: list[Any] = []

    def __enter__(self) -> Recording:
        self.hooks = [
            network.register_forward_pre_hook(self._note, with_kwargs=True) for network in self.networks
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _note(self, network: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.calls.append((network, args, named))

    @torch.inference_mode()
    def replay(self) -> None:
        """Call the networks as they were called, one after the other."""
        for network, args, named in self.calls:
            network(*args, **named)
