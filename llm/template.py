"""How a conversation becomes one row of token ids.

    <s>  <|user|> text <Img> media </Img> text <|end|>  <|assistant|> text [IMG0][IMG1].. text </s>  ...

There is one layout, for training and for generation. Media are slots here, filled with projected
encoder tokens by the model; the ids under them are padding. A model that knows no role tokens has words
in their place (:mod:`llm.role_words`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from encoders.media import Modality
from llm.role_words import RoleWords
from llm.tokenizer import ROLES, ConversationTokenizer

LossOn = Literal["assistant", "last_assistant", "all"]


@dataclass(frozen=True, eq=False, slots=True)
class MediaTokens:
    """A medium as its encoder left it: ``tokens`` ``(n, width)`` and perhaps one global vector.

    Projection happens inside the model. ``pooled`` ``(width,)`` is for projectors that read it alone.
    ``blocks`` is the layout of a medium that was cut: numbers of tokens that are projected together, and
    words between them; one block of all tokens unless given.
    """

    modality: Modality
    tokens: Tensor
    pooled: Tensor | None = None
    blocks: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or not len(self.tokens):
            raise ValueError(
                f"{self.modality} tokens have shape {tuple(self.tokens.shape)}; expected (n, width), n >= 1."
            )
        if not self.blocks:
            object.__setattr__(self, "blocks", (len(self.tokens),))
        counts = [block for block in self.blocks if isinstance(block, int)]
        if sum(counts) != len(self.tokens) or min(counts) < 1:
            raise ValueError(
                f"blocks {self.blocks} do not cut up {len(self.tokens)} tokens; expected numbers of at least "
                f"1 that add up to them."
            )

    def pieces(self) -> list[MediaTokens | str]:
        """Return what is projected apart, and the words between, in order.

        A medium of several blocks is not what its global vector stands for, so its pieces have none.
        """
        if self.blocks == (len(self.tokens),):
            return [self]
        pieces: list[MediaTokens | str] = []
        start = 0
        for block in self.blocks:
            if isinstance(block, str):
                pieces.append(block)
            else:
                pieces.append(MediaTokens(self.modality, self.tokens[start : start + block]))
                start += block
        return pieces


@dataclass(frozen=True, slots=True)
class SignalPart:
    """A medium that the assistant makes (in training) or made earlier (in a history).

    ``copied`` is for training: the very medium of its kind that was there last is wanted, as it is.
    """

    modality: Modality
    copied: bool = False


@dataclass(frozen=True, slots=True)
class Given:
    """Words of a reply that are there in training and not to be learnt: nothing before them tells them."""

    text: str


Part = str | MediaTokens | SignalPart | Given


@dataclass(frozen=True, eq=False, slots=True)
class Message:
    """One turn: who speaks, and the parts in order. Only the assistant has signal parts and given words."""

    role: str
    parts: list[Part]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role is {self.role!r}; expected one of {', '.join(ROLES)}.")
        if self.role != "assistant":
            for part in self.parts:
                if isinstance(part, SignalPart | Given):
                    raise ValueError(
                        f"A {self.role} message holds a {type(part).__name__}; only the assistant's may."
                    )


Dialogue = list[Message]


@dataclass(frozen=True, eq=False, slots=True)
class MediaSlot:
    """Where a medium, or a piece of one, goes in a row: positions ``start`` to ``start + length``.

    ``prompt_ids`` is the text of the same message, for projectors that look at a medium with a question.
    """

    start: int
    length: int
    media: MediaTokens
    prompt_ids: list[int]


@dataclass(frozen=True, slots=True)
class SignalSpan:
    """Where a signal block starts in a row, and the text of the reply since the previous medium.

    ``copied`` is that of its :class:`SignalPart`.
    """

    modality: Modality
    start: int
    caption: str
    copied: bool = False


@dataclass(eq=False, slots=True)
class Row:
    """One dialogue as ids. ``trained`` marks the ids that the model should learn to say."""

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    media: list[MediaSlot] = field(default_factory=list)
    signals: list[SignalSpan] = field(default_factory=list)

    def add(self, ids: list[int], trained: bool) -> None:
        """Append ``ids``."""
        self.ids += ids
        self.trained += [trained] * len(ids)


def encode_dialogue(
    dialogue: Dialogue,
    tokenizer: ConversationTokenizer,
    slot_length: Callable[[MediaTokens], int],
    *,
    loss_on: LossOn = "assistant",
    open_reply: bool = False,
) -> Row:
    """Lay out ``dialogue``.

    Args:
        dialogue: the messages; it may be empty only with ``open_reply``.
        tokenizer: gives the ids.
        slot_length: how many positions a medium, or a piece of one, takes, at least 1.
        loss_on: whose words are trained: every assistant message, the last one, or everything
            that is a word (for a base model). A block's later tokens never are: they are forced.
        open_reply: end with ``<|assistant|>``, ready for generation.

    Raises:
        ValueError: an empty dialogue.

    """
    if not dialogue and not open_reply:
        raise ValueError("The dialogue is empty; expected at least one message.")
    row = Row()
    row.add([tokenizer.bos_id], False)
    if tokenizer.role_words is not None:
        _add_turns(row, dialogue, tokenizer, tokenizer.role_words, slot_length, loss_on, open_reply)
        return row
    last = max((i for i, m in enumerate(dialogue) if m.role == "assistant"), default=-1)
    for index, message in enumerate(dialogue):
        speaks = message.role == "assistant" and (loss_on != "last_assistant" or index == last)
        trained = speaks or loss_on == "all"
        row.add([tokenizer.role_ids[message.role]], False)
        _add_parts(row, _joined(message.parts), message.parts, tokenizer, slot_length, trained)
        row.add([tokenizer.eos_id if message.role == "assistant" else tokenizer.end_id], trained)
    if open_reply:
        row.add([tokenizer.role_ids["assistant"]], False)
    return row


def _add_turns(
    row: Row,
    dialogue: Dialogue,
    tokenizer: ConversationTokenizer,
    words: RoleWords,
    slot_length: Callable[[MediaTokens], int],
    loss_on: LossOn,
    open_reply: bool,
) -> None:
    turns = _turns(dialogue, words) or [([], None)]
    last = max((i for i, (_, replies) in enumerate(turns) if replies is not None), default=-1)
    for index, (said, replies) in enumerate(turns):
        trained = loss_on != "last_assistant" or index == last
        if index == 0:
            opening = words.first if said and isinstance(said[0], str) else words.first.rstrip()
            row.add(tokenizer.encode_text(opening), loss_on == "all")
        answered = replies is not None or (open_reply and index == len(turns) - 1)
        lead, close = words.user if index else "", words.reply if answered else ""
        asked = _stripped([lead, *said, close])
        _add_parts(row, asked, said, tokenizer, slot_length, loss_on == "all")
        if replies is not None:
            _add_parts(row, _stripped([*replies, words.end]), replies, tokenizer, slot_length, trained)


def _turns(dialogue: Dialogue, words: RoleWords) -> list[tuple[list[Part], list[Part] | None]]:
    """Pair what is said to the assistant with its reply; what the system says goes to the next user turn."""
    turns: list[tuple[list[Part], list[Part] | None]] = []
    for message in dialogue:
        parts = [_quoted(part, words) for part in _joined(message.parts)]
        if message.role == "assistant":
            said = turns.pop()[0] if turns and turns[-1][1] is None else []
            turns.append((said, parts))
        elif turns and turns[-1][1] is None:
            turns[-1][0].extend(["\n", *parts])
        else:
            turns.append((parts, None))
    return turns


def _quoted(part: Part, words: RoleWords) -> Part:
    if isinstance(part, Given):
        return Given(words.quoted(part.text))
    return words.quoted(part) if isinstance(part, str) else part


def _stripped(parts: list[Part]) -> list[Part]:
    """Join texts, and take the white space off where they touch a medium or a signal.

    The tokenizer that such models were trained with drops white space beside added tokens.
    """
    joined = _joined(parts)
    stripped: list[Part] = []
    for i, part in enumerate(joined):
        if isinstance(part, str):
            part = part.lstrip() if i else part
            part = part.rstrip() if i + 1 < len(joined) else part
        stripped.append(part)
    return [part for part in stripped if part != ""]


def _add_parts(
    row: Row,
    parts: list[Part],
    spoken: list[Part],
    tokenizer: ConversationTokenizer,
    slot_length: Callable[[MediaTokens], int],
    trained: bool,
) -> None:
    """Add ``parts``; ``spoken`` are those of them that somebody said, less the words of a role."""
    texts = [tokenizer.encode_text(words) if (words := _words(part)) else [] for part in parts]
    prompt_ids = [i for text in _joined(spoken) if isinstance(text, str) for i in tokenizer.encode_text(text)]
    caption: list[int] = []
    for part, ids in zip(parts, texts, strict=True):
        if isinstance(part, SignalPart):
            block = list(tokenizer.signal_ids(part.modality))
            row.signals.append(
                SignalSpan(part.modality, len(row.ids), tokenizer.decode_text(caption).strip(), part.copied)
            )
            row.add(block[:1], trained)
            row.add(block[1:], False)
            caption = []
        elif isinstance(part, MediaTokens):
            row.add([tokenizer.media_open_id], False)
            for piece in part.pieces():
                if isinstance(piece, str):
                    row.add(tokenizer.encode_text(piece), False)
                    continue
                length = slot_length(piece)
                row.media.append(MediaSlot(len(row.ids), length, piece, prompt_ids))
                row.add([tokenizer.pad_id] * length, False)
            row.add([tokenizer.media_close_id], False)
            caption = []
        else:
            row.add(ids, trained and isinstance(part, str))
            caption += ids


def _words(part: Part) -> str:
    return part.text if isinstance(part, Given) else part if isinstance(part, str) else ""


def _joined(parts: list[Part]) -> list[Part]:
    """Join neighbouring texts, so that how a text was cut into parts does not change its ids."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined
