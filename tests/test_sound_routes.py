"""Sounds of words: over the tiny models, and what is refused before anything is made."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from encoders.media import Audio, read_media
from services.artefacts import ArtefactStore
from services.gateway import build_gateway
from services.local_decoder import LocalDecoder
from services.presets import load_preset
from tests.fake_boxes import AUDIO, FakeSpeaker, agent
from tests.scripted_agent import client


@pytest.fixture(scope="module")
def app(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """A gateway over the tiny decoder of sounds; nobody speaks there."""
    preset = load_preset(str(tiny_preset))
    store = ArtefactStore(tmp_path_factory.mktemp("files").as_uri())
    limits = {AUDIO: preset.decoders[AUDIO].limits}
    made_by = agent(store, FakeSpeaker(), LocalDecoder(preset, AUDIO, store), cost_limits=limits)  # type: ignore[arg-type]
    return build_gateway(preset, made_by, store)


async def answer(app: FastAPI, **body: Any) -> Any:
    async with client(app) as http:
        return await http.post("/v1/audio/generate", json={"prompt": "a low drum", **body})


async def test_a_sound_comes_as_a_file_or_described(app: FastAPI) -> None:
    plain = await answer(app, seed=3, seconds=0.1)
    assert plain.headers["content-type"] == "audio/wav"
    sound = read_media(plain.content)
    assert isinstance(sound, Audio)
    assert sound.seconds == pytest.approx(0.1)
    async with client(app) as http:
        file_id = plain.headers["x-file-id"]
        told = (await http.get(f"/v1/files/{file_id}")).json()
        assert (await http.get(plain.headers["content-location"])).content == plain.content
    assert (told["caption"], told["manifest"]["link"]) == ("a low drum", "caption")

    inline = (await answer(app, seed=3, seconds=0.1, response_format="b64_json")).json()
    assert base64.b64decode(inline["b64_json"]) == plain.content
    assert inline["manifest"]["seed"] == 3
    linked = (await answer(app, input="a high bell", prompt=None, response_format="url")).json()
    assert linked["url"] == f"http://test/v1/files/{linked['file_id']}/content"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"prompt": ""}, 400, "empty_message", "prompt"),
        ({"model": "tts-1"}, 404, "model_not_found", "model"),
        ({"seconds": 31}, 400, "decoder_limit_exceeded", "seconds"),
        ({"seconds": 0}, 400, "invalid_value", "seconds"),
        ({"size": "16x16"}, 400, "invalid_value", "size"),
        ({"response_format": "mp3"}, 400, "invalid_value", "response_format"),
        ({"stream": True}, 400, "unsupported_parameter", "stream"),
        ({"n": 2}, 400, "unsupported_parameter", "n"),
    ],
)
async def test_a_wish_that_cannot_be_granted_is_named(
    app: FastAPI, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    refused = await answer(app, **body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (status, code, param), error
