"""Text and token ids of conversations.

Control tokens (roles, ends, media, signals) exist as ids only: the template puts them in by id,
and no text, whoever wrote it, tokenises to one of them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from encoders.media import Modality
from llm.role_words import RoleWords
from llm.signals import MEDIA_CLOSE, MEDIA_OPEN, SignalVocabulary

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ROLES = ("system", "user", "assistant")
ROLE_TOKENS = {role: f"<|{role}|>" for role in ROLES}
END = "<|end|>"


class ConversationTokenizer:
    """A Hugging Face fast tokenizer with the control tokens of conversations.

    Begin, end and padding are the base tokenizer's own where it has them (padding falls back to
    the end token). Role tokens and ``<|end|>`` that the base lacks are added, then the media and
    signal tokens. Everything added has an id of at least :attr:`base_vocabulary`. With ``role_words``
    there are neither role tokens nor ``<|end|>``: words mark the roles.

    Raises:
        ValueError: the tokenizer has some of the media and signal tokens but not all of them in
            the right order, or has foreign tokens behind them.

    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        signals: SignalVocabulary | None = None,
        role_words: RoleWords | None = None,
    ) -> None:
        self.signals = signals or SignalVocabulary()
        self.role_words = role_words
        self.backing = cast(Any, copy.deepcopy(tokenizer))  # transformers types few of its methods
        bos, eos = self.backing.bos_token or BOS, self.backing.eos_token or EOS
        role_tokens = () if role_words else (*ROLE_TOKENS.values(), END)
        control = dict.fromkeys((*self.signals.tokens, bos, eos, *role_tokens))
        known: dict[str, int] = self.backing.get_vocab()
        for name in control:
            if name not in known or known[name] not in self.backing.added_tokens_decoder:
                token = AddedToken(name, special=True, normalized=False)
                self.backing.add_tokens([token], special_tokens=True)

        known = self.backing.get_vocab()
        ids: dict[str, int] = {name: known[name] for name in control}
        self.base_vocabulary = ids[MEDIA_OPEN]
        self.added_tokens: tuple[str, ...] = tuple(
            self.backing.convert_ids_to_tokens(list(range(self.base_vocabulary, len(self.backing))))
        )
        if self.added_tokens[: len(self.signals.tokens)] != self.signals.tokens or not control.keys() >= set(
            self.added_tokens
        ):
            raise ValueError(
                f"The tokenizer ends in {self.added_tokens}; expected the media and signal tokens "
                f"{self.signals.tokens} and nothing foreign behind them. Use the base model's own tokenizer."
            )

        self.bos_id, self.eos_id = ids[bos], ids[eos]
        pad_id = self.backing.pad_token_id
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        self.media_open_id, self.media_close_id = ids[MEDIA_OPEN], ids[MEDIA_CLOSE]
        if role_words is None:
            self.end_id = ids[END]
            self.role_ids = {role: ids[name] for role, name in ROLE_TOKENS.items()}
        self._signal_ids = {m: tuple(ids[n] for n in self.signals.names(m)) for m in self.signals.modalities}
        self.signal_starts = {block[0]: modality for modality, block in self._signal_ids.items()}

        unknown = self.backing.unk_token_id
        live = {i for i, token in self.backing.added_tokens_decoder.items() if token.content.strip()}
        self.live_ids = frozenset((live | set(ids.values()) | {self.pad_id}) - {unknown})
        self.unspeakable_ids = self.live_ids - {self.eos_id} - self.signal_starts.keys()
        self._live_texts = sorted((name for name, i in known.items() if i in self.live_ids), key=len)
        self._plain = _without_added_tokens(self.backing.backend_tokenizer)

    @classmethod
    def load(
        cls, folder: Path, signals: SignalVocabulary | None = None, role_words: RoleWords | None = None
    ) -> ConversationTokenizer:
        """Read ``tokenizer.json`` (and its neighbours) from ``folder``.

        Raises:
            ValueError: there is no ``tokenizer.json``.

        """
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder / 'tokenizer.json'} is missing; expected a fast tokenizer there.")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(cast(PreTrainedTokenizerFast, tokenizer), signals, role_words)

    def save(self, folder: Path) -> None:
        """Write the tokenizer, added tokens included, in the layout of ``from_pretrained``."""
        self.backing.save_pretrained(folder)

    def __len__(self) -> int:
        return len(self.backing)

    def signal_ids(self, modality: Modality) -> tuple[int, ...]:
        """Return the ids of one block of ``modality``.

        Raises:
            ValueError: the vocabulary has no block for ``modality``.

        """
        if modality not in self._signal_ids:
            raise ValueError(
                f"There are no signal tokens for {modality}; this model can ask for "
                f"{', '.join(self._signal_ids) or 'nothing'}."
            )
        return self._signal_ids[modality]

    def encode_text(self, text: str) -> list[int]:
        """Tokenise ``text`` as plain characters: the result holds no id of :attr:`live_ids`.

        Added tokens are unknown to the tokenizer used here. Where its own model has such a string
        as a piece (unigram and whole-word models do), the string is cut in two and tried again.
        """
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if self.live_ids.isdisjoint(ids):
            return ids
        if len(text) < 2:
            return []
        cut = self._cut(text)
        return self.encode_text(text[:cut]) + self.encode_text(text[cut:])

    def spells_tokens_alone(self, text: str) -> bool:
        """Return whether ``text`` spells out :attr:`live_ids`, in either case, and says nothing else."""
        left = text.lower()
        for name in reversed(self._live_texts):
            left = left.replace(name.lower(), " ")
        return bool(text.strip()) and not left.strip()

    def _cut(self, text: str) -> int:
        """Return where to cut so that one live string in ``text`` falls apart."""
        for name in self._live_texts:
            start = text.find(name)
            if start >= 0 and len(name) > 1:
                return start + 1
        return len(text) // 2

    def decode_text(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, live ids left out. Broken UTF-8 comes out as U+FFFD."""
        spoken = [i for i in ids if i not in self.live_ids]
        text: str = self.backing.backend_tokenizer.decode(spoken, skip_special_tokens=False)
        return text


class TextStream:
    """Turns ids that arrive one by one into text, holding back a character that is not whole yet."""

    def __init__(self, tokenizer: ConversationTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # ids whose text is out; they settle the spaces of what follows
        self._pending: list[int] = []
        self._sent = 0  # characters of the pending text that are out already

    def push(self, token_id: int) -> str:
        """Take one id; return the text that has become certain, perhaps none."""
        self._pending.append(token_id)
        text = self._pending_text()
        whole = text.rstrip("\ufffd")
        delta, self._sent = whole[self._sent :], max(self._sent, len(whole))
        if whole == text:
            self._context, self._pending, self._sent = self._pending[-8:], [], 0
        return delta

    def flush(self) -> str:
        """Return what was held back, as it stands, and forget everything."""
        if not self._pending:
            self._context = []
            return ""
        delta = self._pending_text()[self._sent :]
        self._context, self._pending, self._sent = [], [], 0
        return delta

    def _pending_text(self) -> str:
        before = self._tokenizer.decode_text(self._context)
        return self._tokenizer.decode_text(self._context + self._pending)[len(before) :]


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of exactly ``vocabulary_size`` tokens or fewer, if ``texts`` hold no more pairs.

    It ignores case and loses nothing else. Padding, begin, end and role tokens are part of it;
    media and signal tokens are not (:class:`ConversationTokenizer` puts them behind).

    Raises:
        ValueError: ``vocabulary_size`` leaves no room for 256 bytes and the special tokens.

    """
    special = [PAD, BOS, EOS, *ROLE_TOKENS.values(), END]
    smallest = 256 + len(special)
    if vocabulary_size < smallest:
        raise ValueError(f"vocabulary_size is {vocabulary_size}; expected at least {smallest}.")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[*ROLE_TOKENS.values(), END],
    )


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    """Return a copy whose model alone decides, with no template, padding or truncation."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = []
    state["post_processor"] = state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))
