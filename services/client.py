"""A small client of the HTTP interface, for the chat page and for scripts."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from services.errors import BadRequest, ServiceError, Unavailable

SLOW_S = 600.0


class Client:
    """Talks to one service. Errors of the service are raised as ServiceError."""

    def __init__(self, base_url: str) -> None:
        # A proxy that the environment names is not for the way to our own service.
        self.http = httpx.AsyncClient(
            base_url=base_url, timeout=httpx.Timeout(30.0, read=SLOW_S), trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.http.aclose()

    async def upload(self, path: Path) -> str:
        """Store a file and return its id."""
        with _lost(), path.open("rb") as file:
            answer = await self.http.post("/v1/files", files={"file": (path.name, file)})
        file_id: str = _checked(answer)["id"]
        return file_id

    async def download(self, url: str) -> bytes:
        """Return the bytes at a URL of the service."""
        with _lost():
            answer = await self.http.get(httpx.URL(url).path)
        if answer.is_error:
            _checked(answer)
        return answer.content

    async def stream(
        self, messages: Sequence[Mapping[str, Any]], **body: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Stream the chunks of a chat completion; closing the stream stops the service's work."""
        request = {"messages": list(messages), "stream": True, **body}
        async with aclosing(self._chunks("/v1/chat/completions", request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def cancel_part(self, reply_id: str, index: int) -> None:
        """Stop one medium of a reply while it is made."""
        with _lost():
            answer = await self.http.post(f"/v1/responses/{reply_id}/parts/{index}/cancel")
        _checked(answer)

    async def retry_part(
        self, reply_id: str, index: int, **body: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Make one medium of a reply again; stream the chunks that a chat completion has for it."""
        path = f"/v1/responses/{reply_id}/parts/{index}/retry"
        async with aclosing(self._chunks(path, {"stream": True, **body})) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _chunks(self, path: str, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        with _lost():
            async with self.http.stream("POST", path, json=request) as answer:
                if answer.is_error:
                    await answer.aread()
                    _checked(answer)
                async for line in answer.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    chunk: dict[str, Any] = json.loads(data)
                    if "error" in chunk:
                        raise _told(chunk["error"])
                    yield chunk


class _lost:
    """Turns a broken connection into an error of ours."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx.HTTPError):
            raise Unavailable(
                f"The service does not answer ({type(error).__name__}). Try again soon.",
                code="service_unavailable",
            ) from error


def _checked(answer: httpx.Response) -> dict[str, Any]:
    try:
        body: dict[str, Any] = answer.json()
    except ValueError:
        body = {"error": {"message": f"The service answered {answer.status_code} without JSON."}}
    if answer.is_error:
        raise _told(body.get("error", {}))
    return body


def _told(error: Mapping[str, Any]) -> ServiceError:
    return BadRequest(
        str(error.get("message", "The service gave no reason.")),
        code=str(error.get("code") or "unknown"),
        param=error.get("param"),
    )
