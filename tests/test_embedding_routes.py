"""Embeddings: media and texts in one space, over tiny encoders with and without a text tower."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

from services.artefacts import ArtefactStore
from services.boxes import BoxState
from services.gateway import build_gateway
from services.local_encoder import LocalEncoder
from services.presets import load_preset
from tests.fake_boxes import FakeEncoder, FakeSpeaker, agent
from tests.scripted_agent import MP4, PNG, WAV, client, data_url
from tests.test_imagebind_encoder import made_encoder
from tests.tiny import ENCODER_WIDTH

PICTURE = data_url(PNG, "image/png")


def gateway(preset_file: Path, store: ArtefactStore) -> FastAPI:
    preset = load_preset(str(preset_file))
    reads = agent(store, FakeSpeaker(), encoder=LocalEncoder(preset, store), limits=preset.limits)
    return build_gateway(preset, reads, store)


@pytest.fixture
def app(tiny_preset: Path, store: ArtefactStore) -> FastAPI:
    return gateway(tiny_preset, store)


async def answer(app: FastAPI, given: Any, **rest: Any) -> Any:
    async with client(app) as http:
        return await http.post("/v1/embeddings", json={"input": given, **rest})


def vectors(answered: Any) -> list[Any]:
    assert answered.status_code == 200, answered.text
    data = answered.json()["data"]
    assert [each["index"] for each in data] == list(range(len(data)))
    return [np.array(each["embedding"]) for each in data]


async def test_media_of_every_kind_become_unit_vectors_of_one_width(app: FastAPI) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(WAV).decode(), "format": "wav"}}
    found = vectors(await answer(app, [PICTURE, sound, data_url(MP4, "video/mp4"), PICTURE]))
    assert [vector.shape for vector in found] == [(ENCODER_WIDTH,)] * 4
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(4))
    assert np.array_equal(found[0], found[3])
    assert np.allclose(found[0], found[2], atol=1e-5)  # a clip in which nothing moves is its picture
    assert not np.allclose(found[0], found[1], atol=0.1)


async def test_an_uploaded_file_is_named_by_its_id(app: FastAPI) -> None:
    async with client(app) as http:
        file_id = (await http.post("/v1/files", files={"file": ("a.png", PNG)})).json()["id"]
    named, sent = vectors(await answer(app, [file_id, PICTURE]))
    assert np.array_equal(named, sent)


async def test_floats_may_come_as_base64(app: FastAPI) -> None:
    (plain,) = vectors(await answer(app, PICTURE))
    packed = (await answer(app, PICTURE, encoding_format="base64")).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == plain.tolist()


async def test_texts_are_read_where_the_encoder_has_a_tower_for_them(
    tiny_preset: Path, store: ArtefactStore, tmp_path: Path
) -> None:
    refused = await answer(gateway(tiny_preset, store), [PICTURE, "a bell"])
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "unsupported_modality", "input[1]")
    assert "has no text tower; it reads audio, image, video." in error["message"]

    made_encoder().save_pretrained(tmp_path / "weights" / "encoder")
    path = tmp_path / "reads-text.yaml"
    path.write_text(tiny_preset.read_text())
    found = vectors(await answer(gateway(path, store), ["a red bell", PICTURE, "a red bell", "a drum"]))
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert np.array_equal(found[0], found[2])
    assert not np.allclose(found[0], found[3])


@pytest.mark.parametrize(
    ("given", "rest", "status", "code", "param"),
    [
        ([], {}, 400, "invalid_value", "input"),
        (None, {}, 400, "invalid_value", "input"),
        ([[1, 2]], {}, 400, "invalid_value", "input[0]"),
        ([PICTURE, " "], {}, 400, "empty_message", "input[1]"),
        (["file-" + "0" * 32], {}, 404, "file_not_found", "input[0]"),
        (["data:image/png;base64,iVBORw=="], {}, 400, "invalid_media", "input[0]"),
        ([PICTURE.replace("image/png", "audio/wav")], {}, 400, "unsupported_media", "input[0]"),
        ([PICTURE] * 5, {}, 413, "media_limit_exceeded", "input"),
        (["x"] * 257, {}, 400, "invalid_value", "input"),
        ([PICTURE], {"model": "text-embedding-3-small"}, 404, "model_not_found", "model"),
        ([PICTURE], {"dimensions": 3}, 400, "unsupported_parameter", "dimensions"),
        ([PICTURE], {"encoding_format": "int8"}, 400, "invalid_value", "encoding_format"),
    ],
)
async def test_what_cannot_be_embedded_is_named(
    app: FastAPI, given: Any, rest: dict[str, Any], status: int, code: str, param: str
) -> None:
    refused = await answer(app, given, **rest)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (status, code, param), error


async def test_an_encoder_that_is_not_there_is_told(
    tiny_preset: Path, store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.admission.PATIENCE_S", 0.01)
    encoder = FakeEncoder()
    encoder.now = BoxState.GONE
    app = build_gateway(load_preset(str(tiny_preset)), agent(store, FakeSpeaker(), encoder=encoder), store)
    refused = await answer(app, PICTURE)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
    assert refused.headers["retry-after"]
