"""Files in the layout of NExT-GPT's checkpoints, of any size, from what is known of the release."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decoders.projection import OutputProjectionConfig
from encoders.media import Modality
from llm.lora import LoraOptions
from llm.nextgpt_release import ReleaseSizes
from tests import tiny_pipelines

VOCABULARY = 300
LETTERS = [chr(c) for c in range(33, 127)]
PIECES = ["<unk>", "<s>", "</s>", "\u2581", "\n", *LETTERS, "##", "\u2581##", "\u2581###", "\u2581bell"]

SMALL = ReleaseSizes(
    width=32,
    num_layers=32,
    base_vocabulary=VOCABULARY,
    base_rows=VOCABULARY + 1,
    context_length=256,
    encoder_width=12,
    lora=LoraOptions(rank=2, alpha=2, dropout=0.1),
)
SMALL_OUTPUTS = {
    modality: OutputProjectionConfig(
        llm_width=32, out_width=out_width, num_queries=queries, hidden_width=16, ffn_width=24
    )
    for modality, out_width, queries in (
        (Modality.IMAGE, tiny_pipelines.WIDTH, tiny_pipelines.TOKENS),
        (Modality.VIDEO, tiny_pipelines.WIDTH, tiny_pipelines.TOKENS),
        (Modality.AUDIO, tiny_pipelines.WIDTH, 1),
    )
}
SIZES: dict[str, Any] = {"sizes": SMALL, "outputs": SMALL_OUTPUTS, "rewritten": SMALL_OUTPUTS}
EMBEDDING = "llama_model.base_model.model.model.embed_tokens.weight"
HEAD = "llama_model.base_model.model.lm_head.weight"
FULL_OUTPUTS = {"": (77, 768), "_video": (77, 1024), "_audio": (1, 512)}


def released_names(
    rows: int, width: int, encoder: int, rank: int, hidden: int, ffn: int, outputs: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors of a third-stage file, spelled out one by one."""
    shapes: dict[str, tuple[int, ...]] = {
        "llama_model.base_model.model.model.embed_tokens.weight": (rows, width),
        "llama_model.base_model.model.lm_head.weight": (rows, width),
        "llama_proj.weight": (width, encoder),
        "llama_proj.bias": (width,),
    }
    for layer in range(32):
        for letter in "qkvo":
            module = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{letter}_proj"
            shapes[f"{module}.lora_A.default.weight"] = (rank, width)
            shapes[f"{module}.lora_B.default.weight"] = (width, rank)
    for suffix, (queries, out_width) in outputs.items():
        module = f"gen_text_hidden_fcs{suffix}.0"
        shapes[f"{module}.query_embs"] = (1, queries, hidden)
        shapes[f"{module}.fc.weight"], shapes[f"{module}.fc.bias"] = (hidden, width), (hidden,)
        shapes[f"{module}.model.weight"], shapes[f"{module}.model.bias"] = (out_width, hidden), (out_width,)
        for half, attentions in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "multihead_attn"])):
            shapes[f"{module}.tfm.{half}.norm.weight"] = shapes[f"{module}.tfm.{half}.norm.bias"] = (hidden,)
            for i in range(4):
                layer_name = f"{module}.tfm.{half}.layers.{i}"
                for attention in attentions:
                    shapes[f"{layer_name}.{attention}.in_proj_weight"] = (3 * hidden, hidden)
                    shapes[f"{layer_name}.{attention}.in_proj_bias"] = (3 * hidden,)
                    shapes[f"{layer_name}.{attention}.out_proj.weight"] = (hidden, hidden)
                    shapes[f"{layer_name}.{attention}.out_proj.bias"] = (hidden,)
                shapes[f"{layer_name}.linear1.weight"] = (ffn, hidden)
                shapes[f"{layer_name}.linear1.bias"] = (ffn,)
                shapes[f"{layer_name}.linear2.weight"] = (hidden, ffn)
                shapes[f"{layer_name}.linear2.bias"] = (hidden,)
                for norm in range(1, len(attentions) + 2):
                    shapes[f"{layer_name}.norm{norm}.weight"] = (hidden,)
                    shapes[f"{layer_name}.norm{norm}.bias"] = (hidden,)
    return shapes


