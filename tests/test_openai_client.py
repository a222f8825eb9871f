"""OpenAI's own Python client against the gateway on a real socket."""

import base64
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import uvicorn

from encoders.media import Modality, read_media
from services.artefacts import ArtefactStore
from services.gateway import build_gateway
from services.presets import load_preset


@pytest.fixture(scope="module")
def client(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    from services.local import local_agent

    preset = load_preset(str(tiny_preset))
    store = ArtefactStore(tmp_path_factory.mktemp("files").as_uri())
    app = build_gateway(preset, local_agent(preset, store), store)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = listener.getsockname()[1]
    with openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client:
        yield client
    server.should_exit = True
    thread.join()
    listener.close()


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "patchbay"


def test_a_plain_chat_gives_words_and_all_media(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "draw, play and film a bell"}],
        seed=1,
        extra_body={"decoders": {"image": {"num_inference_steps": 2}}},
    )
    message = completion.choices[0].message
    assert message.content == "here is a bell.\nit sounds like this.\nand it moves."
    extra = message.model_extra
    assert extra is not None
    kinds = [part["type"] for part in extra["parts"]]
    assert kinds == ["text", "image", "text", "audio", "text", "video"]
    assert extra["parts"][1]["manifest"]["steps"] == 2
    picture = base64.b64decode(extra["images"][0]["image_url"]["url"].partition(",")[2])
    assert read_media(picture).modality is Modality.IMAGE
    assert message.audio is not None
    assert base64.b64decode(message.audio.data).startswith(b"RIFF")
    video = client.get(extra["videos"][0]["video_url"]["url"], cast_to=openai.HttpxBinaryResponseContent)
    assert read_media(video.content).modality is Modality.VIDEO
    assert completion.usage is not None
    assert completion.usage.total_tokens > 20


def test_a_conversation_goes_on_with_the_message_that_came_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "draw a bell"}]
    )
    second = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "user", "content": "draw a bell"},
            first.choices[0].message.model_dump(),  # type: ignore[list-item]
            {"role": "user", "content": "play it"},
        ],
    )
    assert second.choices[0].message.content == "it sounds like this."
    assert second.choices[0].message.audio is not None


def test_a_stream_gives_the_words_as_they_come_and_the_media(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "draw a bell"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    words, images, reasons, usage = [], [], [], None
    said_before_drawn = ""
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            words.append(choice.delta.content or "")
            images += (choice.delta.model_extra or {}).get("images", [])
            reasons.append(choice.finish_reason)
            said_before_drawn += "" if images else words[-1]
    assert "".join(words) == said_before_drawn == "here is a bell."
    assert len(images) == 1
    assert reasons[-1] == "stop"
    assert usage is not None


def test_files_are_uploaded_and_referred_to(client: openai.OpenAI, tmp_path: Path) -> None:
    from tests.scripted_agent import PNG, about

    (tmp_path / "a.png").write_bytes(PNG)
    file = client.files.create(file=tmp_path / "a.png", purpose="vision")
    assert client.files.retrieve(file.id).filename == "a.png"
    assert client.files.content(file.id).content == PNG
    completion = client.chat.completions.create(model="tiny", messages=about(file.id))
    assert completion.choices[0].message.content
    assert client.files.delete(file.id).deleted


def test_pictures_are_made_of_words(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a bell", n=2, size="16x16", extra_body={"seed": 3})  # type: ignore[call-overload]
    assert [picture.model_extra["manifest"]["seed"] for picture in answer.data] == [3, 4]
    file = client.get(answer.data[0].url, cast_to=openai.HttpxBinaryResponseContent).content
    inline = client.images.generate(prompt="a bell", response_format="b64_json", extra_body={"seed": 3})
    assert inline.data is not None
    assert base64.b64decode(inline.data[0].b64_json or "") == file
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=" ")
    assert (refused.value.code, refused.value.param) == ("empty_message", "prompt")


def test_a_picture_is_seen_while_it_is_made(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt="a bell", stream=True, partial_images=2, extra_body={"steps": 6, "seed": 3}
    )
    events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert all(read_media(base64.b64decode(event.b64_json)).modality is Modality.IMAGE for event in events)


def test_media_are_embedded_in_one_space(client: openai.OpenAI) -> None:
    from tests.scripted_agent import MP4, PNG, data_url

    given = [data_url(PNG, "image/png"), data_url(MP4, "video/mp4")]
    answer = client.embeddings.create(model="tiny", input=given)
    lengths = [sum(number**2 for number in each.embedding) for each in answer.data]
    assert lengths == pytest.approx([1.0, 1.0])
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="tiny", input="a bell")
    assert (refused.value.code, refused.value.param) == ("unsupported_modality", "input[0]")


def test_errors_are_those_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "hi"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as empty:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": " "}])
    assert (empty.value.code, empty.value.param) == ("empty_message", "messages[0].content")


def test_leaving_a_stream_stops_the_decoder(client: openai.OpenAI) -> None:
    slow = {"decoders": {"image": {"num_inference_steps": 1000}}}
    with client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "draw a bell"}], stream=True, extra_body=slow
    ) as stream:
        for chunk in stream:
            delta = chunk.choices[0].delta.model_extra or {}
            if any(part["status"] == "started" for part in delta.get("parts", [])):
                break
    began = time.monotonic()
    client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "draw a bell"}],
        extra_body={"decoders": {"image": {"num_inference_steps": 1}}},
    )
    quick = time.monotonic() - began
    began = time.monotonic()
    client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "draw a bell"}], extra_body=slow
    )
    assert quick < (time.monotonic() - began) / 2
