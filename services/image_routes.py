"""``/v1/images/generations``: pictures of words, as OpenAI's clients ask for them, streamed with previews."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from encoders.media import Modality
from services.artefacts import ArtefactStore
from services.asgi import EventStream, end, named_sse, read_json, until_gone, with_pings
from services.direct_requests import (
    AdapterOf,
    DirectRequest,
    MediumMaker,
    described,
    outcome,
    seeds_apart,
    text_of,
    unsupported,
    url_of,
)
from services.errors import ServiceError, translate
from services.events import Event, PartDone, PartPreview, TurnFailed
from services.messages import MAX_PREVIEWS
from services.turn_stream import opened

Json = dict[str, Any]


class ImageRequest(DirectRequest):
    """The body of a request for pictures."""

    n: Annotated[int, Field(ge=1)] = 1
    response_format: Literal["url", "b64_json"] = "url"
    output_format: str = "png"
    background: str = "auto"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=MAX_PREVIEWS)] = 0

    def refuse_unsupported(self, most: int) -> None:
        """Raise BadRequest for wishes that would silently not be granted."""
        if self.n > most:
            raise unsupported("n", f"It is {self.n}; one request makes at most {most}. Ask again for more.")
        if self.stream and self.n > 1:
            raise unsupported("n", f"It is {self.n}; a stream shows one picture. Leave n or stream out.")
        if self.output_format != "png":
            raise unsupported("output_format", "Use 'png'.")
        if self.background == "transparent":
            raise unsupported("background", "Pictures are opaque. Leave it out.")


def images_router(maker: MediumMaker, store: ArtefactStore, adapter_of: AdapterOf, most: int) -> APIRouter:
    """Return the routes; one request makes at most ``most`` pictures."""
    router = APIRouter(prefix="/v1/images")

    @router.post("/generations")
    async def generate(request: Request) -> Response:
        wanted = ImageRequest.read(await read_json(request))
        wanted.refuse_unsupported(most)
        settings = wanted.wishes(adapter_of)
        options = wanted.options(wanted.partial_images if wanted.stream else 0)

        def make(seeded: Any) -> AsyncGenerator[Event, None]:
            return maker.make(
                Modality.IMAGE, wanted.prompt, seeded, user=options.user, previews=options.previews
            )

        if wanted.stream:
            opening, rest = await until_gone(request, opened(make(settings)))
            return EventStream(_lines(store, opening, rest))
        pictures = [make(seeded) for seeded in seeds_apart(settings, wanted.n)]
        made = await until_gone(request, _all(pictures))
        data = await asyncio.to_thread(_data, store, str(request.base_url), wanted.response_format, made)
        return JSONResponse({"created": int(time.time()), "data": data, **_form(made[0])})

    return router


async def _all(pictures: Sequence[AsyncGenerator[Event, None]]) -> list[PartDone]:
    """Return all pictures; when one cannot be made, the others are stopped."""
    tasks = [asyncio.ensure_future(outcome(events)) for events in pictures]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await end(*tasks)


def _data(store: ArtefactStore, base_url: str, form: str, made: Sequence[PartDone]) -> list[Json]:
    if form == "url":
        return [{"url": url_of(base_url, done), **described(done)} for done in made]
    return [{"b64_json": text_of(store, done), **described(done)} for done in made]


def _form(done: PartDone) -> Json:
    """Return how a picture is, in OpenAI's words."""
    width, height = done.manifest["width_px"], done.manifest["height_px"]
    return {"size": f"{width}x{height}", "output_format": "png", "background": "opaque"}


async def _lines(
    store: ArtefactStore, opening: Sequence[Event], rest: AsyncGenerator[Event, None]
) -> AsyncGenerator[str, None]:
    """Return the lines of a stream: previews, then the picture; what goes wrong is the last line."""
    shown = 0

    async def told() -> AsyncGenerator[Event, None]:
        async with aclosing(rest):
            for event in opening:
                yield event
            async for event in rest:
                yield event

    async with aclosing(with_pings(told())) as events:
        try:
            async for event in events:
                match event:
                    case None:
                        yield ": ping\n\n"
                    case PartPreview():
                        kind = "image_generation.partial_image"
                        look = base64.b64encode(event.data).decode("ascii")
                        form = event.media_type.removeprefix("image/")
                        yield _event(kind, b64_json=look, partial_image_index=shown, output_format=form)
                        shown += 1
                    case PartDone():
                        kind = "image_generation.completed"
                        whole = await asyncio.to_thread(text_of, store, event)
                        yield _event(kind, b64_json=whole, **_form(event), **described(event))
                    case TurnFailed(error=error):
                        raise ServiceError.from_wire(dict(error))
        except Exception as error:  # noqa: BLE001  (the status has been sent: the stream must say it)
            yield named_sse("error", {"type": "error", **translate(error).body()})


def _event(kind: str, **values: Any) -> str:
    return named_sse(kind, {"type": kind, "created_at": int(time.time()), **values})
