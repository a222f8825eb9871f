"""LoRA per request in the language model: right for every row, whoever else is in the pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm.engine import Engine
from llm.generate import GenerationOptions, SignalReady, generate
from llm.lora import LoraOptions
from llm.model import LanguageModel
from llm.request_lora import LoraRows, RequestLora, read_request_lora
from tests.lora_files import add_to, change_json, change_tensors, write_lm_lora
from tests.test_language_engine import assert_same, end_of, run
from tests.tiny_llm import gpt_neox, llama, tiny_model, user

WEIGHTS = "adapter_model.safetensors"
OPTIONS = GenerationOptions(max_new_tokens=36, max_signals=1)


def read(name: str, folder: Path, model: LanguageModel) -> RequestLora:
    return read_request_lora(name, folder, model.causal_lm, torch.float32)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model()


@pytest.fixture(scope="module")
def merged(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two adapters: their folders, and by name models with their product in the weights themselves."""
    models: dict[str, Any] = {}
    for seed, name in enumerate(("pirate", "poet"), 1):
        folder = tmp_path_factory.mktemp(name)
        changes: dict[str, Any] = {} if name == "pirate" else {"r": 5, "use_rslora": True}
        added = write_lm_lora(model.causal_lm, folder, seed, **changes)
        models[name] = folder, copy.deepcopy(model)
        add_to(models[name][1].causal_lm, added)
    return models


@pytest.fixture(scope="module")
def pirate(model: LanguageModel, merged: dict[str, Any]) -> RequestLora:
    return read("pirate", merged["pirate"][0], model)


@pytest.fixture(scope="module")
def poet(model: LanguageModel, merged: dict[str, Any]) -> RequestLora:
    return read("poet", merged["poet"][0], model)


