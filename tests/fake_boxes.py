"""Boxes that follow a script, an agent over them, and what it takes to ask it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.agent import Agent
from services.artefacts import ArtefactStore
from services.boxes import (
    Array,
    BoxState,
    Encoded,
    Made,
    Preview,
    Progress,
    PromptMessage,
    Speech,
    SpeechOptions,
    SpokenSignal,
    Step,
)
from services.errors import BadRequest
from services.events import (
    Event,
    TurnFailed,
    TurnStarted,
)
from services.messages import MediaPart, Message, Role, TextPart, TurnOptions

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO


def signal(modality: Modality, caption: str = "a bell") -> SpokenSignal:
    zeros = np.zeros((2, 4), dtype=np.float32)
    return SpokenSignal(modality, caption, zeros, zeros)


class FakeBox:
    """Is ready unless it is told otherwise."""

    now = BoxState.READY

    async def state(self) -> BoxState:
        return self.now

    async def counts(self) -> dict[str, dict[str, float]]:
        return {}


class FakeEncoder(FakeBox):
    async def encode(self, artefact_id: str, expect: Modality | None) -> Encoded:
        if expect is AUDIO:
            raise BadRequest("This is not a sound.", code="unsupported_media")
        tokens = np.zeros((3, 4), dtype=np.float32)
        return Encoded(expect or IMAGE, tokens, tokens[0], (3,))

    async def embed(self, items: Sequence[TextPart | MediaPart]) -> list[Array]:
        return [np.ones(4, dtype=np.float32) / 2 for _ in items]


class FakeSpeaker(FakeBox):
    """Says what it is given; a callable in the list is called instead of said.

    Captions are as probable as ``likenesses`` says, look by look.
    """

    def __init__(self, *script: Speech | Exception | Callable[[], Any]) -> None:
        self.script = script
        self.likenesses: list[float | Exception] = []
        self.looks: list[tuple[Sequence[PromptMessage], str, str]] = []
        self.prompt: list[PromptMessage] = []
        self.options: SpeechOptions | None = None
        self.closed = False

    async def generate(
        self, prompt: Sequence[PromptMessage], options: SpeechOptions
    ) -> AsyncGenerator[Speech, None]:
        self.prompt, self.options = list(prompt), options
        try:
            for item in self.script:
                if isinstance(item, Exception):
                    raise item
                if callable(item):
                    await item()
                    continue
                yield item
                await asyncio.sleep(0)
        finally:
            self.closed = True

    async def score(self, prompt: Sequence[PromptMessage], reply: str, user: str = "") -> list[float]:
        self.looks.append((prompt, reply, user))
        likeness = self.likenesses[len(self.looks) - 1]
        if isinstance(likeness, Exception):
            raise likeness
        return [0.0, math.log(likeness), math.log(0.999)]


class FakeDecoder(FakeBox):
    """Takes ``steps`` of ``step_s`` seconds each, and fails at the end if it is told to."""

    def __init__(
        self, store: ArtefactStore, modality: Modality, steps: int = 2, step_s: float = 0.0,
        error: Exception | None = None, now: BoxState = BoxState.READY,
    ) -> None:  # fmt: skip
        self.store, self.modality = store, modality
        self.steps, self.step_s, self.error, self.now = steps, step_s, error, now
        self.began: list[float] = []
        self.ended: list[float] = []
        self.settings: list[DecodeSettings] = []
        self.signals: list[SpokenSignal] = []
        self.users: list[str] = []
        self.sources: list[str | None] = []
        self.steps_taken = 0
        self.stopped = False

    async def decode(
        self,
        signal: SpokenSignal,
        settings: DecodeSettings,
        *,
        user: str = "",
        previews: int = 0,
        source: str | None = None,
    ) -> AsyncGenerator[Step, None]:
        self.began.append(time.monotonic())
        self.settings.append(settings)
        self.signals.append(signal)
        self.users.append(user)
        self.sources.append(source)
        try:
            for step in range(self.steps):
                await asyncio.sleep(self.step_s)
                self.steps_taken += 1
                yield Progress(step + 1, self.steps, None)
                if step < previews:
                    yield Preview(step + 1, self.steps, b"look", "image/jpeg")
        except (GeneratorExit, asyncio.CancelledError):
            self.stopped = True
            raise
        if self.error is not None:
            raise self.error
        made = self.store.put(
            b"data", media_type="image/png", filename="x.png", modality=self.modality, caption=signal.caption
        )
        self.ended.append(time.monotonic())
        yield Made(made, {"seed": settings.seed})


def agent(store: ArtefactStore, speaker: FakeSpeaker, *decoders: FakeDecoder, **rest: Any) -> Agent:
    return Agent(
        encode=rest.pop("encoder", FakeEncoder()),
        generate=speaker,
        decode={decoder.modality: decoder for decoder in decoders},
        store=store,
        **rest,
    )


def said(text: str = "draw a bell") -> list[Message]:
    return [Message(Role.USER, (TextPart(text),))]


async def events_of(agent: Agent, conversation: list[Message] | None = None, **options: Any) -> list[Event]:
    conversation = said() if conversation is None else conversation
    return [event async for event in agent.turn(conversation, TurnOptions(**options))]


def failure(events: list[Event]) -> dict[str, Any]:
    assert isinstance(events[-1], TurnFailed), events
    return dict(events[-1].error)


def turn_of(events: Sequence[Event]) -> str:
    assert isinstance(events[0], TurnStarted)
    return events[0].id
