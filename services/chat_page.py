"""The chat page: a Gradio page that speaks to the public HTTP interface and to nothing else."""

from __future__ import annotations

import asyncio
import base64
import math
import os
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import gradio as gr
from fastapi import FastAPI

from encoders.media import Modality
from services.client import Client
from services.errors import BadRequest, ServiceError
from services.presets import Preset

Json = dict[str, Any]
Shown = list[Json]

NAMES = {Modality.IMAGE: "picture", Modality.VIDEO: "video", Modality.AUDIO: "sound"}
PREVIEWS = 6
SHOWN_EVERY_S = 0.1  # a browser that is told of every step falls behind
SUFFIXES = {"image": ".png", "video": ".mp4", "audio": ".wav"}
CSS = """
#chat [data-testid] img, #chat video { width: 224px !important; object-fit: contain; border-radius: 8px; }
#chat audio { min-width: 280px; }
#chat button.example { border: 1px solid var(--border-color-primary); border-radius: 8px; }
#chat [aria-label="Share"], #chat [title="Share"] { display: none; }
footer { display: none !important; }
"""


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]


def build_page(preset: Preset, base_url: str, lifespan: Lifespan | None = None) -> FastAPI:
    """Return the page as an ASGI application; ``base_url`` is where the API answers.

    ``lifespan`` is entered and left with the page.
    """
    folder = tempfile.TemporaryDirectory(prefix="patchbay-page-", dir=os.environ.get("GRADIO_TEMP_DIR"))

    @asynccontextmanager
    async def whole_lifespan(app: FastAPI) -> AsyncIterator[None]:
        with folder:
            async with lifespan(app) if lifespan else nullcontext():
                yield

    app = FastAPI(lifespan=whole_lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    fonts = ["system-ui", "sans-serif"]
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        _blocks(preset, base_url, Path(folder.name)),
        path="/",
        footer_links=[],
        run_history=False,
        max_file_size=preset.limits.media.max_mb * 2**20,
        allowed_paths=[str(path) for path in _example_files(preset)],
        theme=gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    return mounted


@dataclass
class Shelf:
    """The reply while it arrives: what is shown, and what the next turn will say was said."""

    folder: Path
    shown: Shown
    parts: dict[int, Json] = field(default_factory=dict)
    text_index: int = 0

    def take(self, chunk: Json) -> list[tuple[int, str]]:
        """Take one chunk; return (index, URL) of the media that are to be fetched."""
        if not chunk["choices"]:
            return []
        delta = chunk["choices"][0]["delta"]
        wanted = []
        if text := delta.get("content"):
            part = self.parts.setdefault(self.text_index, {"type": "text", "text": ""})
            part["text"] = (part["text"] + text).lstrip("\n")
        for told in delta.get("parts", ()):
            index = told["index"]
            part = self.parts.setdefault(index, {"type": told["type"]})
            part.update(told)
            self.text_index = max(self.text_index, index + 1)
            if told["status"] == "preview":
                self._show(part)
            if told["status"] == "done":
                wanted.append((index, told["url"]))
        return wanted

    def put(self, index: int, data: bytes) -> None:
        """Keep the bytes of a medium in a file that the page can show."""
        part = self.parts[index]
        self._drop_preview(part)
        path = self.folder / f"{part['file_id']}{SUFFIXES[part['type']]}"
        path.write_bytes(data)
        part["path"] = str(path)

    def _show(self, part: Json) -> None:
        """Keep a preview in a file in place of the one before; a new name, or browsers show the old one."""
        data = part["preview"]["image_url"]["url"].partition(",")[2]
        self._drop_preview(part)
        path = self.folder / f"preview-{secrets.token_hex(8)}.jpg"
        path.write_bytes(base64.b64decode(data))
        part["preview_path"] = str(path)

    @staticmethod
    def _drop_preview(part: Json) -> None:
        if "preview_path" in part:
            Path(part.pop("preview_path")).unlink(missing_ok=True)

    def messages(self) -> Shown:
        """Return the conversation as the page shows it."""
        reply = [bubble for index in sorted(self.parts) for bubble in _bubbles(self.parts[index])]
        return [*self.shown, *reply]

    def assistant(self) -> Json:
        """Return the reply as the next request repeats it."""
        parts: list[Json] = []
        for index in sorted(self.parts):
            part = self.parts[index]
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["status"] == "done":
                parts.append({name: part[name] for name in ("type", "file_id", "caption")})
        return {"role": "assistant", "parts": parts}


def _bubbles(part: Json) -> Shown:
    if part["type"] == "text":
        return [{"role": "assistant", "content": part["text"]}]
    name = NAMES[Modality(part["type"])]
    if "path" in part:
        return [_file(part["path"], part.get("caption", ""))]
    if part["status"] == "failed":
        title = {"title": f"The {name} could not be made", "status": "done"}
        return [{"role": "assistant", "content": part["error"]["message"], "metadata": title}]
    progress = "waiting for its decoder"
    if "step" in part:
        left = "" if part.get("eta_s") is None else f", about {part['eta_s']:.0f} s left"
        progress = f"step {part['step']} of {part['total']}{left}"
    title = {"title": f"Making a {name}: {progress}", "status": "pending"}
    pending = {"role": "assistant", "content": part.get("caption", ""), "metadata": title}
    if "preview_path" not in part:
        return [pending]
    return [pending, _file(part["preview_path"], f"preview of the {name}")]


def _file(path: str, alt_text: str) -> Json:
    return {"role": "assistant", "content": {"path": path, "alt_text": alt_text}}


def _blocks(preset: Preset, base_url: str, folder: Path) -> gr.Blocks:
    with gr.Blocks(title="Patchbay", fill_height=True, analytics_enabled=False) as blocks:
        gr.Markdown(f"## Patchbay · {preset.name}\n{preset.description}")
        shown = gr.Chatbot(
            show_label=False,
            buttons=["copy_all"],
            elem_id="chat",
            scale=1,
            height="60vh",
            feedback_options=None,
            allow_tags=False,
            group_consecutive_messages=True,
            examples=cast(Any, _examples(preset)),
            placeholder="Write, drop, paste or record something; or try one of these:",
        )
        said = gr.MultimodalTextbox(
            elem_id="said",
            show_label=False,
            placeholder="Say something; drop or paste pictures, sounds and videos here",
            sources=["upload", "microphone"],
            file_types=["image", "audio", "video"],
            file_count="multiple",
            stop_btn=False,
            autofocus=True,
        )
        history = gr.State([])
        pending = gr.State(None)
        settings = _settings(preset)

        async def take(value: Json | None, messages: Shown) -> tuple[Any, Shown, Json | None]:
            if not value or not (str(value.get("text") or "").strip() or value.get("files")):
                return gr.skip(), messages, None
            user: Shown = [{"role": "user", "content": {"path": path}} for path in _paths(value)]
            if text := str(value.get("text") or "").strip():
                user.append({"role": "user", "content": text})
            busy = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
            return busy, [*messages, *user], value

        async def take_example(messages: Shown, event: gr.SelectData) -> tuple[Any, Shown, Json | None]:
            return await take(event.value, messages)

        async def reply(
            request: gr.Request, value: Json | None, messages: Shown, earlier: list[Json], *wishes: Any
        ) -> AsyncGenerator[tuple[Shown, list[Json]], None]:
            if value is None:
                yield messages, earlier
                return
            try:
                body = settings.body(wishes)
            except BadRequest as error:
                yield [*messages, _problem(error)], earlier
                return
            stop = stops[request.session_hash] = asyncio.Event()
            try:
                turn = _turn(base_url, folder, value, messages, earlier, body, stop)
                async with aclosing(turn) as states:
                    async for state in states:
                        yield state
            finally:
                stops.pop(request.session_hash, None)

        def ready() -> gr.MultimodalTextbox:
            return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)

        async def stop(request: gr.Request) -> None:
            if request.session_hash in stops:
                stops[request.session_hash].set()

        inputs = [pending, shown, history, *settings.components]
        stops: dict[str | None, asyncio.Event] = {}  # of the replies under way, by browser session
        for trigger, first, first_inputs in (
            (said.submit, take, [said, shown]),
            (shown.example_select, take_example, [shown]),
        ):
            taken = trigger(
                first, first_inputs, [said, shown, pending], queue=False, api_visibility="private"
            )
            answered = taken.then(
                reply, inputs, [shown, history], api_visibility="private", show_progress="hidden"
            )
            answered.then(ready, None, [said], queue=False, api_visibility="private")
        said.stop(stop, None, None, queue=False, api_visibility="private")
        shown.clear(lambda: [], None, [history], queue=False, api_visibility="private")
    blocks.queue(default_concurrency_limit=16)
    return cast(gr.Blocks, blocks)


