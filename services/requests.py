"""From the JSON of a chat completion to a conversation and options.

The form is OpenAI's, with the widely used extra input parts for sound and video. A medium is put
into the store on its way, so that what comes out of here names artefacts and holds no bytes.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from decoders.settings import DecodeSettings
from decoders.writing import read_manifest
from encoders.media import Modality
from services.artefacts import ArtefactStore
from services.errors import BadRequest, ServiceError
from services.messages import MAX_PREVIEWS, MediaPart, Message, Part, Role, SpokenPart, TextPart, TurnOptions
from services.setting_names import IN_REQUESTS, in_requests

DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.IGNORECASE)
OWN_URL = re.compile(r"(?:https?://[^/]+)?/v1/files/(?P<id>file-[0-9a-f]{32})/content")
URL_PARTS = {
    "image_url": Modality.IMAGE,
    "audio_url": Modality.AUDIO,
    "video_url": Modality.VIDEO,
}
OWN_PARTS = {modality.value: modality for modality in (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)}
PART_TYPES = ("text", *URL_PARTS, "input_audio", "file")

JsonObject = Mapping[str, Any]


class Body(BaseModel):
    """A JSON object in which null says the same as nothing, as OpenAI's clients mean it."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, values: object) -> object:
        return _given(values)


class DecoderRequest(Body):
    """What a request may set about one decoder."""

    model_config = ConfigDict(extra="forbid")

    seed: int | None = None
    num_inference_steps: Annotated[
        int | None, Field(validation_alias=AliasChoices("num_inference_steps", "steps"))
    ] = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    size: Annotated[str | None, Field(pattern=r"^\d{1,5}x\d{1,5}$", description="width x height")] = None
    num_frames: int | None = None
    seconds: float | None = None
    lora: Annotated[str | None, Field(min_length=1, description="name of an adapter for this decoder")] = None
    strength: Annotated[float | None, Field(description="start from the newest medium of this kind")] = None
    keep_untouched: Annotated[
        bool | None, Field(description="of that medium, where both agree: its pixels, or its tuning")
    ] = None
    fast: Annotated[bool | None, Field(description="reuse deep features as the preset says")] = None
    deep_every: Annotated[int | None, Field(description="reuse deep features for so many steps")] = None

    def settings(self) -> DecodeSettings:
        """Return the same wishes as the decoder understands them."""
        width, height = (int(side) for side in self.size.split("x")) if self.size else (None, None)
        wishes: dict[str, Any] = {
            "seed": self.seed,
            "steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "scheduler": self.scheduler,
            "width_px": width,
            "height_px": height,
            "num_frames": self.num_frames,
            "duration_s": self.seconds,
            "lora": self.lora,
            "strength": self.strength,
            "keep_untouched": self.keep_untouched,
            "fast": self.fast,
            "deep_every": self.deep_every,
        }
        for name, wish in wishes.items():
            try:
                DecodeSettings(**{name: wish})
            except ValueError as error:
                told = IN_REQUESTS.get(name, name)
                message = in_requests(str(error), name)
                raise BadRequest(message, code="invalid_value", param=told) from error
        return DecodeSettings(**wishes)


class StreamOptions(Body):
    """What a stream tells besides the reply."""

    include_usage: bool = False
    include_progress: bool = False
    previews: Annotated[int, Field(ge=0, le=MAX_PREVIEWS)] = 0


