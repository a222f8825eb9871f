"""The agent over real models in one process: what works at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from alignment.second_look import next_seed
from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.agent import Agent
from services.artefacts import ArtefactStore
from services.boxes import BoxState, GenerateBox, PromptMessage, Speech, SpeechOptions, SpokenSignal
from services.events import Event, PartDone, PartProgress, TextDelta, TurnDone
from services.local import local_agent
from services.local_decoder import LocalDecoder
from services.messages import Message, Role, TextPart, TurnOptions
from services.metrics import exposition
from services.presets import VerifyPreset, load_preset

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO
WITHIN_S = 120.0


@pytest.fixture(scope="module")
def agent(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Agent:
    store = ArtefactStore(tmp_path_factory.mktemp("files").as_uri())
    agent = local_agent(load_preset(str(tiny_preset)), store)
    for box in agent.decode.values():
        assert isinstance(box, LocalDecoder)
        box.load()
    return agent


def said(text: str) -> list[Message]:
    return [Message(Role.USER, (TextPart(text),))]


class Pausing:
    """Speaks like the box that it is given, but after the first signal it waits for ``may_go_on``."""

    def __init__(self, box: GenerateBox) -> None:
        self.box = box
        self.may_go_on = asyncio.Event()

    async def state(self) -> BoxState:
        return await self.box.state()

    async def generate(
        self, prompt: Sequence[PromptMessage], options: SpeechOptions
    ) -> AsyncGenerator[Speech, None]:
        async with aclosing(self.box.generate(prompt, options)) as stream:
            async for speech in stream:
                yield speech
                if isinstance(speech, SpokenSignal):
                    await self.may_go_on.wait()


async def test_a_decoder_works_as_soon_as_its_signal_is_there_while_the_text_goes_on(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = Pausing(agent.generate)
    monkeypatch.setattr(agent, "generate", speaker)
    events: list[Event] = []
    async with asyncio.timeout(WITHIN_S):
        async for event in agent.turn(said("draw, play and film a bell"), TurnOptions(seed=1)):
            events.append(event)
            if isinstance(event, PartDone):
                speaker.may_go_on.set()
    order = [event.index for event in events if isinstance(event, PartDone | TextDelta)]
    assert order.index(1) < order.index(2)  # the picture was there before the words that follow it
    assert isinstance(events[-1], TurnDone)
    timings = events[-1].timings
    assert timings["parts"][0]["done_s"] < timings["text_s"]


async def test_the_decoders_of_one_turn_work_at_the_same_time(agent: Agent) -> None:
    decoders = {modality: DecodeSettings(steps=90) for modality in (IMAGE, VIDEO, AUDIO)}
    options = TurnOptions(seed=1, decoders=decoders)
    steps: list[int] = []
    async with asyncio.timeout(WITHIN_S):
        async for event in agent.turn(said("draw, play and film a bell"), options):
            if isinstance(event, PartProgress) and event.step > 0:
                steps.append(event.index)
    first = {index: steps.index(index) for index in set(steps)}
    last = {index: len(steps) - 1 - steps[::-1].index(index) for index in set(steps)}
    assert set(steps) == {1, 3, 5}
    assert all(first[one] < last[other] for one in first for other in last)


async def test_turns_share_the_engines(agent: Agent) -> None:
    decoders = {IMAGE: DecodeSettings(steps=300)}
    told: list[tuple[str, Event]] = []

    async def turn(name: str, follow: asyncio.Event, started: asyncio.Event) -> None:
        await follow.wait()
        async for event in agent.turn(said("draw a bell"), TurnOptions(seed=1, decoders=decoders)):
            told.append((name, event))
            if isinstance(event, PartProgress) and event.step:
                started.set()

    now, first_steps, ever = asyncio.Event(), asyncio.Event(), asyncio.Event()
    now.set()
    async with asyncio.timeout(WITHIN_S):
        await asyncio.gather(turn("first", now, first_steps), turn("second", first_steps, ever))
    order = [
        (name, type(event))
        for name, event in told
        if isinstance(event, PartDone) or (isinstance(event, PartProgress) and event.step)
    ]
    assert order.index(("second", PartProgress)) < order.index(("first", PartDone))
    box = agent.decode[IMAGE]
    assert isinstance(box, LocalDecoder)
    assert box.engine is not None
    assert box.engine.stats().most_stepping == 2


async def test_everything_that_boxes_count_is_a_metric_and_idle_boxes_have_nothing_to_do(
    agent: Agent,
) -> None:
    counts = await agent.counts()
    assert set(counts) == {"agent", "encoder", "language_model", "image", "video", "audio"}
    lines = exposition(counts).splitlines()
    assert sum(not line.startswith("#") for line in lines) == sum(
        len(values) for replicas in counts.values() for values in replicas.values()
    )
    assert counts["language_model"]["local"]["slots_in_use"] == 0
    assert all(counts[modality.value]["local"]["requests"] == 0 for modality in (IMAGE, VIDEO, AUDIO))


async def test_an_agent_in_one_process_looks_at_what_it_made(tiny_preset: Path, tmp_path: Path) -> None:
    preset = load_preset(str(tiny_preset))
    verify = VerifyPreset(retries=2, below=0.999999, question="what is this?")
    looking = preset.model_copy(
        update={"generation": preset.generation.model_copy(update={"verify": verify})}
    )
    agent = local_agent(looking, ArtefactStore(f"file://{tmp_path}/store"))

    async def drawn(**wishes: Any) -> PartDone:
        options = TurnOptions(**wishes)
        (part,) = [e async for e in agent.turn(said("draw a bell"), options) if isinstance(e, PartDone)]
        return part

    best = await drawn(seed=3)
    assert best.attempts == 3  # nothing is as sure as that
    assert best.manifest["seed"] in [next_seed(3, attempt) for attempt in range(3)]
    assert (await drawn(seed=3)).artefact.sha256 == best.artefact.sha256
    bare = await drawn(seed=best.manifest["seed"], verify=False)
    assert bare.artefact.sha256 == best.artefact.sha256
    assert 0 < best.manifest["likeness"] < verify.below
