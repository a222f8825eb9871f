"""From the JSON of a chat completion to a conversation and options, or to an error with its place."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.artefacts import ArtefactStore
from services.events import (
    TurnDone,
    TurnStarted,
)
from services.gateway import build_gateway
from services.messages import MediaPart, Role, SpokenPart, TextPart, TurnOptions
from services.presets import Preset
from tests.scripted_agent import (
    AUDIO,
    IMAGE,
    MP4,
    PNG,
    VIDEO,
    WAV,
    FakeAgent,
    ask,
    body,
    client,
    data_url,
    script,
)


async def test_all_kinds_of_input_parts_become_artefacts(preset: Preset, store: ArtefactStore) -> None:
    stored = store.put(PNG, media_type="image/png", filename="a.png", modality=IMAGE)
    content = [
        {"type": "text", "text": "What are these?"},
        {"type": "image_url", "image_url": {"url": data_url(PNG, "image/png"), "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(WAV).decode(), "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": data_url(WAV, "audio/wav")}},
        {"type": "video_url", "video_url": {"url": data_url(MP4, "video/mp4")}},
        {"type": "file", "file": {"file_id": stored.id}},
        {"type": "file", "file": {"file_data": data_url(MP4, "video/mp4"), "filename": "v.mp4"}},
        {"type": "image_url", "image_url": {"url": f"http://test/v1/files/{stored.id}/content"}},
    ]
    agent = FakeAgent(TurnStarted(seed=1), TurnDone(finish_reason="stop"))
    answer = await ask(agent, preset, store, body(content))
    assert answer.status_code == 200, answer.text
    (message,) = agent.conversation
    assert message.parts[0] == TextPart("What are these?")
    media = [part for part in message.parts if isinstance(part, MediaPart)]
    assert [part.modality for part in media] == [IMAGE, AUDIO, AUDIO, VIDEO, IMAGE, None, IMAGE]
    assert [store.read(part.artefact_id) for part in media] == [PNG, WAV, WAV, MP4, PNG, MP4, PNG]


async def test_options_reach_the_agent(preset: Preset, store: ArtefactStore) -> None:
    agent = FakeAgent(TurnStarted(seed=1), TurnDone(finish_reason="stop"))
    wishes = {
        "modalities": ["text", "image"],
        "seed": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_completion_tokens": 12,
        "top_k": 20,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.25,
        "frequency_penalty": -1,
        "stop": ["a", "b"],
        "user": "ann",
        "extra_body": {
            "decoders": {"image": {"seed": 2, "num_inference_steps": 4, "size": "64x32", "strength": 0.5}}
        },
    }
    await ask(agent, preset, store, body(**wishes))
    assert agent.options == TurnOptions(
        modalities=[Modality.TEXT, IMAGE],
        seed=5,
        temperature=0.5,
        top_p=0.9,
        max_new_tokens=12,
        top_k=20,
        repetition_penalty=1.2,
        presence_penalty=0.25,
        frequency_penalty=-1,
        stop=("a", "b"),
        decoders={IMAGE: DecodeSettings(seed=2, steps=4, width_px=64, height_px=32, strength=0.5)},
        user="ann",
    )
    await ask(agent, preset, store, body(stop="a", stream=True, stream_options={"previews": 3}))
    assert agent.options == TurnOptions(stop=("a",), previews=3)
    await ask(agent, preset, store, body(stop=None, presence_penalty=None, user=""))
    assert agent.options == TurnOptions()


async def test_fast_media_are_asked_for_by_word_or_by_number(preset: Preset, store: ArtefactStore) -> None:
    agent = FakeAgent(TurnStarted(seed=1), TurnDone(finish_reason="stop"))
    wishes = {IMAGE: {"fast": True}, VIDEO: {"deep_every": 3, "keep_untouched": True}, AUDIO: {"fast": False}}
    await ask(agent, preset, store, body(decoders=wishes))
    assert agent.options.decoders == {kind: DecodeSettings(**wish) for kind, wish in wishes.items()}


async def test_an_earlier_reply_comes_back_as_signals(preset: Preset, store: ArtefactStore) -> None:
    """However much of our reply a client keeps, its media are known again."""
    answer = await ask(FakeAgent(*script(store)), preset, store, body())
    message = answer.json()["choices"][0]["message"]
    lean = {name: value for name, value in message.items() if name != "parts"}
    lean["audio"] = {"id": lean["audio"]["id"]}
    for earlier in (message, lean):
        agent = FakeAgent(TurnStarted(seed=1), TurnDone(finish_reason="stop"))
        payload = body()
        payload["messages"] = [*payload["messages"], earlier, {"role": "user", "content": "again"}]
        answer = await ask(agent, preset, store, payload)
        assert answer.status_code == 200, answer.text
        spoken = agent.conversation[1]
        assert spoken.role is Role.ASSISTANT
        assert {part.modality for part in spoken.parts if isinstance(part, SpokenPart)} == {
            IMAGE,
            VIDEO,
            AUDIO,
        }
        assert not any(isinstance(part, MediaPart) for part in spoken.parts)


async def test_a_picture_follows_its_caption_when_a_client_keeps_no_order(
    preset: Preset, store: ArtefactStore
) -> None:
    image = store.put(PNG, media_type="image/png", filename="a", modality=IMAGE, caption="A.", manifest={})
    agent = FakeAgent(TurnStarted(seed=1), TurnDone(finish_reason="stop"))
    url = f"/v1/files/{image.id}/content"
    earlier = {"role": "assistant", "content": "A.\nB.", "images": [{"type": "image_url", "image_url": url}]}
    payload = body()
    payload["messages"] = [*payload["messages"], earlier, {"role": "user", "content": "again"}]
    await ask(agent, preset, store, payload)
    assert agent.conversation[1].parts == (TextPart("A."), SpokenPart(IMAGE, "A.", image.id), TextPart("B."))


STEPS = "decoders.image.num_inference_steps"
REFUSED: list[tuple[dict[str, Any], int, str, str | None]] = [
    (body(model="gpt-9"), 404, "model_not_found", "model"),
    ({"model": "tiny"}, 400, "invalid_value", "messages"),
    ({"model": "tiny", "messages": []}, 400, "invalid_value", "messages"),
    (body(5), 400, "invalid_value", "messages[0].content"),
    (body([{"type": "text"}]), 400, "invalid_value", "messages[0].content[0]"),
    (body([{"type": "smell", "smell": 1}]), 400, "invalid_value", "messages[0].content[0]"),
    (
        body([{"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}]),
        400,
        "remote_url_not_allowed",
        "messages[0].content[0]",
    ),
    (
        body([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        400,
        "remote_url_not_allowed",
        "messages[0].content[0]",
    ),
    (
        body([{"type": "image_url", "image_url": {"url": "data:image/png;base64,###"}}]),
        400,
        "invalid_base64",
        "messages[0].content[0]",
    ),
    (
        body([{"type": "file", "file": {"file_id": "file-" + "0" * 32}}]),
        404,
        "file_not_found",
        "messages[0].content[0]",
    ),
    (
        body([{"type": "file", "file": {"file_id": "../../etc/passwd"}}]),
        404,
        "file_not_found",
        "messages[0].content[0]",
    ),
    (body(modalities=["text", "smell"]), 400, "invalid_value", "modalities.1"),
    (body(decoders={"image": {"stesp": 3}}), 400, "invalid_value", "decoders.image.stesp"),
    (body(decoders={"image": {"num_inference_steps": 0}}), 400, "invalid_value", STEPS),
    (body(decoders={"image": {"strength": 0}}), 400, "invalid_value", "decoders.image.strength"),
    (body(decoders={"image": {"deep_every": 17}}), 400, "invalid_value", "decoders.image.deep_every"),
    (body(decoders={"image": {"size": "4x8"}}), 400, "invalid_value", "decoders.image.size"),
    (body(decoders={"audio": {"seconds": 500}}), 400, "invalid_value", "decoders.audio.seconds"),
    (body(decoders={"text": {"seed": 1}}), 400, "invalid_value", "decoders"),
    (body(stream_options={"previews": 33}), 400, "invalid_value", "stream_options.previews"),
    (body(temperature=3), 400, "invalid_value", "temperature"),
    (body(top_p=0), 400, "invalid_value", "top_p"),
    (body(top_k=-1), 400, "invalid_value", "top_k"),
    (body(top_k=1.5), 400, "invalid_value", "top_k"),
    (body(repetition_penalty=0), 400, "invalid_value", "repetition_penalty"),
    (body(presence_penalty=2.5), 400, "invalid_value", "presence_penalty"),
    (body(frequency_penalty=-2.5), 400, "invalid_value", "frequency_penalty"),
    (body(stop=""), 400, "invalid_value", "stop"),
    (body(stop=["x"] * 5), 400, "invalid_value", "stop"),
    (body(stop=[1]), 400, "invalid_value", "stop.0"),
    (body(stop=5), 400, "invalid_value", "stop"),
    (body(user="x" * 300), 400, "invalid_value", "user"),
    (body(max_tokens=0), 400, "invalid_value", "max_completion_tokens"),
    (body(n=2), 400, "unsupported_parameter", "n"),
    (body(tools=[{"type": "function"}]), 400, "unsupported_parameter", "tools"),
    (body(audio={"voice": "alloy", "format": "mp3"}), 400, "unsupported_parameter", "audio.format"),
    (
        {"model": "tiny", "messages": [{"role": "tool", "content": "x"}]},
        400,
        "invalid_value",
        "messages[0].role",
    ),
]


@pytest.mark.parametrize(("payload", "status", "code", "param"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_wrong_request_gets_an_error_with_its_place(
    preset: Preset,
    store: ArtefactStore,
    payload: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
    stream: bool,
) -> None:
    answer = await ask(FakeAgent(), preset, store, {**payload, "stream": stream})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert answer.headers["x-request-id"]


async def test_a_setting_is_named_as_the_request_names_it(preset: Preset, store: ArtefactStore) -> None:
    answer = await ask(FakeAgent(), preset, store, body(decoders={"audio": {"seconds": 500}}))
    assert answer.json()["error"]["message"].startswith("seconds is 500.0; it must be a number from")


async def test_null_says_the_same_as_nothing(preset: Preset, store: ArtefactStore) -> None:
    agent = FakeAgent(TurnStarted(seed=1), TurnDone(finish_reason="stop"))
    nothing = dict.fromkeys(("stream", "decoders", "lora", "stop", "tools", "n", "temperature"))
    assert (await ask(agent, preset, store, body(**nothing))).status_code == 200
    nested = body(stream=True, stream_options={"include_usage": None}, decoders={"image": None})
    assert (await ask(agent, preset, store, nested)).status_code == 200


async def test_half_a_character_is_refused_wherever_it_stands(preset: Preset, store: ArtefactStore) -> None:
    half = "half \ud83d"
    spoken = {"role": "assistant", "parts": [{"type": "image", "caption": half}]}
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        for message in ({"role": "user", "content": half}, spoken):
            answer = await http.post(
                "/v1/chat/completions",
                content=json.dumps({"messages": [message]}),  # \ud83d in ASCII, as JSON may say it
                headers={"content-type": "application/json"},
            )
            error = answer.json()["error"]
            found = answer.status_code, error["code"], error["param"]
            assert found == (400, "invalid_value", "messages[0]")
