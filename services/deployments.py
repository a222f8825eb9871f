"""The boxes as Ray Serve deployments: shells around the objects of one process.

Each replica holds one of the objects of ``services.local_*``, which bring a thread of their own and end
what is dropped within one step, because Serve frees a replica's slot on cancel while its thread still
runs. Media travel through the artefact store. What goes wrong travels as a value, so that no traceback
fills the logs. Only this file and ``deploy/`` know Ray; replicas that need no model never import torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from alignment.chatter import hush
from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.adapters import AdapterShelf, AdapterState
from services.agent import Agent
from services.artefacts import ArtefactStore
from services.boxes import (
    LOCAL,
    Counts,
    Encoded,
    PromptMessage,
    Speech,
    SpeechOptions,
    SpokenSignal,
    Step,
)
from services.errors import ServiceError, Unavailable, translate
from services.events import Event, TurnFailed
from services.messages import Message, TurnOptions
from services.presets import Preset, load_preset

logger = logging.getLogger(__name__)

APP_NAME = "patchbay"
STATUS_KEPT_S = 1.0
COUNTS_WITHIN_S = 5.0  # a replica that is full answers when its next request has ended
STOPS_WITHIN_S = 60.0  # a step of a large video takes a while


class ReplicaArgs(BaseModel):
    """What every replica needs to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str
    store: str = Field(description="URL of the artefact store, reachable from every machine")
    torch_threads: int = Field(default=1, ge=1)


@dataclass(frozen=True)
class Failure:
    """An error on its way to another process."""

    error: Mapping[str, Any]

    def raised(self) -> ServiceError:
        """Return the error as an exception."""
        return ServiceError.from_wire(dict(self.error))


def _failure(error: Exception) -> Failure:
    known = translate(error)
    if known.status == 500:
        logger.error("A request failed.", exc_info=error)
    return Failure(known.to_wire())


class EncoderReplica:
    """Reads media from the store and encodes them."""

    def __init__(self, args: ReplicaArgs) -> None:
        _use_threads(args.torch_threads)
        from services.local_encoder import LocalEncoder

        self.box = LocalEncoder(load_preset(args.preset), ArtefactStore(args.store))
        self.box.load()

    async def encode(self, artefact_id: str, expect: Modality | None) -> Encoded | Failure:
        """Encode one artefact."""
        try:
            return await self.box.encode(artefact_id, expect)
        except Exception as error:  # noqa: BLE001  (the edge of a process: it must answer)
            return _failure(error)

    async def counts(self) -> Mapping[str, Counts]:
        """Return what this replica counts."""
        return _named(await self.box.counts())


class LanguageModelReplica:
    """Speaks: words, and signals for media."""

    def __init__(self, args: ReplicaArgs) -> None:
        _use_threads(args.torch_threads)
        from services.local_language_model import LocalLanguageModel

        self.box = LocalLanguageModel(load_preset(args.preset))
        self.box.load()
        self.box.warm_up()

    async def generate(
        self, prompt: Sequence[PromptMessage], options: SpeechOptions
    ) -> AsyncGenerator[Speech | Failure, None]:
        """Stream a reply."""
        try:
            async with aclosing(self.box.generate(prompt, options)) as stream:
                async for speech in stream:
                    yield speech
        except Exception as error:  # noqa: BLE001  (the edge of a process: it must answer)
            yield _failure(error)

    async def counts(self) -> Mapping[str, Counts]:
        """Return what this replica counts."""
        return _named(await self.box.counts())

    def adapters(self) -> list[AdapterState]:
        """Return the adapters of this box."""
        return self.box.adapters.states()

    def unload_adapter(self, name: str) -> bool | Failure:
        """Put an adapter away; return whether it was loaded."""
        return _unloaded(self.box.adapters, name)


class DecoderReplica:
    """Makes media of one kind, or of several whose decoders make room for each other, and stores them.

    Decoders are loaded at once, unless the preset lets them leave the device: then at their first use.
    """

    def __init__(self, args: ReplicaArgs, modalities: Sequence[Modality]) -> None:
        _use_threads(args.torch_threads)
        from services.local_decoder import LocalDecoder, pool_for

        preset, store = load_preset(args.preset), ArtefactStore(args.store)
        pool = pool_for(preset)
        self.boxes = {modality: LocalDecoder(preset, modality, store, pool) for modality in modalities}
        for box in self.boxes.values():
            if preset.decoders_gb is None and box.chosen.waits_in == "device":
                box.load()
                box.warm_up()

    async def decode(
        self, signal: SpokenSignal, settings: DecodeSettings, *, user: str, previews: int
    ) -> AsyncGenerator[Step | Failure, None]:
        """Stream progress, previews and the medium."""
        try:
            work = self.boxes[signal.modality].decode(signal, settings, user=user, previews=previews)
            async with aclosing(work) as stream:
                async for step in stream:
                    yield step
        except Exception as error:  # noqa: BLE001  (the edge of a process: it must answer)
            yield _failure(error)

    async def counts(self, modality: Modality) -> Mapping[str, Counts]:
        """Return what this replica counts of one kind."""
        return _named(await self.boxes[modality].counts())

    def adapters(self) -> list[AdapterState]:
        """Return the adapters of all its boxes."""
        return [state for box in self.boxes.values() for state in box.adapters.states()]

    def unload_adapter(self, name: str) -> bool | Failure:
        """Put an adapter away; return whether it was loaded."""
        shelf = next(box.adapters for box in self.boxes.values() if name in box.adapters.folders)
        return _unloaded(shelf, name)


