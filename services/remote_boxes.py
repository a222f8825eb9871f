"""The boxes and the agent behind Ray Serve handles: what a process asks of another, and how it fails.

What goes wrong on the other side comes as a :class:`Failure`, a value; a replica that is lost becomes an
error that says so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.adapters import AdapterState
from services.boxes import Counts, Encoded, PromptMessage, Speech, SpeechOptions, SpokenSignal, Step
from services.errors import ServiceError, Unavailable
from services.events import Event, TurnFailed
from services.messages import Message, TurnOptions

if TYPE_CHECKING:
    from services.deployments import AgentReplica, DecoderReplica, EncoderReplica, LanguageModelReplica

logger = logging.getLogger(__name__)

APP_NAME = "patchbay"
STATUS_KEPT_S = 1.0
COUNTS_WITHIN_S = 5.0  # a replica that is full answers when its next request has ended
STOPS_WITHIN_S = 60.0  # a step of a large video takes a while


@dataclass(frozen=True)
class Failure:
    """An error on its way to another process."""

    error: Mapping[str, Any]

    def raised(self) -> ServiceError:
        """Return the error as an exception."""
        return ServiceError.from_wire(dict(self.error))


class RemoteEncoder:
    """An encode box behind a handle."""

    def __init__(self, handle: DeploymentHandle[EncoderReplica]) -> None:
        self.handle = handle

    async def encode(self, artefact_id: str, expect: Modality | None) -> Encoded:
        """Read the artefact and encode it."""
        try:
            encoded: Encoded | Failure = await self.handle.encode.remote(artefact_id, expect)
        except (RayError, RayServeException) as error:
            raise _lost("encoder", error) from error
        if isinstance(encoded, Failure):
            raise encoded.raised()
        return encoded

    async def counts(self) -> Mapping[str, Counts]:
        """Return what each replica counts."""
        return await _counts(self.handle)


class RemoteLanguageModel:
    """A generate box behind a handle."""

    def __init__(self, handle: DeploymentHandle[LanguageModelReplica]) -> None:
        self.handle = handle

    async def generate(
        self, prompt: Sequence[PromptMessage], options: SpeechOptions
    ) -> AsyncGenerator[Speech, None]:
        """Stream the reply."""
        async with aclosing(_stream(self.handle, "generate", "language model", prompt, options)) as stream:
            async for speech in stream:
                yield speech

    async def counts(self) -> Mapping[str, Counts]:
        """Return what each replica counts."""
        return await _counts(self.handle)


class RemoteDecoder:
    """A decode box behind a handle."""

    def __init__(
        self,
        handle: DeploymentHandle[DecoderReplica],
        modality: Modality,
        status: ClusterStatus,
        deployment: str,
    ) -> None:
        self.handle = handle
        self.modality = modality
        self.status = status
        self.deployment = deployment

    async def available(self) -> bool:
        """Whether a replica is running."""
        return await self.status.is_running(self.deployment)

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
        box = f"{self.modality.value} decoder"
        wishes = {"user": user, "previews": previews, "source": source}
        work = _stream(self.handle, "decode", box, signal, settings, **wishes)
        async with aclosing(work) as stream:
            async for step in stream:
                yield step

    async def counts(self) -> Mapping[str, Counts]:
        """Return what each replica counts."""
        return await _counts(self.handle, self.modality)


class RemoteAgent:
    """The agent behind a handle, as the gateway needs it."""

    def __init__(self, handle: DeploymentHandle[AgentReplica]) -> None:
        self.handle = handle

    async def turn(
        self, conversation: Sequence[Message], options: TurnOptions
    ) -> AsyncGenerator[Event, None]:
        """Stream the events of a turn; a lost agent is a failed turn."""
        async with aclosing(self._events("turn", conversation, options)) as events:
            async for event in events:
                yield event

    async def outputs(self) -> tuple[Modality, ...]:
        """Return the media that can be made now."""
        try:
            outputs: tuple[Modality, ...] = await self.handle.outputs.remote()
        except (RayError, RayServeException) as error:
            raise _lost("agent", error) from error
        return outputs

    async def counts(self) -> Mapping[str, Mapping[str, Counts]]:
        """Return what the boxes count, by box and replica."""
        try:
            counts: Mapping[str, Mapping[str, Counts]] = await self.handle.counts.remote()
        except (RayError, RayServeException) as error:
            raise _lost("agent", error) from error
        return {**counts, "agent": await _counts(self.handle, method="own_counts")}

    async def cancel_part(self, turn: str, index: int) -> bool:
        """Stop one medium; return False when no replica is making it."""
        answers = await _all(self.handle, "cancel_part", turn, index, within_s=STOPS_WITHIN_S)
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

    async def _events(self, method: str, *args: Any, **wishes: Any) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(_stream(self.handle, method, "agent", *args, **wishes)) as stream:
                async for event in stream:
                    yield event
        except ServiceError as error:
            yield TurnFailed(error=error.to_wire())

    async def adapters(self) -> list[AdapterState]:
        """Return the adapters of every replica of every box."""
        try:
            states: list[AdapterState] = await self.handle.adapters.remote()
        except (RayError, RayServeException) as error:
            raise _lost("agent", error) from error
        return states

    async def unload_adapter(self, name: str) -> int:
        """Put an adapter away; return in how many replicas it was loaded."""
        try:
            count: int | Failure = await self.handle.unload_adapter.remote(name)
        except (RayError, RayServeException) as error:
            raise _lost("agent", error) from error
        if isinstance(count, Failure):
            raise count.raised()
        return count


class ClusterStatus:
    """Which deployments are running, asked of the controller at most once a second."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.asked_at = float("-inf")
        self.running: dict[str, bool] = {}

    async def is_running(self, deployment: str) -> bool:
        """Whether a deployment has a running replica."""
        async with self.lock:
            if time.monotonic() - self.asked_at > STATUS_KEPT_S:
                self.running = await asyncio.to_thread(self._ask)
                self.asked_at = time.monotonic()
        return self.running.get(deployment, False)

    @staticmethod
    def _ask() -> dict[str, bool]:
        application = serve.status().applications.get(APP_NAME)
        if application is None:
            return {}
        states: dict[str, dict[Any, int]] = {
            name: dict(deployment.replica_states) for name, deployment in application.deployments.items()
        }
        return {name: counts.get("RUNNING", 0) > 0 for name, counts in states.items()}


