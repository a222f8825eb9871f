"""The language model's share of NExT-GPT's released checkpoint: names, shapes, and our folder from it.

Known is the 2023 layout, that of ``nextgpt_7b_tiva_v0``, and that of files saved before its third stage,
which have no LoRA. Reading the pickle is not done here, and neither are the output projections.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from encoders.media import Modality
from llm import checkpoint
from llm.lora import LoraOptions, write_lora
from llm.projectors import ProjectorConfig
from llm.role_words import VICUNA_V0
from llm.sentencepiece_model import read_sentencepiece
from llm.signals import SignalVocabulary
from llm.tokenizer import BOS, EOS, ConversationTokenizer

BASE_NAME = "Vicuna-7B v0 (LLaMA-1 with the delta lmsys/vicuna-7b-delta-v0)"
EMBEDDING, HEAD = "tables.embedding", "tables.head"
LEAST_AGREEMENT = 0.5
COMPARED_ROWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseSizes:
    """Sizes of the language model's share. The defaults are those of ``nextgpt_7b_tiva_v0``.

    ``base_rows``, those of the base's tables, are one more than its tokenizer has tokens: Vicuna v0 alone has
    a row for padding. LLaMA-1 and the later Vicunas have 32,000, so this tells it from them.
    """

    width: int = 4096
    num_layers: int = 32
    base_vocabulary: int = 32_000
    base_rows: int = 32_001
    context_length: int = 2048
    encoder_width: int = 1024
    lora: LoraOptions = field(default_factory=lambda: LoraOptions(dropout=0.1))
    signals: SignalVocabulary = field(default_factory=SignalVocabulary)

    @property
    def vocabulary(self) -> int:
        """Rows of the tables: base tokens, then media and signal tokens."""
        return self.base_vocabulary + len(self.signals.tokens)


def base_config(sizes: ReleaseSizes) -> dict[str, int | str]:
    """Return what is known of the ``config.json`` of the base that a checkpoint of ``sizes`` belongs to."""
    return {
        "model_type": "llama",
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.num_layers,
        "vocab_size": sizes.base_rows,
        "max_position_embeddings": sizes.context_length,
    }


def plain_name(name: str) -> str:
    """Return the one name of a tensor that files of different stages and peft versions name differently.

    ``tables.embedding`` and ``tables.head``, ``lora.<module>.lora_A.weight`` and ``llama_proj.*``; any
    other name comes back as it is.
    """
    if name == "input_embeddings.weight":  # in a whole state dict, the embedding under its second name
        return EMBEDDING
    inner = name.removeprefix("llama_model.").removeprefix("base_model.model.")
    if inner == name:
        return name
    if inner == "model.embed_tokens.weight":
        return EMBEDDING
    if inner == "lm_head.weight":
        return HEAD
    if ".lora_A." in inner or ".lora_B." in inner:
        return "lora." + inner.replace(".default.", ".")
    return name


def released_shapes(sizes: ReleaseSizes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of all tensors by :func:`plain_name`, in groups that are whole or absent."""
    table = (sizes.vocabulary, sizes.width)
    tables: dict[str, tuple[int, ...]] = {EMBEDDING: table, HEAD: table}
    lora: dict[str, tuple[int, ...]] = {}
    for layer in range(sizes.num_layers):
        for target in sizes.lora.targets:
            module = f"lora.model.layers.{layer}.self_attn.{target}"
            lora[f"{module}.lora_A.weight"] = (sizes.lora.rank, sizes.width)
            lora[f"{module}.lora_B.weight"] = (sizes.width, sizes.lora.rank)
    projection: dict[str, tuple[int, ...]] = {
        "llama_proj.weight": (sizes.width, sizes.encoder_width),
        "llama_proj.bias": (sizes.width,),
    }
    return {"tables": tables, "lora": lora, "input projection": projection}


