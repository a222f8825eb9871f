import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from decoders.settings import DecodeSettings
from encoders.media import Modality, read_media
from services import chat as chat_module
from services import cli, weight_commands
from services.session import Reply, ReplyPart
from tests.scripted_agent import PNG

Captured = pytest.CaptureFixture[str]


def run(*words: str) -> int:
    return cli.main(list(words))


@pytest.fixture
def chat(tiny_preset: Path, tmp_path: Path) -> list[str]:
    return ["chat", "--preset", str(tiny_preset), "--out", str(tmp_path / "out"), "--seed", "1"]


def test_chat_prints_one_object_with_the_parts_in_order(
    chat: list[str], tmp_path: Path, capsys: Captured
) -> None:
    assert run(*chat, "--json", "draw, play and film a bell") == 0
    captured = capsys.readouterr()
    answer: dict[str, Any] = json.loads(captured.out)
    assert captured.err == ""
    parts = answer["parts"]
    assert [part["type"] for part in parts] == ["text", "image", "text", "audio", "text", "video"]
    assert parts[0] == {"type": "text", "text": "here is a bell."}
    for part in parts[1::2]:
        assert set(part) == {"type", "path", "caption", "manifest"}
        path = Path(part["path"])
        assert path.parent == tmp_path / "out"
        assert path.suffix == {"image": ".png", "audio": ".wav", "video": ".mp4"}[part["type"]]
        assert read_media(path.read_bytes()).modality is Modality(part["type"])
    assert parts[1]["caption"] == "here is a bell."
    assert parts[1]["manifest"]["seed"] == 1
    assert answer["timings"]["total_s"] > 0


def test_chat_tells_a_person_where_the_media_are(chat: list[str], capsys: Captured) -> None:
    assert run(*chat, "draw a bell") == 0
    out = capsys.readouterr().out
    assert out.startswith("here is a bell.\n[image ...]\n")
    assert out.rstrip().endswith("0001-image.png")
    assert run(*chat, "draw a bell") == 0
    assert capsys.readouterr().out.rstrip().endswith("0002-image.png")


def test_chat_takes_media_and_earlier_turns(chat: list[str], tmp_path: Path, capsys: Captured) -> None:
    picture, earlier = tmp_path / "a.png", tmp_path / "earlier.json"
    picture.write_bytes(PNG)
    earlier.write_text(
        json.dumps(
            [
                {"role": "user", "content": "draw a bell"},
                {"role": "assistant", "parts": [{"type": "text", "text": "Here is a bell."}]},
            ]
        )
    )
    assert run(*chat, "--image", str(picture), "what is this?") == 0
    assert capsys.readouterr().out.strip()
    assert run(*chat, "--messages", str(earlier), "play it") == 0
    assert "it sounds like this." in capsys.readouterr().out


def test_a_conversation_goes_on_until_the_person_leaves(
    chat: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("draw a bell\n/image nowhere.png\n/help\n\nplay it\n/quit\nx")
    )
    assert run(*chat) == 0
    captured = capsys.readouterr()
    assert "here is a bell." in captured.out
    assert "it sounds like this." in captured.out
    assert "Leave with /quit" in captured.out
    assert "nowhere.png cannot be read" in captured.err