class AgentReplica:
    """Makes turns out of the other deployments."""

    def __init__(
        self,
        args: ReplicaArgs,
        encoder: DeploymentHandle[EncoderReplica],
        language_model: DeploymentHandle[LanguageModelReplica],
        decoders: Mapping[Modality, DeploymentHandle[DecoderReplica]],
    ) -> None:
        preset = load_preset(args.preset)
        status = ClusterStatus()
        self.boxes: dict[str, DeploymentHandle[Any]] = {"language_model": language_model}
        self.boxes |= {modality.value: handle for modality, handle in decoders.items()}
        self.agent = Agent(
            encode=RemoteEncoder(encoder),
            generate=RemoteLanguageModel(language_model),
            decode={
                modality: RemoteDecoder(handle, modality, status, decoder_name(modality, preset))
                for modality, handle in decoders.items()
            },
            store=ArtefactStore(args.store),
            inputs=preset.encoder.modalities,
            generation=preset.generation,
            limits=preset.limits,
            cost_limits={modality: decoder.limits for modality, decoder in preset.decoders.items()},
            adapters=preset.adapters,
        )

    async def turn(
        self, conversation: Sequence[Message], options: TurnOptions
    ) -> AsyncGenerator[Event, None]:
        """Stream the events of a turn."""
        async with aclosing(self.agent.turn(conversation, options)) as events:
            async for event in events:
                yield event

    async def outputs(self) -> tuple[Modality, ...]:
        """Return the media that can be made now."""
        return await self.agent.outputs()

    async def counts(self) -> dict[str, Mapping[str, Counts]]:
        """Return what the boxes count."""
        return await self.agent.counts()

    async def cancel_part(self, turn: str, index: int) -> bool:
        """Stop one medium, if it is being made by this replica."""
        return await self.agent.cancel_part(turn, index)

    async def retry_part(
        self, turn: str, index: int, wishes: DecodeSettings, *, user: str | None, previews: int
    ) -> AsyncGenerator[Event, None]:
        """Stream the events of a medium that is made again."""
        again = self.agent.retry_part(turn, index, wishes, user=user, previews=previews)
        async with aclosing(again) as events:
            async for event in events:
                yield event

    async def adapters(self) -> list[AdapterState]:
        """Return the adapters of every replica of the boxes that have some."""
        boxes = {adapter.box for adapter in self.agent.adapters.values()}
        handles = {self.boxes[box].deployment_name: self.boxes[box] for box in sorted(boxes)}
        answers = [await handle.broadcast("adapters").results_async() for handle in handles.values()]
        return [state for replicas in answers for states in replicas for state in states]

    async def unload_adapter(self, name: str) -> int | Failure:
        """Put an adapter away in every replica; return in how many it was loaded."""
        box = self.boxes[self.agent.adapters[name].box]
        answers = await box.broadcast("unload_adapter", name).results_async()
        failures = [answer for answer in answers if isinstance(answer, Failure)]
        return failures[0] if failures else sum(answers)


class GatewayReplica:
    """Answers HTTP, and shows the chat page when it is told its own address."""

    def __init__(
        self, args: ReplicaArgs, agent: DeploymentHandle[AgentReplica], page_url: str | None
    ) -> None:
        self.args = args
        self.agent = agent
        self.page_url = page_url

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the ASGI application."""
        from services.gateway import build_gateway, with_page

        preset = load_preset(self.args.preset)
        store = ArtefactStore(self.args.store)
        agent = RemoteAgent(self.agent)
        api = build_gateway(preset, agent, store, labels=False, adapters=agent)
        if self.page_url is None:
            return api
        from services.chat_page import build_page

        return with_page(api, build_page(preset, self.page_url, lifespan=api.router.lifespan_context))


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
        self, signal: SpokenSignal, settings: DecodeSettings, *, user: str = "", previews: int = 0
    ) -> AsyncGenerator[Step, None]:
        """Stream progress, previews and the medium."""
        box = f"{self.modality.value} decoder"
        work = _stream(self.handle, "decode", box, signal, settings, user=user, previews=previews)
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
        return counts

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


def _unloaded(shelf: AdapterShelf[Any], name: str) -> bool | Failure:
    try:
        return shelf.unload(name)
    except ServiceError as error:
        return _failure(error)


def decoder_name(modality: Modality, preset: Preset) -> str:
    """Return the name of the deployment that makes ``modality``: with a common budget, the same for all."""
    if preset.decoders_gb is not None:
        return "Decoders"
    return f"{modality.value.capitalize()}Decoder"


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


async def _counts(handle: DeploymentHandle[Any], *args: object) -> Mapping[str, Counts]:
    answers: list[Mapping[str, Counts]] = await _all(handle, "counts", *args, within_s=COUNTS_WITHIN_S)
    return {replica: counts for answer in answers for replica, counts in answer.items()}


def _named(counts: Mapping[str, Counts]) -> Mapping[str, Counts]:
    """Give the counts of the box in this replica the name of the replica."""
    if LOCAL not in counts:
        return {}
    return {serve.get_replica_context().replica_id.unique_id: counts[LOCAL]}


def _lost(box: str, error: Exception) -> Unavailable:
    logger.warning("The %s was lost: %s", box, type(error).__name__)
    return Unavailable(
        f"The {box} stopped while it worked and is being started again. Try again soon.",
        code=f"{box.split()[-1]}_unavailable",
        retry_after_s=5,
    )


def _use_threads(count: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(count)
    hush()
    import torch

    torch.set_num_threads(count)
