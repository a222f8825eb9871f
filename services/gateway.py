"""The public HTTP interface. It checks, translates and streams; it holds no model and no state."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from encoders.media import MediaError
from services.adapter_routes import AdapterKeeper, adapter_routes
from services.adapters import split_model
from services.artefacts import ArtefactStore
from services.asgi import (
    ClientGone,
    EventStream,
    RequestEnvelope,
    end,
    error_response,
    read_json,
    retry_after,
    until_gone,
)
from services.boxes import BoxState, Counts, not_ready
from services.chat_completions import Completion
from services.direct_requests import MediumMaker
from services.embedding_routes import Embedder, embeddings_router
from services.errors import (
    BadRequest,
    Internal,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    Unprocessable,
    translate,
)
from services.events import Event
from services.files import files_router
from services.image_routes import images_router
from services.messages import MEDIA, Message, TurnOptions
from services.metrics import MEDIA_TYPE, exposition
from services.part_routes import PartMaker, parts_router
from services.presets import Preset
from services.requests import StreamOptions, read_chat_request, read_messages
from services.sound_routes import sounds_router
from services.turn_stream import lines, opened
from services.video_jobs import VideoJobs
from services.video_routes import videos_router

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 600
SPEAKERS = ("agent", "language_model")
"""What every reply needs. Only an agent in another process can be away."""


class TurnMaker(PartMaker, MediumMaker, Embedder, Protocol):
    """The agent, as the gateway needs it."""

    def turn(self, conversation: Sequence[Message], options: TurnOptions) -> AsyncGenerator[Event, None]:
        """Stream a reply."""
        ...

    async def states(self) -> Mapping[str, BoxState]:
        """Return which parts of the service can work now: the boxes, and perhaps the agent itself."""
        ...

    async def counts(self) -> Mapping[str, Mapping[str, Counts]]:
        """Return what the boxes count, by box and replica."""
        ...


def build_gateway(
    preset: Preset,
    agent: TurnMaker,
    store: ArtefactStore,
    *,
    labels: bool = True,
    adapters: AdapterKeeper | None = None,
) -> FastAPI:
    """Return the API as an ASGI application; ``labels`` False leaves request ids to a proxy in front."""
    created = int(time.time())
    limits = preset.limits
    expires_after_s = int(limits.files_expire_after_h * 3600)
    jobs = VideoJobs(store)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(store, expires_after_s))
        yield
        await jobs.close()
        await end(sweeper)

    app = FastAPI(title="Patchbay", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    def new_completion(
        request: Request, wishes: StreamOptions | None, model: str = preset.name
    ) -> Completion:
        return Completion(
            model=model,
            store=store,
            base_url=str(request.base_url),
            expires_after_s=expires_after_s,
            include_progress=wishes is not None and wishes.include_progress,
            include_usage=wishes is not None and wishes.include_usage,
        )

    def adapter_of(model: str | None) -> str | None:
        name, adapter = split_model(model or preset.name, preset.adapters)
        if name != preset.name:
            raise _no_model(model, preset)
        return adapter

    app.include_router(files_router(store, limits.media.budget()))
    app.include_router(images_router(agent, store, adapter_of, limits.max_decoder_calls))
    app.include_router(parts_router(agent, new_completion))
    app.include_router(sounds_router(agent, store, adapter_of))
    app.include_router(
        embeddings_router(agent, store, adapter_of, name=preset.name, max_media=limits.max_media)
    )
    app.include_router(
        videos_router(agent, jobs, store, adapter_of, name=preset.name, expires_after_s=expires_after_s)
    )
    if adapters is not None:
        app.include_router(adapter_routes(preset.adapters, adapters))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        chat = read_chat_request(await read_json(request))
        adapter = adapter_of(chat.model)
        options = chat.options()
        if adapter is not None:
            options = replace(options, adapters=(adapter, *options.adapters))
        conversation = await asyncio.to_thread(read_messages, chat.messages, store)
        completion = new_completion(request, chat.stream_options, chat.model or preset.name)
        events = agent.turn(conversation, options)
        if not chat.stream:
            return JSONResponse(await until_gone(request, completion.collect(events)))
        opening, rest = await until_gone(request, opened(events))
        return EventStream(lines(completion, opening, rest))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = [preset.name, *(f"{preset.name}:{adapter}" for adapter in preset.adapters)]
        return {"object": "list", "data": [await _model(name, preset, agent, created) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if split_model(name, preset.adapters)[0] != preset.name:
            raise _no_model(name, preset)
        return await _model(name, preset, agent, created)

    @app.get("/health")
    async def health() -> Response:
        states = await agent.states()
        speakers = [part for part in SPEAKERS if states.get(part, BoxState.READY) is not BoxState.READY]
        body = {
            "status": _status(states),
            "preset": preset.name,
            "parts": dict(states),
            "output_modalities": _made_now(preset, states),
            "unavailable": [part for part, state in states.items() if state is not BoxState.READY],
        }
        if not speakers:
            return JSONResponse(body)
        error = not_ready(speakers[0].replace("_", " "), states[speakers[0]])
        return JSONResponse({**body, **error.body()}, error.status, headers=retry_after(error))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(exposition(await agent.counts()), media_type=MEDIA_TYPE)

    _answer_errors(app, labels)
    app.add_middleware(RequestEnvelope, max_body_bytes=limits.max_request_mb * 2**20, labels=labels)
    return app


def with_page(api: FastAPI, page: ASGIApp) -> ASGIApp:
    """Return one application: the API under /v1, /health and /metrics, and ``page`` everywhere else.

    ``page`` gets the lifespan; the API's own runs inside it.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        is_api = path in ("/health", "/metrics", "/v1") or path.startswith("/v1/")
        await (api if is_api else page)(scope, receive, send)

    return app


