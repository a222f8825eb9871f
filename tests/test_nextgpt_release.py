"""The released checkpoint at its true size, on the meta device: every tensor has its place."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from decoders import nextgpt_release as output_side
from decoders.projection import OutputProjection
from encoders.media import Modality
from llm import nextgpt_release as llm_side
from llm.lora import LoraOptions, put_lora
from llm.model import SignalRows
from llm.nextgpt_release import ReleaseSizes
from llm.projectors import ProjectorConfig, build_projector
from tests.nextgpt_files import FULL_OUTPUTS, full_names, small_names


def plain_shapes() -> dict[str, tuple[int, ...]]:
    return {output_side.plain_name(llm_side.plain_name(name)): shape for name, shape in full_names().items()}


def plain_tensors() -> dict[str, Tensor]:
    shapes = plain_shapes()
    return {name: torch.empty(s, dtype=torch.float16, device="meta") for name, s in shapes.items()}


def shapes_of(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def test_the_release_has_its_published_number_of_tensors_and_parameters() -> None:
    shapes = full_names()

    assert len(shapes) == len(small_names()) == 647
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 396_045_568


def test_every_name_and_shape_of_the_release_is_expected_and_no_other() -> None:
    groups = llm_side.released_shapes(ReleaseSizes()) | output_side.released_shapes(output_side.RELEASED)

    expected = {name: shape for group in groups.values() for name, shape in group.items()}
    assert expected == plain_shapes()
    assert {title: len(group) for title, group in groups.items()} == {
        "tables": 2,
        "lora": 256,
        "input projection": 2,
        "image output projection": 129,
        "video output projection": 129,
        "audio output projection": 129,
    }


def test_names_without_peft_mean_the_same() -> None:
    plain = llm_side.plain_name

    assert plain("llama_model.model.embed_tokens.weight") == "tables.embedding"
    assert plain("llama_model.lm_head.weight") == "tables.head"
    assert plain("llama_model.model.layers.0.mlp.up_proj.weight") == (
        "llama_model.model.layers.0.mlp.up_proj.weight"
    )
    assert plain("llama_model.base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight") == (
        "lora.model.layers.3.self_attn.q_proj.lora_A.weight"
    )


def test_lora_fits_a_vicuna_of_true_size() -> None:
    with torch.device("meta"):
        base = LlamaForCausalLM(
            LlamaConfig(vocab_size=32_001, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32)
        )
        model = put_lora(base, LoraOptions())

    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert shapes_of(llm_side.adapter_tensors(plain_tensors())) == shapes_of(expected)


def test_the_bridge_fits_a_language_model_of_true_size() -> None:
    config = ProjectorConfig(kind="linear", encoder_width=1024, llm_width=4096)
    with torch.device("meta"):
        rows = SignalRows(38, torch.empty(32_000, 4096), torch.empty(32_000, 4096))
        projector = build_projector(config)
    expected = {f"signal_rows.{name}": tuple(p.shape) for name, p in rows.named_parameters()}
    for modality in ("image", "video", "audio"):
        expected |= {f"projectors.{modality}.{n}": tuple(p.shape) for n, p in projector.named_parameters()}

    assert shapes_of(llm_side.bridge_tensors(plain_tensors(), ReleaseSizes())) == expected


def test_output_projections_of_true_size_take_the_release_strictly() -> None:
    tensors = plain_tensors()
    for modality, config in output_side.RELEASED.items():
        prefix = f"{modality}."
        state = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        with torch.device("meta"):
            projection = OutputProjection(config)
        projection.load_state_dict(state, assign=True, strict=True)

    sizes = [(c.num_queries, c.out_width) for c in output_side.RELEASED.values()]
    assert sizes == list(FULL_OUTPUTS.values())
    assert output_side.REWRITTEN[Modality.IMAGE].out_width == 1024
