"""What ``patchbay serve`` says when it cannot start."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import ActorDiedError

from deploy.serve import _health_lacks, _page_lacks, _wait_until, _why, main, ready_within_s
from services.errors import PresetProblem
from services.presets import load_preset


def status(**deployments: str) -> Any:
    found = {name: SimpleNamespace(message=message) for name, message in deployments.items()}
    return SimpleNamespace(applications={"patchbay": SimpleNamespace(deployments=found)})


def test_a_proxy_that_never_came_up_is_one_sentence_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> None:
        raise ActorDiedError

    monkeypatch.setattr(serve, "status", nobody)
    told = _why(ActorDiedError())
    assert told.code == "not_started"
    assert told.message.startswith("The service could not start: The actor died unexpectedly")
    assert told.message.endswith("try again, or run `patchbay doctor` to see what is wrong.")
    assert "\n" not in told.message


def test_a_box_whose_weights_do_not_load_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    report = (
        "Traceback (most recent call last):\n  ...\nThe encoder cannot be loaded: x has shape (1,).\n more"
    )
    monkeypatch.setattr(serve, "status", lambda: status(Agent="", Encoder=report))
    told = _why(RuntimeError("Deploying application patchbay failed."))
    assert told.message == "The service could not start: The encoder cannot be loaded: x has shape (1,)."


def test_a_service_may_take_longer_to_come_up_the_more_weights_it_reads(
    tiny_preset: Path, tmp_path: Path
) -> None:
    preset = load_preset(str(tiny_preset))
    shutil.copytree(preset.weights_folder, tmp_path / "weights")
    path = tmp_path / "large.yaml"
    path.write_text(tiny_preset.read_text())
    small = ready_within_s(load_preset(str(path)))
    assert 300 < small < 301  # a tiny preset has less than 50 MB

    for name in ("image/unet/more.safetensors", "llm/base/more.safetensors"):
        with (tmp_path / "weights" / name).open("wb") as file:
            file.truncate(5 * 10**9)  # a hole, which takes no place on the disk

    assert ready_within_s(load_preset(str(path))) == small + 200


@contextmanager
def answering(*answers: tuple[int, bytes]) -> Iterator[str]:
    """Serve these answers, the last one for ever, and yield the address."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_a_proxy_of_the_environment_is_not_asked_for_our_own_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with answering((200, b'{"status": "ok"}')) as address:
        assert _page_lacks(address) == ""
        assert _health_lacks(address) == ""


def test_what_is_still_loaded_is_waited_for_and_named_when_it_takes_too_long() -> None:
    loading = (503, b'{"status": "loading", "unavailable": ["language_model", "image"]}')
    with answering((404, b"no route"), loading, (200, b'{"status": "ok", "unavailable": []}')) as address:
        lacking = [_health_lacks(address) for _ in range(3)]
    assert lacking == ["an answer", "language_model, image", ""]
    assert _health_lacks(address) == "an answer"  # nobody is there any more
    with pytest.raises(PresetProblem, match="did not come up within 0 s; it lacks language_model, image"):
        _wait_until(lambda: lacking[1], 0.0, lambda: None)


def test_a_service_that_failed_is_not_waited_for() -> None:
    def failed() -> None:
        raise RuntimeError("out of paint")

    with pytest.raises(RuntimeError, match="out of paint"):
        _wait_until(lambda: "an answer", 60.0, failed)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(name: str) -> None:
        raise OSError(28, "No space left on device", "/somewhere/a")

    monkeypatch.setattr("deploy.serve.load_preset", full)
    assert main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("patchbay: /somewhere/a cannot be used: No space left on device.")
    assert error.count("\n") == 1
