"""The generate box: turns share one engine, and its errors are those of requests."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from encoders.media import Modality
from services.boxes import Encoded, Finished, PromptMessage, Speech, SpeechOptions, SpokenSignal, Words
from services.errors import BadRequest, PresetProblem
from services.local_language_model import LocalLanguageModel
from services.messages import Role
from services.presets import load_preset
from tests.tiny import with_adapters

OPTIONS = SpeechOptions(
    allowed=frozenset({Modality.IMAGE, Modality.VIDEO, Modality.AUDIO}),
    max_signals=6,
    max_new_tokens=160,
    temperature=0.0,
    top_p=1.0,
    seed=0,
)


@pytest.fixture(scope="module")
def box(tiny_preset: Path) -> LocalLanguageModel:
    box = LocalLanguageModel(load_preset(str(tiny_preset)))
    box.load()
    return box


def prompt(text: str) -> list[PromptMessage]:
    return [PromptMessage(Role.USER, (text,))]


async def said(box: LocalLanguageModel, text: str) -> list[Speech]:
    return [speech async for speech in box.generate(prompt(text), OPTIONS)]


async def test_turns_share_the_model_and_answer_as_they_do_alone(box: LocalLanguageModel) -> None:
    def told(speeches: list[Speech]) -> list[object]:
        kept: list[object] = []
        for speech in speeches:
            match speech:
                case SpokenSignal():
                    kept.append((speech.modality, speech.caption))
                case Words(text=text) if kept and isinstance(kept[-1], str):
                    kept[-1] += text  # how many words are told together varies
                case Words(text=text):
                    kept.append(text)
                case Finished():
                    kept.append(speech)
        return kept

    assert box.stats is not None
    start = box.stats.steps
    alone = await said(box, "draw, play and film a bell")
    before = box.stats.steps
    replies = await asyncio.gather(*(said(box, "draw, play and film a bell") for _ in range(4)))
    assert all(told(reply) == told(alone) for reply in replies)
    assert isinstance(alone[-1], Finished)
    assert {type(speech) for speech in alone} == {Words, SpokenSignal, Finished}
    assert box.stats.steps - before < 2 * (before - start)
    assert box.stats.hit_rate > 0.5


async def test_a_dropped_turn_leaves_the_model_to_the_others(box: LocalLanguageModel) -> None:
    async with aclosing(box.generate(prompt("draw, play and film a bell"), OPTIONS)) as stream:
        await anext(stream)
    assert isinstance((await said(box, "hello"))[-1], Finished)
    assert box.stats is not None
    assert box.stats.running == 0


async def test_a_conversation_that_is_too_long_is_a_bad_request(box: LocalLanguageModel) -> None:
    with pytest.raises(BadRequest, match="this model sees at most") as caught:
        await said(box, "far too long " * 500)
    assert caught.value.code == "context_length_exceeded"


async def test_warming_up_works_inside_an_event_loop_too(box: LocalLanguageModel) -> None:
    assert box.stats is not None
    before = box.stats.requests
    box.warm_up()
    assert box.stats.requests == before + 1


def test_engine_sizes_that_cannot_be_are_a_problem_of_the_preset(tiny_preset: Path) -> None:
    preset = load_preset(str(tiny_preset))
    options = preset.language_model.model_copy(update={"slots": 9, "step_tokens": 9})
    box = LocalLanguageModel(preset.model_copy(update={"language_model": options}))
    with pytest.raises(PresetProblem, match=r"language model cannot be loaded: step_tokens is 9"):
        box.load()


def test_the_models_own_lora_is_merged_at_load() -> None:
    preset = load_preset("toybox")
    box = LocalLanguageModel(preset)
    box.load()
    assert box._lm is not None
    lora = load_file(preset.bridge_folder / "adapter" / "adapter_model.safetensors")
    settings = json.loads((preset.bridge_folder / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(preset.base_folder)
    downs = [name for name in lora if name.endswith("lora_A.weight")]
    assert downs
    assert not [name for name, _ in box._lm.named_parameters() if "lora" in name]
    for down in downs:
        name = down.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        up = down.replace("lora_A", "lora_B")
        product = lora[up].float() @ lora[down].float() * settings["lora_alpha"] / settings["r"]
        assert product.abs().max() > 0
        merged = base.get_parameter(name).float() + product
        torch.testing.assert_close(box._lm.get_parameter(name), merged, atol=1e-5, rtol=1e-4)


async def test_lora_of_requests_stays_beside_the_weights_that_all_share(tiny_preset: Path) -> None:
    box = LocalLanguageModel(load_preset(str(with_adapters(tiny_preset))))
    box.load()
    assert box._lm is not None
    before = {name: weight.clone() for name, weight in box._lm.state_dict().items()}
    for name in ("pirate", "poet"):
        spoken = box.generate(prompt("hello"), replace(OPTIONS, adapter=name))
        assert isinstance([speech async for speech in spoken][-1], Finished)
    assert [state.name for state in box.adapters.states() if state.loaded] == ["pirate", "poet"]
    torch.testing.assert_close(dict(box._lm.state_dict()), before, rtol=0, atol=0)


async def test_a_caption_that_is_right_is_more_probable_than_another(box: LocalLanguageModel) -> None:
    zeros = np.zeros((4, 16), np.float32)
    asked = [PromptMessage(Role.USER, (Encoded(Modality.IMAGE, zeros, zeros[0], (4,)), "what is this?"))]
    right, wrong = [await box.score(asked, words, "ann") for words in ("It is a bell.", "Hello!")]
    assert min(right) > -0.5 > min(wrong)
    with pytest.raises(BadRequest) as caught:
        await box.score(asked, "bell " * 600)
    assert caught.value.code == "context_length_exceeded"