def test_what_the_model_is_not_sure_of_is_asked_about_and_made_on_demand(
    chat: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert run(*chat, "--ask-below", "0.999999", "--json", "draw a bell") == 0
    text, asked = json.loads(capsys.readouterr().out)["parts"]
    assert text == {"type": "text", "text": "here is a bell."}
    confidence = asked.pop("confidence")
    question = "Shall I make this picture?"
    assert asked == {"type": "image", "status": "asked", "caption": "here is a bell.", "question": question}
    assert 0 < confidence < 0.999999

    monkeypatch.setattr("sys.stdin", io.StringIO("/make\ndraw a bell\n/make\n/make\nplay it"))
    assert run(*chat, "--ask-below", "0.999999") == 0
    captured = capsys.readouterr()
    assert f"[image? {confidence:.5g}] {question}" in captured.out
    assert len(re.findall(r"^image: .*\.png$", captured.out, re.MULTILINE)) == 1
    assert captured.err.count("The last reply asked about no medium") == 2
    assert "it sounds like this." in captured.out

    assert run(*chat, "--ask-below", "1", "draw a bell") == 1
    assert "ask_below is 1.0; it must be at least 0" in capsys.readouterr().err


class FakeSession:
    """Makes the same picture each time, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Any]] = []

    def __enter__(self) -> "FakeSession":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def chat(self, messages: Any, *, decoders: Any, **rest: object) -> Reply:
        self.asked.append((messages, decoders))
        picture = ReplyPart(type=Modality.IMAGE, data=PNG, caption="a bell", manifest={}, file_id="file-1")
        return Reply(id="turn", parts=(picture,), finish_reason="stop", usage={}, timings={})


def test_a_conversation_edits_the_newest_picture_for_as_long_as_it_is_wished(
    chat: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    session = FakeSession()
    monkeypatch.setattr("services.chat._open", lambda preset: (session, 0.0))
    said = ["draw", "/strength image 0.5", "/strength image 2", "redder", "/strength image off", "anew"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(said)))

    assert run(*chat) == 0
    assert run(*chat, "--strength", "image=0.25", "--strength", "audio=1", "once") == 0

    half, quarter = (DecodeSettings(strength=strength) for strength in (0.5, 0.25))
    once = {Modality.IMAGE: quarter, Modality.AUDIO: DecodeSettings(strength=1.0)}
    assert [decoders for _, decoders in session.asked] == [{}, {Modality.IMAGE: half}, {}, once]
    earlier = session.asked[1][0][1]["parts"][0]
    assert (earlier["type"], earlier["file_id"]) == ("image", "file-1")
    assert "strength is 2.0; it must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--preset", "toybx", "hi"], "no preset 'toybx'"),
        (["--image", "nowhere.png", "hi"], "nowhere.png cannot be read: No such file or directory."),
        (["--messages", "nowhere.json", "hi"], "nowhere.json cannot be read"),
        ([""], "The message is empty"),
        (["--out", "/dev/null/x", "hi"], "/dev/null/x cannot be made"),
        (["--strength", "image=0.5", "draw a bell"], "the conversation holds no image to start from"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(
    chat: list[str], words: list[str], complaint: str, capsys: Captured
) -> None:
    assert run(*chat, *words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("patchbay: ")
    assert captured.err.count("\n") == 1
    assert complaint in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["sing"],
        ["serve", "--port", "0"],
        ["chat", "--seed", "x", "hi"],
        ["chat", "--strength", "image=much", "hi"],
        ["chat", "--strength", "words=0.5", "hi"],
        ["eval", "moon"],
        ["chat", "a", "b"],
    ],
)
def test_wrong_usage_is_exit_code_2(words: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    assert "usage: patchbay" in capsys.readouterr().err


def test_every_command_has_a_sentence_of_help(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for command in ("chat", "serve", "eval", "train", "convert", "presets", "doctor"):
        assert f"    {command} " in out


def test_presets_are_listed_with_their_state(capsys: Captured) -> None:
    assert run("presets") == 0
    out = capsys.readouterr().out
    assert "toybox" in out
    assert "nextgpt-7b" in out


def test_doctor_says_what_is_missing(tiny_preset: Path, tmp_path: Path, capsys: Captured) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(tiny_preset.read_text().replace("weights: weights", "weights: nowhere"))
    assert run("doctor", "--preset", str(broken), "--port", "8123") == 1
    captured = capsys.readouterr()
    assert "BAD weights" in captured.out
    assert f"correct the folders in {broken}" in captured.out
    assert captured.err.count("\n") == 1


def test_serve_refuses_before_ray_starts(tmp_path: Path, tiny_preset: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        command = [
            sys.executable,
            "-m",
            "services.cli",
            "serve",
            "--preset",
            str(tiny_preset),
            "--port",
            port,
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(cli.__file__).parent.parent, env={**os.environ}
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"patchbay: Cannot listen on 127.0.0.1:{port}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_file_of_the_system_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def full(name: str) -> None:
        raise OSError(28, "No space left on device", "/somewhere/a")

    monkeypatch.setattr(weight_commands, "load_preset", full)

    assert run("doctor") == 1

    assert capsys.readouterr().err == (
        "patchbay: /somewhere/a cannot be used: No space left on device. Look at the path, its rights and "
        "the free space, then try again.\n"
    )


def test_wrong_numbers_are_named_as_such(capsys: Captured) -> None:
    for words in (["serve", "--port", "x"], ["chat", "--seed", "x", "hi"], ["train", "all", "--jobs", "x"]):
        with pytest.raises(SystemExit):
            run(*words)
        assert capsys.readouterr().err.endswith("'x' is not a whole number\n")


def test_media_never_take_the_place_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "10000-image.png").write_bytes(b"first")
    part = ReplyPart(type=Modality.IMAGE, data=b"next", caption="", manifest={}, file_id="")
    assert chat_module._written(part, tmp_path)["path"] == str(tmp_path / "10001-image.png")
    with monkeypatch.context() as blind:  # another process writes after we have looked
        blind.setattr(Path, "iterdir", lambda folder: iter(()))
        (tmp_path / "0001-image.png").write_bytes(b"theirs")
        assert chat_module._written(part, tmp_path)["path"] == str(tmp_path / "0002-image.png")
    assert (tmp_path / "0001-image.png").read_bytes() == b"theirs"
