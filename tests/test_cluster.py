"""The whole service with a real Ray, started as a person starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.tiny import with_adapters

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.cluster
START_S = 420


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(preset: Path, log: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Start ``patchbay serve`` and yield its address once it has printed it."""
    port = free_port()
    command = [sys.executable, "-m", "services.cli", "serve", "--preset", str(preset), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while "Ready after" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        told = [line.split()[0] for line in log.read_text().splitlines() if line.strip()]
        assert told == ["Starting", "Chat", "API", "Ready"], log.read_text()
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


@pytest.fixture(scope="module")
def service(
    tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    with serving(with_adapters(tiny_preset), tmp_path_factory.mktemp("serve") / "log") as running:
        yield running


@pytest.fixture
def client(service: tuple[str, object]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{service[0]}/v1", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, text: str, steps: int = 2) -> dict[str, object]:
    completion = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": text}],
        seed=1,
        extra_body={"decoders": {"image": {"num_inference_steps": steps}}},
    )
    assert completion.choices[0].message.model_extra is not None
    return completion.choices[0].message.model_extra


def test_three_media_in_one_reply_come_from_three_deployments(client: openai.OpenAI) -> None:
    parts = ask(client, "draw, play and film a bell")["parts"]
    assert isinstance(parts, list)
    assert [part["type"] for part in parts] == ["text", "image", "text", "audio", "text", "video"]
    assert not any("error" in part for part in parts)


def test_the_same_seed_makes_the_same_picture_as_in_one_process(
    client: openai.OpenAI, tiny_preset: Path
) -> None:
    from services.session import Session

    parts = ask(client, "draw a bell")["parts"]
    assert isinstance(parts, list)
    with Session.open(str(tiny_preset)) as session:
        reply = session.chat([{"role": "user", "content": "draw a bell"}], seed=1)
    assert reply.parts[1].manifest is not None
    for name in ("seed", "weights", "condition"):
        assert parts[1]["manifest"][name] == reply.parts[1].manifest[name]


def test_media_are_uploaded_to_and_read_by_other_processes(client: openai.OpenAI, tmp_path: Path) -> None:
    from tests.scripted_agent import PNG, about

    (tmp_path / "a.png").write_bytes(PNG)
    file = client.files.create(file=tmp_path / "a.png", purpose="vision")
    completion = client.chat.completions.create(model="tiny", messages=about(file.id))
    assert completion.choices[0].message.content


def test_errors_come_through_all_processes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as empty:
        ask(client, "")
    assert empty.value.code == "empty_message"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "draw a bell " * 2000)
    assert long.value.code == "context_length_exceeded"
    bad = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iQ=="}}]
    with pytest.raises(openai.BadRequestError) as broken:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": bad}],  # type: ignore[misc, list-item]
        )
    assert (broken.value.code, broken.value.param) == ("invalid_media", "messages[0].content[0]")


def test_adapters_reach_every_deployment_and_go_by_command(
    client: openai.OpenAI, service: tuple[str, object]
) -> None:
    def told(model: str, **extra: object) -> dict[str, object]:
        completion = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "draw a bell"}], seed=1, extra_body=extra
        )
        assert completion.choices[0].message.model_extra is not None
        return completion.choices[0].message.model_extra

    def adapters() -> dict[str, int]:
        with urllib.request.urlopen(f"{service[0]}/v1/adapters") as answer:
            return {adapter["id"]: adapter["loaded"] for adapter in json.load(answer)["data"]}

    plain, worn = told("tiny"), told("tiny:ink")
    assert isinstance(plain["parts"], list)
    assert isinstance(worn["parts"], list)
    assert worn["parts"][1]["manifest"]["lora"]["name"] == "ink"
    assert worn["images"] != plain["images"]
    assert told("tiny", lora=["pirate"])["parts"] != plain["parts"]
    with pytest.raises(openai.BadRequestError) as unknown:
        told("tiny", lora="nobody")
    assert (unknown.value.code, unknown.value.param) == ("adapter_not_found", "lora")

    assert (adapters()["ink"], adapters()["pirate"], adapters()["poet"]) == (1, 1, 0)
    for name in ("ink", "pirate"):
        command = urllib.request.Request(f"{service[0]}/v1/adapters/{name}/unload", method="POST")
        with urllib.request.urlopen(command) as answer:
            assert json.load(answer)["unloaded"] == 1
    assert not any(adapters().values())


def test_leaving_a_stream_stops_the_decoder_in_its_process(
    client: openai.OpenAI, service: tuple[str, object]
) -> None:
    slow = {"decoders": {"image": {"num_inference_steps": 1000}}}
    began = time.monotonic()
    ask(client, "draw a bell", 1000)
    whole = time.monotonic() - began
    with client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "draw a bell"}], stream=True, extra_body=slow
    ) as stream:
        for chunk in stream:
            delta = chunk.choices[0].delta.model_extra or {}
            if any(part["status"] == "started" for part in delta.get("parts", [])):
                break
    began = time.monotonic()
    ask(client, "draw a bell", 1)
    assert time.monotonic() - began < whole / 2
    assert metrics(service[0], "patchbay_decoder_requests") == [0, 0, 0]


