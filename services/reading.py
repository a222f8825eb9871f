"""A conversation as the language model reads it: checked, and its media encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from encoders.media import Modality
from services.boxes import EncodeBox, Encoded, PromptMessage, PromptPart, SpokenEarlier
from services.errors import BadRequest, ServiceError, TooLarge, translate
from services.messages import MediaPart, Message, Role, SpokenPart, TextPart
from services.presets import Limits


@dataclass(frozen=True)
class Read:
    """``prompt`` is for the language model; ``newest`` are the latest media of each kind, by artefact."""

    prompt: Sequence[PromptMessage]
    newest: Mapping[Modality, str]


class Reader:
    """Reads conversations with an encoder that knows the media ``inputs``."""

    def __init__(self, encode: EncodeBox, inputs: Sequence[Modality], limits: Limits) -> None:
        self.encode = encode
        self.inputs = tuple(inputs)
        self.limits = limits

    def check(self, conversation: Sequence[Message]) -> None:
        """Raise a ServiceError for a conversation that cannot be answered."""
        if not conversation or conversation[-1].role is not Role.USER:
            raise BadRequest(
                "The last message must be the user's. Add one that says what is wanted.",
                code="invalid_conversation",
                param="messages",
            )
        last = conversation[-1]
        if not any(not isinstance(part, TextPart) or part.text.strip() for part in last.parts):
            raise BadRequest(
                "The message is empty. Write something, or attach a picture, a video or a sound.",
                code="empty_message",
                param=f"messages[{len(conversation) - 1}].content",
            )
        if len(conversation) > self.limits.max_messages:
            raise TooLarge(
                f"The conversation has {len(conversation)} messages; at most {self.limits.max_messages} are "
                "read. Leave out the oldest.",
                code="too_many_messages",
                param="messages",
            )
        num_media = sum(isinstance(part, MediaPart) for message in conversation for part in message.parts)
        if num_media > self.limits.max_media:
            raise TooLarge(
                f"The conversation holds {num_media} media; at most {self.limits.max_media} are read. "
                "Leave out the oldest.",
                code="media_limit_exceeded",
                param="messages",
            )

    async def read(self, conversation: Sequence[Message]) -> Read:
        """Encode the media of a conversation; an error says in which part it was."""
        prompt = []
        newest: dict[Modality, str] = {}
        for number, message in enumerate(conversation):
            parts: list[PromptPart] = []
            for place, part in enumerate(message.parts):
                match part:
                    case TextPart(text=text):
                        parts.append(text)
                    case SpokenPart(modality=modality, caption=caption, artefact_id=artefact_id):
                        if artefact_id is not None:
                            newest[modality] = artefact_id
                        if caption and not (parts and isinstance(parts[-1], str) and parts[-1].strip()):
                            parts.append(caption)
                        parts.append(SpokenEarlier(modality))
                    case MediaPart():
                        try:
                            encoded = await self._encoded(part)
                        except (ServiceError, ValueError) as error:
                            raise translate(error).at(f"messages[{number}].content[{place}]") from error
                        newest[encoded.modality] = part.artefact_id
                        parts.append(encoded)
            prompt.append(PromptMessage(message.role, tuple(parts)))
        return Read(prompt, newest)

    def expect_readable(self, part: MediaPart) -> None:
        """Raise BadRequest for a medium that says it is of a kind that is not read."""
        if part.modality is not None and part.modality not in self.inputs:
            raise BadRequest(
                f"This model cannot read {part.modality.value}; it reads "
                f"{', '.join(('text', *(known.value for known in self.inputs)))}. Leave it out.",
                code="unsupported_modality",
            )

    async def _encoded(self, part: MediaPart) -> Encoded:
        self.expect_readable(part)
        return await self.encode.encode(part.artefact_id, part.modality)
