"""Pictures of words: over the tiny models, and what is refused before anything is made."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from decoders.failures import QueueFull
from decoders.settings import DecodeSettings
from decoders.writing import read_manifest
from encoders.media import Image, Modality, read_media
from services import admission
from services.artefacts import ArtefactStore
from services.boxes import BoxState
from services.errors import TooManyRequests, translate
from services.events import Event, PartStarted, TurnFailed
from services.gateway import build_gateway
from services.local_decoder import LocalDecoder
from services.presets import Preset, load_preset
from tests.fake_boxes import AUDIO, IMAGE, FakeDecoder, FakeSpeaker, agent, failure
from tests.scripted_agent import FakeAgent, client
from tests.tiny import with_adapters

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtefactStore:
    return ArtefactStore(tmp_path_factory.mktemp("files").as_uri())


@pytest.fixture(scope="module")
def app(tiny_preset: Path, store: ArtefactStore) -> FastAPI:
    """A gateway over the tiny picture decoder; nobody speaks there."""
    preset = load_preset(str(with_adapters(tiny_preset)))
    decoder = LocalDecoder(preset, IMAGE, store)
    made_by = agent(
        store,
        FakeSpeaker(),
        decoder,  # type: ignore[arg-type]
        cost_limits={IMAGE: preset.decoders[IMAGE].limits},
        adapters=preset.adapters,
        limits=preset.limits,
    )
    return build_gateway(preset, made_by, store)


async def answer(app: FastAPI, **body: Any) -> Any:
    async with client(app) as http:
        content = json.dumps({"prompt": "a bell", **body})  # httpx sends no half characters
        return await http.post(PATH, content=content, headers={"content-type": "application/json"})


def events_in(text: str) -> list[dict[str, Any]]:
    """Return the data of a stream of named events; each name is the type in its data."""
    found = []
    for block in text.strip().split("\n\n"):
        name, _, data = block.partition("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        found.append(value)
    return found


async def test_pictures_come_as_urls_or_in_the_answer(app: FastAPI, store: ArtefactStore) -> None:
    plain = (await answer(app, n=2, seed=7, size="16x24")).json()
    assert (plain["size"], plain["output_format"]) == ("16x24", "png")
    first, second = plain["data"]
    assert [picture["manifest"]["seed"] for picture in (first, second)] == [7, 8]
    assert first["manifest"]["link"] == "caption"
    async with client(app) as http:
        file = (await http.get(first["url"])).content
    image = read_media(file)
    assert isinstance(image, Image)
    assert image.pixels.shape == (24, 16, 3)
    manifest = read_manifest(file)
    assert manifest is not None
    assert manifest["caption"] == "a bell"

    (inline,) = (await answer(app, seed=7, size="16x24", response_format="b64_json")).json()["data"]
    assert base64.b64decode(inline["b64_json"]) == file  # the same seed, the same picture
    assert "url" not in inline
    (other,) = (await answer(app, seed=8, size="16x24")).json()["data"]
    assert other["manifest"]["condition"] == first["manifest"]["condition"]
    (words,) = (await answer(app, seed=7, prompt="a drum")).json()["data"]
    assert words["manifest"]["condition"] != first["manifest"]["condition"]


async def test_a_stream_shows_the_picture_while_it_is_made(app: FastAPI) -> None:
    body = {"stream": True, "partial_images": 2, "seed": 7, "steps": 6, "size": "auto"}
    streamed = await answer(app, **body)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *looks, last = events_in(streamed.text)
    assert [look["type"] for look in looks] == ["image_generation.partial_image"] * 2
    assert [look["partial_image_index"] for look in looks] == [0, 1]
    previews = [read_media(base64.b64decode(look["b64_json"])) for look in looks]
    assert all(isinstance(look, Image) for look in previews)
    assert looks[0]["b64_json"] != looks[1]["b64_json"]
    assert looks[0]["output_format"] == "jpeg"
    assert last["type"] == "image_generation.completed"
    (plain,) = (await answer(app, seed=7, steps=6, response_format="b64_json")).json()["data"]
    assert last["b64_json"] == plain["b64_json"]


async def test_the_name_of_the_model_may_name_an_adapter(app: FastAPI) -> None:
    (named,) = (await answer(app, model="tiny:ink")).json()["data"]
    assert named["manifest"]["lora"]["name"] == "ink"
    refused = await answer(app, model="tiny:pirate")  # which is for the language model
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "adapter_not_found")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"prompt": " "}, 400, "empty_message", "prompt"),
        ({"prompt": None}, 400, "invalid_value", "prompt"),
        ({"prompt": "\ud800"}, 400, "invalid_value", "prompt"),
        ({"model": "dall-e-3"}, 404, "model_not_found", "model"),
        ({"n": 0}, 400, "invalid_value", "n"),
        ({"n": 7}, 400, "unsupported_parameter", "n"),
        ({"n": 2, "stream": True}, 400, "unsupported_parameter", "n"),
        ({"size": "large"}, 400, "invalid_value", "size"),
        ({"size": "17x16"}, 400, "invalid_value", "size"),
        ({"size": "2048x16"}, 400, "decoder_limit_exceeded", "size"),
        ({"steps": 1001}, 400, "invalid_value", "num_inference_steps"),
        ({"num_frames": 3}, 400, "invalid_value", "num_frames"),
        ({"strength": 0.5}, 400, "unsupported_parameter", "strength"),
        ({"keep_untouched": True}, 400, "unsupported_parameter", "keep_untouched"),
        ({"negative_prompt": "drums"}, 400, "unsupported_parameter", "negative_prompt"),
        ({"output_format": "webp"}, 400, "unsupported_parameter", "output_format"),
        ({"background": "transparent"}, 400, "unsupported_parameter", "background"),
        ({"response_format": "gif"}, 400, "invalid_value", "response_format"),
        ({"partial_images": 33, "stream": True}, 400, "invalid_value", "partial_images"),
        ({"lora": "pirate"}, 400, "adapter_not_found", "lora"),
    ],
)
async def test_a_wish_that_cannot_be_granted_is_named(
    app: FastAPI, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    for stream in (False, True):
        refused = await answer(app, **{"stream": stream, **body})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (status, code, param), error


async def made_by(decoder: FakeDecoder, store: ArtefactStore, modality: Modality = IMAGE) -> list[Event]:
    the_agent = agent(store, FakeSpeaker(), decoder)
    return [event async for event in the_agent.make(modality, "a bell", DecodeSettings(), user="ann")]


async def test_back_pressure_of_the_decoder_is_the_answer(store: ArtefactStore, preset: Preset) -> None:
    full = FakeDecoder(store, IMAGE, steps=0, error=QueueFull(90.0, 60.0))
    (told,) = await made_by(full, store)  # not even begun
    assert isinstance(told, TurnFailed)
    assert (told.error["code"], told.error["retry_after_s"]) == ("queue_full", 30)
    assert full.users == ["user ann"]
    assert full.signals[0].is_words
    error: TooManyRequests = translate(QueueFull(90.0, 60.0))  # type: ignore[assignment]
    scripted = FakeAgent(TurnFailed(error=error.to_wire()))
    for stream in (False, True):
        refused = await answer(build_gateway(preset, scripted, store), stream=stream)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")


async def test_a_decoder_that_is_not_there_is_told(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PATIENCE_S", 0.01)
    for now, code in ((BoxState.LOADING, "model_loading"), (BoxState.GONE, "decoder_unavailable")):
        assert failure(await made_by(FakeDecoder(store, IMAGE, now=now), store))["code"] == code
    assert failure(await made_by(FakeDecoder(store, IMAGE), store, AUDIO))["code"] == "unsupported_modality"


async def test_a_picture_that_fails_stops_the_others_of_its_request(
    store: ArtefactStore, preset: Preset
) -> None:
    class Two(FakeAgent):
        async def make(self, *args: Any, **wishes: Any) -> AsyncGenerator[Event, None]:
            self.made.append(args)
            if len(self.made) == 1:
                self.script = (PartStarted(index=0, modality=IMAGE, caption=""), 60.0)
            else:
                full = TooManyRequests("Full.", code="queue_full")
                self.script = (TurnFailed(error=full.to_wire()),)
            async for event in self.turn((), None):  # type: ignore[arg-type]
                yield event

    scripted = Two()
    refused = await answer(build_gateway(preset, scripted, store), n=2)
    assert refused.status_code == 429
    assert scripted.ended.is_set()


async def test_leaving_a_stream_stops_the_decoder(store: ArtefactStore) -> None:
    decoder = FakeDecoder(store, IMAGE, steps=1000, step_s=0.01)
    events = agent(store, FakeSpeaker(), decoder).make(IMAGE, "a bell", DecodeSettings())
    await anext(events)
    await events.aclose()
    assert decoder.stopped
    assert decoder.steps_taken < 10
