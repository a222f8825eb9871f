"""Ways to deployments whose replicas are not there: nobody waits for ever, and health says why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.exceptions import RayServeException

from services import cluster
from services.boxes import BoxState
from services.cluster import ClusterStatus, Line
from services.errors import Unavailable
from services.messages import TurnOptions
from services.remote_boxes import RemoteAgent


class Nobody:
    """A handle whose calls wait for a replica that never comes."""

    def __init__(self) -> None:
        self.cancelled = 0

    def options(self, stream: bool) -> Nobody:
        return self

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args, **wishes: Waiting(self))


class Waiting:
    def __init__(self, handle: Nobody) -> None:
        self.handle = handle

    def __await__(self) -> Any:
        return asyncio.sleep(60).__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        await asyncio.sleep(60)
        yield None

    def cancel(self) -> None:
        self.handle.cancelled += 1


class Told(ClusterStatus):
    """Knows the states without asking; they may change each time."""

    def __init__(self, *states: BoxState) -> None:
        super().__init__()
        self.told = list(states)

    async def state(self, deployment: str) -> BoxState:
        return self.told.pop(0) if len(self.told) > 1 else self.told[0]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(cluster, "ABSENT_FOR_S", 0.1)


def to_nobody(*states: BoxState) -> tuple[Line, Nobody]:
    handle: Any = Nobody()
    return Line(handle, "language model", "LanguageModel", Told(*states)), handle


@pytest.mark.parametrize("now", [BoxState.LOADING, BoxState.GONE])
async def test_whoever_asks_where_nobody_is_hears_of_it_in_time(now: BoxState) -> None:
    line, handle = to_nobody(now)
    began = time.monotonic()
    with pytest.raises(Unavailable) as called:
        await line.call("encode")
    with pytest.raises(Unavailable) as streamed:
        async for _ in line.stream("generate"):
            pass
    assert time.monotonic() - began < 5
    assert called.value.code == streamed.value.code == "model_loading"
    assert called.value.retry_after_s
    assert handle.cancelled == 2


async def test_a_replica_that_is_only_busy_is_waited_for() -> None:
    for line, _ in (to_nobody(BoxState.READY), to_nobody(*[BoxState.GONE, BoxState.READY] * 100)):
        waiting = asyncio.ensure_future(line.call("encode"))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_turn_without_an_agent_is_a_failed_turn() -> None:
    line, _ = to_nobody(BoxState.GONE)
    events = [event async for event in RemoteAgent(line, {}).turn((), TurnOptions())]
    assert [event.type for event in events] == ["turn.failed"]


async def test_a_deployment_that_lost_its_replicas_is_not_loading_but_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def deployment(status: str, **replicas: int) -> SimpleNamespace:
        return SimpleNamespace(status=status, replica_states=replicas)

    deployments = {
        "Agent": deployment("HEALTHY", RUNNING=1),
        "Encoder": deployment("UPDATING", STARTING=1),
        "LanguageModel": deployment("UNHEALTHY", STARTING=1),
        "ImageDecoder": deployment("DEPLOY_FAILED"),
        "VideoDecoder": deployment("UPDATING", RUNNING=1, STARTING=1),
    }
    application = SimpleNamespace(deployments=deployments)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"patchbay": application}))
    names = {name.lower(): name for name in (*deployments, "AudioDecoder")}
    line = Line(Any, "agent", "Agent", ClusterStatus())  # type: ignore[arg-type]
    states = await RemoteAgent(line, names).states()
    assert states == {
        "agent": BoxState.READY,
        "encoder": BoxState.LOADING,
        "languagemodel": BoxState.GONE,
        "imagedecoder": BoxState.GONE,
        "videodecoder": BoxState.READY,
        "audiodecoder": BoxState.LOADING,  # Serve has not come to it yet
    }


async def test_a_controller_that_does_not_answer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise RayServeException("away")

    status = ClusterStatus()
    status.states = {"Agent": BoxState.READY}
    monkeypatch.setattr(serve, "status", away)
    assert await status.state("Agent") is BoxState.READY
