"""``/v1/responses/{id}/parts/{n}``: one medium of a reply is cancelled, or made again, alone.

``id`` is that of the chat completion and ``n`` the place in its ``parts``. A medium that is made again
comes as an entry of ``parts``, or in a stream as the chunks that a chat completion has for it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from decoders.settings import DecodeSettings
from services.asgi import EventStream, read_json, until_gone
from services.chat_completions import Completion
from services.errors import BadRequest, NotFound, ServiceError
from services.events import Event, PartDone, PartFailed, TurnFailed
from services.messages import TurnOptions
from services.requests import DecoderRequest, StreamOptions, invalid
from services.turn_stream import lines, opened

REPLY_ID = re.compile(r"chatcmpl-(?P<turn>[0-9a-f]{32})")

NewCompletion = Callable[[Request, StreamOptions | None], Completion]


class PartMaker(Protocol):
    """The agent, as far as single parts go."""

    async def cancel_part(self, turn: str, index: int) -> bool:
        """Stop one medium; return False when it is not being made."""
        ...

    def retry_part(
        self, turn: str, index: int, wishes: DecodeSettings, *, user: str | None = None, previews: int = 0
    ) -> AsyncGenerator[Event, None]:
        """Make one medium again."""
        ...


class RetryRequest(DecoderRequest):
    """The body of a retry: what is to be other than the first time, and how it is to be told."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    def options(self) -> TurnOptions:
        """Return the wishes that a turn has too, checked."""
        previews = self.stream_options.previews if self.stream and self.stream_options else 0
        return TurnOptions(previews=previews, user=self.user or None)


def parts_router(agent: PartMaker, new_completion: NewCompletion) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1/responses/{reply_id}/parts/{index}")

    @router.post("/cancel")
    async def cancel(reply_id: str, index: int) -> dict[str, Any]:
        if not await agent.cancel_part(_turn(reply_id), index):
            raise NotFound(
                f"Part {index} of {reply_id:.80} is not being made: it is done, has failed, or is no medium "
                "of this reply. Only what is under way can be cancelled.",
                code="part_not_running",
            )
        return {"id": reply_id, "object": "response.part", "index": index, "status": "cancelled"}

    @router.post("/retry")
    async def retry(request: Request, reply_id: str, index: int) -> Response:
        wishes = _read(await read_json(request) if await request.body() else {})
        options = wishes.options()
        turn = _turn(reply_id)
        events = agent.retry_part(
            turn, index, wishes.settings(), user=options.user, previews=options.previews
        )
        completion = new_completion(request, wishes.stream_options)
        completion.id = reply_id
        if not wishes.stream:
            part = await until_gone(request, _collected(completion, events))
            return JSONResponse({"id": reply_id, "object": "response.part", "index": index, **part})
        opening, rest = await until_gone(request, opened(events))
        return EventStream(lines(completion, opening, rest))

    return router


def _turn(reply_id: str) -> str:
    found = REPLY_ID.fullmatch(reply_id)
    if found is None:
        raise NotFound(
            f"There is no reply {reply_id!r:.80}; expected the id of a chat completion, like "
            "chatcmpl-0123456789abcdef0123456789abcdef.",
            code="response_not_found",
        )
    return found["turn"]


def _read(body: object) -> RetryRequest:
    if not isinstance(body, dict):
        raise BadRequest(
            f"The body is a JSON {type(body).__name__}; expected an object with settings, or no body.",
            code="invalid_json",
        )
    try:
        return RetryRequest.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from error


async def _collected(completion: Completion, events: AsyncGenerator[Event, None]) -> dict[str, Any]:
    """Return how the medium ended; a retry that cannot even start is raised."""
    async with aclosing(events):
        async for event in events:
            match event:
                case PartDone():
                    return {"status": "done", **completion.reference(event)}
                case PartFailed():
                    return {"status": "failed", **completion.failure(event)}
                case TurnFailed(error=error):
                    raise ServiceError.from_wire(dict(error))
    raise AssertionError("a retry ended without saying so")
