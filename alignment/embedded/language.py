"""The base language model of the embedded preset: a small Llama, trained on Toybox in words alone.

It never sees a medium or a signal. Where a person would show something, the text says what is
shown in brackets, so that the base learns to talk about things that it is told; stage 1 later puts
projected features where the bracket was.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignment.fitting import FitConfig, fit, half_precision, prefer_plain_attention, training_device
from alignment.toybox.directions import DIRECTIONS, make
from alignment.toybox.exercise import Exercise, FreshScenes
from alignment.toybox.grammar import caption
from alignment.toybox.world import Clip, Look, Scene
from llm import checkpoint
from llm.model import LanguageModel, mean_loss
from llm.signals import SignalVocabulary
from llm.template import Dialogue, Message
from llm.tokenizer import ConversationTokenizer, train_tokenizer

SIGNALS = SignalVocabulary(image=16, video=16, audio=16)
"""The lengths that ``patchbay train link-designs`` found best."""
WIDTH, LAYERS = 192, 9
BATCH = 32
SHARES = {
    "text-to-many": 6.0,
    "conversation": 3.0,
    "new-subject": 4.0,
    "talk": 3.0,
    "decision": 4.0,
    "text+image-to-image": 3.0,
    "text+audio-to-audio": 1.5,
    "text+video-to-video": 3.0,
    "beyond-words": 3.0,
}
"""How often a direction is met where that is not once: the more there is to keep apart, the more often."""


def in_words(exercise: Exercise) -> Dialogue:
    """Return the exercise with its answer as a dialogue of texts only."""
    dialogue = [
        Message(turn.role, [" ".join(filter(None, (_bracketed(part, turn.role) for part in turn.parts)))])
        for turn in exercise.turns
    ]
    spoken = [part for part in exercise.answer if isinstance(part, str)]
    return [*dialogue, Message("assistant", [", ".join(spoken)])]


def kept_tokenizer(folder: Path) -> ConversationTokenizer:
    """Return the tokenizer in ``folder``, learning it from the dialogues on the first call."""
    if not folder.is_dir():
        _learnt_tokenizer().save(folder)
    return ConversationTokenizer.load(folder, SIGNALS)


def with_signals(model: LanguageModel, signals: SignalVocabulary) -> LanguageModel:
    """Return the base of ``model`` with fresh signals of other lengths, and without projectors.

    Raises:
        ValueError: its tokenizer has added tokens beside media and signals, whose ids would shift.

    """
    own = model.tokenizer
    if own.added_tokens != own.signals.tokens:
        raise ValueError(
            f"The tokenizer has added {own.added_tokens}; expected media and signal tokens alone. Only the "
            "base that `patchbay train language` makes can get other signals."
        )
    described = json.loads(own.backing.backend_tokenizer.to_str())
    described["added_tokens"] = [
        token for token in described["added_tokens"] if token["id"] < own.base_vocabulary
    ]
    backing = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        bos_token=own.backing.bos_token,
        eos_token=own.backing.eos_token,
        pad_token=own.backing.pad_token,
    )
    return LanguageModel(model.causal_lm, ConversationTokenizer(backing, signals), {})


def _learnt_tokenizer() -> ConversationTokenizer:
    rng = random.Random("llm-vocabulary")
    texts = []
    for _ in range(400):
        for direction in DIRECTIONS:
            dialogue = in_words(make(direction, rng, FreshScenes(rng)))
            texts += [part for message in dialogue for part in message.parts if isinstance(part, str)]
    return ConversationTokenizer(train_tokenizer(texts, 1200), SIGNALS)


def build_base(tokenizer: ConversationTokenizer) -> LanguageModel:
    """Return the untrained base. Each of its layers passes on what it gets, until it is trained."""
    config = LlamaConfig(
        vocab_size=tokenizer.base_vocabulary, hidden_size=WIDTH, intermediate_size=512,
        num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=6,
        max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    for layer in llama.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return LanguageModel(llama, tokenizer, {})


def grown(base: Path, tokenizer: ConversationTokenizer) -> LanguageModel:
    """Return a base with the weights in a folder; layers that it has beside those change nothing yet.

    Raises:
        ValueError: the folder has weights for which there is no place.

    """
    model = build_base(tokenizer)
    found = model.causal_lm.load_state_dict(
        checkpoint.load_base(base, torch.float32).state_dict(), strict=False
    )
    if found.unexpected_keys:
        raise ValueError(
            f"{base} has {len(found.unexpected_keys)} weights beside those of a base with {LAYERS} layers, "
            f"the first of them {found.unexpected_keys[0]}. Adopt a base with as many layers or fewer."
        )
    return model


def train_base(folder: Path, config: FitConfig) -> LanguageModel:
    """Train the base on every direction, the hard ones more often."""
    model = build_base(kept_tokenizer(folder / "tokenizer"))
    model.train_only({"base"})
    prefer_plain_attention(model.causal_lm)

    def losses(step: int) -> dict[str, Tensor]:
        rng = config.randomness(step)
        names = rng.choices(
            tuple(DIRECTIONS), weights=[SHARES.get(name, 1.0) for name in DIRECTIONS], k=BATCH
        )
        dialogues = [in_words(make(name, rng, FreshScenes(rng))) for name in names]
        batches = [batch.to(training_device()) for batch in model.collate_by_length(dialogues)]
        with half_precision():
            return {"words": mean_loss([model(batch) for batch in batches])}

    fit("language model", model, losses, config, folder)
    return model.eval()


def _bracketed(part: str | Scene, role: str) -> str:
    if isinstance(part, str):
        return part
    if role == "assistant":
        return ""
    kind = "picture" if isinstance(part, Look) else "video" if isinstance(part, Clip) else "sound"
    return f"[{kind}: {caption(part)}]"
