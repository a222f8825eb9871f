"""Who is there in the cluster, and ways to them that end where nobody is.

A handle of Ray Serve waits for a replica for as long as it takes. Whoever asks over a :class:`Line` hears
within seconds that there is none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

from services.boxes import BoxState, Counts, not_ready
from services.errors import ServiceError, Unavailable

logger = logging.getLogger(__name__)

APP_NAME = "patchbay"
STATUS_KEPT_S = 1.0
STATUS_WITHIN_S = 5.0
LOOK_EVERY_S = 0.5
ABSENT_FOR_S = 3.0  # of a stream's patience, so that its status can still tell of it
COUNTS_WITHIN_S = 5.0  # a replica that is full answers when its next request has ended

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """An error on its way to another process."""

    error: Mapping[str, Any]

    def raised(self) -> ServiceError:
        """Return the error as an exception."""
        return ServiceError.from_wire(dict(self.error))


class ClusterStatus:
    """Which deployments can work, asked of the controller at most once a second."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.asked_at = float("-inf")
        self.states: Mapping[str, BoxState] = {}

    async def state(self, deployment: str) -> BoxState:
        """Return whether a deployment has a replica that works; what is not known yet is loading."""
        async with self.lock:
            if time.monotonic() - self.asked_at > STATUS_KEPT_S:
                try:
                    async with asyncio.timeout(STATUS_WITHIN_S):
                        self.states = await asyncio.to_thread(self._ask)
                except (TimeoutError, RayError, RayServeException) as error:
                    logger.warning("The controller does not answer: %s", type(error).__name__)
                self.asked_at = time.monotonic()
        return self.states.get(deployment, BoxState.LOADING)

    @staticmethod
    def _ask() -> dict[str, BoxState]:
        application = serve.status().applications.get(APP_NAME)
        if application is None:
            return {}
        return {name: state_of(deployment) for name, deployment in application.deployments.items()}


def state_of(deployment: DeploymentStatusOverview) -> BoxState:
    """Return what the controller's report says; who had replicas and lost them is gone, not loading."""
    if dict[Any, int](deployment.replica_states).get("RUNNING", 0) > 0:
        return BoxState.READY
    return BoxState.LOADING if deployment.status == "UPDATING" else BoxState.GONE


class Line:
    """A way to one deployment, which is called ``box`` in messages."""

    def __init__(
        self, handle: DeploymentHandle[Any], box: str, deployment: str, status: ClusterStatus
    ) -> None:
        self.handle = handle
        self.box = box
        self.deployment = deployment
        self.status = status

    async def state(self) -> BoxState:
        """Return whether somebody is there."""
        return await self.status.state(self.deployment)

    async def call(self, method: str, *args: Any, **wishes: Any) -> Any:
        """Call a method; what it returns, or the error that it returns as a value, raised."""
        response = getattr(self.handle, method).remote(*args, **wishes)
        ended = False
        try:
            answer = await self._answered(response)
            ended = True
        except (RayError, RayServeException) as error:
            raise self._lost(error) from error
        finally:
            if not ended:
                response.cancel()
        if isinstance(answer, Failure):
            raise answer.raised()
        return answer

    async def stream(self, method: str, *args: Any, **wishes: Any) -> AsyncGenerator[Any, None]:
        """Iterate over a streaming method; closing this cancels the call on the other side."""
        response = getattr(self.handle.options(stream=True), method).remote(*args, **wishes)
        ended = False
        try:
            items = aiter(response)
            item = await self._answered(anext(items, None))
            while item is not None:
                if isinstance(item, Failure):
                    raise item.raised()
                yield item
                item = await anext(items, None)
            ended = True
        except (RayError, RayServeException) as error:
            raise self._lost(error) from error
        finally:
            if not ended:
                response.cancel()

    async def all(self, method: str, *args: Any, within_s: float) -> list[Any]:
        """Call a method of every replica; return the answers of those that gave one in time."""
        try:
            call = self.handle.broadcast(method, *args)
            answers = await call.results_async(timeout_s=within_s, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("%s.%s: no answer: %s", self.deployment, method, type(error).__name__)
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def counts(self, *args: object, method: str = "counts") -> Mapping[str, Counts]:
        """Return what each replica counts."""
        answers: list[Mapping[str, Counts]] = await self.all(method, *args, within_s=COUNTS_WITHIN_S)
        return {replica: counts for answer in answers for replica, counts in answer.items()}

    async def _answered(self, answer: Awaitable[T]) -> T:
        """Wait for an answer as long as there is somebody to give it."""
        waiting = asyncio.ensure_future(answer)
        absent_since: float | None = None
        try:
            while not (await asyncio.wait({waiting}, timeout=LOOK_EVERY_S))[0]:
                state = await self.state()
                if state is BoxState.READY:
                    absent_since = None
                elif absent_since is None:
                    absent_since = time.monotonic()
                elif time.monotonic() - absent_since > ABSENT_FOR_S - LOOK_EVERY_S:
                    raise not_ready(self.box, state)
            return waiting.result()
        finally:
            if not waiting.done():
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    def _lost(self, error: Exception) -> Unavailable:
        logger.warning("The %s was lost: %s", self.box, type(error).__name__)
        return Unavailable(
            f"The {self.box} stopped while it worked and is being started again. Try again soon.",
            code=f"{self.box.split()[-1]}_unavailable",
            retry_after_s=5,
        )