async def _turn(
    base_url: str,
    folder: Path,
    value: Json,
    messages: Shown,
    earlier: list[Json],
    body: Json,
    stop: asyncio.Event,
) -> AsyncGenerator[tuple[Shown, list[Json]], None]:
    """Send what was said and show the reply while it comes; yields what is shown and the history.

    When ``stop`` is set, the request is dropped, and what there is of the reply stays.
    """
    shelf = Shelf(folder, messages)
    try:
        async with Client(base_url) as client:
            content: list[Json] = [
                {"type": "file", "file": {"file_id": await client.upload(Path(path))}}
                for path in _paths(value)
            ]
            if text := str(value.get("text") or "").strip():
                content.append({"type": "text", "text": text})
            history = [*earlier, {"role": "user", "content": content}]
            async with (
                aclosing(client.stream(history, **body)) as chunks,
                aclosing(_until(stop, chunks)) as wanted,
            ):
                shown_at = -math.inf
                async for chunk in wanted:
                    for index, url in shelf.take(chunk):
                        shelf.put(index, await client.download(url))
                    if time.monotonic() - shown_at >= SHOWN_EVERY_S:
                        shown_at = time.monotonic()
                        yield shelf.messages(), [*history, shelf.assistant()]
            messages = shelf.messages()
            shown = [_stopped(message) for message in messages] if stop.is_set() else messages
            yield shown, [*history, shelf.assistant()]
    except ServiceError as error:
        yield [*shelf.messages(), _problem(error)], earlier


