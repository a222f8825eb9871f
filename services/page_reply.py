"""A reply on the chat page: what is shown while it comes, its buttons, and what the next request repeats."""

from __future__ import annotations

import asyncio
import base64
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from encoders.media import Modality
from services.client import Client
from services.errors import ServiceError

Json = dict[str, Any]
Shown = list[Json]

NAMES = {Modality.IMAGE: "picture", Modality.VIDEO: "video", Modality.AUDIO: "sound"}
SHOWN_EVERY_S = 0.1  # a browser that is told of every step falls behind
SUFFIXES = {"image": ".png", "video": ".mp4", "audio": ".wav"}
ASK_AGAIN_AFTER_S = 1.0  # a service that is being loaded waits a little itself before it says so
LOADING_WITHIN_S = 1200.0
WORKING = ("started", "working", "preview")
CANCEL, AGAIN = "cancel", "again"


@dataclass
class Shelf:
    """One reply. ``shown`` stands above it on the page, ``said`` before it in the next request."""

    folder: Path
    shown: Shown
    said: list[Json] = field(default_factory=list)
    parts: dict[int, Json] = field(default_factory=dict)
    text_index: int = 0
    reply_id: str = ""
    ended: bool = False
    replaced: tuple[int, Json] | None = None

    def take(self, chunk: Json) -> list[tuple[int, str]]:
        """Take one chunk; return (index, URL) of the media that are to be fetched."""
        self.reply_id = chunk["id"]
        if not chunk["choices"]:
            return []
        delta = chunk["choices"][0]["delta"]
        wanted = []
        asked = any(told["status"] == "asked" for told in delta.get("parts", ()))
        if (text := delta.get("content")) and not asked:  # the question is shown with its medium
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

    def begin_again(self, index: int) -> None:
        """Let a medium be made anew; if that comes to nothing, :meth:`end` puts back what there was."""
        before = self.parts[index]
        self.replaced = index, before
        self.parts[index] = {
            "type": before["type"],
            "status": "started",
            "caption": before.get("caption", ""),
        }
        self.ended = False

    def end(self) -> Json | None:
        """Note that nothing more comes. Returns the error of a medium that another stands in for."""
        self.ended = True
        for part in self.parts.values():
            if part.get("status") in WORKING:
                part["status"] = "stopped"
        replaced, self.replaced = self.replaced, None
        if replaced is None or replaced[1]["status"] != "done":
            return None
        index, before = replaced
        part = self.parts[index]
        if part["status"] == "done":
            return None
        self._drop_preview(part)
        self.parts[index] = before
        error: Json | None = part.get("error")
        return None if error is None or error["code"] == "part_cancelled" else error

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
        """Return the conversation as the page shows it; the last bubble of the reply carries its buttons."""
        reply = [bubble for index in sorted(self.parts) for bubble in _bubbles(self.parts[index])]
        if reply and (buttons := self.buttons()):
            reply[-1] = {**reply[-1], "options": buttons}
        return [*self.shown, *reply]

    def buttons(self) -> list[Json]:
        """Return what can be done to single media: cancelled while they are made, made again afterwards."""
        buttons = []
        for index in sorted(self.parts):
            part = self.parts[index]
            if part["type"] == "text" or (part["status"] in WORKING) is self.ended:
                continue
            if not self.ended:
                label, deed = f"Cancel {self._name(index)}", CANCEL
            elif part["status"] == "asked":
                label, deed = f"Make {self._name(index)}", AGAIN
            else:
                label, deed = f"Make {self._name(index)} again", AGAIN
            buttons.append({"label": label, "value": f"{deed} {index}"})
        return buttons

    def _name(self, index: int) -> str:
        kind = self.parts[index]["type"]
        alike = [place for place in sorted(self.parts) if self.parts[place]["type"] == kind]
        name = NAMES[Modality(kind)]
        return f"the {name}" if len(alike) == 1 else f"{name} {alike.index(index) + 1}"

    def assistant(self) -> Json:
        """Return the reply as the next request repeats it."""
        parts: list[Json] = []
        for index in sorted(self.parts):
            part = self.parts[index]
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["status"] == "done":
                parts.append({name: part[name] for name in ("type", "file_id", "caption")})
            elif part["status"] == "asked":
                parts.append({name: part[name] for name in ("type", "status", "question")})
        return {"role": "assistant", "parts": parts}

    def history(self) -> list[Json]:
        """Return the conversation as the next request repeats it."""
        return [*self.said, self.assistant()]


