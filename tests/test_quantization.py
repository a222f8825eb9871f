from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from encoders.media import Modality
from llm.adapters import is_adapter_name
from llm.engine import Engine
from llm.generate import GenerationOptions, generate
from llm.quantization import Quantization, quantizable, quantize, quantized_bytes
from llm.request_lora import LoraRows, read_request_lora
from services.boxes import PromptMessage, SpeechOptions, SpokenSignal, Words
from services.errors import PresetProblem
from services.footprint import boxes_of
from services.local_language_model import LocalLanguageModel
from services.memory_plan import changed
from services.messages import Role
from services.presets import load_preset
from tests.held import held_bytes
from tests.lora_files import add_to, write_lm_lora
from tests.test_language_engine import end_of, run
from tests.tiny_llm import llama, qwen2, tiny_model, user

KINDS: tuple[Quantization, ...] = ("int8", "nf4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_weights_take_the_bytes_that_were_predicted(kind: Quantization, dtype: torch.dtype) -> None:
    base = llama(64).to(dtype)
    size = dtype.itemsize
    predicted = held_bytes(base) + sum(
        quantized_bytes(layer.out_features, layer.in_features, kind, size) - layer.weight.numel() * size
        for _, layer in quantizable(base)
    )

    quantize(base, kind)

    assert held_bytes(base) == predicted


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("nf4", 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_model_says_nearly_the_same(kind: Quantization, most: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = llama(64).to(dtype).eval().requires_grad_(False)
    ids = torch.arange(12)[None]
    whole = base(ids).logits.float()

    quantize(base, kind)

    said = base(ids).logits
    assert said.dtype == dtype
    change = (said.float() - whole).norm() / whole.norm()
    assert 0 < change < most


def test_only_linear_layers_inside_the_base_are_quantised() -> None:
    model = tiny_model(qwen2)
    names = [name for name, _ in quantizable(model.causal_lm)]
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if "layers" not in name}

    quantize(model.causal_lm, "nf4")

    assert len(names) == 2 * 7  # q, k, v, o, gate, up, down
    assert not any(is_adapter_name(name) or "lm_head" in name for name in names)
    for name, tensor in kept.items():
        assert torch.equal(model.get_parameter(name), tensor), name


def test_a_weight_that_makes_no_whole_blocks_is_left_alone() -> None:
    base = llama(64)
    base.base_model.layers[0].mlp.extra = nn.Linear(3, 5)

    assert not any(name.endswith("extra") for name, _ in quantizable(base))


def test_without_the_library_the_error_says_what_to_install(
    tiny_preset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.quantization.is_installed", lambda: False)
    preset = changed(load_preset(str(tiny_preset)), {"language_model.quantization": "int8"})

    with pytest.raises(PresetProblem, match=r"needs torchao.*pip install -r requirements\.lock"):
        LocalLanguageModel(preset).load()


@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_a_request_is_added_to_the_quantised_weights_of_its_rows_only(
    kind: Quantization, tmp_path: Path
) -> None:
    model = tiny_model()
    added = write_lm_lora(model.causal_lm, tmp_path, seed=1)
    whole = copy.deepcopy(model)  # gets the weights that the quantised ones stand for
    quantize(model.causal_lm, kind)
    lora = read_request_lora("pirate", tmp_path, model.causal_lm, model.causal_lm.dtype)
    for name, layer in quantizable(model.causal_lm):
        stands_for = layer(torch.eye(layer.in_features)).detach().T.contiguous()
        whole.causal_lm.get_submodule(name).weight = nn.Parameter(stands_for)  # type: ignore[assignment]
    merged = copy.deepcopy(whole)
    add_to(merged.causal_lm, added)
    rows, embeddings = LoraRows(model.causal_lm), torch.randn(3, 7, model.width)

    with torch.no_grad(), rows.over([lora, None, lora]):
        mixed = model.run(embeddings)
        plain, worn = whole.run(embeddings), merged.run(embeddings)

    torch.testing.assert_close(mixed[[0, 2]], worn[[0, 2]], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(mixed[1], plain[1], atol=1e-4, rtol=1e-3)
    assert (worn - plain).abs().max() > 0.05

    dialogue, options = [user("draw a bell")], GenerationOptions(max_new_tokens=12, max_signals=1)
    engine = Engine(model, slots=2)
    requests = [engine.prepare(dialogue, options, each) for each in (lora, None)]
    events = run(engine, requests)
    for request, like in zip(requests, (merged, whole), strict=True):
        assert end_of(events[request]).ids == end_of(list(generate(like, dialogue, options))).ids


PROMPTS = (
    "draw a big red bell",
    "hello",
    "a slow video of a small blue bird moving up, and its sound",
    "let me hear a high drum",
)
ASKED = ([Modality.IMAGE], [], [Modality.VIDEO, Modality.AUDIO], [Modality.AUDIO])


async def replies(box: LocalLanguageModel) -> list[Any]:
    options = SpeechOptions(
        allowed=frozenset({Modality.IMAGE, Modality.VIDEO, Modality.AUDIO}),
        max_signals=4,
        max_new_tokens=80,
        temperature=0.0,
        top_p=1.0,
        seed=0,
    )
    said = []
    for prompt in PROMPTS:
        parts: list[Any] = [""]
        async for value in box.generate([PromptMessage(Role.USER, (prompt,))], options):
            if isinstance(value, Words):
                parts[0] += value.text
            elif isinstance(value, SpokenSignal):
                parts.append((value.modality, value.caption))
        said.append(parts)
    return said


async def test_the_embedded_model_answers_the_same_in_8_and_in_4_bits() -> None:
    preset = load_preset("toybox")
    whole = LocalLanguageModel(preset)
    whole.load()
    expected = await replies(whole)
    assert [[modality for modality, _ in media] for _, *media in expected] == list(ASKED)

    for kind, share in (("int8", 0.33), ("nf4", 0.22)):
        fitted = changed(preset, {"language_model.quantization": kind})
        box = LocalLanguageModel(fitted)
        box.load()

        assert box.engine is not None
        base = box.engine._engine.model.causal_lm
        part = boxes_of(fitted)[1].parts[0]
        assert held_bytes(base) == pytest.approx(part.in_memory, rel=0.01)
        assert held_bytes(base) < share * boxes_of(preset)[1].parts[0].in_memory
        assert await replies(box) == expected, kind
