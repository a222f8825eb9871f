"""Videos that are made while nobody waits: jobs, kept in the artefact store where every process finds them.

The process that took a job makes its video and writes down how far it is. A job of which nothing was heard
for a while has lost that process and has failed. Whoever deletes a job stops it, from any process: first it
is written down that it is deleted, and whoever writes how far it is looks for that: no record comes back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from services.artefacts import ArtefactStore
from services.asgi import end, with_pings
from services.errors import NotFound, ServiceError, Unavailable, translate
from services.events import Event, PartDone, PartProgress, PartStarted, TurnFailed

logger = logging.getLogger(__name__)

JOB_PURPOSE = "video_job"
DELETED_PURPOSE = "deleted_video_job"
ID_PATTERN = re.compile(r"video_[0-9a-f]{32}")
WRITE_EVERY_S = 0.5
HEARTBEAT_S = 2.0
LOST_AFTER_S = 30.0


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """One video on its way. ``updated_at`` is when its process was last heard of."""

    id: str
    model: str
    prompt: str
    created_at: int
    updated_at: float
    status: str = "queued"
    progress: int = 0
    revised_prompt: str | None = None
    completed_at: int | None = None
    error: dict[str, str] | None = None
    file_id: str | None = None
    manifest: dict[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ("completed", "failed")


class VideoJobs:
    """The jobs of all processes that share ``store``, and those that this process works at."""

    def __init__(self, store: ArtefactStore) -> None:
        self.store = store
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(
        self, model: str, prompt: str, opening: Sequence[Event], rest: AsyncGenerator[Event, None]
    ) -> VideoJob:
        """Take a job whose first events are known, and return it; it goes on while nobody looks."""
        now = time.time()
        name = f"video_{secrets.token_hex(16)}"
        revised = next((event.caption for event in opening if isinstance(event, PartStarted)), prompt)
        job = VideoJob(
            id=name, model=model, prompt=prompt, revised_prompt=revised, created_at=int(now), updated_at=now
        )
        await asyncio.to_thread(self._write, job)
        task = asyncio.create_task(self._follow(job, _chained(opening, rest)))
        self._tasks[job.id] = task
        task.add_done_callback(lambda task: self._tasks.pop(job.id))
        return job

    def get(self, job_id: str) -> VideoJob:
        """Return a job as it is now.

        Raises:
            NotFound: there is none with this id, or it has expired.

        """
        try:
            if not ID_PATTERN.fullmatch(job_id) or self._is_deleted(job_id):
                raise NotFound("", code="")
            job = VideoJob(**json.loads(self.store.read(_record_id(job_id))))
        except NotFound as error:
            raise NotFound(
                f"There is no video {job_id!r:.80}. Use the id that POST /v1/videos answered; videos expire.",
                code="video_not_found",
            ) from error
        if job.is_over or time.time() - job.updated_at < LOST_AFTER_S:
            return job
        lost = "The process that made this video has gone. Ask for it again."
        return replace(job, status="failed", error={"code": "job_lost", "message": lost})

    def all(self) -> list[VideoJob]:
        """Return all jobs, the newest first."""
        jobs = []
        for artefact in self.store.of_purpose(JOB_PURPOSE):
            try:
                jobs.append(self.get(artefact.filename))
            except NotFound:  # removed meanwhile
                continue
        return sorted(jobs, key=lambda job: (job.created_at, job.id), reverse=True)

    async def delete(self, job_id: str) -> None:
        """Remove a job with its video; what is still being made of it stops."""
        if job_id in self._tasks:
            await end(self._tasks[job_id])
        await asyncio.to_thread(self._remove, job_id)

    def _remove(self, job_id: str) -> None:
        job = self.get(job_id)
        self.store.put(
            b"deleted",
            media_type="text/plain",
            filename=job.id,
            purpose=DELETED_PURPOSE,
            artefact_id=_deletion_id(job.id),
        )
        self._discard(job)

    def _discard(self, job: VideoJob) -> None:
        """Remove what there is of a deleted job."""
        for artefact_id in (_record_id(job.id), job.file_id):
            if artefact_id is not None:
                with suppress(NotFound):
                    self.store.delete(artefact_id)

    def _is_deleted(self, job_id: str) -> bool:
        try:
            self.store.get(_deletion_id(job_id))
        except NotFound:
            return False
        return True

    async def close(self) -> None:
        """Stop what this process makes."""
        await end(*self._tasks.values())

    async def _follow(self, job: VideoJob, events: AsyncGenerator[Event, None]) -> None:
        written_at = time.monotonic()
        try:
            async with aclosing(with_pings(events, HEARTBEAT_S)) as told:
                async for event in told:
                    job = _after(job, event)
                    if job.is_over or event is None or time.monotonic() - written_at >= WRITE_EVERY_S:
                        if not await asyncio.to_thread(self._rewrite, job):
                            return  # somebody deleted it
                        written_at = time.monotonic()
                    if job.is_over:
                        return
        except Exception as error:
            logger.exception("A video job failed.")
            await asyncio.to_thread(self._rewrite, _failed(job, translate(error)))

    def _rewrite(self, job: VideoJob) -> bool:
        """Write a job anew, and return whether it is still wanted."""
        self._write(replace(job, updated_at=time.time()))
        if self._is_deleted(job.id):
            self._discard(job)
            return False
        return True

    def _write(self, job: VideoJob) -> None:
        self.store.put(
            json.dumps(asdict(job)).encode(),
            media_type="application/json",
            filename=job.id,
            purpose=JOB_PURPOSE,
            artefact_id=_record_id(job.id),
        )


async def _chained(
    opening: Sequence[Event], rest: AsyncGenerator[Event, None]
) -> AsyncGenerator[Event, None]:
    async with aclosing(rest):
        for event in opening:
            yield event
        async for event in rest:
            yield event


def _after(job: VideoJob, event: Event | None) -> VideoJob:
    """Return a job after something was told of it."""
    match event:
        case PartProgress(step=step, total=total):
            return replace(job, status="in_progress", progress=min(99, 100 * step // max(1, total)))
        case PartDone(artefact=artefact, manifest=manifest):
            return replace(
                job,
                status="completed",
                progress=100,
                completed_at=int(time.time()),
                file_id=artefact.id,
                manifest=dict(manifest),
            )
        case TurnFailed(error=error):
            return _failed(job, ServiceError.from_wire(dict(error)))
    return job


def _failed(job: VideoJob, error: ServiceError) -> VideoJob:
    told = error if error.message else Unavailable("The video could not be made.", code="video_failed")
    return replace(job, status="failed", error={"code": told.code, "message": told.message})


def _record_id(job_id: str) -> str:
    """Return the id of the artefact that holds a job; as hard to guess as the job's."""
    return _hidden_id(job_id)


def _deletion_id(job_id: str) -> str:
    """Return the id of the artefact that says that a job is deleted."""
    return _hidden_id(f"{job_id} deleted")


def _hidden_id(of: str) -> str:
    return f"file-{hashlib.sha256(of.encode()).hexdigest()[:32]}"