def _bubbles(part: Json) -> Shown:
    if part["type"] == "text":
        return [{"role": "assistant", "content": part["text"]}]
    name = NAMES[Modality(part["type"])]
    if "path" in part:
        return [_file(part["path"], part.get("caption", ""))]
    if part["status"] == "failed":
        how = "was cancelled" if part["error"]["code"] == "part_cancelled" else "could not be made"
        title = {"title": f"The {name} {how}", "status": "done"}
        return [{"role": "assistant", "content": part["error"]["message"], "metadata": title}]
    if part["status"] == "asked":
        return [{"role": "assistant", "content": part["question"]}]
    progress = "waiting for its decoder"
    if "step" in part:
        left = "" if part.get("eta_s") is None else f", about {part['eta_s']:.0f} s left"
        progress = f"step {part['step']} of {part['total']}{left}"
    title = {"title": f"Making a {name}: {progress}", "status": "pending"}
    if part["status"] == "stopped":
        title = {"title": "Stopped", "status": "done"}
    pending = {"role": "assistant", "content": part.get("caption", ""), "metadata": title}
    if "preview_path" not in part:
        return [pending]
    return [pending, _file(part["preview_path"], f"preview of the {name}")]


def _file(path: str, alt_text: str) -> Json:
    return {"role": "assistant", "content": {"path": path, "alt_text": alt_text}}


def problem(message: str) -> Json:
    """Return the bubble that says why there is no answer."""
    title = {"title": "There is no answer", "status": "done"}
    return {"role": "assistant", "content": message, "metadata": title}


async def replied(
    base_url: str,
    folder: Path,
    said: tuple[str, Sequence[str]],
    shown: Shown,
    earlier: list[Json],
    body: Mapping[str, Any],
    stop: asyncio.Event,
) -> AsyncGenerator[tuple[Shown, list[Json], Shelf], None]:
    """Send what was ``said``, words and files, and show the reply while it comes.

    Yields what is shown, the history and the reply. When ``stop`` is set, the request is dropped, and what
    there is of the reply stays.
    """
    shelf = Shelf(folder, shown)
    text, paths = said
    try:
        async with Client(base_url) as client:
            content: list[Json] = [
                {"type": "file", "file": {"file_id": await client.upload(Path(path))}} for path in paths
            ]
            if text:
                content.append({"type": "text", "text": text})
            shelf.said = [*earlier, {"role": "user", "content": content}]
            ask = partial(client.stream, shelf.said, **body)
            async with aclosing(_once_loaded(client, shelf, ask, stop)) as states:
                async for state in states:
                    yield state, shelf.history(), shelf
    except ServiceError as error:
        shelf.end()
        yield [*shelf.messages(), problem(error.message)], earlier, shelf


async def remade(
    base_url: str, shelf: Shelf, index: int, body: Mapping[str, Any], stop: asyncio.Event
) -> AsyncGenerator[tuple[Shown, list[Json], Shelf], None]:
    """Make one medium of a reply again and show it in its place; yields as :func:`replied` does."""
    shelf.begin_again(index)
    try:
        async with Client(base_url) as client:
            yield shelf.messages(), shelf.history(), shelf
            ask = partial(client.retry_part, shelf.reply_id, index, **body)
            async with aclosing(_once_loaded(client, shelf, ask, stop)) as states:
                async for state in states:
                    yield state, shelf.history(), shelf
    except ServiceError as error:
        shelf.end()
        yield [*shelf.messages(), problem(error.message)], shelf.history(), shelf


async def _once_loaded(
    client: Client, shelf: Shelf, ask: Callable[[], AsyncGenerator[Json, None]], stop: asyncio.Event
) -> AsyncGenerator[Shown, None]:
    """Yield what :func:`_shown` does; while the service is being loaded, say so and ask again."""
    deadline = time.monotonic() + LOADING_WITHIN_S
    while True:
        try:
            async with aclosing(_shown(client, shelf, ask(), stop)) as states:
                async for state in states:
                    yield state
            return
        except ServiceError as error:
            if error.code != "model_loading" or time.monotonic() > deadline:
                raise
            title = {"title": "Waiting until it is loaded", "status": "pending"}
            yield [*shelf.messages(), {"role": "assistant", "content": error.message, "metadata": title}]
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), ASK_AGAIN_AFTER_S)
        if stop.is_set():
            shelf.end()
            yield shelf.messages()
            return


async def _shown(
    client: Client, shelf: Shelf, chunks: AsyncGenerator[Json, None], stop: asyncio.Event
) -> AsyncGenerator[Shown, None]:
    """Yield what is to be seen while ``chunks`` come, and at their end or when ``stop`` is set."""
    async with aclosing(chunks), aclosing(_until(stop, chunks)) as wanted:
        shown_at = -math.inf
        async for chunk in wanted:
            for index, url in shelf.take(chunk):
                shelf.put(index, await client.download(url))
            if time.monotonic() - shown_at >= SHOWN_EVERY_S:
                shown_at = time.monotonic()
                yield shelf.messages()
    error = shelf.end()
    yield [*shelf.messages(), problem(error["message"])] if error else shelf.messages()


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
