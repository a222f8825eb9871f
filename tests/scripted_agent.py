"""An agent that follows a script, and what it takes to ask a gateway over it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from decoders.settings import DecodeSettings
from decoders.writing import to_mp4, to_png, to_wav
from encoders.media import Audio, Image, Modality, Video
from services.artefacts import ArtefactStore
from services.boxes import Array, BoxState
from services.events import (
    Event,
    PartDone,
    PartProgress,
    PartStarted,
    TextDelta,
    TurnDone,
    TurnStarted,
)
from services.gateway import build_gateway
from services.messages import MediaPart, Message, TextPart, TurnOptions
from services.presets import Preset

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO
PIXELS = np.full((8, 8, 3), 200, dtype=np.uint8)
PNG = to_png(Image(PIXELS), {"seed": 1})
WAV = to_wav(Audio(np.zeros(800, dtype=np.float32), 16000), {"seed": 1})
MP4 = to_mp4(Video(np.stack([PIXELS.repeat(4, 0).repeat(4, 1)] * 4), 8.0), {"seed": 1})
FILES = {
    IMAGE: (PNG, "image/png", "image.png"),
    VIDEO: (MP4, "video/mp4", "video.mp4"),
    AUDIO: (WAV, "audio/wav", "audio.wav"),
}


class FakeAgent:
    """Tells a script of events and remembers what it was asked."""

    def __init__(self, *script: Event | float) -> None:
        self.script = script
        self.conversation: Sequence[Message] = ()
        self.options = TurnOptions()
        self.ended = asyncio.Event()
        self.running: set[tuple[str, int]] = set()
        self.now = dict.fromkeys(("encoder", "language_model", "image", "video"), BoxState.READY)
        self.now["audio"] = BoxState.GONE
        self.retried: list[tuple[Any, ...]] = []
        self.made: list[tuple[Any, ...]] = []

    async def turn(
        self, conversation: Sequence[Message], options: TurnOptions
    ) -> AsyncGenerator[Event, None]:
        self.conversation, self.options = conversation, options
        try:
            for item in self.script:
                if isinstance(item, float):
                    await asyncio.sleep(item)
                else:
                    yield item
        finally:
            self.ended.set()

    async def states(self) -> Mapping[str, BoxState]:
        return self.now

    async def counts(self) -> dict[str, dict[str, dict[str, float]]]:
        return {"image": {"local": {"requests": 2}}}

    async def cancel_part(self, turn: str, index: int) -> bool:
        return (turn, index) in self.running

    async def make(
        self,
        modality: Modality,
        caption: str,
        settings: DecodeSettings,
        *,
        user: str | None = None,
        previews: int = 0,
    ) -> AsyncGenerator[Event, None]:
        self.made.append((modality, caption, settings, user, previews))
        async with aclosing(self.turn((), TurnOptions())) as events:
            async for event in events:
                yield event

    async def embed(self, items: Sequence[TextPart | MediaPart]) -> list[Array]:
        return [np.ones(4, dtype=np.float32) / 2 for _ in items]

    async def retry_part(
        self, turn: str, index: int, wishes: DecodeSettings, *, user: str | None = None, previews: int = 0
    ) -> AsyncGenerator[Event, None]:
        self.retried.append((turn, index, wishes, user, previews))
        async with aclosing(self.turn((), TurnOptions())) as events:
            async for event in events:
                yield event


@asynccontextmanager
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


def done(store: ArtefactStore, index: int, modality: Modality, caption: str = "a bell") -> PartDone:
    data, media_type, name = FILES[modality]
    artefact = store.put(
        data, media_type=media_type, filename=name, modality=modality, caption=caption, manifest={"seed": 1}
    )
    return PartDone(index=index, modality=modality, caption=caption, artefact=artefact, manifest={"seed": 1})


def script(store: ArtefactStore) -> list[Event]:
    return [
        TurnStarted(seed=1),
        TextDelta(index=0, text="Here is"),
        TextDelta(index=0, text=" a bell."),
        PartStarted(index=1, modality=IMAGE, caption="Here is a bell."),
        TextDelta(index=2, text="It sounds."),
        PartProgress(index=1, step=1, total=2, eta_s=0.5),
        PartStarted(index=3, modality=AUDIO, caption="It sounds."),
        done(store, 1, IMAGE),
        done(store, 3, AUDIO),
        PartStarted(index=4, modality=VIDEO, caption=""),
        done(store, 4, VIDEO, ""),
        TurnDone(finish_reason="stop", usage={"prompt_tokens": 3, "completion_tokens": 4}, timings={"a": 1}),
    ]


def about(file_id: str) -> list[Any]:
    """Return a conversation about an uploaded file."""
    file = {"type": "file", "file": {"file_id": file_id}}
    return [{"role": "user", "content": [file, {"type": "text", "text": "what is this?"}]}]


def body(content: Any = "draw a bell", **rest: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **rest}


async def ask(
    app_agent: FakeAgent, preset: Preset, store: ArtefactStore, payload: dict[str, Any]
) -> httpx.Response:
    async with client(build_gateway(preset, app_agent, store)) as http:
        return await http.post("/v1/chat/completions", json=payload)


def chunks_of(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