class ChatRequest(Body):
    """The body of a chat completion. Keys that mean nothing here are passed over, as clients expect."""

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    modalities: list[Modality] | None = None
    decoders: dict[Modality, DecoderRequest] = {}
    lora: list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    ask_below: float | None = None
    verify: bool | None = None
    user: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    audio: dict[str, Any] | None = None
    n: int | None = None
    stop: list[str] = []
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    logprobs: bool | None = None
    response_format: dict[str, Any] | None = None

    @field_validator("stop", "lora", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if not isinstance(value, str | list):
            raise PydanticCustomError("words", "Input should be a string or a list of strings")
        return [value] if isinstance(value, str) else value

    @field_validator("decoders", mode="before")
    @classmethod
    def _made_by_decoders(cls, value: object) -> object:
        if isinstance(value, Mapping) and Modality.TEXT in value:
            raise PydanticCustomError("medium", "Text has no decoder; name image, video or audio")
        return _given(value)

    def options(self) -> TurnOptions:
        """Return how the reply is wanted."""
        decoders = {}
        for modality, wishes in self.decoders.items():
            try:
                decoders[modality] = wishes.settings()
            except BadRequest as error:
                raise error.at(f"decoders.{modality.value}.{error.param}") from error
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return TurnOptions(
            modalities=self.modalities,
            seed=self.seed,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            stop=tuple(self.stop),
            max_new_tokens=limit,
            ask_below=self.ask_below,
            verify=self.verify,
            decoders=decoders,
            previews=self.stream_options.previews if self.stream and self.stream_options else 0,
            user=self.user or None,
            adapters=self.adapters,
        )

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that are named, whichever box they are for."""
        return tuple(self.lora)

    def refuse_unsupported(self) -> None:
        """Raise BadRequest for wishes that would silently not be granted."""
        wishes = {
            "n": self.n not in (None, 1),
            "tools": bool(self.tools),
            "functions": bool(self.functions),
            "logprobs": bool(self.logprobs),
            "response_format": (self.response_format or {}).get("type", "text") != "text",
            "audio.format": (self.audio or {}).get("format", "wav") != "wav",
        }
        for name, is_wished in wishes.items():
            if is_wished:
                way_out = "Use 'wav'." if name == "audio.format" else "Leave it out."
                raise BadRequest(
                    f"This value of {name} is not supported here. {way_out}",
                    code="unsupported_parameter",
                    param=name,
                )


def read_chat_request(body: object) -> ChatRequest:
    """Check the JSON of a request."""
    if not isinstance(body, dict):
        raise BadRequest(
            f"The body is a JSON {type(body).__name__}; expected an object with model and messages.",
            code="invalid_json",
        )
    if isinstance(body.get("extra_body"), dict):
        body = body | body["extra_body"]
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from error
    request.refuse_unsupported()
    return request


def invalid(error: ValidationError) -> BadRequest:
    """Return the first complaint of pydantic as the client is told about it."""
    first = error.errors()[0]
    param = ".".join(str(step) for step in first["loc"] if step != "[key]")
    return BadRequest(f"{param or 'The body'}: {first['msg']}.", code="invalid_value", param=param or None)


def read_messages(messages: Sequence[JsonObject], store: ArtefactStore) -> list[Message]:
    """Return the conversation; media that came along are in ``store`` afterwards."""
    conversation = [_message(message, f"messages[{place}]", store) for place, message in enumerate(messages)]
    for place, message in enumerate(conversation):
        for part in message.parts:
            expect_whole_characters(_words_of(part), f"messages[{place}]")
    return conversation


def _words_of(part: Part) -> str:
    return part.caption if isinstance(part, SpokenPart) else part.text if isinstance(part, TextPart) else ""


def expect_whole_characters(words: str, param: str) -> None:
    """Raise BadRequest for half of a character, which JSON can hold and UTF-8 cannot."""
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise _wrong(
            param,
            f"The text holds half of a character, {words[error.start]!a}, which stands for nothing "
            "alone. Send both halves, or the character itself.",
        ) from error


def _given(values: object) -> object:
    """Return an object without what is null in it."""
    if not isinstance(values, Mapping):
        return values
    return {name: value for name, value in values.items() if value is not None}


def _message(message: JsonObject, param: str, store: ArtefactStore) -> Message:
    if not isinstance(message, Mapping):
        raise _wrong(param, f"A message is an object with role and content, not {message!r:.80}.")
    role = message.get("role")
    if role in ("system", "developer"):
        return Message(Role.SYSTEM, tuple(_content(message.get("content"), f"{param}.content", store)))
    if role == "user":
        return Message(Role.USER, tuple(_content(message.get("content"), f"{param}.content", store)))
    if role == "assistant":
        return Message(Role.ASSISTANT, tuple(_spoken(message, param, store)))
    raise _wrong(f"{param}.role", f"role is {role!r}; expected 'system', 'user' or 'assistant'.")


def _content(content: object, param: str, store: ArtefactStore) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [TextPart(content)]
    if not isinstance(content, list):
        raise _wrong(param, f"content is {content!r:.80}; expected a string or a list of parts.")
    parts: list[Part] = []
    for place, part in enumerate(content):
        here = f"{param}[{place}]"
        try:
            parts.append(read_part(part, store))
        except ServiceError as error:
            raise error.at(here) from error
    return parts


def read_part(part: object, store: ArtefactStore) -> TextPart | MediaPart:
    """Return one part of a message; a medium that came along is in ``store`` afterwards."""
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise _wrong(None, f"A part is an object with a type, not {part!r:.80}.")
    kind = part["type"]
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise _wrong(None, f"text is {text!r:.80}; expected a string.")
        return TextPart(text)
    if kind in URL_PARTS:
        value = part.get(kind)
        url = value.get("url") if isinstance(value, Mapping) else value
        return _by_url(url, URL_PARTS[kind], store)
    if kind == "input_audio":
        value = part.get(kind)
        data = value.get("data") if isinstance(value, Mapping) else None
        if not isinstance(data, str):
            raise _wrong(None, "input_audio has no data; expected {'data': base64, 'format': 'wav'}.")
        if DATA_URL.match(data):
            return _by_url(data, Modality.AUDIO, store)
        return _stored(_from_base64(data), Modality.AUDIO, store)
    if kind == "file":
        return _file(part.get("file"), store)
    if kind in OWN_PARTS and isinstance(part.get("data"), bytes):
        return _stored(part["data"], OWN_PARTS[kind], store)
    if kind in OWN_PARTS and isinstance(part.get("file_id"), str):
        return MediaPart(store.get(part["file_id"]).id, OWN_PARTS[kind])
    raise _wrong(None, f"The part type {kind!r:.40} is not known; expected one of {', '.join(PART_TYPES)}.")


def _by_url(url: object, modality: Modality, store: ArtefactStore) -> MediaPart:
    if not isinstance(url, str):
        raise _wrong(None, f"The url is {url!r:.80}; expected a data URL.")
    if found := DATA_URL.match(url):
        return _stored(_from_base64(url[found.end() :]), modality, store)
    if found := OWN_URL.fullmatch(url):
        return MediaPart(store.get(found["id"]).id, modality)
    if url.startswith("data:"):
        raise _wrong(None, "The data URL is not in base64; expected data:TYPE;base64,DATA.")
    raise BadRequest(
        f"The URL {url!r:.100} is not fetched: this service opens no connections for a message. Send the "
        "medium as a data URL (data:TYPE;base64,DATA), or upload it with POST /v1/files and send its id.",
        code="remote_url_not_allowed",
    )


def _file(value: object, store: ArtefactStore) -> MediaPart:
    if not isinstance(value, Mapping):
        raise _wrong(None, "file is missing; expected {'file_id': ...} or {'file_data': data URL}.")
    if isinstance(file_id := value.get("file_id"), str):
        artefact = store.get(file_id)
        return MediaPart(artefact.id, artefact.modality)
    if isinstance(data := value.get("file_data"), str):
        found = DATA_URL.match(data)
        return _stored(_from_base64(data[found.end() :] if found else data), None, store)
    raise _wrong(None, "file has neither file_id nor file_data; upload with POST /v1/files and send the id.")


def _stored(data: bytes, modality: Modality | None, store: ArtefactStore) -> MediaPart:
    artefact = store.put(
        data, media_type="application/octet-stream", filename="attachment", modality=modality
    )
    return MediaPart(artefact.id, modality)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(
            f"The data is not base64 ({error}). Encode the whole file with standard base64.",
            code="invalid_base64",
        ) from error


def _spoken(message: JsonObject, param: str, store: ArtefactStore) -> list[Part]:
    """Read an earlier reply, which may be ours: in order by its ``parts``, else put in order again."""
    if isinstance(own := message.get("parts"), list):
        return _in_lines(
            part for place, value in enumerate(own) for part in _own(value, f"{param}.parts[{place}]", store)
        )
    content = [
        _as_spoken(part, store) for part in _content(message.get("content"), f"{param}.content", store)
    ]
    media: list[Part] = []
    for name in ("images", "videos"):
        media += [
            _as_spoken(part, store) for part in _content(message.get(name) or [], f"{param}.{name}", store)
        ]
    audio = message.get("audio")
    if isinstance(audio, Mapping) and isinstance(audio.get("id"), str):
        try:
            artefact = store.get(audio["id"])
        except ServiceError as error:
            raise error.at(f"{param}.audio.id") from error
        media.append(_as_spoken(MediaPart(artefact.id, Modality.AUDIO), store))
    return _interleaved(content, media)


def _in_lines(parts: Iterable[Part]) -> list[Part]:
    """Join neighbouring texts as ``content`` has them: where a medium between them is not there."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, TextPart) and joined and isinstance(before := joined[-1], TextPart):
            joined[-1] = TextPart(f"{before.text}\n{part.text}")
        else:
            joined.append(part)
    return joined


def _own(part: object, param: str, store: ArtefactStore) -> list[Part]:
    if not isinstance(part, Mapping):
        raise _wrong(param, f"A part is an object with a type, not {part!r:.80}.")
    modality = OWN_PARTS.get(str(part.get("type")))
    if modality is None:
        return [_as_spoken(each, store) for each in _content([part], param, store)]
    if part.get("error") is not None:
        return []
    if part.get("status") == "asked":
        question = part.get("question")
        return [TextPart(question)] if isinstance(question, str) else []
    caption, file_id = part.get("caption"), part.get("file_id")
    if isinstance(caption, str):
        return [SpokenPart(modality, caption, file_id if isinstance(file_id, str) else None)]
    return [_as_spoken(each, store) for each in _content([part], param, store)]


def _as_spoken(part: Part, store: ArtefactStore) -> Part:
    """Turn a medium that one of our decoders made into the signal it came from."""
    if not isinstance(part, MediaPart):
        return part
    artefact = store.get(part.artefact_id)
    manifest = artefact.manifest or read_manifest(store.read(artefact.id))
    modality = part.modality or artefact.modality
    if manifest is None or modality is None:
        return part
    caption = artefact.caption if artefact.caption is not None else manifest.get("caption")
    return SpokenPart(modality, caption if isinstance(caption, str) else "", artefact.id)


def _interleaved(content: list[Part], media: list[Part]) -> list[Part]:
    """Put each medium right behind its caption, where the text has it; the others come last."""
    text = "".join(part.text for part in content if isinstance(part, TextPart))
    others = [part for part in content if not isinstance(part, TextPart)]
    placed = sorted(
        (text.find(part.caption) + len(part.caption), number, part)
        for number, part in enumerate(media)
        if isinstance(part, SpokenPart) and part.caption and part.caption in text
    )
    parts: list[Part] = []
    at = 0
    for end, _, part in placed:
        parts += [TextPart(text[at:end].strip()), part] if end > at else [part]
        at = max(at, end)
    rest = text[at:].strip() if placed else text
    found = {id(part) for _, _, part in placed}
    return [
        *parts,
        *([TextPart(rest)] if rest else []),
        *others,
        *(part for part in media if id(part) not in found),
    ]


def _wrong(param: str | None, message: str) -> BadRequest:
    return BadRequest(message, code="invalid_value", param=param)
