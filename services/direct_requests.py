"""What the resources that make one kind of medium of words have in common: what is asked, and how it ends."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Protocol, Self, TypeVar

from pydantic import AliasChoices, ConfigDict, Field, ValidationError, field_validator

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.artefacts import ArtefactStore
from services.errors import BadRequest, ServiceError
from services.events import Event, PartDone, TurnFailed
from services.messages import TurnOptions
from services.requests import DecoderRequest, expect_whole_characters, invalid

T = TypeVar("T")

AdapterOf = Callable[[str | None], str | None]
"""Returns the adapter that a model's name asks for; raises NotFound for another model."""


class MediumMaker(Protocol):
    """The agent, as far as media without a conversation go."""

    def make(
        self,
        modality: Modality,
        prompt: str,
        settings: DecodeSettings,
        *,
        user: str | None = None,
        previews: int = 0,
    ) -> AsyncGenerator[Event, None]:
        """Make one medium of words; the last event is PartDone or TurnFailed."""
        ...


class DirectRequest(DecoderRequest):
    """A prompt and settings. Keys that mean nothing here are passed over, as clients expect."""

    model_config = ConfigDict(extra="ignore")

    prompt: Annotated[str, Field(validation_alias=AliasChoices("prompt", "input"))]
    model: str | None = None
    user: str | None = None
    negative_prompt: str | None = None

    @field_validator("size", mode="before")
    @classmethod
    def _as_usual(cls, value: object) -> object:
        return None if value == "auto" else value

    @classmethod
    def read(cls, body: object) -> Self:
        """Check the JSON of a request."""
        if not isinstance(body, dict):
            raise BadRequest(
                f"The body is a JSON {type(body).__name__}; expected an object with a prompt.",
                code="invalid_json",
            )
        try:
            request = cls.model_validate(body)
        except ValidationError as error:
            raise invalid(error) from error
        if not request.prompt.strip():
            raise BadRequest(
                "The prompt is empty. Say what is to be made.", code="empty_message", param="prompt"
            )
        expect_whole_characters(request.prompt, "prompt")
        if request.strength is not None:
            raise unsupported("strength", "There is no medium to start from. Leave it out.")
        if request.keep_untouched:
            raise unsupported("keep_untouched", "There is no medium to keep anything of. Leave it out.")
        if request.negative_prompt:
            raise unsupported("negative_prompt", "Say in the prompt what is wanted, and leave it out.")
        return request

    def wishes(self, adapter_of: AdapterOf) -> DecodeSettings:
        """Return the settings, with the adapter that the model's name asks for."""
        settings, adapter = self.settings(), adapter_of(self.model)
        return settings if adapter is None or settings.lora else replace(settings, lora=adapter)

    def options(self, previews: int = 0) -> TurnOptions:
        """Return the wishes that a turn has too, checked."""
        return TurnOptions(previews=previews, user=self.user or None)


def unsupported(param: str, way_out: str) -> BadRequest:
    """Return the error for a wish that would silently not be granted."""
    return BadRequest(
        f"This value of {param} is not supported here. {way_out}", code="unsupported_parameter", param=param
    )


async def outcome(events: AsyncGenerator[Event, None]) -> PartDone:
    """Return the medium that a stream of events ends with; what prevented it is raised."""
    async with aclosing(events):
        async for event in events:
            match event:
                case PartDone():
                    return event
                case TurnFailed(error=error):
                    raise ServiceError.from_wire(dict(error))
    raise AssertionError("a medium ended without saying so")


def text_of(store: ArtefactStore, done: PartDone) -> str:
    """Return the bytes of a medium in base64."""
    return base64.b64encode(store.read(done.artefact.id)).decode("ascii")


def url_of(base_url: str, done: PartDone) -> str:
    """Return where the bytes of a medium are."""
    return f"{base_url.rstrip('/')}/v1/files/{done.artefact.id}/content"


def seeds_apart(settings: DecodeSettings, count: int) -> Sequence[DecodeSettings]:
    """Return settings for several media of one request: a seed that is given counts up."""
    if settings.seed is None:
        return [settings] * count
    return [settings.with_seed(settings.seed + number) for number in range(count)]


def described(done: PartDone) -> dict[str, Any]:
    """Return what every answer says of a medium beyond its bytes: also the words that it was made of."""
    return {
        "revised_prompt": done.caption,
        "file_id": done.artefact.id,
        "media_type": done.artefact.media_type,
        "manifest": dict(done.manifest),
    }