def _status(states: Mapping[str, BoxState]) -> str:
    if BoxState.GONE in states.values():
        gone = [part for part in SPEAKERS if states.get(part) is BoxState.GONE]
        return "unavailable" if gone else "degraded"
    return "loading" if BoxState.LOADING in states.values() else "ok"


def _made_now(preset: Preset, states: Mapping[str, BoxState]) -> list[str]:
    made = (modality.value for modality in MEDIA if modality in preset.decoders)
    return ["text", *(modality for modality in made if states.get(modality) is BoxState.READY)]


async def _model(name: str, preset: Preset, agent: TurnMaker, created: int) -> dict[str, Any]:
    states = await agent.states()
    reads = states.get("encoder") is BoxState.READY
    inputs = ["text", *(modality.value for modality in preset.encoder.modalities if reads)]
    outputs = _made_now(preset, states)
    return {
        "id": name,
        "parent": None if name == preset.name else preset.name,
        "object": "model",
        "created": created,
        "owned_by": "patchbay",
        "description": preset.description,
        "input_modalities": inputs,
        "output_modalities": outputs,
        "architecture": {"input_modalities": inputs, "output_modalities": outputs},
    }


def _no_model(name: str | None, preset: Preset) -> NotFound:
    known = [preset.name, *(f"{preset.name}:{adapter}" for adapter in preset.adapters)]
    return NotFound(
        f"There is no model {name!r:.80}; this service runs {', '.join(map(repr, known))}.",
        code="model_not_found",
        param="model",
    )


def _answer_errors(app: FastAPI, labels: bool) -> None:
    @app.exception_handler(ServiceError)
    async def known(request: Request, error: ServiceError) -> Response:
        return error_response(error)

    @app.exception_handler(MediaError)
    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> Response:
        return error_response(translate(error))

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(step) for step in first["loc"])
        return error_response(Unprocessable(f"{param}: {first['msg']}.", code="invalid_value", param=param))

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> Response:
        path = f"{request.method} {request.url.path:.100}"
        if error.status_code == HTTPStatus.NOT_FOUND:
            known_error: ServiceError = NotFound(f"There is no {path} here.", code="not_found")
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            known_error = MethodNotAllowed(
                f"{path} is not allowed; the path knows other methods.", code="method_not_allowed"
            )
        else:
            kind = BadRequest if error.status_code == HTTPStatus.BAD_REQUEST else Unprocessable
            known_error = kind(f"{path}: {error.detail.rstrip('.')}.", code="invalid_request")
        return error_response(known_error)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        logger.exception("%s %s failed.", request.method, request.url.path, exc_info=error)
        answer = error_response(
            Internal(
                "Something went wrong inside the service. Its log has the details.", code="internal_error"
            )
        )
        if labels:  # this answer is made outside of RequestEnvelope
            answer.headers["x-request-id"] = request.state.request_id
        return answer


async def _sweep(store: ArtefactStore, expires_after_s: float) -> None:
    while True:
        try:
            await asyncio.to_thread(store.sweep, expires_after_s)
        except OSError:
            logger.exception("Old files could not be removed.")
        await asyncio.sleep(SWEEP_EVERY_S)
