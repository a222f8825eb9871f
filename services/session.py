"""The whole agent in this program, without a server: open a preset, talk to it, get the parts back.

with Session.open("toybox") as session:
    reply = session.chat([{"role": "user", "content": "draw a big red bell"}], seed=1)
    reply.parts[1].data  # a PNG
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.agent import Agent
from services.artefacts import ArtefactStore
from services.errors import ServiceError
from services.events import (
    Event,
    PartAsked,
    PartDone,
    PartFailed,
    TextDelta,
    TurnDone,
    TurnFailed,
    TurnStarted,
)
from services.messages import Message, TurnOptions
from services.presets import Preset, load_preset
from services.requests import read_messages


@dataclass(frozen=True, kw_only=True)
class ReplyPart:
    """One part of a reply: ``text`` for words, else ``data``, or the ``error`` that prevented it.

    A medium that was asked about instead of made has a ``question`` and ``confidence`` in [0, 1].
    ``file_id`` names a medium in later messages to the same session.
    """

    type: Modality
    text: str | None = None
    data: bytes | None = field(default=None, repr=False)
    caption: str | None = None
    manifest: Mapping[str, Any] | None = None
    file_id: str | None = None
    error: str | None = None
    question: str | None = None
    confidence: float | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole reply, parts in the order spoken. ``id`` names it for :meth:`Session.make`."""

    id: str
    parts: tuple[ReplyPart, ...]
    finish_reason: str
    usage: Mapping[str, int]
    timings: Mapping[str, Any]

    @property
    def text(self) -> str:
        """All words of the reply, questions about media included."""
        return "\n".join(text for part in self.parts if (text := part.text or part.question))


class Session:
    """An agent over models in this process, behind ordinary (not async) calls."""

    def __init__(self, preset: Preset) -> None:
        from services.local import local_agent

        self.preset = preset
        self.folder = tempfile.TemporaryDirectory(prefix="patchbay-")
        self.store = ArtefactStore(Path(self.folder.name).as_uri())
        self.runner = asyncio.Runner()
        try:
            self.agent: Agent = local_agent(preset, self.store)
        except BaseException:  # an interrupt while models load too: the folder and the loop must not stay
            self.close()
            raise

    @classmethod
    def open(cls, preset: str | Preset = "toybox") -> Session:
        """Load the models of a preset, by name, by YAML path, or as a value."""
        return cls(load_preset(preset) if isinstance(preset, str) else preset)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        on_event: Callable[[Event], None] | None = None,
        **options: Any,
    ) -> Reply:
        """Answer a conversation in the form of chat completions.

        Besides data URLs and file ids, a media part may carry its bytes: ``{"type": "image",
        "data": b"..."}``, or ``video`` or ``audio``. ``options`` are the fields of TurnOptions.
        Raises ServiceError when there is no reply.
        """
        conversation = read_messages(messages, self.store)
        return self.runner.run(self._collect(conversation, TurnOptions(**options), on_event))

    def make(self, reply: Reply, index: int) -> Reply:
        """Make a medium of a reply that was asked about, or make one again.

        Returns the reply with the medium at its place, or the error that prevented it. Raises ServiceError
        when it cannot even start.
        """
        return self.runner.run(self._made(reply, index))

    async def _collect(
        self,
        conversation: Sequence[Message],
        options: TurnOptions,
        on_event: Callable[[Event], None] | None,
    ) -> Reply:
        turn = ""
        parts: dict[int, ReplyPart] = {}
        async with aclosing(self.agent.turn(conversation, options)) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)
                match event:
                    case TurnStarted():
                        turn = event.id
                    case TextDelta(index=index, text=text):
                        before = parts[index].text or "" if index in parts else ""
                        parts[index] = ReplyPart(type=Modality.TEXT, text=before + text)
                    case PartAsked() | PartDone() | PartFailed():
                        parts[event.index] = self._medium(event)
                    case TurnFailed():
                        raise ServiceError.from_wire(dict(event.error))
                    case TurnDone():
                        return Reply(
                            id=turn,
                            parts=tuple(parts[index] for index in sorted(parts)),
                            finish_reason=event.finish_reason,
                            usage=event.usage,
                            timings=event.timings,
                        )
        raise AssertionError("a turn ended without saying so")

    async def _made(self, reply: Reply, index: int) -> Reply:
        async with aclosing(self.agent.retry_part(reply.id, index, DecodeSettings())) as events:
            async for event in events:
                match event:
                    case PartDone() | PartFailed():
                        parts = list(reply.parts)
                        parts[index] = self._medium(event)
                        return replace(reply, parts=tuple(parts))
                    case TurnFailed():
                        raise ServiceError.from_wire(dict(event.error))
        raise AssertionError("a retry ended without saying so")

    def _medium(self, event: PartAsked | PartDone | PartFailed) -> ReplyPart:
        match event:
            case PartDone():
                return ReplyPart(
                    type=event.modality,
                    data=self.store.read(event.artefact.id),
                    caption=event.caption,
                    manifest=event.manifest,
                    file_id=event.artefact.id,
                )
            case PartAsked():
                return ReplyPart(
                    type=event.modality,
                    caption=event.caption,
                    question=event.question,
                    confidence=event.confidence,
                )
            case PartFailed():
                return ReplyPart(type=event.modality, caption=event.caption, error=event.message)

    def close(self) -> None:
        """Stop the threads and remove the session's files."""
        self.runner.close()
        self.folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