def test_one_part_is_cancelled_and_made_again_by_other_processes(
    client: openai.OpenAI, service: tuple[str, object]
) -> None:
    told = []
    with client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "draw, play and film a bell"}],
        stream=True,
        stream_options={"previews": 9},  # type: ignore[typeddict-unknown-key]
        extra_body={"user": "ann", "decoders": {"image": {"num_inference_steps": 1000}}},
    ) as stream:
        for chunk in stream:
            for part in (chunk.choices[0].delta.model_extra or {}).get("parts", []):
                told.append((part["type"], part["status"]))
                if told.count(("image", "preview")) == 1 and told[-1] == ("image", "preview"):
                    path = f"/v1/responses/{chunk.id}/parts/{part['index']}"
                    answer = post(f"{service[0]}{path}/cancel", {})
                    assert answer["status"] == "cancelled"
    assert {("image", "failed"), ("audio", "done"), ("video", "done")} <= set(told)
    wait_until(lambda: metrics(service[0], "patchbay_decoder_requests") == [0, 0, 0])
    again = post(f"{service[0]}{path}/retry", {"num_inference_steps": 2, "seed": 5})
    assert (again["status"], again["type"], again["manifest"]["seed"]) == ("done", "image", 5)


def test_every_box_counts_in_its_own_process(client: openai.OpenAI, service: tuple[str, object]) -> None:
    ask(client, "draw a bell")
    assert metrics(service[0], "patchbay_language_model_slots") == [8]
    assert metrics(service[0], "patchbay_language_model_slots_in_use") == [0]
    assert metrics(service[0], "patchbay_encoder_cache_bytes") != []
    assert metrics(service[0], "patchbay_language_model_requests_total")[0] >= 1


def post(url: str, body: dict[str, object]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
        value: dict[str, Any] = json.load(answer)
    return value


def metrics(address: str, name: str) -> list[float]:
    """Return the samples of one metric."""
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{")]


def test_a_decoder_that_died_is_not_promised_until_it_is_back(
    client: openai.OpenAI, service: tuple[str, "subprocess.Popen[bytes]"]
) -> None:
    _, process = service
    named = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(process.pid)}
    (victim,) = [int(pid) for pid, name in named.items() if b":ImageDecoder" in name]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: "image" not in outputs(client))
    parts = ask(client, "draw a bell")["parts"]
    assert isinstance(parts, list)
    assert "image" not in {part["type"] for part in parts}
    assert ask(client, "play a bell")["parts"][1]["type"] == "audio"  # type: ignore[index]
    with pytest.raises(openai.InternalServerError) as down:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "draw a bell"}],
            modalities=["text", "image"],  # type: ignore[list-item]
        )
    assert (down.value.status_code, down.value.code) == (503, "decoder_unavailable")
    assert down.value.response.headers["retry-after"]
    wait_until(lambda: "image" in outputs(client))
    assert ask(client, "draw a bell")["parts"][1]["type"] == "image"  # type: ignore[index]


def test_without_a_language_model_requests_end_in_time_and_health_says_why(
    client: openai.OpenAI, service: tuple[str, "subprocess.Popen[bytes]"]
) -> None:
    address, process = service
    named = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(process.pid)}
    (victim,) = [int(pid) for pid, name in named.items() if b":LanguageModel" in name]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: health(address)["parts"]["language_model"] == "gone")
    told = health(address)
    assert (told["status"], told["error"]["code"]) == ("unavailable", "model_loading")
    began = time.monotonic()
    refused: openai.APIStatusError | None = None
    try:
        ask(client, "hello")
    except openai.APIStatusError as error:
        refused = error
    if refused is not None:  # otherwise it is back already
        assert (refused.status_code, refused.code) == (503, "model_loading")
        assert refused.response.headers["retry-after"]
    assert time.monotonic() - began < 30
    wait_until(lambda: health(address)["status"] == "ok")
    assert ask(client, "draw a bell")["parts"][1]["type"] == "image"  # type: ignore[index]


def health(address: str) -> dict[str, Any]:
    """Return what ``/health`` says, whatever its status."""
    try:
        with urllib.request.urlopen(f"{address}/health") as answer:
            value: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        value = json.load(error)
    return value


def outputs(client: openai.OpenAI) -> list[str]:
    extra = client.models.retrieve("tiny").model_extra
    assert extra is not None
    modalities: list[str] = extra["output_modalities"]
    return modalities


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_health_and_page_answer_and_unknown_paths_do_not(service: tuple[str, object]) -> None:
    address = service[0]
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert json.load(answer)["status"] == "ok"
    with urllib.request.urlopen(f"{address}/") as answer:
        assert b"gradio" in answer.read()
    with pytest.raises(urllib.error.HTTPError) as missing:
        urllib.request.urlopen(f"{address}/v1/nothing")
    assert json.load(missing.value)["error"]["code"] == "not_found"


def test_a_signal_ends_everything(service: tuple[str, "subprocess.Popen[bytes]"]) -> None:
    """It ends the service that the tests above have used, so it stays the last of them."""
    _, process = service
    children = [int(pid) for pid in descendants(process.pid)]
    assert len(children) > 5
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, [pid for pid in children if Path(f"/proc/{pid}").exists()]
        time.sleep(0.2)


def test_weights_of_a_wrong_shape_are_one_line_and_exit_code_1(tiny_preset: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(tiny_preset.parent, tmp_path / "copy")
    path = copy / "weights" / "llm" / "bridge.safetensors"
    tensors = load_file(path)
    tensors["signal_rows.head"] = tensors["signal_rows.head"][:-1].clone()
    save_file(tensors, path)
    command = [sys.executable, "-m", "services.cli", "serve", "--port", str(free_port())]
    done = subprocess.run(
        [*command, "--preset", str(copy / tiny_preset.name)],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("patchbay: The service could not start: The language model cannot be loaded:")
    assert "signal_rows.head has shape" in last


def descendants(pid: int) -> list[str]:
    """Return the ids of all processes that ``pid`` has started, and those that they have started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return found + [grandchild for child in found for grandchild in descendants(int(child))]
