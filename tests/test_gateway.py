"""Replies over HTTP: plain and streamed, their failures, and what is around them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from services import turn_stream
from services.artefacts import ArtefactStore
from services.asgi import with_pings
from services.boxes import BoxState
from services.errors import BadRequest
from services.events import (
    PartFailed,
    PartPreview,
    PartProgress,
    PartStarted,
    TextDelta,
    TurnDone,
    TurnFailed,
    TurnStarted,
)
from services.gateway import build_gateway
from services.presets import Preset
from tests.scripted_agent import (
    IMAGE,
    MP4,
    PNG,
    VIDEO,
    WAV,
    FakeAgent,
    ask,
    body,
    chunks_of,
    client,
    data_url,
    script,
)


async def test_a_plain_completion_holds_all_media_and_the_ordered_parts(
    preset: Preset, store: ArtefactStore
) -> None:
    answer = await ask(FakeAgent(*script(store)), preset, store, body())
    assert answer.status_code == 200
    completion = answer.json()
    (choice,) = completion["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "stop"
    assert message["content"] == "Here is a bell.\nIt sounds."
    assert message["images"][0]["image_url"]["url"] == data_url(PNG, "image/png")
    assert base64.b64decode(message["audio"]["data"]) == WAV
    assert [part["type"] for part in message["parts"]] == ["text", "image", "text", "audio", "video"]
    assert message["parts"][1]["manifest"] == {"seed": 1}
    assert completion["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    url = message["videos"][0]["video_url"]["url"]
    assert url.startswith("http://test/v1/files/file-")
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        video = await http.get(url)
    assert (video.content, video.headers["content-type"]) == (MP4, "video/mp4")
    assert video.headers["x-content-type-options"] == "nosniff"


async def test_a_stream_tells_each_part_with_its_place(preset: Preset, store: ArtefactStore) -> None:
    payload = body(stream=True, stream_options={"include_usage": True, "include_progress": True})
    answer = await ask(FakeAgent(*script(store)), preset, store, payload)
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = chunks_of(answer.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Here is a bell.\nIt sounds."
    told = [part for delta in deltas for part in delta.get("parts", [])]
    assert [(part["index"], part["status"]) for part in told] == [
        (1, "started"),
        (1, "working"),
        (3, "started"),
        (1, "done"),
        (3, "done"),
        (4, "started"),
        (4, "done"),
    ]
    assert [next(iter(delta)) for delta in deltas if len(delta) == 2][1:] == ["images", "audio", "videos"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 7
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


async def test_progress_is_told_only_to_those_who_ask(preset: Preset, store: ArtefactStore) -> None:
    answer = await ask(FakeAgent(*script(store)), preset, store, body(stream=True))
    assert "working" not in answer.text
    assert "usage" not in answer.text


async def test_a_preview_is_a_picture_of_its_part(preset: Preset, store: ArtefactStore) -> None:
    look = PartPreview(index=0, step=1, total=3, data=b"look", media_type="image/jpeg")
    events = [TurnStarted(seed=1), PartStarted(index=0, modality=VIDEO, caption=""), look]
    answer = await ask(FakeAgent(*events, TurnDone(finish_reason="stop")), preset, store, body(stream=True))
    told = [
        part for chunk in chunks_of(answer.text) for part in chunk["choices"][0]["delta"].get("parts", [])
    ]
    url = data_url(b"look", "image/jpeg")
    assert told[1] == {
        "index": 0,
        "type": "video",
        "status": "preview",
        "step": 1,
        "total": 3,
        "preview": {"type": "image_url", "image_url": {"url": url}},
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_a_completion_is_named_after_its_turn(
    preset: Preset, store: ArtefactStore, stream: bool
) -> None:
    agent = FakeAgent(TurnStarted(id="a" * 32, seed=1), TurnDone(finish_reason="stop"))
    answer = await ask(agent, preset, store, body(stream=stream))
    first = chunks_of(answer.text)[0] if stream else answer.json()
    assert first["id"] == "chatcmpl-" + "a" * 32


async def test_metrics_are_text_for_prometheus(preset: Preset, store: ArtefactStore) -> None:
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        answer = await http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'patchbay_decoder_requests{modality="image",replica="local"} 2' in answer.text.splitlines()


async def test_a_failed_part_stands_in_its_place(preset: Preset, store: ArtefactStore) -> None:
    failed = PartFailed(index=1, modality=IMAGE, caption="x", code="out_of_memory", message="Too big.")
    events = [TurnStarted(seed=1), TextDelta(index=0, text="Here."), failed, TurnDone(finish_reason="stop")]
    answer = await ask(FakeAgent(*events), preset, store, body())
    assert answer.status_code == 200
    parts = answer.json()["choices"][0]["message"]["parts"]
    assert parts[1]["error"] == {"code": "out_of_memory", "message": "Too big."}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_turn_that_fails_before_its_first_words_has_the_status_of_its_error(
    preset: Preset, store: ArtefactStore, stream: bool
) -> None:
    error = BadRequest("Too long.", code="context_length_exceeded", param="messages")
    agent = FakeAgent(TurnStarted(seed=1), TurnFailed(error=error.to_wire()))
    answer = await ask(agent, preset, store, body(stream=stream))
    assert answer.status_code == 400
    assert answer.json() == error.body()


async def test_a_turn_that_fails_later_ends_its_stream_with_the_error(
    preset: Preset, store: ArtefactStore
) -> None:
    error = BadRequest("Too long.", code="context_length_exceeded")
    events = [TurnStarted(seed=1), TextDelta(index=0, text="Here"), TurnFailed(error=error.to_wire())]
    answer = await ask(FakeAgent(*events), preset, store, body(stream=True))
    assert answer.status_code == 200
    last = answer.text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: ")) == error.body()
    assert "[DONE]" not in answer.text


async def test_a_stream_pings_while_nothing_happens(
    preset: Preset, store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eager(values: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        return with_pings(values, every_s=0.02)

    monkeypatch.setattr(turn_stream, "with_pings", eager)
    monkeypatch.setattr(turn_stream, "PATIENCE_S", 0.01)
    agent = FakeAgent(TurnStarted(seed=1), 0.1, TextDelta(index=0, text="Hi"), TurnDone(finish_reason="stop"))
    answer = await ask(agent, preset, store, body(stream=True))
    before, _, after = answer.text.partition('"content":"Hi"')
    assert before.count(": ping\n\n") >= 2
    assert after.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_when_the_client_goes_the_turn_ends(preset: Preset, store: ArtefactStore, stream: bool) -> None:
    agent = FakeAgent(
        TurnStarted(seed=1), TextDelta(index=0, text="Hi"), 60.0, TurnDone(finish_reason="stop")
    )
    app = build_gateway(preset, agent, store)
    payload = json.dumps(body(stream=stream)).encode()
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": payload, "more_body": False})
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    running = asyncio.create_task(app(scope, incoming.get, send))
    await asyncio.sleep(0.1)
    assert not agent.ended.is_set()
    incoming.put_nowait({"type": "http.disconnect"})
    async with asyncio.timeout(2):
        await agent.ended.wait()
        await running


async def test_request_ids_are_kept_or_made(preset: Preset, store: ArtefactStore) -> None:
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        kept = await http.get("/health", headers={"x-request-id": "mine-1"})
        made = await http.get("/health", headers={"x-request-id": "bad id\t" * 40})
    assert kept.headers["x-request-id"] == "mine-1"
    assert len(made.headers["x-request-id"]) == 32


async def test_health_and_models_say_what_can_be_made_now(preset: Preset, store: ArtefactStore) -> None:
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        health = (await http.get("/health")).json()
        (model,) = (await http.get("/v1/models")).json()["data"]
        same = (await http.get("/v1/models/tiny")).json()
        other = await http.get("/v1/models/gpt-9")
    assert (health["status"], health["unavailable"]) == ("degraded", ["audio"])
    assert health["parts"] == {
        "encoder": "ready",
        "language_model": "ready",
        "image": "ready",
        "video": "ready",
        "audio": "gone",
    }
    assert model == same
    assert model["input_modalities"] == ["text", "image", "video", "audio"]
    assert model["output_modalities"] == ["text", "image", "video"]
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("part", "now", "status", "code"),
    [
        ("language_model", BoxState.LOADING, "loading", 503),
        ("language_model", BoxState.GONE, "unavailable", 503),
        ("encoder", BoxState.LOADING, "loading", 200),
        ("encoder", BoxState.GONE, "degraded", 200),
        ("audio", BoxState.LOADING, "loading", 200),
        ("audio", BoxState.READY, "ok", 200),
    ],
)
async def test_health_says_what_each_part_is_doing(
    preset: Preset, store: ArtefactStore, part: str, now: BoxState, status: str, code: int
) -> None:
    agent = FakeAgent()
    agent.now |= {"audio": BoxState.READY, part: now}
    async with client(build_gateway(preset, agent, store)) as http:
        answer = await http.get("/health")
        (model,) = (await http.get("/v1/models")).json()["data"]
    health = answer.json()
    assert (answer.status_code, health["status"], health["parts"][part]) == (code, status, now)
    assert health["unavailable"] == ([] if now is BoxState.READY else [part])
    if code == 503:  # no request can be answered: who balances loads looks at the status alone
        assert health["error"]["code"] == "model_loading"
        assert answer.headers["retry-after"]
    reads = ["text"] if part == "encoder" else ["text", "image", "video", "audio"]
    assert model["input_modalities"] == reads


async def test_errors_of_routing_are_in_the_same_form(preset: Preset, store: ArtefactStore) -> None:
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        missing = await http.get("/v1/nothing")
        method = await http.put("/v1/chat/completions")
        no_file = await http.post("/v1/files", data={"purpose": "x"})
        not_json = await http.post(
            "/v1/chat/completions", content="{", headers={"content-type": "application/json"}
        )
        deep = await http.post(
            "/v1/chat/completions", content="[" * 100_000, headers={"content-type": "application/json"}
        )
        form = await http.post("/v1/chat/completions", content=json.dumps(body()))
    found = [(answer.status_code, answer.json()["error"]["code"]) for answer in (missing, method)]
    assert found == [(404, "not_found"), (405, "method_not_allowed")]
    found = [
        (answer.status_code, answer.json()["error"]["code"]) for answer in (no_file, not_json, deep, form)
    ]
    assert found == [
        (400, "missing_file"),
        (400, "invalid_json"),
        (400, "invalid_json"),
        (400, "unsupported_content_type"),
    ]


async def test_a_body_above_the_limit_is_refused_announced_or_not(
    preset: Preset, store: ArtefactStore
) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 100_000

    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        headers = {"content-type": "application/json"}
        announced = await http.post("/v1/chat/completions", content=b"x" * 3_000_000, headers=headers)
        hidden = await http.post("/v1/chat/completions", content=chunked(), headers=headers)
        upload = await http.post("/v1/files", files={"file": ("x.png", b"x" * 3_000_000)})
    for answer in (announced, hidden, upload):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


async def test_a_stream_pings_while_only_progress_comes_that_nobody_asked_for(
    preset: Preset, store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eager(values: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        return with_pings(values, every_s=0.05)

    monkeypatch.setattr(turn_stream, "with_pings", eager)
    steps = [0.01, PartProgress(index=0, step=1, total=40, eta_s=None)] * 30
    started = PartStarted(index=0, modality=IMAGE, caption="")
    agent = FakeAgent(TurnStarted(seed=1), started, *steps, TurnDone(finish_reason="stop"))
    answer = await ask(agent, preset, store, body(stream=True))
    assert answer.text.count(": ping\n\n") >= 2


async def test_a_mistake_of_ours_has_a_request_id_too(preset: Preset, store: ArtefactStore) -> None:
    class Broken(FakeAgent):
        async def states(self) -> Any:
            raise RuntimeError("secret")

    async with client(build_gateway(preset, Broken(), store)) as http:
        answer = await http.get("/health", headers={"x-request-id": "mine-2"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine-2")
    assert "secret" not in answer.text


async def test_a_model_with_a_slash_in_its_name_is_an_unknown_model(
    preset: Preset, store: ArtefactStore
) -> None:
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        answer = await http.get("/v1/models/somebody/gpt-9")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_form_that_cannot_be_read_is_a_bad_request(preset: Preset, store: ArtefactStore) -> None:
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        answer = await http.post("/v1/files", content=b"x", headers={"content-type": "multipart/form-data"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "POST /v1/files: Missing boundary in multipart."
