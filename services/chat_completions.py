"""A turn's events as a chat completion: one object, or a stream of chunks.

Text is ``content``, pictures are ``images``, the first sound is ``audio``, videos are ``videos`` by
URL, in the dialects that clients know. The whole reply, in the order spoken, is the extension
``parts``; in a stream, ``delta.parts`` tells when a part starts, moves, shows itself, ends, fails or is
asked about, with its ``index``, because a medium may arrive after the words that follow it.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from encoders.media import Modality
from services.artefacts import Artefact, ArtefactStore
from services.errors import ServiceError
from services.events import (
    Event,
    PartAsked,
    PartDone,
    PartFailed,
    PartPreview,
    PartProgress,
    PartStarted,
    TextDelta,
    TurnDone,
    TurnFailed,
    TurnStarted,
    new_turn_id,
)

Json = dict[str, Any]


@dataclass
class Completion:
    """Makes the objects of one chat completion."""

    model: str
    store: ArtefactStore
    base_url: str
    expires_after_s: int
    include_progress: bool = False
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{new_turn_id()}")
    created: int = field(default_factory=lambda: int(time.time()))
    types: dict[int, str] = field(default_factory=dict)

    def chunk(self, delta: Json, finish_reason: str | None = None) -> Json:
        """Return one chunk of a stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._chunk([choice])

    def chunks(self, event: Event) -> list[Json]:
        """Return what a stream says about one event; a failed turn is raised."""
        match event:
            case TurnStarted(id=turn):
                self.id = f"chatcmpl-{turn}"
                return [self.chunk({"role": "assistant", "content": ""})]
            case TextDelta(index=index, text=text):
                return [self.chunk({"content": self._separator(index) + text})]
            case PartStarted(index=index, modality=modality, caption=caption):
                self.types[index] = modality.value
                return [self._part(index, "started", caption=caption)]
            case PartAsked(index=index, question=question):
                asked = {"index": index, **self.asked(event)}
                return [self.chunk({"content": self._separator(index) + question, "parts": [asked]})]
            case PartProgress(index=index, step=step, total=total, eta_s=eta_s):
                if not self.include_progress:
                    return []
                return [self._part(index, "working", step=step, total=total, eta_s=eta_s)]
            case PartPreview(index=index, step=step, total=total):
                url = _data_url(event.media_type, event.data)
                picture = {"type": "image_url", "image_url": {"url": url}}
                return [self._part(index, "preview", step=step, total=total, preview=picture)]
            case PartDone(index=index):
                delta = self.medium(event)
                done = {**self.reference(event), "index": index, "status": "done"}
                return [self.chunk({**delta, "parts": [done]})]
            case PartFailed(index=index):
                return [self._part(index, "failed", error={"code": event.code, "message": event.message})]
            case TurnFailed(error=error):
                raise ServiceError.from_wire(dict(error))
            case TurnDone():
                last = {**self.chunk({}, event.finish_reason), "timings": dict(event.timings)}
                usage = {**self._chunk([]), "usage": _usage(event)}
                return [last, usage] if self.include_usage else [last]

    async def collect(self, events: AsyncGenerator[Event, None]) -> Json:
        """Return the whole completion; a failed turn is raised."""
        parts: dict[int, Json] = {}
        media: dict[str, Any] = {}
        async with aclosing(events):
            async for event in events:
                match event:
                    case TurnStarted(id=turn):
                        self.id = f"chatcmpl-{turn}"
                    case TextDelta(index=index, text=text):
                        part = parts.setdefault(index, {"type": "text", "text": ""})
                        part["text"] += text
                    case PartDone(index=index):
                        parts[index] = self.reference(event)
                        medium = await asyncio.to_thread(self.medium, event)
                        for name, value in medium.items():
                            if name == "audio":
                                media.setdefault("audio", value)
                            else:
                                media.setdefault(name, []).extend(value)
                    case PartFailed(index=index):
                        parts[index] = self.failure(event)
                    case PartAsked(index=index):
                        parts[index] = self.asked(event)
                    case TurnFailed(error=error):
                        raise ServiceError.from_wire(dict(error))
                    case TurnDone():
                        return self._whole(event, [parts[index] for index in sorted(parts)], media)
        raise AssertionError("a turn ended without saying so")

    def medium(self, event: PartDone) -> Json:
        """Return the medium as clients expect it in a message or a delta."""
        artefact = event.artefact
        match event.modality:
            case Modality.VIDEO:
                return {"videos": [{"type": "video_url", "video_url": {"url": self.url(artefact)}}]}
            case Modality.AUDIO:
                audio = {
                    "id": artefact.id,
                    "data": base64.b64encode(self.store.read(artefact.id)).decode("ascii"),
                    "expires_at": artefact.created_at + self.expires_after_s,
                    "transcript": event.caption,
                    "format": "wav",
                }
                return {"audio": audio}
            case _:
                url = _data_url(artefact.media_type, self.store.read(artefact.id))
                return {"images": [{"type": "image_url", "image_url": {"url": url}}]}

    def reference(self, event: PartDone) -> Json:
        """Return the medium as an entry of ``parts``."""
        return {
            "type": event.modality.value,
            "file_id": event.artefact.id,
            "url": self.url(event.artefact),
            "media_type": event.artefact.media_type,
            "caption": event.caption,
            "attempts": event.attempts,
            "manifest": dict(event.manifest),
        }

    def failure(self, event: PartFailed) -> Json:
        """Return a medium that could not be made as an entry of ``parts``."""
        return {
            "type": event.modality.value,
            "caption": event.caption,
            "error": {"code": event.code, "message": event.message},
        }

    def asked(self, event: PartAsked) -> Json:
        """Return a medium that was asked about as an entry of ``parts``."""
        return {
            "type": event.modality.value,
            "status": "asked",
            "caption": event.caption,
            "confidence": event.confidence,
            "question": event.question,
        }

    def url(self, artefact: Artefact) -> str:
        """Return where the bytes of an artefact are."""
        return f"{self.base_url.rstrip('/')}/v1/files/{artefact.id}/content"

    def _separator(self, index: int) -> str:
        """Return what parts a new text from the text before it."""
        is_new, is_first = index not in self.types, "text" not in self.types.values()
        self.types[index] = "text"
        return "\n" if is_new and not is_first else ""

    def _part(self, index: int, status: str, **rest: Any) -> Json:
        return self.chunk({"parts": [{"index": index, "type": self.types[index], "status": status, **rest}]})

    def _chunk(self, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _whole(self, done: TurnDone, parts: list[Json], media: Mapping[str, Any]) -> Json:
        said = (part.get("text") or part.get("question") for part in parts)
        texts = [text for text in said if text]
        message = {
            "role": "assistant",
            "content": "\n".join(texts) if texts else None,
            "refusal": None,
            **media,
            "parts": parts,
        }
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                {"index": 0, "message": message, "finish_reason": done.finish_reason, "logprobs": None}
            ],
            "usage": _usage(done),
            "timings": dict(done.timings),
        }


def _data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def _usage(done: TurnDone) -> dict[str, int]:
    prompt = done.usage.get("prompt_tokens", 0)
    completion = done.usage.get("completion_tokens", 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
