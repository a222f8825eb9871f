"""What an engine is asked for: a dialogue laid out, with a name for what is at each of its positions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch

from llm.model import LanguageModel
from llm.reply import GenerationEvent, GenerationOptions, Reply
from llm.request_lora import RequestLora
from llm.scoring import GivenReply, Scored
from llm.template import Dialogue, MediaSlot, Message, Row

StepEvent = GenerationEvent | Scored | Exception


@dataclass(eq=False)
class Request:
    """One reply on its way. Made by :meth:`to_reply`, or by :meth:`to_score`.

    ``keys`` name what is at each position, for comparing beginnings: the id, or for media a negative
    number from their content. The first key names the LoRA too, as what one computes is of no use to
    another.
    """

    row: Row
    reply: Reply
    keys: list[int]
    ids: list[int]
    lora: RequestLora | None = None
    user: str = ""
    given: GivenReply | None = None
    cancelled: bool = False

    @property
    def most_reused(self) -> int:
        """Positions that may come from another request; the states at all later ones are wanted."""
        return (len(self.ids) if self.given is None else self.given.first) - 1

    @classmethod
    def to_reply(
        cls,
        model: LanguageModel,
        context: int,
        dialogue: Dialogue,
        options: GenerationOptions | None,
        lora: RequestLora | None,
        user: str,
    ) -> Self:
        """Ask for a reply of ``model`` in ``context`` positions; errors are as of :meth:`Engine.prepare`.

        Where somebody typed nothing but the names of tokens, such as ``[IMG0]``, the model may choose no
        medium: it reads them as letters, and letters that are no word may remind it of one.
        """
        row = model.encode(dialogue, open_reply=True)
        options = options or GenerationOptions()
        if dialogue and _spells_tokens_alone(model, dialogue[-1]):
            options = replace(options, allowed=frozenset(options.required))
        reply = Reply(model.tokenizer, options, row.ids, context)
        return cls(row, reply, _keys(model, row, lora), list(row.ids), lora, user)

    @classmethod
    def to_score(cls, model: LanguageModel, context: int, dialogue: Dialogue, user: str) -> Self:
        """Ask how probable the last reply is; errors are as of :meth:`Engine.prepare_given`."""
        row = model.encode(dialogue, loss_on="last_assistant")
        given = GivenReply(row)
        fed = row.ids[:-1]  # nothing follows the last
        reply = Reply(model.tokenizer, GenerationOptions(), fed, context)
        return cls(row, reply, _keys(model, row, None), fed, user=user, given=given)


def _spells_tokens_alone(model: LanguageModel, message: Message) -> bool:
    texts = [part for part in message.parts if isinstance(part, str)]
    return len(texts) == len(message.parts) and model.tokenizer.spells_tokens_alone(" ".join(texts))


def _keys(model: LanguageModel, row: Row, lora: RequestLora | None) -> list[int]:
    keys = list(row.ids)
    for slot in row.media:
        keys[slot.start : slot.start + slot.length] = _media_keys(model, slot)
    if lora is not None:
        keys[0] = -int(lora.digest, 16) - 1
    return keys


def _media_keys(model: LanguageModel, slot: MediaSlot) -> Iterator[int]:
    digest = hashlib.blake2b(str(slot.media.modality).encode(), digest_size=16)
    for tensor in (slot.media.tokens, slot.media.pooled):
        if tensor is not None:
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    if model.reads_prompt(slot.media.modality):
        digest.update(str(slot.prompt_ids).encode())
    name = int.from_bytes(digest.digest(), "big") << 32
    return (-(name + i) - 1 for i in range(slot.length))
