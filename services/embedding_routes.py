"""``/v1/embeddings``: texts, pictures, videos and sounds as vectors in one space, in the order of ``input``.

``input`` is one item or a list of them. A string is a text, unless it is a data URL or the id of a file, so
that OpenAI's own clients can ask for media; an object is a part as chat completions have it.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from fastapi import APIRouter, Request
from pydantic import ValidationError

from services.artefacts import ID_PATTERN, ArtefactStore
from services.asgi import read_json, until_gone
from services.boxes import Array
from services.direct_requests import AdapterOf
from services.errors import BadRequest, ServiceError, TooLarge
from services.messages import MediaPart, TextPart
from services.requests import Body, expect_whole_characters, invalid, read_part

MAX_INPUTS = 256
KIND_OF_DATA_URL = re.compile(r"data:(?P<kind>image|audio|video)/", re.IGNORECASE)


class Embedder(Protocol):
    """The agent, as far as embeddings go."""

    async def embed(self, items: Sequence[TextPart | MediaPart]) -> list[Array]:
        """Return a unit vector for each item, all in one space."""
        ...


class EmbeddingsRequest(Body):
    """The body of a request. Keys that mean nothing here are passed over, as clients expect."""

    input: Any
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


def embeddings_router(
    embedder: Embedder, store: ArtefactStore, adapter_of: AdapterOf, *, name: str, max_media: int
) -> APIRouter:
    """Return the routes of the model ``name``; one request embeds at most ``max_media`` media."""
    router = APIRouter(prefix="/v1/embeddings")

    @router.post("")
    async def embed(request: Request) -> dict[str, Any]:
        wanted = _checked(await read_json(request))
        adapter_of(wanted.model)
        items = await asyncio.to_thread(_items, wanted.input, store, max_media)
        vectors = await until_gone(request, embedder.embed(items))
        width = len(vectors[0])
        if wanted.dimensions not in (None, width):
            raise BadRequest(
                f"dimensions is {wanted.dimensions}; an embedding of this model has {width}, and fewer mean "
                "nothing. Leave it out.",
                code="unsupported_parameter",
                param="dimensions",
            )
        shown = [
            _text(vector) if wanted.encoding_format == "base64" else vector.tolist() for vector in vectors
        ]
        return {
            "object": "list",
            "model": wanted.model or name,
            "data": [
                {"object": "embedding", "index": index, "embedding": embedding}
                for index, embedding in enumerate(shown)
            ],
            "usage": {"prompt_tokens": 0, "total_tokens": 0},  # the language model reads nothing of it
        }

    return router


def _checked(body: object) -> EmbeddingsRequest:
    if not isinstance(body, dict):
        raise BadRequest(
            f"The body is a JSON {type(body).__name__}; expected an object with an input.",
            code="invalid_json",
        )
    try:
        return EmbeddingsRequest.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from error


def _items(given: object, store: ArtefactStore, max_media: int) -> list[TextPart | MediaPart]:
    values = given if isinstance(given, list) else [given]
    if not 0 < len(values) <= MAX_INPUTS:
        raise BadRequest(
            f"input holds {len(values)} items; expected 1 to {MAX_INPUTS}. Ask several times for more.",
            code="invalid_value",
            param="input",
        )
    items = []
    for place, value in enumerate(values):
        try:
            items.append(_item(value, store))
        except ServiceError as error:
            raise error.at(f"input[{place}]") from error
    if (num_media := sum(isinstance(item, MediaPart) for item in items)) > max_media:
        raise TooLarge(
            f"input holds {num_media} media; at most {max_media} are read at once. Ask several times.",
            code="media_limit_exceeded",
            param="input",
        )
    return items


def _item(value: object, store: ArtefactStore) -> TextPart | MediaPart:
    if isinstance(value, str):
        value = _as_part(value)
    elif not isinstance(value, dict):
        raise BadRequest(
            f"An item is {value!r:.80}; expected a text, a data URL, the id of a file, or a part as chat "
            "completions have it. Tokens are not read: send the text.",
            code="invalid_value",
        )
    part = read_part(value, store)
    assert isinstance(part, TextPart | MediaPart)
    if isinstance(part, TextPart):
        if not part.text.strip():
            raise BadRequest("The text is empty. Leave it out, or write something.", code="empty_message")
        expect_whole_characters(part.text, "input")
    return part


def _as_part(text: str) -> dict[str, Any]:
    if ID_PATTERN.fullmatch(text):
        return {"type": "file", "file": {"file_id": text}}
    if (found := KIND_OF_DATA_URL.match(text)) is not None:
        kind = f"{found['kind'].lower()}_url"
        return {"type": kind, kind: {"url": text}}
    return {"type": "text", "text": text}


def _text(vector: Array) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode("ascii")
