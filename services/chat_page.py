"""The chat page: a Gradio page that speaks to the public HTTP interface and to nothing else."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    aclosing,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gradio as gr
from fastapi import FastAPI

from encoders.media import Modality
from services.client import Client
from services.errors import BadRequest, ServiceError
from services.page_reply import AGAIN, CANCEL, NAMES, Json, Shelf, Shown, problem, remade, replied
from services.presets import Preset

PREVIEWS = 6
COMMON, PER_DECODER = 3, 3  # components of the settings
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
        latest = gr.State(None)  # the reply that has buttons
        chosen = gr.State(None)
        pending = gr.State(None)
        settings = _settings(preset)

        def busy(**values: Any) -> gr.MultimodalTextbox:
            return gr.MultimodalTextbox(submit_btn=False, stop_btn=True, **values)

        async def take(value: Json | None, messages: Shown) -> tuple[Any, Shown, Json | None]:
            if not value or not (str(value.get("text") or "").strip() or value.get("files")):
                return gr.skip(), messages, None
            user: Shown = [{"role": "user", "content": {"path": path}} for path in _paths(value)]
            if text := str(value.get("text") or "").strip():
                user.append({"role": "user", "content": text})
            return busy(value=None), [*messages, *user], value

        async def take_example(messages: Shown, event: gr.SelectData) -> tuple[Any, Shown, Json | None]:
            return await take(event.value, messages)

        async def reply(
            request: gr.Request, value: Json | None, messages: Shown, earlier: list[Json], *wishes: Any
        ) -> AsyncGenerator[tuple[Any, Any, Any], None]:
            if value is None:
                yield messages, earlier, gr.skip()
                return
            try:
                body = settings.body(wishes)
            except BadRequest as error:
                yield [*messages, problem(error.message)], earlier, None
                return
            words = str(value.get("text") or "").strip(), _paths(value)
            with _stoppable(request) as stop:
                turn = replied(base_url, folder, words, messages, earlier, body, stop)
                async with aclosing(turn) as states:
                    async for state in states:
                        yield state

        async def cancel(shelf: Shelf | None, event: gr.SelectData) -> None:
            deed, index = event.value.split()
            if shelf is not None and deed == CANCEL:
                async with Client(base_url) as client:
                    with suppress(ServiceError):  # it is done by now; the reply shows how
                        await client.cancel_part(shelf.reply_id, int(index))

        async def choose(event: gr.SelectData) -> tuple[Any, int | None]:
            deed, index = event.value.split()
            return (busy(), int(index)) if deed == AGAIN else (gr.skip(), None)

        async def again(
            request: gr.Request, index: int | None, shelf: Shelf | None, *wishes: Any
        ) -> AsyncGenerator[tuple[Any, Any, Any], None]:
            if index is None or shelf is None:
                yield gr.skip(), gr.skip(), gr.skip()
                return
            try:
                part = shelf.parts[index]
                body = settings.again(wishes, Modality(part["type"]), is_first=part["status"] == "asked")
            except BadRequest as error:
                yield [*shelf.messages(), problem(error.message)], gr.skip(), shelf
                return
            with _stoppable(request) as stop:
                async with aclosing(remade(base_url, shelf, index, body, stop)) as states:
                    async for state in states:
                        yield state

        def ready(request: gr.Request) -> Any:
            if request.session_hash in stops:  # a reply goes on
                return gr.skip()
            return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)

        async def stop(request: gr.Request) -> None:
            if request.session_hash in stops:
                stops[request.session_hash].set()

        @contextmanager
        def _stoppable(request: gr.Request) -> Iterator[asyncio.Event]:
            event = stops[request.session_hash] = asyncio.Event()
            try:
                yield event
            finally:
                stops.pop(request.session_hash, None)

        stops: dict[str | None, asyncio.Event] = {}  # of the replies under way, by browser session
        outputs = [shown, history, latest]
        spoken, after = [said, shown, pending], [pending, shown, history]
        for trigger, first, first_inputs, first_outputs, then, then_inputs in (
            (said.submit, take, [said, shown], spoken, reply, after),
            (shown.example_select, take_example, [shown], spoken, reply, after),
            (shown.option_select, choose, [], [said, chosen], again, [chosen, latest]),
        ):
            taken = trigger(first, first_inputs, first_outputs, queue=False, api_visibility="private")
            answered = taken.then(
                then,
                [*then_inputs, *settings.components],
                outputs,
                api_visibility="private",
                show_progress="hidden",
            )
            answered.then(ready, None, [said], queue=False, api_visibility="private")
        shown.option_select(cancel, [latest], None, queue=False, api_visibility="private")
        said.stop(stop, None, None, queue=False, api_visibility="private")
        shown.clear(lambda: ([], None), None, [history, latest], queue=False, api_visibility="private")
    blocks.queue(default_concurrency_limit=16)
    return cast(gr.Blocks, blocks)


@dataclass
class Settings:
    """The components of the settings and how their values go into a request."""

    modalities: tuple[Modality, ...]
    components: list[Any]

    def body(self, values: Sequence[Any]) -> Json:
        """Return the part of a request that ``values`` ask for; what is empty is left out."""
        seed, temperature, _, *_ = values
        body: Json = {"temperature": temperature, "stream_options": self._told(values)}
        if (number := _number(seed, "Seed", int)) is not None:
            body["seed"] = number
        decoders = {modality.value: self._wishes(values, modality) for modality in self.modalities}
        if decoders := {name: wishes for name, wishes in decoders.items() if wishes}:
            body["decoders"] = decoders
        return body

    def again(self, values: Sequence[Any], modality: Modality, *, is_first: bool = False) -> Json:
        """Return the request that makes one medium again: with another seed, unless one is filled in.

        ``is_first`` says that it was only asked about; then its own seed is as good.
        """
        body = {**self._wishes(values, modality), "stream_options": self._told(values)}
        if (seed := _number(values[0], "Seed", int)) is not None:
            body["seed"] = seed
        elif not is_first:
            body["seed"] = secrets.randbelow(2**31)
        return body

    @staticmethod
    def _told(values: Sequence[Any]) -> Json:
        options: Json = {"include_progress": True}
        if values[2]:
            options["previews"] = PREVIEWS
        return options

    def _wishes(self, values: Sequence[Any], modality: Modality) -> Json:
        start = COMMON + self.modalities.index(modality) * PER_DECODER
        steps, guidance, strength = values[start : start + PER_DECODER]
        name = NAMES[modality].capitalize()
        wishes = {
            "num_inference_steps": _number(steps, f"{name}: steps", int),
            "guidance_scale": _number(guidance, f"{name}: guidance", float),
            "strength": strength or None,
        }
        return {key: value for key, value in wishes.items() if value is not None}


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
                components.append(
                    gr.Slider(
                        0,
                        1,
                        0,
                        step=0.05,
                        label=f"{name}: strength",
                        info=f"0: as usual; else the newest {NAMES[modality]}, changed so much; 1: a new one",
                    )
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