def bridge_tensors(tensors: Mapping[str, Tensor], sizes: ReleaseSizes) -> dict[str, Tensor]:
    """Return what goes into ``bridge.safetensors``.

    The one input projection that the checkpoint has for all media comes three times, once per modality.
    Of the tables come the rows of the added tokens.
    """
    n = sizes.base_vocabulary
    bridge = {"signal_rows.embedding": tensors[EMBEDDING][n:], "signal_rows.head": tensors[HEAD][n:]}
    if "llama_proj.weight" in tensors:
        for modality in sizes.signals.modalities:
            for name in ("weight", "bias"):
                bridge[f"projectors.{modality}.project.{name}"] = tensors[f"llama_proj.{name}"].clone()
    return bridge


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what goes into ``adapter_model.safetensors``, under peft's names; empty without LoRA."""
    return {
        f"base_model.model.{name.removeprefix('lora.')}": tensor
        for name, tensor in tensors.items()
        if name.startswith("lora.")
    }


def write_folder(
    tensors: Mapping[str, Tensor], folder: Path, sizes: ReleaseSizes, base: Path | None, whole_tables: bool
) -> None:
    """Write a language model folder, each tensor in its own dtype.

    Args:
        tensors: checked against :func:`released_shapes`.
        folder: is made.
        sizes: of the checkpoint.
        base: folder of the base model, checked by :func:`check_base`. Its weights are linked into
            ``folder`` where the file system can, and copied where not. None leaves ``base/`` out.
        whole_tables: keep the rows of the base's own tokens too. The checkpoint trained them, so
            without them it speaks a little differently.

    """
    folder.mkdir(parents=True)
    checkpoint.save_tensors(bridge_tensors(tensors, sizes), folder / checkpoint.BRIDGE, None)
    if whole_tables:
        n = sizes.base_vocabulary
        tables = {"embedding": tensors[EMBEDDING][:n], "head": tensors[HEAD][:n]}
        checkpoint.save_tensors(tables, folder / checkpoint.TABLES, None)
    lora = adapter_tensors(tensors)
    if lora:
        write_lora(lora, sizes.lora, folder / checkpoint.ADAPTER)
    if base is not None:
        _put_base(base, folder / checkpoint.BASE, sizes)
    projector = ProjectorConfig(kind="linear", encoder_width=sizes.encoder_width, llm_width=sizes.width)
    readable = sizes.signals.modalities if "llama_proj.weight" in tensors else ()
    counts = {str(m): sizes.signals.count(m) for m in (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)}
    manifest = checkpoint.Manifest(
        base_config_sha256=checkpoint.config_digest(base) if base else None,
        base_config=base_config(sizes),
        llm_width=sizes.width,
        base_vocabulary=sizes.base_vocabulary,
        added_tokens=list(sizes.signals.tokens),
        signals=counts,
        projectors=checkpoint.Manifest.describe(dict.fromkeys(readable, projector)),
        lora=bool(lora),
        base_tables=whole_tables,
        role_words=VICUNA_V0,
    )
    (folder / checkpoint.MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def check_base(base: Path, tensors: Mapping[str, Tensor], sizes: ReleaseSizes) -> float:
    """Hold a base model against the checkpoint, without loading its weights.

    Returns:
        The mean cosine, in [-1, 1], between rows of the base's embedding and the checkpoint's: near 1
        for the base that the checkpoint was trained on.

    Raises:
        ValueError: a file is missing or damaged; the base is no LLaMA, or has another width, depth,
            vocabulary or context; or its embedding has nothing to do with the checkpoint's.

    """
    path = base / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected the folder of {BASE_NAME}. Give that with --base.")
    config = _read_json(path)
    for name, expected in base_config(sizes).items():
        if (given := config.get(name)) != expected:
            raise ValueError(
                f"{path} has {name} {given!r}; this checkpoint was trained on a base with {expected!r}. "
                f"Use {BASE_NAME}, not LLaMA itself, a later Vicuna or Llama 2."
            )
    read_base_tokenizer(base, sizes)
    _expect_all_shards(base)
    table = _base_embedding(base, sizes)
    _expect_all_tensors(base, config)
    picked = torch.linspace(0, sizes.base_vocabulary - 1, min(COMPARED_ROWS, sizes.base_vocabulary)).long()
    ours, theirs = tensors[EMBEDDING][picked].float(), table[picked].float()
    agreement = float(F.cosine_similarity(ours, theirs, dim=-1).mean())
    if not agreement >= LEAST_AGREEMENT:
        raise ValueError(
            f"The embedding in {base} has a mean cosine of {agreement:.2f} with the checkpoint's; expected "
            f"at least {LEAST_AGREEMENT}. It is another model of the same size. Use {BASE_NAME}."
        )
    return agreement


def read_base_tokenizer(base: Path, sizes: ReleaseSizes) -> ConversationTokenizer:
    """Read the base's tokenizer, less the tokens that were added behind its own vocabulary.

    ``tokenizer.model`` goes before ``tokenizer.json``: it is what the checkpoint was trained with, and a fast
    tokenizer that transformers 5 makes of it treats texts that begin with a space in another way.

    Raises:
        ValueError: there is neither file, or it has another vocabulary.

    """
    path = base / "tokenizer.model"
    if path.is_file():
        backend = read_sentencepiece(path)
    else:
        path = base / "tokenizer.json"
        backend = _fast_tokenizer(path, sizes)
    given = backend.get_vocab_size(with_added_tokens=True)
    if given != sizes.base_vocabulary:
        raise ValueError(
            f"{path} has {given} tokens; this checkpoint was trained with {sizes.base_vocabulary}. "
            f"Use the tokenizer of {BASE_NAME}."
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, unk_token="<unk>"
    )
    return ConversationTokenizer(tokenizer, sizes.signals, VICUNA_V0)


def _fast_tokenizer(path: Path, sizes: ReleaseSizes) -> Tokenizer:
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no tokenizer; expected tokenizer.model or tokenizer.json there. Copy "
            f"tokenizer.model from the folder that the weights came from."
        )
    state = _read_json(path)
    try:
        state["added_tokens"] = [t for t in state.get("added_tokens", []) if t["id"] < sizes.base_vocabulary]
        return Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is no tokenizer: {error}. Use that of {BASE_NAME}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or is cut off: {error}. Copy or download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected an object. Download it again.")
    return values


