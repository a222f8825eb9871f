"""``/v1/videos``: videos of words as jobs, with their progress, and their bytes in ranges."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from starlette.datastructures import UploadFile

from encoders.media import Modality
from services.artefacts import ArtefactStore
from services.asgi import read_json, until_gone
from services.direct_requests import AdapterOf, DirectRequest, MediumMaker, unsupported
from services.errors import BadRequest, Conflict
from services.files import content_of
from services.turn_stream import opened
from services.video_jobs import VideoJob, VideoJobs

MAX_LISTED = 100
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


def videos_router(
    maker: MediumMaker,
    jobs: VideoJobs,
    store: ArtefactStore,
    adapter_of: AdapterOf,
    *,
    name: str,
    expires_after_s: int,
) -> APIRouter:
    """Return the routes of the model ``name``."""
    router = APIRouter(prefix="/v1/videos")

    def shown(job: VideoJob) -> dict[str, Any]:
        return _shown(job, expires_after_s)

    @router.post("")
    async def create(request: Request) -> dict[str, Any]:
        wanted = DirectRequest.read(await _body(request))
        settings, user = wanted.wishes(adapter_of), wanted.options().user
        events = maker.make(Modality.VIDEO, wanted.prompt, settings, user=user)
        opening, rest = await until_gone(request, opened(events))
        return shown(await jobs.start(wanted.model or name, wanted.prompt, opening, rest))

    @router.get("")
    def listed(
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        found = jobs.all()
        if order == "asc":
            found.reverse()
        ids = [job.id for job in found]
        if after is not None:
            if after not in ids:
                raise BadRequest(
                    f"after is {after!r:.80}, which is no video of this list. Use the last_id of a page.",
                    code="invalid_value",
                    param="after",
                )
            found = found[ids.index(after) + 1 :]
        page = found[:limit]
        return {
            "object": "list",
            "data": [shown(job) for job in page],
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": len(found) > len(page),
        }

    @router.get("/{job_id}")
    def describe(job_id: str) -> dict[str, Any]:
        return shown(jobs.get(job_id))

    @router.delete("/{job_id}")
    async def delete(job_id: str) -> dict[str, Any]:
        await jobs.delete(job_id)
        return {"id": job_id, "object": "video.deleted", "deleted": True}

    @router.api_route("/{job_id}/content", methods=["GET", "HEAD"])
    def content(job_id: str, request: Request, variant: str = "video") -> Response:
        if variant != "video":
            raise unsupported("variant", "There is the video alone. Leave it out.")
        job = jobs.get(job_id)
        if job.file_id is None:
            why = job.error["message"] if job.error else f"{job.progress} % of it are done. Ask again later."
            raise Conflict(f"The video is {job.status}: {why}", code=f"video_{job.status}")
        return content_of(store, store.get(job.file_id), request.headers.get("range"))

    return router


async def _body(request: Request) -> object:
    """Return the body, which may be JSON or, as OpenAI's client sends it, a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in FORMS:
        body = await read_json(request)
    else:
        async with request.form(max_files=1, max_fields=50) as form:
            body = {key: "a file" if isinstance(value, UploadFile) else value for key, value in form.items()}
    if isinstance(body, dict) and body.get("input_reference"):
        raise unsupported("input_reference", "Start from a video in a chat, with strength. Leave it out.")
    return body


def _shown(job: VideoJob, expires_after_s: int) -> dict[str, Any]:
    made = job.manifest or {}
    timed, sized = {"num_frames", "fps"} <= made.keys(), {"width_px", "height_px"} <= made.keys()
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "expires_at": None if job.completed_at is None else job.completed_at + expires_after_s,
        "prompt": job.prompt,
        "revised_prompt": job.revised_prompt,
        "size": f"{made['width_px']}x{made['height_px']}" if sized else None,
        "seconds": f"{made['num_frames'] / made['fps']:g}" if timed else None,
        "remixed_from_video_id": None,
        "error": job.error,
        "file_id": job.file_id,
        "manifest": job.manifest,
    }
