"""The boxes and the agent behind Ray Serve handles: what a process asks of another, and how it fails.

What goes wrong on the other side comes as a :class:`services.cluster.Failure`, a value; a replica that is
lost, or never there, becomes an error that says so.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.adapters import AdapterState
from services.boxes import (
    Array,
    BoxState,
    Counts,
    Encoded,
    PromptMessage,
    Speech,
    SpeechOptions,
    SpokenSignal,
    Step,
)
from services.cluster import Line
from services.errors import ServiceError, Unavailable
from services.events import Event, TurnFailed
from services.messages import MediaPart, Message, TextPart, TurnOptions

STOPS_WITHIN_S = 60.0  # a step of a large video takes a while


class RemoteEncoder:
    """An encode box behind a handle."""

    def __init__(self, line: Line) -> None:
        self.line = line

    async def state(self) -> BoxState:
        """Return whether a replica is running."""
        return await self.line.state()

    async def encode(self, artefact_id: str, expect: Modality | None) -> Encoded:
        """Read the artefact and encode it."""
        encoded: Encoded = await self.line.call("encode", artefact_id, expect)
        return encoded

    async def embed(self, items: Sequence[TextPart | MediaPart]) -> list[Array]:
        """Return a unit vector for each item."""
        vectors: list[Array] = await self.line.call("embed", items)
        return vectors

    async def counts(self) -> Mapping[str, Counts]:
        """Return what each replica counts."""
        return await self.line.counts()


class RemoteLanguageModel:
    """A generate box behind a handle."""

    def __init__(self, line: Line) -> None:
        self.line = line

    async def state(self) -> BoxState:
        """Return whether a replica is running."""
        return await self.line.state()

    async def generate(
        self, prompt: Sequence[PromptMessage], options: SpeechOptions
    ) -> AsyncGenerator[Speech, None]:
        """Stream the reply."""
        async with aclosing(self.line.stream("generate", prompt, options)) as stream:
            async for speech in stream:
                yield speech

    async def score(self, prompt: Sequence[PromptMessage], reply: str, user: str = "") -> Sequence[float]:
        """Return how probable each token of a reply is, and its end."""
        found: Sequence[float] = await self.line.call("score", prompt, reply, user)
        return found

    async def counts(self) -> Mapping[str, Counts]:
        """Return what each replica counts."""
        return await self.line.counts()


class RemoteDecoder:
    """A decode box behind a handle."""

    def __init__(self, line: Line, modality: Modality) -> None:
        self.line = line
        self.modality = modality

    async def state(self) -> BoxState:
        """Return whether a replica is running."""
        return await self.line.state()

    async def decode(
        self,
        signal: SpokenSignal,
        settings: DecodeSettings,
        *,
        user: str = "",
        previews: int = 0,
        source: str | None = None,
    ) -> AsyncGenerator[Step, None]:
        """Stream progress, previews and the medium."""
        wishes = {"user": user, "previews": previews, "source": source}
        async with aclosing(self.line.stream("decode", signal, settings, **wishes)) as stream:
            async for step in stream:
                yield step

    async def counts(self) -> Mapping[str, Counts]:
        """Return what each replica counts."""
        return await self.line.counts(self.modality)


class RemoteAgent:
    """The agent behind a handle, as the gateway needs it.

    ``deployments`` are the names of the deployments by part of the service; whether they are there, the
    controller knows also while no agent is.
    """

    def __init__(self, line: Line, deployments: Mapping[str, str]) -> None:
        self.line = line
        self.deployments = deployments

    async def turn(
        self, conversation: Sequence[Message], options: TurnOptions
    ) -> AsyncGenerator[Event, None]:
        """Stream the events of a turn; a lost agent is a failed turn."""
        async with aclosing(self._events("turn", conversation, options)) as events:
            async for event in events:
                yield event

    async def states(self) -> dict[str, BoxState]:
        """Return which parts of the service can work now."""
        return {part: await self.line.status.state(name) for part, name in self.deployments.items()}

    async def counts(self) -> Mapping[str, Mapping[str, Counts]]:
        """Return what the boxes count, by box and replica."""
        counts: Mapping[str, Mapping[str, Counts]] = await self.line.call("counts")
        return {**counts, "agent": await self.line.counts(method="own_counts")}

    async def embed(self, items: Sequence[TextPart | MediaPart]) -> list[Array]:
        """Return a unit vector for each item, all in one space."""
        vectors: list[Array] = await self.line.call("embed", items)
        return vectors

    async def cancel_part(self, turn: str, index: int) -> bool:
        """Stop one medium; return False when no replica is making it."""
        answers = await self.line.all("cancel_part", turn, index, within_s=STOPS_WITHIN_S)
        if not answers:
            raise Unavailable(
                "The agent does not answer. Try again soon.", code="agent_unavailable", retry_after_s=5
            )
        return any(answers)

    async def retry_part(
        self, turn: str, index: int, wishes: DecodeSettings, *, user: str | None = None, previews: int = 0
    ) -> AsyncGenerator[Event, None]:
        """Stream the events of a medium that is made again; any replica can make it."""
        again = self._events("retry_part", turn, index, wishes, user=user, previews=previews)
        async with aclosing(again) as events:
            async for event in events:
                yield event

    async def make(
        self,
        modality: Modality,
        caption: str,
        settings: DecodeSettings,
        *,
        user: str | None = None,
        previews: int = 0,
    ) -> AsyncGenerator[Event, None]:
        """Stream the events of a medium that is made of words."""
        made = self._events("make", modality, caption, settings, user=user, previews=previews)
        async with aclosing(made) as events:
            async for event in events:
                yield event

    async def _events(self, method: str, *args: Any, **wishes: Any) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(self.line.stream(method, *args, **wishes)) as stream:
                async for event in stream:
                    yield event
        except ServiceError as error:
            yield TurnFailed(error=error.to_wire())

    async def adapters(self) -> list[AdapterState]:
        """Return the adapters of every replica of every box."""
        states: list[AdapterState] = await self.line.call("adapters")
        return states

    async def unload_adapter(self, name: str) -> int:
        """Put an adapter away; return in how many replicas it was loaded."""
        count: int = await self.line.call("unload_adapter", name)
        return count
