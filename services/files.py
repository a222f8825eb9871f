"""``/v1/files``: upload once, refer by id; what decoders made is fetched here as well."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from encoders.media import CONTAINER_FORMATS, IMAGE_FORMATS, MediaBudget, Modality, read_media
from encoders.media_headers import recognise
from services.artefacts import Artefact, ArtefactStore
from services.asgi import error_response
from services.errors import BadRequest, RangeNotSatisfiable

MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
    "webm": "video/webm",
}
ONE_RANGE = re.compile(r"bytes=(?P<first>\d{0,18})-(?P<last>\d{0,18})")


def files_router(store: ArtefactStore, budget: MediaBudget) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1/files")

    @router.post("")
    async def upload(request: Request) -> dict[str, Any]:
        async with request.form(max_files=1, max_fields=10) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise BadRequest(
                    "There is no file in the form; expected multipart/form-data with a part named 'file'.",
                    code="missing_file",
                    param="file",
                )
            data, name = await file.read(), file.filename or "file"
        stored = await asyncio.to_thread(
            keep, store, budget, data, name, purpose if isinstance(purpose, str) else "user_data"
        )
        return described(stored)

    @router.get("/{file_id}")
    def describe(file_id: str) -> dict[str, Any]:
        return described(store.get(file_id))

    @router.delete("/{file_id}")
    def delete(file_id: str) -> dict[str, Any]:
        store.delete(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    @router.api_route("/{file_id}/content", methods=["GET", "HEAD"])
    def content(file_id: str, request: Request) -> Response:
        return content_of(store, store.get(file_id), request.headers.get("range"))

    return router


def keep(store: ArtefactStore, budget: MediaBudget, data: bytes, name: str, purpose: str) -> Artefact:
    """Store a medium that somebody sent; something that can never be read raises MediaError."""
    found = recognise(data)
    if found not in MEDIA_TYPES or len(data) > budget.max_bytes:
        read_media(data, budget)  # says what is wrong
    assert found is not None
    modality = Modality.IMAGE if found in IMAGE_FORMATS else Modality.AUDIO
    return store.put(
        data,
        media_type=MEDIA_TYPES[found],
        filename=re.sub(r"[^\w. -]", "_", name)[-100:] or "file",
        purpose=purpose[:64],
        modality=None if found in CONTAINER_FORMATS else modality,
    )


def described(artefact: Artefact) -> dict[str, Any]:
    """Return the file object of the API."""
    return {
        "id": artefact.id,
        "object": "file",
        "bytes": artefact.bytes,
        "created_at": artefact.created_at,
        "filename": artefact.filename,
        "purpose": artefact.purpose,
        "status": "processed",
        "media_type": artefact.media_type,
        "caption": artefact.caption,
        "manifest": artefact.manifest,
    }


def content_of(store: ArtefactStore, artefact: Artefact, wanted: str | None) -> Response:
    """Return the bytes of an artefact, or the range of them that the header ``wanted`` names."""
    headers = {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=3600",
        "Content-Disposition": _disposition(artefact.filename),
        "X-Content-Type-Options": "nosniff",
        "ETag": f'"{artefact.sha256}"',
    }
    found = ONE_RANGE.fullmatch(wanted or "")
    if found is None or not (found["first"] or found["last"]):
        return Response(store.read(artefact.id), media_type=artefact.media_type, headers=headers)
    if found["first"]:
        first = int(found["first"])
        last = min(int(found["last"] or artefact.bytes), artefact.bytes - 1)
    else:
        first, last = max(0, artefact.bytes - int(found["last"])), artefact.bytes - 1
    if first > last:
        refusal = error_response(
            RangeNotSatisfiable(
                f"The range {wanted!r} is not within the {artefact.bytes} bytes of the file.",
                code="range_not_satisfiable",
            )
        )
        refusal.headers["Content-Range"] = f"bytes */{artefact.bytes}"
        return refusal
    headers["Content-Range"] = f"bytes {first}-{last}/{artefact.bytes}"
    data = store.read(artefact.id, first, last + 1)
    return Response(data, 206, media_type=artefact.media_type, headers=headers)


def _disposition(filename: str) -> str:
    """Name a file in a header: plainly, and where ASCII does not hold its name as RFC 6266 says, too."""
    plain = re.sub(r"[^\x20-\x7e]", "_", filename)
    other = "" if plain == filename else f"; filename*=UTF-8''{quote(filename)}"
    return f'inline; filename="{plain}"{other}'