def full_names() -> dict[str, tuple[int, ...]]:
    """Return the layout of ``nextgpt_7b_tiva_v0`` itself."""
    return released_names(32_038, 4096, 1024, 32, 512, 2048, FULL_OUTPUTS)


def small_names() -> dict[str, tuple[int, ...]]:
    """Return the same names with the shapes of ``SMALL`` and ``SMALL_OUTPUTS``."""
    outputs = {
        suffix: (config.num_queries, config.out_width)
        for suffix, config in zip(FULL_OUTPUTS, SMALL_OUTPUTS.values(), strict=True)
    }
    return released_names(VOCABULARY + 38, 32, 12, 2, 16, 24, outputs)


def small_tensors(like: Tensor | None = None) -> dict[str, Tensor]:
    """Return random half-precision tensors of these names; the embedding begins near ``like``."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.2).half() for name, shape in small_names().items()
    }
    if like is not None:
        name = "llama_model.base_model.model.model.embed_tokens.weight"
        own = like[:VOCABULARY]  # the base has a row more than its tokenizer has tokens
        tensors[name][:VOCABULARY] = (own + 0.1 * own.std() * tensors[name][:VOCABULARY]).half()
    return tensors


def earlier(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file from before the third stage: no LoRA, and so no peft in the names."""
    return {
        name.replace("base_model.model.", ""): value
        for name, value in tensors.items()
        if ".lora_" not in name
    }


def rewritten(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output projections under the names of the 2024 code, with the tables that it saves beside them."""
    names = {
        "gen_text_hidden_fcs.0.": "model.mm_output_img_projector.",
        "gen_text_hidden_fcs_video.0.": "model.mm_output_vid_projector.",
        "gen_text_hidden_fcs_audio.0.": "model.mm_output_aud_projector.",
    }
    state = {"model.embed_tokens.weight": torch.zeros(336, 32), "lm_head.weight": torch.zeros(336, 32)}
    for name, value in tensors.items():
        for old, new in names.items():
            if name.startswith(old):
                rest = name.removeprefix(old)
                layer, _, last = rest.partition(".")
                layer = {"fc": "in_fc", "model": "out_fc"}.get(layer, layer)
                state[new + layer + ("." + last if last else "")] = value
    return state


def save_pt(tensors: dict[str, Tensor], path: Path) -> Path:
    torch.save({name: torch.nn.Parameter(value) for name, value in tensors.items()}, path)
    return path


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of LLaMA's kind: sentencepiece's white space, a prefix at the start of every text."""
    pieces = [*PIECES, *(f"<piece{i}>" for i in range(VOCABULARY - len(PIECES)))]
    scores = [0.0 if i < 3 else -1.0 if len(p) > 1 and p in PIECES else -9.0 for i, p in enumerate(pieces)]
    backend = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=0))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("\n", behavior="isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_base(folder: Path, change: Callable[[LlamaConfig], None] | None = None) -> Tensor:
    """Write a base model that ``SMALL`` belongs to; return its embedding."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=32,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    if change:
        change(config)
    model = LlamaForCausalLM(config)
    model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)  # Vicuna v0's row for padding
    model.save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    return model.get_input_embeddings().weight.detach()


def read_json(path: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads(path.read_text())
    return values


def write_sentencepiece(
    path: Path,
    pieces: Sequence[tuple[str, float, int]],
    *,
    trainer: bytes = b"\x18\x02\x98\x02\x01",  # model_type 2, byte-pair encoding; byte_fallback true
    normalizer: bytes = b"\x0a\x08identity\x20\x00",  # name; remove_extra_whitespaces false
) -> Path:
    """Write a tokenizer.model: pieces of a text, a score and a kind, then the two settings, in that order."""
    data = b""
    for text, score, kind in pieces:
        name = text.encode()
        piece = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", score)
        piece += b"\x18" + bytes([kind]) if kind != 1 else b""
        data += b"\x0a" + bytes([len(piece)]) + piece
    for key, value in ((b"\x12", trainer), (b"\x1a", normalizer)):
        data += key + bytes([len(value)]) + value
    path.write_bytes(data)
    return path


def llama_pieces(words: Sequence[str]) -> list[tuple[str, float, int]]:
    """Pieces in LLaMA's order: unknown, start and end, all bytes, then ``words``, the best first."""
    first = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    octets = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    return [*first, *octets, *((word, -float(rank), 1) for rank, word in enumerate(words))]
