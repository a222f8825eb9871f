"""Small random language models for the tests of ``llm``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from encoders.media import Modality
from llm.model import LanguageModel
from llm.projectors import ProjectorConfig
from llm.template import Dialogue, MediaTokens, Message, SignalPart
from llm.tokenizer import ConversationTokenizer, train_tokenizer

WIDTH, ENCODER_WIDTH = 32, 12
SENTENCES = [
    "draw a big red bell at the top left",
    "here is a small blue drum, and how it sounds",
    "what does this picture sound like?",
]


@cache
def tiny_tokenizer() -> ConversationTokenizer:
    return ConversationTokenizer(train_tokenizer(SENTENCES, 300))


def llama(rows: int, **changes: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, **{**sizes, **changes}))


def qwen2(rows: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, tie_word_embeddings=True, **sizes))


def qwen3(rows: int) -> PreTrainedModel:
    """Queries and keys are normed, and heads are wider than the width divided by their number."""
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=rows, head_dim=2 * WIDTH // 4, **sizes))
    with torch.no_grad():  # norms of ones would hide whether each is used
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.uniform_(0.5, 1.5)
    return model


def gpt_neox(rows: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 256}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=rows, **sizes))


def tiny_model(base: Callable[..., PreTrainedModel] = llama, seed: int = 0, **changes: Any) -> LanguageModel:
    """An untrained model that reads all media and asks for media gladly."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    model = LanguageModel(base(tokenizer.base_vocabulary, **changes), tokenizer, tiny_projectors())
    with torch.no_grad():  # large enough for a random head to have preferences
        model.signal_rows.head.normal_(std=0.1)
        model.signal_rows.embedding.normal_(std=0.5)
    return model.eval()


def tiny_projectors() -> dict[Modality, ProjectorConfig]:
    sizes = {"encoder_width": ENCODER_WIDTH, "llm_width": WIDTH}
    return {
        Modality.IMAGE: ProjectorConfig(kind="resampler", num_queries=3, grid=(2,), **sizes),
        Modality.VIDEO: ProjectorConfig(kind="mlp", **sizes),
        Modality.AUDIO: ProjectorConfig(kind="linear", **sizes),
    }


def medium(modality: Modality, num_tokens: int = 4, seed: int = 0) -> MediaTokens:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return MediaTokens(modality, draw(num_tokens, ENCODER_WIDTH), draw(ENCODER_WIDTH))


def user(*parts: str | MediaTokens) -> Message:
    return Message("user", list(parts))


def assistant(*parts: str | SignalPart) -> Message:
    return Message("assistant", list(parts))


def mixed_dialogue() -> Dialogue:
    return [
        user("what is this?", medium(Modality.IMAGE), medium(Modality.VIDEO, 5)),
        assistant("a bell.", SignalPart(Modality.IMAGE), " and its sound", SignalPart(Modality.AUDIO)),
        user("and this?", medium(Modality.AUDIO)),
        assistant("a drum"),
    ]