def _expect_all_shards(base: Path) -> None:
    path = base / "model.safetensors.index.json"
    if not path.is_file():
        return
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{path} has no weight_map, so it is no index of weights. Download it again.")
    if absent := sorted({str(name) for name in shards.values() if not (base / str(name)).is_file()}):
        raise ValueError(
            f"{path} names {len(absent)} file{'s' if len(absent) > 1 else ''} that {base} lacks: "
            f"{', '.join(absent)}. Copy or download the whole folder."
        )


def _expect_all_tensors(base: Path, config: dict[str, Any]) -> None:
    """Hold names and shapes of all weights against what the configuration describes."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except (KeyError, RuntimeError, StrictDataclassError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{base / 'config.json'} describes no model that can be built: {error}. Use that of {BASE_NAME}."
        ) from error
    given: dict[str, tuple[int, ...]] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            given |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name, parameter in model.named_parameters():
        if given.get(name) != tuple(parameter.shape):
            has = f"has {name} of shape {given[name]}" if name in given else f"lacks {name}"
            raise ValueError(
                f"{base} {has}; its config.json asks for {tuple(parameter.shape)}. Copy or download the "
                f"whole folder of {BASE_NAME}."
            )


def _base_embedding(base: Path, sizes: ReleaseSizes) -> Tensor:
    name = "model.embed_tokens.weight"
    table: Tensor | None = None
    for path in sorted(base.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118
                    table = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file: {error}. Copy or download it again."
            ) from error
    if table is None:
        raise ValueError(
            f"{base} holds no safetensors with {name}. If its weights are pickles (.bin), turn them into "
            f"safetensors first: patchbay convert pickles {base}"
        )
    if tuple(table.shape) != (sizes.base_rows, sizes.width):
        raise ValueError(
            f"The embedding in {base} has shape {tuple(table.shape)}, and its config.json says "
            f"{(sizes.base_rows, sizes.width)}. Use the weights and the configuration of {BASE_NAME}."
        )
    return table


def _put_base(base: Path, folder: Path, sizes: ReleaseSizes) -> None:
    folder.mkdir()
    files = [base / "config.json", base / "generation_config.json", *base.glob("*.safetensors*")]
    for path in files:
        if path.is_file():
            source = path.resolve()
            try:
                os.link(source, folder / path.name)
            except OSError:
                shutil.copyfile(source, folder / path.name)
    read_base_tokenizer(base, sizes).save(folder)
