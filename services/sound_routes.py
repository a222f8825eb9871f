"""``/v1/audio/generate``: a sound of words, as the bytes of a file or described in JSON."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from encoders.media import Modality
from services.artefacts import ArtefactStore
from services.asgi import read_json, until_gone
from services.direct_requests import (
    AdapterOf,
    DirectRequest,
    MediumMaker,
    described,
    outcome,
    text_of,
    unsupported,
    url_of,
)


class SoundRequest(DirectRequest):
    """The body of a request for a sound."""

    response_format: Literal["wav", "url", "b64_json"] = "wav"
    stream: bool = False
    n: int = 1

    def refuse_unsupported(self) -> None:
        """Raise BadRequest for wishes that would silently not be granted."""
        if self.stream:
            raise unsupported("stream", "A sound comes whole. Leave it out.")
        if self.n != 1:
            raise unsupported("n", "One request makes one sound. Leave it out.")


def sounds_router(maker: MediumMaker, store: ArtefactStore, adapter_of: AdapterOf) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1/audio")

    @router.post("/generate")
    async def generate(request: Request) -> Response:
        wanted = SoundRequest.read(await read_json(request))
        wanted.refuse_unsupported()
        settings, user = wanted.wishes(adapter_of), wanted.options().user
        events = maker.make(Modality.AUDIO, wanted.prompt, settings, user=user)
        made = await until_gone(request, outcome(events))
        url = url_of(str(request.base_url), made)
        if wanted.response_format == "wav":
            data = await asyncio.to_thread(store.read, made.artefact.id)
            headers = {"Content-Location": url, "X-File-Id": made.artefact.id}
            return Response(data, media_type=made.artefact.media_type, headers=headers)
        sound: dict[str, Any] = {"created": int(time.time()), "object": "audio", **described(made)}
        if wanted.response_format == "url":
            return JSONResponse({**sound, "url": url})
        return JSONResponse({**sound, "b64_json": await asyncio.to_thread(text_of, store, made)})

    return router
