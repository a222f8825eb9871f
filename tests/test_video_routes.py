"""Videos as jobs: begun, looked at, fetched in ranges, deleted while they are made, and lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from decoders.failures import QueueFull
from encoders.media import Video, read_media
from services import video_jobs
from services.agent import Agent
from services.artefacts import ArtefactStore
from services.boxes import Made, Step
from services.gateway import build_gateway
from services.local_decoder import LocalDecoder
from services.presets import Preset, load_preset
from services.video_jobs import VideoJobs
from tests.fake_boxes import VIDEO, FakeDecoder, FakeSpeaker, agent
from tests.scripted_agent import client

PROMPT = {"prompt": "a bell moving left"}


class FakeFilm(FakeDecoder):
    """A decoder whose manifest says what a video's says."""

    async def decode(self, *args: Any, **wishes: Any) -> AsyncGenerator[Step, None]:
        async with aclosing(super().decode(*args, **wishes)) as steps:
            async for step in steps:
                if isinstance(step, Made):
                    sizes = {"width_px": 16, "height_px": 16, "num_frames": 4, "fps": 8.0}
                    step = replace(step, manifest={**step.manifest, **sizes})
                yield step


async def ended(http: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while (job := (await http.get(f"/v1/videos/{job_id}")).json())["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.02)
    return dict(job)


def asking(preset: Preset, store: ArtefactStore, made_by: Agent) -> Any:
    return client(build_gateway(preset, made_by, store))


@pytest.fixture
async def slow(preset: Preset, store: ArtefactStore, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """A client of a gateway whose decoder takes long, and the decoder."""
    monkeypatch.setattr(video_jobs, "WRITE_EVERY_S", 0.0)
    decoder = FakeDecoder(store, VIDEO, steps=1000, step_s=0.01)
    async with asking(preset, store, agent(store, FakeSpeaker(), decoder)) as http:
        yield http, decoder
        for job in (await http.get("/v1/videos")).json()["data"]:
            await http.delete(f"/v1/videos/{job['id']}")
        assert decoder.stopped


async def test_a_video_is_made_while_nobody_waits_and_fetched_in_ranges(
    tiny_preset: Path, store: ArtefactStore
) -> None:
    preset = load_preset(str(tiny_preset))
    limits = {VIDEO: preset.decoders[VIDEO].limits}
    made_by = agent(store, FakeSpeaker(), LocalDecoder(preset, VIDEO, store), cost_limits=limits)  # type: ignore[arg-type]
    async with asking(preset, store, made_by) as http:
        # As OpenAI's client asks: every value is a field of a form.
        form = {name: (None, value) for name, value in (PROMPT | {"seed": "3", "num_frames": "4"}).items()}
        begun = (await http.post("/v1/videos", files=form)).json()
        assert (begun["object"], begun["model"], begun["prompt"]) == ("video", "tiny", PROMPT["prompt"])
        job = await ended(http, begun["id"])
        assert (job["status"], job["progress"], job["error"]) == ("completed", 100, None)
        assert (job["size"], job["seconds"], job["manifest"]["seed"]) == ("16x16", "0.5", 3)
        assert job["manifest"]["link"] == "caption"
        assert job["expires_at"] > job["completed_at"] >= job["created_at"]
        path = f"/v1/videos/{begun['id']}/content"
        whole = await http.get(path)
        video = read_media(whole.content)
        assert isinstance(video, Video)
        assert len(video.frames) == 4
        some = await http.get(path, headers={"range": "bytes=4-11"})
        assert (some.status_code, some.content) == (206, whole.content[4:12])
        assert (await http.head(path)).headers["content-type"] == "video/mp4"

        assert (await http.delete(f"/v1/videos/{begun['id']}")).json()["deleted"] is True
        for gone in (f"/v1/videos/{begun['id']}", path):
            refused = await http.get(gone)
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "video_not_found")
        assert (await http.get(f"/v1/files/{job['file_id']}")).status_code == 404


async def test_progress_is_that_of_the_decoder_and_the_content_comes_last(slow: Any) -> None:
    http, decoder = slow
    begun = (await http.post("/v1/videos", json=PROMPT)).json()
    async with asyncio.timeout(30):
        while not 1 <= (job := (await http.get(f"/v1/videos/{begun['id']}")).json())["progress"] < 100:
            await asyncio.sleep(0.02)
    assert job["status"] == "in_progress"
    assert job["progress"] <= decoder.steps_taken / 10
    early = await http.get(f"/v1/videos/{begun['id']}/content")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "video_in_progress")


async def test_deleting_a_video_stops_its_decoder(slow: Any) -> None:
    http, decoder = slow
    begun = (await http.post("/v1/videos", json=PROMPT)).json()
    await http.delete(f"/v1/videos/{begun['id']}")
    async with asyncio.timeout(30):
        while not decoder.stopped:
            await asyncio.sleep(0.02)
    assert decoder.steps_taken < 900
    assert (await http.get("/v1/videos")).json()["data"] == []


async def test_deleting_a_video_in_another_process_stops_its_decoder_too(
    slow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    http, decoder = slow
    begun = (await http.post("/v1/videos", json=PROMPT)).json()
    await VideoJobs(decoder.store).delete(begun["id"])
    async with asyncio.timeout(30):
        while not decoder.stopped:
            await asyncio.sleep(0.02)
    assert decoder.steps_taken < 900


async def test_videos_are_listed_page_by_page(preset: Preset, store: ArtefactStore) -> None:
    async with asking(preset, store, agent(store, FakeSpeaker(), FakeFilm(store, VIDEO))) as http:
        ids = {(await http.post("/v1/videos", json=PROMPT)).json()["id"] for _ in range(3)}
        first = (await http.get("/v1/videos", params={"limit": 2})).json()
        rest = (await http.get("/v1/videos", params={"after": first["last_id"]})).json()
        assert (first["has_more"], rest["has_more"]) == (True, False)
        pages = [job["id"] for page in (first, rest) for job in page["data"]]
        assert (len(pages), set(pages)) == (3, ids)
        upwards = (await http.get("/v1/videos", params={"order": "asc"})).json()
        assert [job["id"] for job in upwards["data"]] == pages[::-1]
        refused = await http.get("/v1/videos", params={"after": "video_x"})
        assert refused.json()["error"]["param"] == "after"
        for name in ids:
            assert (await ended(http, name))["status"] in ("completed", "failed")


async def test_a_job_whose_process_has_gone_has_failed(slow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    http, decoder = slow
    begun = (await http.post("/v1/videos", json=PROMPT)).json()
    elsewhere = VideoJobs(decoder.store)
    assert elsewhere.get(begun["id"]).status in ("queued", "in_progress")
    monkeypatch.setattr(video_jobs, "LOST_AFTER_S", 0.0)
    lost = elsewhere.get(begun["id"])
    assert lost.error is not None
    assert (lost.status, lost.error["code"]) == ("failed", "job_lost")


async def test_a_video_that_fails_on_the_way_says_why(preset: Preset, store: ArtefactStore) -> None:
    broken = FakeDecoder(store, VIDEO, error=MemoryError())
    async with asking(preset, store, agent(store, FakeSpeaker(), broken)) as http:
        begun = (await http.post("/v1/videos", json=PROMPT)).json()
        job = await ended(http, begun["id"])
        assert (job["status"], job["error"]["code"]) == ("failed", "out_of_memory")
        content = await http.get(f"/v1/videos/{begun['id']}/content")
        assert (content.status_code, content.json()["error"]["code"]) == (409, "video_failed")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"prompt": ""}, 400, "empty_message", "prompt"),
        ({"model": "sora-2"}, 404, "model_not_found", "model"),
        ({"num_frames": 65}, 400, "decoder_limit_exceeded", "num_frames"),
        ({"seconds": "4"}, 400, "invalid_value", "seconds"),
        ({"input_reference": {"file_id": "x"}}, 400, "unsupported_parameter", "input_reference"),
        ({}, 429, "queue_full", None),
    ],
)
async def test_a_job_that_cannot_begin_is_refused_at_once(
    preset: Preset, store: ArtefactStore, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    full = FakeDecoder(store, VIDEO, steps=0, error=QueueFull(90.0, 60.0))
    made_by = agent(store, FakeSpeaker(), full, cost_limits={VIDEO: preset.decoders[VIDEO].limits})
    async with asking(preset, store, made_by) as http:
        refused = await http.post("/v1/videos", json=PROMPT | body)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (status, code, param), error
        assert (await http.get("/v1/videos")).json()["data"] == []
