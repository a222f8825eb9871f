"""The chat page: what it shows for a reply, and a real browser on the whole page."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from encoders.media import Modality
from services import page_reply
from services.chat_page import Settings
from services.errors import BadRequest, TooManyRequests, Unavailable
from services.page_reply import Shelf, remade, replied
from tests.test_cluster import ROOT, free_port

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium")


def chunk(**delta: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta}]}


def told(index: int, status: str, **rest: Any) -> dict[str, Any]:
    return chunk(parts=[{"index": index, "type": "image", "status": status, **rest}])


def test_a_medium_appears_where_it_was_spoken(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [{"role": "user", "content": "draw"}])
    assert shelf.take(chunk(role="assistant", content="")) == []
    shelf.take(chunk(content="Here."))
    shelf.take(told(1, "started", caption="Here."))
    shelf.take(chunk(content="\nAnd more"))
    shelf.take(told(1, "working", step=3, total=20, eta_s=1.6))
    user, words, picture, more = shelf.messages()
    assert (user["role"], words["content"], more["content"]) == ("user", "Here.", "And more")
    assert picture["metadata"] == {
        "title": "Making a picture: step 3 of 20, about 2 s left",
        "status": "pending",
    }
    wanted = shelf.take(told(1, "done", caption="Here.", file_id="file-1", url="http://x/y"))
    assert wanted == [(1, "http://x/y")]
    shelf.put(1, b"png")
    assert shelf.messages()[2]["content"] == {"path": str(tmp_path / "file-1.png"), "alt_text": "Here."}
    assert (tmp_path / "file-1.png").read_bytes() == b"png"
    assert shelf.assistant()["parts"] == [
        {"type": "text", "text": "Here."},
        {"type": "image", "file_id": "file-1", "caption": "Here."},
        {"type": "text", "text": "And more"},
    ]


def test_a_preview_stands_below_the_progress_until_the_medium_is_there(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [])
    shelf.take(told(0, "started", caption="A bell."))
    for step in (1, 2):
        url = f"data:image/jpeg;base64,{base64.b64encode(b'look %d' % step).decode()}"
        preview = {"type": "image_url", "image_url": {"url": url}}
        shelf.take(told(0, "preview", step=step, total=3, preview=preview))
    progress, picture = shelf.messages()
    assert progress["metadata"]["title"] == "Making a picture: step 2 of 3"
    path = Path(picture["content"]["path"])
    assert path.read_bytes() == b"look 2"
    assert list(tmp_path.iterdir()) == [path]
    shelf.take(told(0, "done", caption="A bell.", file_id="file-1", url="http://x/y"))
    shelf.put(0, b"png")
    (medium,) = shelf.messages()
    assert medium["content"]["path"].endswith("file-1.png")
    assert not path.exists()


def test_a_failed_medium_says_why_and_is_not_repeated(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [])
    shelf.take(told(0, "started", caption=""))
    shelf.take(told(0, "failed", error={"code": "x", "message": "Too big."}))
    (bubble,) = shelf.messages()
    assert bubble["content"] == "Too big."
    assert bubble["metadata"]["title"] == "The picture could not be made"
    assert shelf.assistant()["parts"] == []


def test_a_question_about_a_medium_has_a_button_and_is_forgotten_when_it_is_made(tmp_path: Path) -> None:
    question = {"type": "image", "status": "asked", "question": "Shall I make this picture?"}
    shelf = Shelf(tmp_path, [])
    shelf.take(chunk(content="A bell."))
    shelf.take(
        chunk(content=f"\n{question['question']}", parts=[{"index": 1, "caption": "A bell.", **question}])
    )
    shelf.take(chunk(content="\nAnd more."))
    assert options(shelf) == []
    shelf.end()
    texts = ["A bell.", question["question"], "And more."]
    assert [bubble["content"] for bubble in shelf.messages()] == texts
    assert options(shelf) == [("Make the picture", "again 1")]
    assert shelf.assistant()["parts"][1] == question

    shelf.begin_again(1)
    shelf.take(told(1, "started", caption="A bell."))
    shelf.take(told(1, "done", caption="A bell.", file_id="file-1", url="http://x/y"))
    shelf.put(1, b"png")
    shelf.end()
    assert [type(bubble["content"]) for bubble in shelf.messages()] == [str, dict, str]
    assert options(shelf) == [("Make the picture again", "again 1")]
    assert shelf.assistant()["parts"][1] == {"type": "image", "file_id": "file-1", "caption": "A bell."}


def test_settings_send_what_is_filled_in_only() -> None:
    settings = Settings((Modality.IMAGE, Modality.AUDIO), [])
    progress = {"include_progress": True}
    values: list[Any] = ["", 0.0, False, "", "", 0, "", "", 0]
    assert settings.body(values) == {"temperature": 0.0, "stream_options": progress}
    values = [" 7", 0.5, True, "4", "", 0.25, None, "2.5", 0]
    assert settings.body(values) == {
        "temperature": 0.5,
        "stream_options": {**progress, "previews": 6},
        "seed": 7,
        "decoders": {
            "image": {"num_inference_steps": 4, "strength": 0.25},
            "audio": {"guidance_scale": 2.5},
        },
    }
    told = {**progress, "previews": 6}
    assert settings.again(values, Modality.AUDIO) == {
        "guidance_scale": 2.5,
        "seed": 7,
        "stream_options": told,
    }
    others = {settings.again(["", *values[1:]], Modality.AUDIO)["seed"] for _ in range(4)}
    assert len(others) > 1  # what is made again is to be another
    assert "seed" not in settings.again(["", *values[1:]], Modality.AUDIO, is_first=True)
    assert settings.again(values, Modality.AUDIO, is_first=True)["seed"] == 7


def test_a_setting_that_is_no_number_is_named() -> None:
    settings = Settings((Modality.IMAGE,), [])
    with pytest.raises(BadRequest, match="Picture: steps is 'many'; expected a whole number"):
        settings.body(["", 0.0, False, "many", "", 0])


def options(shelf: Shelf) -> list[tuple[str, str]]:
    """Return the buttons below the chat: Gradio shows those of the last bubble."""
    assert not any("options" in bubble for bubble in shelf.messages()[:-1])
    return [(option["label"], option["value"]) for option in shelf.messages()[-1].get("options", [])]


def test_media_can_be_cancelled_while_they_are_made_and_made_again_afterwards(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [])
    shelf.take(chunk(content="Two."))
    assert options(shelf) == []
    for index in (1, 2):
        shelf.take(told(index, "started", caption=""))
    assert options(shelf) == [("Cancel picture 1", "cancel 1"), ("Cancel picture 2", "cancel 2")]
    shelf.take(told(1, "failed", error={"code": "part_cancelled", "message": "It was cancelled."}))
    shelf.take(told(2, "working", step=1, total=2, eta_s=None))
    assert options(shelf) == [("Cancel picture 2", "cancel 2")]
    shelf.take(told(2, "done", caption="", file_id="file-1", url="http://x/y"))
    shelf.put(2, b"png")
    assert options(shelf) == []
    assert shelf.end() is None
    assert options(shelf) == [("Make picture 1 again", "again 1"), ("Make picture 2 again", "again 2")]


def test_what_a_stopped_reply_lacks_can_be_made_after_all(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [])
    shelf.take(told(0, "working", caption="A bell.", step=1, total=2, eta_s=None))
    shelf.end()
    (bubble,) = shelf.messages()
    assert bubble["metadata"] == {"title": "Stopped", "status": "done"}
    assert options(shelf) == [("Make the picture again", "again 0")]


class FakeClient:
    """Answers with chunks, the last of which may be an error; notes what it was asked."""

    chunks: ClassVar[list[Any]] = []
    asked: ClassVar[list[Any]] = []

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    async def __aenter__(self) -> FakeClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    async def download(self, url: str) -> bytes:
        return url.encode()

    async def stream(self, messages: list[Any], **body: Any) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append((messages, body))
        async for each in self._answer():
            yield each

    async def retry_part(self, *args: Any, **body: Any) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append((args, body))
        async for each in self._answer():
            yield each

    async def _answer(self) -> AsyncGenerator[dict[str, Any], None]:
        for each in self.chunks:
            await asyncio.sleep(0)
            if isinstance(each, Exception):
                raise each
            yield each


def finished(number: int) -> dict[str, Any]:
    return told(0, "done", caption="A bell.", file_id=f"file-{number}", url=f"http://x/{number}")


async def last(states: AsyncGenerator[Any, None]) -> Any:
    return [state async for state in states][-1]


async def test_a_medium_that_is_made_again_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_reply, "Client", FakeClient)
    monkeypatch.setattr(FakeClient, "asked", [])
    monkeypatch.setattr(FakeClient, "chunks", [told(0, "started", caption="A bell."), finished(1)])
    never = asyncio.Event()
    _, history, shelf = await last(replied("http://x", tmp_path, ("draw", []), [], [], {"seed": 1}, never))
    said = {"role": "user", "content": [{"type": "text", "text": "draw"}]}
    assert FakeClient.asked == [([said], {"seed": 1})]
    assert history[-1]["parts"] == [{"type": "image", "file_id": "file-1", "caption": "A bell."}]

    monkeypatch.setattr(FakeClient, "chunks", [told(0, "started", caption="A bell."), finished(2)])
    shown, history, _ = await last(remade("http://x", shelf, 0, {"seed": 2}, never))
    assert FakeClient.asked[-1] == (("chatcmpl-1", 0), {"seed": 2})
    assert history == [said, {"role": "assistant", "parts": [
        {"type": "image", "file_id": "file-2", "caption": "A bell."}
    ]}]  # fmt: skip
    assert [Path(bubble["content"]["path"]).read_bytes() for bubble in shown] == [b"http://x/2"]


@pytest.mark.parametrize("how", ["failed", "cancelled", "stopped", "refused"])
async def test_a_medium_that_cannot_be_made_again_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(page_reply, "Client", FakeClient)
    shelf = Shelf(tmp_path, [])
    shelf.take(finished(1))
    shelf.put(0, b"png")
    shelf.end()
    before, stop = shelf.messages(), asyncio.Event()
    code = "decoder_oom" if how == "failed" else "part_cancelled"
    end: Any = told(0, "failed", error={"code": code, "message": "Too big."})
    if how == "refused":
        end = TooManyRequests("Full.", code="queue_full")
    monkeypatch.setattr(FakeClient, "chunks", [told(0, "started", caption="A bell."), end])
    if how == "stopped":
        stop.set()

    shown, history, _ = await last(remade("http://x", shelf, 0, {}, stop))

    assert shown[:1] == before
    assert [bubble["content"] for bubble in shown[1:]] == {"failed": ["Too big."], "refused": ["Full."]}.get(
        how, []
    )
    assert history[-1]["parts"][0]["file_id"] == "file-1"


async def test_the_page_waits_while_the_service_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = Unavailable("The image decoder is still being loaded.", code="model_loading")

    class Loading(FakeClient):
        async def _answer(self) -> AsyncGenerator[dict[str, Any], None]:
            if len(self.asked) < 3:
                raise loading
            yield finished(1)

    monkeypatch.setattr(page_reply, "Client", Loading)
    monkeypatch.setattr(page_reply, "ASK_AGAIN_AFTER_S", 0.01)
    monkeypatch.setattr(FakeClient, "asked", [])
    never = asyncio.Event()
    turn = replied("http://x", tmp_path, ("draw", []), [], [], {}, never)
    seen = [shown async for shown, _, _ in turn]
    assert [shown[-1]["content"] for shown in seen[:2]] == [loading.message] * 2
    assert seen[0][-1]["metadata"] == {"title": "Waiting until it is loaded", "status": "pending"}
    assert [bubble["content"]["alt_text"] for bubble in seen[-1]] == ["A bell."]
    assert len(FakeClient.asked) == 3

    monkeypatch.setattr(FakeClient, "asked", [])
    monkeypatch.setattr(page_reply, "ASK_AGAIN_AFTER_S", 60.0)
    stop = asyncio.Event()
    states = replied("http://x", tmp_path, ("draw", []), [], [], {}, stop)
    await anext(states)
    stop.set()
    assert (await last(states))[0] == []
    assert len(FakeClient.asked) == 1


@pytest.fixture(scope="module")
def address(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a page over the tiny models answers; in a process of its own, as Gradio warns of much."""
    folder = tmp_path_factory.mktemp("page")
    port = free_port()
    command = [sys.executable, "-m", "tests.page_server", str(tiny_preset), str(folder / "files"), str(port)]
    with (folder / "log").open("wb") as log:
        environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 180
    while True:
        with suppress(OSError), urllib.request.urlopen(url):
            break
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.2)
    yield url
    process.terminate()
    process.wait(30)


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    """A browser on the page."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.set_default_timeout(90_000)
        page.goto(address)
        yield page
        browser.close()


def say(page: Page, text: str) -> None:
    box = page.locator("#said textarea")
    box.fill(text)
    box.press("Enter")


@pytest.mark.browser
def test_a_person_types_and_sees_the_picture(page: Page, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    say(page, "draw a bell")
    picture = page.locator("#chat [data-testid='bot'] img")
    expect(picture).to_be_visible(timeout=90_000)
    expect(page.locator("#chat")).to_contain_text("here is a bell.")
    page.wait_for_function("document.querySelector(\"#chat [data-testid='bot'] img\").naturalWidth == 16")
    say(page, "play it")
    expect(page.locator("#chat audio").first).to_be_attached(timeout=90_000)
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.browser
def test_an_example_works_at_one_click_and_a_reply_can_be_stopped(page: Page) -> None:
    from playwright.sync_api import expect

    page.locator("#chat button.example").first.click()
    expect(page.locator("#chat video").first).to_be_attached(timeout=90_000)
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#chat video")).to_have_count(0)
    page.get_by_text("Settings").click()
    page.get_by_label("Picture: steps").fill("1000")
    say(page, "draw a bell")
    expect(page.locator("#chat")).to_contain_text("Making a picture", timeout=90_000)
    page.locator("#said .stop-button").dispatch_event("click")
    expect(page.locator("#chat")).to_contain_text("Stopped")
    expect(page.locator("#chat")).not_to_contain_text("Making a picture")
    expect(page.locator("#said .submit-button")).to_be_visible(timeout=90_000)
    page.wait_for_timeout(1500)
    expect(page.locator("#chat")).to_contain_text("Stopped")
    expect(page.locator("#chat [data-testid='bot'] img")).to_have_count(0)


@pytest.mark.browser
def test_one_medium_is_cancelled_and_made_again_with_buttons(page: Page) -> None:
    from playwright.sync_api import expect

    page.get_by_text("Settings").click()
    page.get_by_label("Picture: steps").fill("1000")
    say(page, "draw, play and film a bell")
    page.get_by_role("button", name="Cancel the picture").click()
    expect(page.locator("#chat")).to_contain_text("The picture was cancelled")
    expect(page.locator("#chat video").first).to_be_attached(timeout=90_000)
    expect(page.locator("#chat audio").first).to_be_attached()
    expect(page.locator("#chat [data-testid='bot'] img")).to_have_count(0)
    page.get_by_label("Picture: steps").fill("2")
    page.get_by_role("button", name="Make the picture again").click()
    expect(page.locator("#chat [data-testid='bot'] img")).to_be_visible(timeout=90_000)
    expect(page.locator("#said .submit-button")).to_be_visible()


@pytest.mark.browser
def test_a_picture_can_be_attached_and_a_problem_is_told(page: Page, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    from tests.scripted_agent import PNG

    (tmp_path / "bell.png").write_bytes(PNG)
    (tmp_path / "broken.png").write_bytes(PNG[:20])
    for name, answer in (("bell.png", "it is a bell."), ("broken.png", "There is no answer")):
        page.locator("#said input[type=file]").set_input_files(tmp_path / name)
        expect(page.locator("#said .thumbnail-item")).to_be_visible()
        say(page, "what is this?")
        expect(page.locator("#chat")).to_contain_text(answer, timeout=90_000)
