"""The chat page: what it shows for a reply, and a real browser on the whole page."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from encoders.media import Modality
from services.chat_page import Settings, Shelf

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


def test_a_failed_medium_says_why_and_is_not_repeated(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [])
    shelf.take(told(0, "started", caption=""))
    shelf.take(told(0, "failed", error={"code": "x", "message": "Too big."}))
    (bubble,) = shelf.messages()
    assert bubble["content"] == "Too big."
    assert shelf.assistant()["parts"] == []


def test_settings_send_what_is_filled_in_only() -> None:
    settings = Settings((Modality.IMAGE, Modality.AUDIO), [])
    assert settings.body([None, 0.0, None, None, None, None]) == {"temperature": 0.0}
    assert settings.body([7, 0.5, 4, None, None, 2.5]) == {
        "temperature": 0.5,
        "seed": 7,
        "decoders": {"image": {"num_inference_steps": 4}, "audio": {"guidance_scale": 2.5}},
    }


@pytest.fixture(scope="module")
def address(tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page and the API in this process, on a real socket."""
    from services.artefacts import ArtefactStore
    from services.chat_page import build_page
    from services.gateway import build_gateway, with_page
    from services.local import local_agent
    from services.presets import Example, load_preset

    preset = load_preset(str(tiny_preset))
    preset = preset.model_copy(update={"examples": (Example(text="draw, play and film a bell"),)})
    store = ArtefactStore(tmp_path_factory.mktemp("files").as_uri())
    api = build_gateway(preset, local_agent(preset, store), store)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    app = with_page(api, build_page(preset, url, lifespan=api.router.lifespan_context))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield url
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")
def test_a_person_types_and_sees_the_picture(address: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.goto(address)
        box = page.locator("#said textarea")
        box.fill("draw a bell")
        box.press("Enter")
        picture = page.locator("#chat [data-testid='bot'] img")
        expect(picture).to_be_visible(timeout=60_000)
        expect(page.locator("#chat")).to_contain_text("here is a bell.")
        assert picture.evaluate("image => image.naturalWidth") == 16
        box.fill("play it")
        box.press("Enter")
        expect(page.locator("#chat audio").first).to_be_attached(timeout=60_000)
        page.screenshot(path=tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        browser.close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")
def test_an_example_works_at_one_click_and_a_reply_can_be_stopped(address: str) -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.locator("#chat button.example").first.click()
        expect(page.locator("#chat video").first).to_be_attached(timeout=60_000)
        page.get_by_text("Settings").click()
        page.get_by_label("Picture: steps").fill("400")
        page.locator("#said textarea").fill("draw a bell")
        page.locator("#said textarea").press("Enter")
        expect(page.locator("#chat")).to_contain_text("Making a picture", timeout=30_000)
        page.locator("#said .stop-button").click()
        expect(page.locator("#chat")).to_contain_text("Stopped", timeout=30_000)
        expect(page.locator("#said .submit-button")).to_be_visible()
        browser.close()