async def _stream(
    handle: DeploymentHandle[Any], method: str, box: str, *args: Any, **wishes: Any
) -> AsyncGenerator[Any, None]:
    """Iterate over a streaming method; closing this cancels the call on the other side."""
    response = getattr(handle.options(stream=True), method).remote(*args, **wishes)
    ended = False
    try:
        async for item in response:
            if isinstance(item, Failure):
                raise item.raised()
            yield item
        ended = True
    except (RayError, RayServeException) as error:
        raise _lost(box, error) from error
    finally:
        if not ended:
            response.cancel()


async def _all(handle: DeploymentHandle[Any], method: str, *args: Any, within_s: float) -> list[Any]:
    """Call a method of every replica; return the answers of those that gave one in time."""
    try:
        call = handle.broadcast(method, *args)
        answers = await call.results_async(timeout_s=within_s, return_exceptions=True)
    except (TimeoutError, RayError, RayServeException) as error:
        logger.warning("%s.%s: no answer: %s", handle.deployment_name, method, type(error).__name__)
        return []
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def _counts(
    handle: DeploymentHandle[Any], *args: object, method: str = "counts"
) -> Mapping[str, Counts]:
    answers: list[Mapping[str, Counts]] = await _all(handle, method, *args, within_s=COUNTS_WITHIN_S)
    return {replica: counts for answer in answers for replica, counts in answer.items()}


def _lost(box: str, error: Exception) -> Unavailable:
    logger.warning("The %s was lost: %s", box, type(error).__name__)
    return Unavailable(
        f"The {box} stopped while it worked and is being started again. Try again soon.",
        code=f"{box.split()[-1]}_unavailable",
        retry_after_s=5,
    )
