"""Single parts over HTTP: cancelled, and made again."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.artefacts import ArtefactStore
from services.errors import Conflict, NotFound
from services.events import PartFailed, PartProgress, PartStarted, TurnFailed
from services.gateway import build_gateway
from services.presets import Preset
from tests.scripted_agent import PNG, FakeAgent, chunks_of, client, data_url, done

IMAGE = Modality.IMAGE
TURN = "0123456789abcdef" * 2
PART = f"/v1/responses/chatcmpl-{TURN}/parts/1"


@pytest.fixture
def agent(store: ArtefactStore) -> FakeAgent:
    return FakeAgent(
        PartStarted(index=1, modality=IMAGE, caption="a bell"),
        PartProgress(index=1, step=1, total=2, eta_s=0.5),
        done(store, 1, IMAGE),
    )


async def post(
    agent: FakeAgent, preset: Preset, store: ArtefactStore, path: str, **request: Any
) -> httpx.Response:
    async with client(build_gateway(preset, agent, store)) as http:
        return await http.post(path, **request)


async def test_what_is_under_way_can_be_cancelled(
    agent: FakeAgent, preset: Preset, store: ArtefactStore
) -> None:
    agent.running.add((TURN, 1))
    answer = await post(agent, preset, store, f"{PART}/cancel")
    assert answer.status_code == 200
    assert answer.json() == {
        "id": f"chatcmpl-{TURN}",
        "object": "response.part",
        "index": 1,
        "status": "cancelled",
    }


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (f"{PART}/cancel", 404, "part_not_running"),
        ("/v1/responses/chatcmpl-1/parts/1/cancel", 404, "response_not_found"),
        ("/v1/responses/..%2Fx/parts/1/retry", 404, "not_found"),
        (f"/v1/responses/{TURN}/parts/1/retry", 404, "response_not_found"),
        (f"{PART[:-1]}one/cancel", 422, "invalid_value"),
    ],
)
async def test_what_is_not_there_is_named(
    agent: FakeAgent, preset: Preset, store: ArtefactStore, path: str, status: int, code: str
) -> None:
    answer = await post(agent, preset, store, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_a_part_that_is_made_again_comes_as_an_entry_of_parts(
    agent: FakeAgent, preset: Preset, store: ArtefactStore
) -> None:
    answer = await post(agent, preset, store, f"{PART}/retry")
    assert answer.status_code == 200, answer.text
    part = answer.json()
    assert agent.retried == [(TURN, 1, DecodeSettings(), None, 0)]
    assert (part["id"], part["object"], part["index"]) == (f"chatcmpl-{TURN}", "response.part", 1)
    assert (part["status"], part["type"], part["caption"]) == ("done", "image", "a bell")
    assert store.read(part["file_id"]) == PNG
    assert part["url"].endswith(f"/v1/files/{part['file_id']}/content")


async def test_a_retry_may_change_settings_and_be_streamed(
    agent: FakeAgent, preset: Preset, store: ArtefactStore
) -> None:
    wishes = {
        "seed": 5,
        "num_inference_steps": 3,
        "stream": True,
        "stream_options": {"include_progress": True, "previews": 2},
        "user": "ann",
    }
    answer = await post(agent, preset, store, f"{PART}/retry", json=wishes)
    assert agent.retried == [(TURN, 1, DecodeSettings(seed=5, steps=3), "ann", 2)]
    chunks = chunks_of(answer.text)
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{TURN}"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta["parts"][0]["status"] for delta in deltas] == ["started", "working", "done"]
    assert deltas[-1]["images"][0]["image_url"]["url"] == data_url(PNG, "image/png")


async def test_a_retry_that_fails_again_says_why(preset: Preset, store: ArtefactStore) -> None:
    failed = PartFailed(index=1, modality=IMAGE, caption="x", code="decoder_oom", message="Too big.")
    answer = await post(FakeAgent(failed), preset, store, f"{PART}/retry")
    part = answer.json()
    assert (part["status"], part["error"]) == ("failed", {"code": "decoder_oom", "message": "Too big."})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_retry_that_cannot_start_has_the_status_of_its_error(
    preset: Preset, store: ArtefactStore, stream: bool
) -> None:
    for error, status in (
        (NotFound("No.", code="part_not_found"), 404),
        (Conflict("Now.", code="part_running"), 409),
    ):
        refusing = FakeAgent(TurnFailed(error=error.to_wire()))
        answer = await post(refusing, preset, store, f"{PART}/retry", json={"stream": stream})
        assert (answer.status_code, answer.json()) == (status, error.body())
        assert answer.headers.get("x-should-retry") == ("false" if status == 409 else None)


@pytest.mark.parametrize(
    ("wishes", "param"),
    [
        ({"stesp": 3}, "stesp"),
        ({"seed": "x"}, "seed"),
        ({"stream_options": {"previews": 99}, "stream": True}, "stream_options.previews"),
    ],
)
async def test_a_wrong_wish_is_named(
    agent: FakeAgent, preset: Preset, store: ArtefactStore, wishes: dict[str, Any], param: str
) -> None:
    answer = await post(agent, preset, store, f"{PART}/retry", json=wishes)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not agent.retried
