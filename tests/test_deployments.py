"""The shells around the boxes, without a cluster: what a caller says reaches the box in its replica."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray import serve

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.agent import Agent
from services.artefacts import ArtefactStore
from services.boxes import BoxState, Encoded, Finished, Made, Preview, PromptMessage, SpokenSignal
from services.cluster import ClusterStatus, Line
from services.deployments import AgentReplica, DecoderReplica, EncoderReplica, LanguageModelReplica
from services.errors import BadRequest
from services.events import PartDone, PartFailed, PartPreview, PartProgress, TurnStarted
from services.messages import MediaPart, Role, TextPart, TurnOptions
from services.remote_boxes import RemoteAgent, RemoteDecoder, RemoteEncoder, RemoteLanguageModel
from tests.fake_boxes import FakeDecoder, FakeEncoder, FakeSpeaker, said

IMAGE = Modality.IMAGE


class Handle:
    """Calls the methods of a replica in this process; values are pickled on their way, as Ray does."""

    deployment_name = "Replica"

    def __init__(self, replica: object) -> None:
        self.replica = replica

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args, **wishes: Call(self._method(method), args, wishes))

    def broadcast(self, method: str, *args: Any) -> Any:
        call = Call(self._method(method), args, {})

        async def results_async(timeout_s: float, return_exceptions: bool) -> list[Any]:
            assert return_exceptions
            return await asyncio.gather(call, return_exceptions=True)

        return SimpleNamespace(results_async=results_async)

    def _method(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self.replica, name)
        return method


class Call:
    """One call, to be awaited or iterated over."""

    def __init__(self, method: Callable[..., Any], args: tuple[Any, ...], wishes: dict[str, Any]) -> None:
        self.method, (self.args, self.wishes) = method, sent((args, wishes))
        self.stream: AsyncGenerator[Any, None] | None = None

    def __await__(self) -> Any:
        return self.method(*self.args, **self.wishes).__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        self.stream = self.method(*self.args, **self.wishes)
        async for value in self.stream:
            yield sent(value)

    def cancel(self) -> None: ...


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def replica(kind: type, box: object) -> Any:
    """Return a replica around a box that needs no weights."""
    shell = object.__new__(kind)
    if kind is DecoderReplica:
        shell.boxes = {IMAGE: box}
    else:
        shell.box = box
    return shell


class AllUp(ClusterStatus):
    async def state(self, deployment: str) -> BoxState:
        return BoxState.READY


def line(replica: object, box: str) -> Line:
    handle: Any = Handle(replica)
    return Line(handle, box, "Replica", AllUp())


def remote_decoder(decoder: FakeDecoder) -> RemoteDecoder:
    return RemoteDecoder(line(replica(DecoderReplica, decoder), "image decoder"), IMAGE)


def remote_agent(store: ArtefactStore, decoder: FakeDecoder) -> RemoteAgent:
    zeros = np.zeros((2, 4), np.float32)
    speaker = FakeSpeaker(SpokenSignal(IMAGE, "a bell", zeros, zeros), Finished("stop"))
    shell = object.__new__(AgentReplica)
    shell.agent = Agent(
        encode=FakeEncoder(),
        generate=speaker,
        decode={IMAGE: remote_decoder(decoder)},
        store=store,
    )
    return RemoteAgent(line(shell, "agent"), {})


async def test_the_user_the_source_and_the_wish_for_previews_reach_the_decoder(store: ArtefactStore) -> None:
    decoder = FakeDecoder(store, IMAGE, steps=3)
    zeros = np.zeros((2, 4), np.float32)
    work = remote_decoder(decoder).decode(
        SpokenSignal(IMAGE, "a bell", zeros, zeros),
        DecodeSettings(seed=1, strength=0.5),
        user="ann",
        previews=1,
        source="file-1",
    )
    steps = [step async for step in work]
    assert decoder.users == ["ann"]
    assert decoder.sources == ["file-1"]  # by its id: no medium travels through a handle
    assert [step for step in steps if isinstance(step, Preview)] == [Preview(1, 3, b"look", "image/jpeg")]
    assert isinstance(steps[-1], Made)


async def test_a_reply_is_scored_in_the_replica_and_its_error_comes_back(store: ArtefactStore) -> None:
    speaker = FakeSpeaker()
    speaker.likenesses = [0.25, BadRequest("Too long.", code="context_length_exceeded")]
    box = RemoteLanguageModel(line(replica(LanguageModelReplica, speaker), "language model"))
    zeros = np.zeros((2, 4), np.float32)
    prompt = [PromptMessage(Role.USER, (Encoded(IMAGE, zeros, zeros[0], (2,)), "what is this?"))]
    assert min(await box.score(prompt, "a bell", "ann")) == pytest.approx(math.log(0.25))
    assert speaker.looks[0][1:] == ("a bell", "ann")
    with pytest.raises(BadRequest, match="Too long"):
        await box.score(prompt, "a bell")


async def test_every_replica_counts_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: name)

    class Counting:
        async def counts(self) -> dict[str, dict[str, float]]:
            return {"local": {"slots": 8}}

    for kind, remote in (
        (EncoderReplica, RemoteEncoder),
        (LanguageModelReplica, RemoteLanguageModel),
        (DecoderReplica, lambda line: RemoteDecoder(line, IMAGE)),
    ):
        box: Any = remote(line(replica(kind, Counting()), "box"))  # type: ignore[operator]
        assert await box.counts() == {"r1": {"slots": 8}}


async def test_every_replica_of_the_agent_counts_what_it_asked_about(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: name)
    remote = remote_agent(store, FakeDecoder(store, IMAGE))
    [event async for event in remote.turn(said(), TurnOptions())]
    assert (await remote.counts())["agent"] == {"r1": {"media_total": 1, "asked_total": 0}}


async def test_a_box_that_does_not_answer_counts_nothing() -> None:
    class Broken:
        async def counts(self) -> None:
            raise OSError("gone")

    assert await RemoteEncoder(line(replica(EncoderReplica, Broken()), "encoder")).counts() == {}


async def test_media_of_words_and_embeddings_go_through_the_replica_of_the_agent(
    store: ArtefactStore,
) -> None:
    decoder = FakeDecoder(store, IMAGE)
    remote = remote_agent(store, decoder)
    made = remote.make(IMAGE, "a bell", DecodeSettings(seed=5), user="ann", previews=1)
    events = [event async for event in made]
    assert isinstance(events[-1], PartDone)
    assert any(isinstance(event, PartPreview) for event in events)
    assert decoder.signals[0].is_words
    assert (decoder.signals[0].caption, decoder.settings[0].seed, decoder.users) == (
        "a bell",
        5,
        ["user ann"],
    )

    shown = MediaPart(store.put(b"x", media_type="image/png", filename="a.png").id, IMAGE)
    assert [vector.shape for vector in await remote.embed([shown, TextPart("a bell")])] == [(4,), (4,)]
    with pytest.raises(BadRequest) as refused:
        await remote.embed([TextPart("a bell"), MediaPart(shown.artefact_id, Modality.TEXT)])
    assert (refused.value.code, refused.value.param) == ("unsupported_modality", "input[1]")


async def test_an_encoder_in_another_process_embeds(store: ArtefactStore) -> None:
    box = RemoteEncoder(line(replica(EncoderReplica, FakeEncoder()), "encoder"))
    assert len(await box.embed([TextPart("a bell")])) == 1


async def test_parts_are_cancelled_and_made_again_in_the_replica_of_the_agent(store: ArtefactStore) -> None:
    decoder = FakeDecoder(store, IMAGE, steps=1000, step_s=0.01)
    agent = remote_agent(store, decoder)
    turn = ""
    events = []
    async for event in agent.turn(said(), TurnOptions(previews=1, user="ann")):
        events.append(event)
        if isinstance(event, TurnStarted):
            turn = event.id
        if isinstance(event, PartProgress) and event.step == 2:
            assert await agent.cancel_part(turn, 0)
    assert not await agent.cancel_part(turn, 0)
    assert [event.code for event in events if isinstance(event, PartFailed)] == ["part_cancelled"]
    assert any(isinstance(event, PartPreview) for event in events)

    decoder.step_s, decoder.steps = 0.0, 2
    again = [event async for event in agent.retry_part(turn, 0, DecodeSettings(seed=5), user="ann")]
    assert isinstance(again[-1], PartDone)
    assert decoder.settings[-1].seed == 5
    assert set(decoder.users) == {"user ann"}
