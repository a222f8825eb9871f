"""Text to the token ids of ImageBind's text tower.

Special tokens in a text are read as ordinary characters, so nobody can end a caption early.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
CLIP_FILES = ("vocab.json", "merges.txt")


class TextTokens:
    """A byte-level BPE vocabulary and the layout ``start, text..., end, 0, 0...`` that CLIP uses."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        """Wrap a tokenizer.

        Raises:
            ValueError: it lacks the start or end token, or the end token has not the highest id
                (the text tower finds the end of a text by it).

        """
        start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
        highest = tokenizer.get_vocab_size(with_added_tokens=True) - 1
        if start is None or end != highest:
            raise ValueError(
                f"The tokenizer has {START} at id {start} and {END} at id {end} of {highest}; expected both, "
                f"{END} last. Use the tokenizer that the text tower was trained with."
            )
        self.start, self.end = int(start), int(end)
        self.context_length = context_length
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path, context_length: int) -> TextTokens:
        """Read ``tokenizer.json``, or CLIP's ``vocab.json`` and ``merges.txt``, from a folder.

        Raises:
            FileNotFoundError: neither is there.
            ValueError: what is there is no tokenizer for this tower.

        """
        if (folder / TOKENIZER_FILE).is_file():
            return cls(_read_tokenizer(folder / TOKENIZER_FILE), context_length)
        if all((folder / name).is_file() for name in CLIP_FILES):
            try:
                clip = CLIPTokenizer.from_pretrained(folder)
            except Exception as error:  # tokenizers raises nothing narrower
                raise ValueError(
                    f"{' and '.join(CLIP_FILES)} in {folder} are no tokenizer: {error}. Copy them again."
                ) from error
            return cls(clip.backend_tokenizer, context_length)
        raise FileNotFoundError(
            f"{folder} has no tokenizer: expected {TOKENIZER_FILE}, or {' and '.join(CLIP_FILES)}. "
            "ImageBind-huge uses CLIP's vocabulary; copy these files from any CLIP model folder "
            "(for example openai/clip-vit-large-patch14)."
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int, context_length: int) -> TextTokens:
        """Learn a vocabulary of at most ``vocabulary_size`` tokens (at least 258) from texts."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size - 2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_special_tokens([START, END])
        return cls(tokenizer, context_length)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` into a folder."""
        (folder / TOKENIZER_FILE).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, start and end included."""
        return self.end + 1

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ``(len(texts), context_length)`` int64. Longer texts are cut before the end token."""
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for row, text in zip(ids, encoded, strict=True):
            tokens = [self.start, *text.ids[: self.context_length - 2], self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}. Copy it again.") from error
    if not isinstance(values, dict) or "model" not in values:
        raise ValueError(f"{path} has no entry 'model'; expected a file of the tokenizers library.")
    try:
        return Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is no tokenizer: {error}. Copy it again.") from error