def test_rows_of_one_pass_are_what_merged_models_give(
    model: LanguageModel, merged: dict[str, Any], pirate: RequestLora, poet: RequestLora
) -> None:
    embeddings = torch.randn(4, 7, model.width)
    rows = LoraRows(model.causal_lm)

    with torch.no_grad():
        plain = model.run(embeddings)
        with rows.over([pirate, None, poet, pirate]):
            mixed = model.run(embeddings)
        with rows.over([poet] * 4):
            all_poet = model.run(embeddings)
        expected = {name: other.run(embeddings) for name, (_, other) in merged.items()}
        after = model.run(embeddings)

    torch.testing.assert_close(mixed[[0, 3]], expected["pirate"][[0, 3]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[2], expected["poet"][2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], plain[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(all_poet, expected["poet"], atol=1e-5, rtol=1e-4)
    assert torch.equal(after, plain)
    assert (mixed[0] - plain[0]).abs().max() > 0.05


def test_requests_with_other_adapters_in_one_engine_are_what_they_are_alone(
    model: LanguageModel, merged: dict[str, Any], pirate: RequestLora, poet: RequestLora
) -> None:
    dialogues = [
        [user(words)] for words in ("draw a bell", "and how?", "draw a bell", "draw a bell", "and how?")
    ]
    loras = [pirate, poet, None, poet, None]
    engine = Engine(model, slots=3, step_tokens=8)

    requests = [engine.prepare(d, OPTIONS, lora) for d, lora in zip(dialogues, loras, strict=True)]
    events = run(engine, requests)

    said = []
    for request, dialogue, lora in zip(requests, dialogues, loras, strict=True):
        speaker = merged[lora.name][1] if lora else model
        assert_same(events[request], list(generate(speaker, dialogue, OPTIONS)))
        said.append(end_of(events[request]).ids)
    assert len({said[0], said[2], said[3]}) == 3
    assert any(isinstance(event, SignalReady) for each in events.values() for event in each)
    assert engine.stats.passes < sum(len(end_of(each).ids) for each in events.values())


def test_the_model_keeps_its_own_lora_below(tmp_path: Path) -> None:
    model = tiny_model()
    model.add_lora(LoraOptions(rank=2, alpha=2))
    with torch.no_grad():
        for parameter in model.parameters_of("lora").values():
            parameter.normal_(std=0.2)
    model.eval()
    both = copy.deepcopy(model)
    both.merge_adapter()
    add_to(both.causal_lm, write_lm_lora(copy.deepcopy(both.causal_lm), tmp_path, 3))
    lora, embeddings = read("x", tmp_path, model), torch.randn(2, 5, model.width)

    with torch.no_grad(), LoraRows(model.causal_lm).over([lora, lora]):
        hidden = model.run(embeddings)

    torch.testing.assert_close(hidden, both.run(embeddings), atol=1e-5, rtol=1e-4)


def test_what_one_adapter_computed_is_not_used_by_another(
    model: LanguageModel, pirate: RequestLora, poet: RequestLora
) -> None:
    engine = Engine(model, slots=4)
    dialogue = [user("what does this picture sound like?")]
    reused = []
    for lora in (None, pirate, poet, pirate, None):
        before = engine.stats.reused_tokens
        run(engine, [engine.prepare(dialogue, OPTIONS, lora)])
        reused.append(engine.stats.reused_tokens - before)

    assert reused[:3] == [0, 0, 0]
    assert min(reused[3:]) > 8


def test_an_engine_that_saw_adapters_speaks_as_before_without(
    model: LanguageModel, pirate: RequestLora
) -> None:
    expected = list(generate(model, [user("and how?")], OPTIONS))
    engine = Engine(model)
    run(engine, [engine.prepare([user("and how?")], OPTIONS, pirate)])
    request = engine.prepare([user("and how?")], OPTIONS)

    assert_same(run(engine, [request])[request], expected)


@pytest.mark.parametrize(
    ("base", "targets"), [(llama, ["o_proj", "up_proj"]), (gpt_neox, ["query_key_value", "dense_h_to_4h"])]
)
def test_layers_are_found_by_their_names_in_any_base(
    base: Callable[..., PreTrainedModel], targets: list[str], tmp_path: Path
) -> None:
    model = tiny_model(base)
    added = write_lm_lora(model.causal_lm, tmp_path, 4, target_modules=targets, rank_pattern={targets[0]: 1})
    lora, embeddings = read("x", tmp_path, model), torch.randn(1, 5, model.width)
    ranks = {layer.rpartition(".")[2]: len(down) for layer, (down, _) in lora.factors.items()}
    assert ranks == {targets[0]: 1, targets[1]: 3}

    with torch.no_grad(), LoraRows(model.causal_lm).over([lora]):
        hidden = model.run(embeddings)
    add_to(model.causal_lm, added)

    torch.testing.assert_close(hidden, model.run(embeddings), atol=1e-5, rtol=1e-4)


def test_half_precision_takes_half_the_memory_and_another_content_has_another_digest(
    model: LanguageModel, merged: dict[str, Any], pirate: RequestLora, poet: RequestLora, tmp_path: Path
) -> None:
    half = read_request_lora("x", merged["pirate"][0], model.causal_lm, torch.bfloat16)

    sizes = 2 * (3 * (32 + 32) + 3 * (32 + 16) + 3 * (48 + 32))
    assert (pirate.num_bytes, half.num_bytes) == (4 * sizes, 2 * sizes)
    assert pirate.digest == half.digest != poet.digest
    assert {half.dtype for pair in half.factors.values() for half in pair} == {torch.bfloat16}


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "config", "complaint"),
    [
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 32)}),
            {},
            r"shape \(4, 32\); expected \(3, 32\)",
        ),
        (
            lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(40, 3)}),
            {},
            r"\(40, 3\); expected \(32, 3\)",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.full((3, 32), torch.inf)}),
            {},
            r"holds NaN or infinity",
        ),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), {}, r"has only lora_A of model.layers.0.self_attn.q_proj"),
        (lambda t: t.clear(), {}, r"is empty; expected lora_A and lora_B"),
        (
            rename("v_proj", "qkv"),
            {},
            r"is for .*qkv, .* end in down_proj, gate_proj, k_proj, o_proj, q_proj",
        ),
        (rename("layers.1.", "layers.7."), {}, r"is for model.layers.7.* trained on LlamaForCausalLM"),
        (
            rename("lora_A", "lora_magnitude_vector"),
            {},
            r"expected base_model.model.<layer>.lora_A.weight and",
        ),
        (lambda t: None, {"r": 4}, r"lora_A .* expected \(4, \d+\): rank 4 by adapter_config.json"),
        (lambda t: None, {"peft_type": "IA3"}, r"describes 'IA3'; expected peft_type LORA"),
        (lambda t: None, {"use_dora": True, "bias": "all"}, r"asks for use_dora, bias 'all'; expected plain"),
        (
            lambda t: None,
            {"init_lora_weights": "pissa"},
            r"init_lora_weights 'pissa'.*merge it into the base",
        ),
        (lambda t: None, {"modules_to_save": ["lm_head"]}, r"asks for modules_to_save"),
        (lambda t: None, {"target_modules": ["q_proj", "o_proj"]}, r"no tensors for o_proj, which"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_expected(
    model: LanguageModel, tmp_path: Path, change: Any, config: dict[str, Any], complaint: str
) -> None:
    write_lm_lora(model.causal_lm, tmp_path, 1)
    change_tensors(tmp_path / WEIGHTS, change)
    change_json(tmp_path / "adapter_config.json", **config)

    with pytest.raises(ValueError, match=complaint):
        read("x", tmp_path, model)


def test_the_head_is_not_adapted_per_request(model: LanguageModel, tmp_path: Path) -> None:
    write_lm_lora(model.causal_lm, tmp_path, 1, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"is for lm_head, which .* cannot be adapted per request"):
        read("x", tmp_path, model)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("adapter_config.json", r"config.json is missing; an adapter"), (WEIGHTS, r"patchbay convert pickles")],
)
def test_a_missing_file_is_named(model: LanguageModel, tmp_path: Path, name: str, complaint: str) -> None:
    write_lm_lora(model.causal_lm, tmp_path, 1)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=complaint):
        read("x", tmp_path, model)


def test_a_file_that_is_cut_off_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    write_lm_lora(model.causal_lm, tmp_path, 1)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read("x", tmp_path, model)