async def _until(stop: asyncio.Event, chunks: AsyncIterator[Json]) -> AsyncGenerator[Json, None]:
    """Yield ``chunks`` until ``stop`` is set; the one that is being waited for is then given up."""
    stopped = asyncio.ensure_future(stop.wait())
    following: asyncio.Future[Json] | None = None
    try:
        while not stop.is_set():
            following = asyncio.ensure_future(anext(chunks))
            await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                try:
                    yield following.result()
                except StopAsyncIteration:
                    return
    finally:
        stopped.cancel()
        if following is not None and not following.done():
            following.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await following


def _problem(error: ServiceError) -> Json:
    title = {"title": "There is no answer", "status": "done"}
    return {"role": "assistant", "content": error.message, "metadata": title}


@dataclass
class Settings:
    """The components of the settings and how their values go into a request."""

    modalities: tuple[Modality, ...]
    components: list[Any]

    def body(self, values: Sequence[Any]) -> Json:
        """Return the part of a request that ``values`` ask for; what is empty is left out."""
        seed, temperature, shows_previews, *rest = values
        options: Json = {"include_progress": True}
        if shows_previews:
            options["previews"] = PREVIEWS
        body: Json = {"temperature": temperature, "stream_options": options}
        if (number := _number(seed, "Seed", int)) is not None:
            body["seed"] = number
        decoders: Json = {}
        for place, modality in enumerate(self.modalities):
            name = NAMES[modality].capitalize()
            steps, guidance = rest[2 * place : 2 * place + 2]
            wishes = {
                "num_inference_steps": _number(steps, f"{name}: steps", int),
                "guidance_scale": _number(guidance, f"{name}: guidance", float),
            }
            if wishes := {key: value for key, value in wishes.items() if value is not None}:
                decoders[modality.value] = wishes
        return {**body, "decoders": decoders} if decoders else body


def _number(text: str | None, name: str, kind: type[int] | type[float]) -> float | None:
    if not text or not text.strip():
        return None
    try:
        return kind(text)
    except ValueError as error:
        wanted = "a whole number" if kind is int else "a number"
        raise BadRequest(
            f"{name} is {text!r}; expected {wanted}, or nothing.", code="invalid_value"
        ) from error


def _settings(preset: Preset) -> Settings:
    components: list[Any] = []
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            components.append(gr.Textbox(label="Seed", placeholder="another reply each time", max_lines=1))
            components.append(
                gr.Slider(
                    0, 2, preset.generation.temperature, step=0.1, label="Temperature", info="Of the words"
                )
            )
            components.append(gr.Checkbox(False, label="Previews", info="Of media while they are made"))
        for modality, decoder in preset.decoders.items():
            name = NAMES[modality].capitalize()
            with gr.Row():
                steps = f"as usual; at most {decoder.limits.steps}"
                components.append(gr.Textbox(label=f"{name}: steps", placeholder=steps, max_lines=1))
                components.append(
                    gr.Textbox(label=f"{name}: guidance", placeholder="as usual; 0 to 50", max_lines=1)
                )
    return Settings(tuple(preset.decoders), components)


def _examples(preset: Preset) -> list[Json]:
    return [
        {
            "text": example.text,
            "display_text": example.text or "What is this?",
            "files": [str(preset.file.parent / name) for name in example.files],
        }
        for example in preset.examples
    ]


def _example_files(preset: Preset) -> list[Path]:
    return [preset.file.parent / name for example in preset.examples for name in example.files]


def _paths(value: Mapping[str, Any]) -> list[str]:
    """Return the paths of attached files, which Gradio gives in several forms."""
    files = value.get("files") or []
    return [file if isinstance(file, str) else file["path"] for file in files]


def _stopped(message: Json) -> Json:
    metadata = message.get("metadata") or {}
    if metadata.get("status") != "pending":
        return message
    return {**message, "metadata": {"title": "Stopped", "status": "done"}}
