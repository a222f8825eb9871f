"""The plumbing of the gateway: request ids, body limits, JSON in, server-sent events out."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.errors import BadRequest, Conflict, ServiceError, TooLarge

T = TypeVar("T")

REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}")
PING_EVERY_S = 10.0


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


class RequestEnvelope:
    """Gives every answer an ``x-request-id`` and stops bodies that are too large.

    Ray Serve's proxy writes the id itself; there ``labels`` is False.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, labels: bool = True) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.labels = labels

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise self._too_large(received)
            return message

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start" and self.labels:
                kept = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                message["headers"] = [*kept, (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        length = headers.get(b"content-length", "")
        if length.isdigit() and int(length) > self.max_body_bytes:
            await error_response(self._too_large(int(length)))(scope, receive, labelled)
            return
        await self.app(scope, limited, labelled)

    def _too_large(self, size: int) -> TooLarge:
        return TooLarge(
            f"The request has {size} bytes or more; at most {self.max_body_bytes} are read. Upload large "
            "files one by one with POST /v1/files and send their ids.",
            code="request_too_large",
        )


class EventStream(Response):
    """Sends server-sent events until they end or the client has gone, whichever comes first.

    When the client goes, the generator of the lines is closed at once, also between two lines.
    """

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        pump = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end(gone, pump)
        if not pump.cancelled() and (error := pump.exception()) is not None:
            raise error

    async def _pump(self, send: Send) -> None:
        async with aclosing(self.lines):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self.lines:
                await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def with_pings(
    values: AsyncGenerator[T, None], every_s: float = PING_EVERY_S
) -> AsyncGenerator[T | None, None]:
    """Yield the values, and None whenever there was none for ``every_s`` seconds."""
    async with aclosing(values):
        while True:
            following = asyncio.ensure_future(anext(values))
            try:
                while not (await asyncio.wait({following}, timeout=every_s))[0]:
                    yield None
                value = following.result()
            except StopAsyncIteration:
                return
            finally:
                await end(following)
            yield value


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``; when the client goes first, stop it and raise ClientGone."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await end(gone, task)


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs and wait until it has really ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def read_json(request: Request) -> object:
    """Return the JSON in the body of a request."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise BadRequest(
            f"The Content-Type is {kind or 'missing'}; expected application/json.",
            code="unsupported_content_type",
        )
    body = await request.body()
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(
            f"The body is not JSON: {error}. Check quotes and commas.", code="invalid_json"
        ) from error


def error_response(error: ServiceError) -> Response:
    """Return the answer for an error."""
    headers = retry_after(error)
    if isinstance(error, Conflict):
        headers["x-should-retry"] = "false"  # OpenAI's clients would ask again at once
    return Response(json.dumps(error.body()), error.status, headers=headers, media_type="application/json")


def retry_after(error: ServiceError) -> dict[str, str]:
    """Return the header that says when to try again, where that is known."""
    return {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}


def named_sse(name: str, value: object) -> str:
    """Return one server-sent event with a name."""
    return f"event: {name}\n{sse(value)}"


def sse(value: object) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
