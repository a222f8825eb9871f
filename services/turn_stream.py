"""A turn as server-sent events: its status is that of its first words, and it never falls silent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress

from services.asgi import end, sse, with_pings
from services.chat_completions import Completion, Json
from services.errors import ServiceError, translate
from services.events import Event, TurnFailed, TurnStarted

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0  # how long a stream waits for its first words before it commits to status 200


async def opened(
    events: AsyncGenerator[Event, None],
) -> tuple[list[Event], AsyncGenerator[Event, None]]:
    """Read a turn up to its first words, so that what is wrong with a request is its status.

    Returns the events read and a stream of the others. After some seconds it does not wait longer.
    """
    opening: list[Event] = []
    following = asyncio.ensure_future(anext(events))
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                event = await asyncio.shield(following)
                if isinstance(event, TurnFailed):
                    raise ServiceError.from_wire(dict(event.error))
                opening.append(event)
                following = asyncio.ensure_future(anext(events))
                if not isinstance(event, TurnStarted):
                    break
    except TimeoutError:
        pass
    except BaseException:
        await end(following)
        await events.aclose()
        raise
    return opening, _rest(following, events)


async def _rest(
    following: asyncio.Future[Event], events: AsyncGenerator[Event, None]
) -> AsyncGenerator[Event, None]:
    try:
        with suppress(StopAsyncIteration):
            yield await following
            async for event in events:
                yield event
    finally:
        await end(following)
        await events.aclose()


async def lines(
    completion: Completion, opening: Sequence[Event], rest: AsyncGenerator[Event, None]
) -> AsyncGenerator[str, None]:
    """Return the lines of a stream of server-sent events; what goes wrong is its last line."""

    async def chunks() -> AsyncGenerator[Json, None]:
        async with aclosing(rest):
            for event in opening:
                for chunk in await asyncio.to_thread(completion.chunks, event):
                    yield chunk
            async for event in rest:
                for chunk in await asyncio.to_thread(completion.chunks, event):
                    yield chunk

    # What is not told, such as progress that nobody asked for, does not keep a connection alive.
    async with aclosing(with_pings(chunks())) as told:
        try:
            async for chunk in told:
                yield ": ping\n\n" if chunk is None else sse(chunk)
            yield "data: [DONE]\n\n"
        except ServiceError as error:
            yield sse(error.body())
        except Exception as error:
            logger.exception("A stream failed.")
            yield sse(translate(error).body())
