"""The boxes as Ray Serve deployments: shells around the objects of one process.

Each replica holds one of the objects of ``services.local_*``, which bring a thread of their own and end
what is dropped within one step, because Serve frees a replica's slot on cancel while its thread still
runs. Media travel through the artefact store. What goes wrong travels as a value, so that no traceback
fills the logs. Only this file, :mod:`services.cluster` and ``deploy/`` know Ray; replicas that need no
model never import torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
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
    Array,
    Counts,
    Encoded,
    PromptMessage,
    Speech,
    SpeechOptions,
    SpokenSignal,
    Step,
)
from services.cluster import ClusterStatus, Failure, Line
from services.errors import ServiceError, translate
from services.events import Event
from services.messages import MediaPart, Message, TextPart, TurnOptions
from services.presets import Preset, load_preset
from services.remote_boxes import RemoteAgent, RemoteDecoder, RemoteEncoder, RemoteLanguageModel

logger = logging.getLogger(__name__)


class ReplicaArgs(BaseModel):
    """What every replica needs to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str
    store: str = Field(description="URL of the artefact store, reachable from every machine")
    torch_threads: int = Field(default=1, ge=1)
    language_model_threads: int = Field(default=1, ge=1)


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

    async def embed(self, items: Sequence[TextPart | MediaPart]) -> list[Array] | Failure:
        """Return a unit vector for each item, all in one space."""
        try:
            return await self.box.embed(items)
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

        self.box = LocalLanguageModel(load_preset(args.preset), args.language_model_threads)
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

    async def score(
        self, prompt: Sequence[PromptMessage], reply: str, user: str
    ) -> Sequence[float] | Failure:
        """Return how probable each token of a reply is, and its end."""
        try:
            return await self.box.score(prompt, reply, user)
        except Exception as error:  # noqa: BLE001  (the edge of a process: it must answer)
            return _failure(error)

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
        self,
        signal: SpokenSignal,
        settings: DecodeSettings,
        *,
        user: str,
        previews: int,
        source: str | None = None,
    ) -> AsyncGenerator[Step | Failure, None]:
        """Stream progress, previews and the medium."""
        try:
            work = self.boxes[signal.modality].decode(
                signal, settings, user=user, previews=previews, source=source
            )
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
        status, names = ClusterStatus(), deployment_names(preset)
        self.boxes: dict[str, DeploymentHandle[Any]] = {"language_model": language_model}
        self.boxes |= {modality.value: handle for modality, handle in decoders.items()}

        def line(handle: DeploymentHandle[Any], part: str, spoken: str) -> Line:
            return Line(handle, spoken, names[part], status)

        self.agent = Agent(
            encode=RemoteEncoder(line(encoder, "encoder", "encoder")),
            generate=RemoteLanguageModel(line(language_model, "language_model", "language model")),
            decode={
                modality: RemoteDecoder(line(handle, modality.value, f"{modality.value} decoder"), modality)
                for modality, handle in decoders.items()
            },
            store=ArtefactStore(args.store),
            inputs=preset.encoder.modalities,
            generation=preset.generation,
            second_look=preset.second_look,
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

    async def counts(self) -> dict[str, Mapping[str, Counts]]:
        """Return what the boxes count; of agents, only this replica."""
        return await self.agent.counts()

    async def own_counts(self) -> Mapping[str, Counts]:
        """Return what this replica of the agent counts."""
        return _named(self.agent.own_counts())

    async def embed(self, items: Sequence[TextPart | MediaPart]) -> list[Array] | Failure:
        """Return a unit vector for each item, all in one space."""
        try:
            return await self.agent.embed(items)
        except Exception as error:  # noqa: BLE001  (the edge of a process: it must answer)
            return _failure(error)

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

    async def make(
        self, modality: Modality, caption: str, settings: DecodeSettings, *, user: str | None, previews: int
    ) -> AsyncGenerator[Event, None]:
        """Stream the events of a medium that is made of words."""
        made = self.agent.make(modality, caption, settings, user=user, previews=previews)
        async with aclosing(made) as events:
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
        names = deployment_names(preset)
        agent = RemoteAgent(Line(self.agent, "agent", names["agent"], ClusterStatus()), names)
        api = build_gateway(preset, agent, store, labels=False, adapters=agent)
        if self.page_url is None:
            return api
        from services.chat_page import build_page

        return with_page(api, build_page(preset, self.page_url, lifespan=api.router.lifespan_context))


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


def deployment_names(preset: Preset) -> dict[str, str]:
    """Return the names of the deployments behind the gateway, by part of the service."""
    decoders = {modality.value: decoder_name(modality, preset) for modality in preset.decoders}
    return {"agent": "Agent", "encoder": "Encoder", "language_model": "LanguageModel", **decoders}


def _named(counts: Mapping[str, Counts]) -> Mapping[str, Counts]:
    """Give the counts of the box in this replica the name of the replica."""
    if LOCAL not in counts:
        return {}
    return {serve.get_replica_context().replica_id.unique_id: counts[LOCAL]}


def _use_threads(count: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(count)
    hush()
    import torch

    torch.set_num_threads(count)
