"""The chat page: what it shows for a reply, and a real browser on the whole page."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from encoders.media import Modality
from services.chat_page import Settings, Shelf
from services.errors import BadRequest
from tests.test_cluster import ROOT, free_port

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium")


def chunk(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta}]}


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
    assert shelf.assistant()["parts"] == []


def test_settings_send_what_is_filled_in_only() -> None:
    settings = Settings((Modality.IMAGE, Modality.AUDIO), [])
    progress = {"include_progress": True}
    assert settings.body(["", 0.0, False, "", "", "", ""]) == {"temperature": 0.0, "stream_options": progress}
    assert settings.body([" 7", 0.5, True, "4", "", None, "2.5"]) == {
        "temperature": 0.5,
        "stream_options": {**progress, "previews": 6},
        "seed": 7,
        "decoders": {"image": {"num_inference_steps": 4}, "audio": {"guidance_scale": 2.5}},
    }


def test_a_setting_that_is_no_number_is_named() -> None:
    settings = Settings((Modality.IMAGE,), [])
    with pytest.raises(BadRequest, match="Picture: steps is 'many'; expected a whole number"):
        settings.body(["", 0.0, False, "many", ""])


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
def test_a_picture_can_be_attached_and_a_problem_is_told(page: Page, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    from tests.test_gateway import PNG

    (tmp_path / "bell.png").write_bytes(PNG)
    (tmp_path / "broken.png").write_bytes(PNG[:20])
    for name, answer in (("bell.png", "it is a bell."), ("broken.png", "There is no answer")):
        page.locator("#said input[type=file]").set_input_files(tmp_path / name)
        expect(page.locator("#said .thumbnail-item")).to_be_visible()
        say(page, "what is this?")
        expect(page.locator("#chat")).to_contain_text(answer, timeout=90_000)
