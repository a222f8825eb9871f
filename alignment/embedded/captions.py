"""The decoders' own text encoders: tokenizers, and a first lesson in reading captions.

The first lesson asks for the attributes of the scene that a caption describes. It costs two
minutes and no picture, and it means that the denoiser starts from a condition that already
separates what must look different.

Shape letters in this file:
    B batch   L caption tokens   D width
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    ClapTextConfig,
    ClapTextModelWithProjection,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    RobertaTokenizer,
)

from alignment.fitting import FitConfig, fit, prefer_plain_attention, training_device
from alignment.toybox import world
from alignment.toybox.grammar import caption, describe, with_typos
from alignment.toybox.world import Scene

Kind = Literal["look", "clip", "sound"]
CAPTION_TOKENS = 24
WIDTH = 128
FEED_WIDTH = 192
SAMPLERS: Mapping[Kind, Callable[[random.Random], Scene]] = {
    "look": world.sample_look,
    "clip": world.sample_clip,
    "sound": world.sample_sound,
}
CLASSES: dict[str, tuple[str | int | None, ...]] = {
    "thing": world.THINGS,
    "colour": world.COLOURS,
    "size": world.SIZES,
    "count": world.COUNTS,
    "place": (*world.PLACES, None),
    "ground": world.GROUNDS,
    "motion": world.MOTIONS,
    "tempo": world.TEMPOS,
    "pitch": world.PITCHES,
    "loudness": world.LOUDNESSES,
}


def spoken(scene: Scene, rng: random.Random) -> str:
    """Return a caption to train on: the plain one two times in three, else one of the many."""
    if rng.random() < 0.67:
        return caption(scene)
    text = describe(scene, rng)
    return with_typos(text, rng) if rng.random() < 0.05 else text


def train_tokenizer(kind: Kind, vocabulary_size: int = 800) -> PreTrainedTokenizerBase:
    """Return a CLIP tokenizer (pictures, videos) or a RoBERTa tokenizer (sounds) for captions."""
    rng = random.Random(f"tokenizer-{kind}")
    texts = [describe(SAMPLERS[kind](rng), rng) for _ in range(6000)]
    blank: PreTrainedTokenizerBase = RobertaTokenizer() if kind == "sound" else CLIPTokenizer()
    tokenizer: PreTrainedTokenizerBase = blank.train_new_from_iterator(texts, vocabulary_size)
    tokenizer.model_max_length = CAPTION_TOKENS
    _number_letters(tokenizer)
    return tokenizer


def _number_letters(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the letters that merges start from their ids in alphabetical order.

    Training numbers letters at the end of a word at random, another way each time.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary: dict[str, int] = state["model"]["vocab"]
    merged = {first + second for first, second in state["model"]["merges"]}
    letters = sorted(set(vocabulary) - merged - {token["content"] for token in state["added_tokens"]})
    vocabulary.update(zip(letters, sorted(vocabulary[letter] for letter in letters), strict=True))
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def kept_tokenizer(kind: Kind, folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in ``folder``, training it on the first call."""
    if not folder.is_dir():
        train_tokenizer(kind).save_pretrained(folder)
    kept: PreTrainedTokenizerBase
    kept = (
        RobertaTokenizer.from_pretrained(folder) if kind == "sound" else CLIPTokenizer.from_pretrained(folder)
    )
    return kept


def build(
    kind: Kind, tokenizer: PreTrainedTokenizerBase, feed_width: int = FEED_WIDTH
) -> CLIPTextModel | ClapTextModelWithProjection:
    """Return an untrained text encoder of the class that the decoder's pipeline expects."""
    sizes: dict[str, Any]
    sizes = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "num_hidden_layers": 2,
             "num_attention_heads": 4, "intermediate_size": feed_width}  # fmt: skip
    ids: dict[str, Any]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    if kind == "sound":
        positions = CAPTION_TOKENS + int(ids["pad_token_id"]) + 1
        config = ClapTextConfig(**sizes, **ids, max_position_embeddings=positions, projection_dim=WIDTH,
                                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
        return ClapTextModelWithProjection(config)
    return CLIPTextModel(CLIPTextConfig(**sizes, **ids, max_position_embeddings=CAPTION_TOKENS))


class CaptionEncoder(nn.Module):
    """A text encoder with its tokenizer, called the way its diffusers pipeline calls it."""

    def __init__(self, kind: Kind, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
        super().__init__()
        self.kind, self.tokenizer, self.model = kind, tokenizer, model

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return ``(B, L, D)`` states for pictures and videos, unit ``(B, D)`` vectors for sounds."""
        batch = self.tokenizer(
            list(texts), padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt"
        )
        batch = batch.to(next(self.model.parameters()).device)
        if self.kind == "sound":
            out = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).text_embeds
            return F.normalize(out, dim=-1)
        states: Tensor = self.model(batch["input_ids"]).last_hidden_state  # (B, L, D)
        return states


class _Attributes(nn.Module):
    def __init__(self, encoder: CaptionEncoder, names: Sequence[str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(CLASSES[name])) for name in names})

    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        states = self.encoder(texts)
        pooled = states.mean(1) if states.ndim == 3 else 8 * states  # (B, D)
        return {name: head(pooled) for name, head in self.heads.items()}


def train_caption_encoder(
    kind: Kind, folder: Path, config: FitConfig, batch_size: int = 64
) -> CaptionEncoder:
    """Teach a text encoder to tell the attributes of the described scene apart.

    With a ``config.json`` in ``folder``, as an adopted run has it, it is as wide as that one.
    """
    tokenizer = kept_tokenizer(kind, folder / "tokenizer")
    begun = folder / "config.json"
    feed_width = json.loads(begun.read_text())["intermediate_size"] if begun.is_file() else FEED_WIDTH
    plain = build(kind, tokenizer, feed_width)
    prefer_plain_attention(plain)
    encoder = CaptionEncoder(kind, tokenizer, plain)
    example = SAMPLERS[kind](random.Random(0))
    names = [name for name in CLASSES if hasattr(example, name)]
    model = _Attributes(encoder, names)

    def losses(step: int) -> dict[str, Tensor]:
        rng = config.randomness(step)
        scenes = [SAMPLERS[kind](rng) for _ in range(batch_size)]
        logits = model([spoken(scene, rng) for scene in scenes])
        return {
            name: F.cross_entropy(
                logits[name],
                torch.tensor(
                    [CLASSES[name].index(getattr(scene, name)) for scene in scenes], device=training_device()
                ),
            )
            for name in names
        }

    fit(f"{kind} captions", model, losses, config, folder)
    return encoder
