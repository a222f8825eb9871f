"""The seam for parts inside the language model's layers, held with CogVLM's visual expert.

The expert is a second feed-forward in every layer, born as a copy of the first, which tokens of media take.
Source: Wang et al. 2023, arXiv 2311.03079, section 2.1 (feed-forwards only).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encoders.media import Modality
from llm.adapters import Step, bound
from llm.engine import Engine
from llm.generate import GenerationOptions, SignalReady
from llm.lora import LoraOptions
from llm.model import LanguageModel
from llm.template import Dialogue
from tests.tiny_llm import assistant, llama, medium, mixed_dialogue, tiny_model, tiny_projectors, user

IMAGE, VIDEO = Modality.IMAGE, Modality.VIDEO


class VisualExpert:
    def __init__(self) -> None:
        self.step: Step | None = None
        self.seen: list[Tensor] = []

    def install(self, lm: nn.Module) -> None:
        for layer in lm.base_model.layers:  # type: ignore[union-attr]
            layer.mlp.adapter = copy.deepcopy(layer.mlp)
            layer.mlp.register_forward_hook(self.route)

    @contextmanager
    def bind(self, step: Step) -> Iterator[None]:
        self.step = step
        self.seen.append(step.media)
        try:
            yield
        finally:
            self.step = None

    def route(self, mlp: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        if self.step is None:
            return out
        return torch.where(self.step.media[..., None], mlp.adapter(*args), out)


def pair(trained: bool = False) -> tuple[LanguageModel, LanguageModel, VisualExpert]:
    """Return a model, the same with an expert, and the expert."""
    bare = tiny_model()
    expert = VisualExpert()
    base = llama(bare.tokenizer.base_vocabulary)
    base.load_state_dict(bare.causal_lm.state_dict())
    model = LanguageModel(base, bare.tokenizer, tiny_projectors(), adapters=[expert])
    model.load_state_dict(bare.state_dict(), strict=False)
    if trained:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters_of("adapters").values():
                parameter += 0.3 * torch.randn_like(parameter)
    return bare, model.eval(), expert


def logits(model: LanguageModel, dialogue: Dialogue) -> Tensor:
    batch = model.collate([dialogue])
    with torch.no_grad():
        return model.logits(model(batch).hidden)[0]


def test_an_adapter_leaves_every_logit_as_it_was_at_birth() -> None:
    bare, model, _ = pair()

    at_birth, untouched = (logits(one, mixed_dialogue()) for one in (model, bare))
    torch.testing.assert_close(at_birth, untouched, rtol=0, atol=0)


def test_a_trained_expert_leaves_words_without_media_as_they_were() -> None:
    bare, model, _ = pair(trained=True)
    words = [user("what is this?"), assistant("a bell.")]

    torch.testing.assert_close(logits(model, words), logits(bare, words), rtol=0, atol=0)


def test_a_trained_expert_changes_what_follows_the_first_token_of_a_medium() -> None:
    bare, model, _ = pair(trained=True)
    shown = [user("what is this?", medium(IMAGE)), assistant("a bell.")]
    first = bare.encode(shown).media[0].start

    difference = (logits(model, shown) - logits(bare, shown)).abs().amax(dim=-1)

    assert not difference[:first].any()
    assert (difference[first:] > 1e-4).all()


def test_the_step_tells_where_media_lie_in_every_row_of_a_batch() -> None:
    _, model, expert = pair()
    batch = model.collate([mixed_dialogue(), [user("hi"), assistant("bell")]])

    model(batch)

    (places,) = expert.seen
    expected = torch.zeros_like(batch.present)
    for row, slot in batch.media:
        expected[row, slot.start : slot.start + slot.length] = True
    assert torch.equal(places, expected)
    assert expected[0].sum() == sum(slot.length for _, slot in batch.media) > 5
    assert not expected[1].any()


@pytest.mark.parametrize("step_tokens", [4, 256])
def test_states_of_a_signal_are_the_same_in_training_and_in_generation(step_tokens: int) -> None:
    """Also where prompts are fed in pieces, beside one another, and a prefix is known already."""
    _, model, expert = pair(trained=True)
    asked = [user("draw this", medium(IMAGE), "like that", medium(VIDEO, 5))]
    other = [user("hello")]
    engine = Engine(model, slots=2, step_tokens=step_tokens)
    options = GenerationOptions(max_new_tokens=24, required=(IMAGE,), max_signals=1)

    for _ in range(2):  # the second time, most of the prompt is in the cache
        requests = [engine.prepare(dialogue, options) for dialogue in (asked, other)]
        for request in requests:
            engine.submit(request)
        signals = {}
        while engine.busy:
            for request, event in engine.step():
                assert not isinstance(event, Exception)
                if isinstance(event, SignalReady):
                    signals[requests.index(request)] = event.signal
        for dialogue, index in ((asked, 0), (other, 1)):
            ids = torch.tensor([[*requests[index].row.ids, *requests[index].reply.ids]])
            batch = model.collate([dialogue])
            embeddings, media = model.embed(ids), torch.zeros_like(ids, dtype=torch.bool)
            filled, places = model.embed_batch(batch)[0], batch.media_places()[0]
            embeddings[0, : len(places)][places] = filled[places]
            media[0, : len(places)] = places
            with torch.no_grad():
                hidden = model.run(embeddings, media=media)[0]
            start = ids[0].tolist().index(model.tokenizer.signal_ids(IMAGE)[0])
            expected = hidden[start : start + len(signals[index].hidden)]
            torch.testing.assert_close(signals[index].hidden, expected, rtol=1e-4, atol=1e-4)
    assert expert.step is None


def test_a_pass_that_fails_is_forgotten() -> None:
    _, model, expert = pair()

    with pytest.raises(ZeroDivisionError), bound(model.adapters, Step(torch.ones(1, 1, dtype=torch.bool))):
        raise ZeroDivisionError

    assert expert.step is None


def test_only_the_adapter_trains_where_only_it_should_and_lora_stays_out_of_it() -> None:
    _, model, _ = pair()
    model.train_only(["adapters"])

    model(model.collate([mixed_dialogue()])).loss.backward()

    grown = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    first = {name for name in model.parameters_of("adapters") if ".layers.0." in name}
    assert grown == first  # what the last layer says at a medium, nobody looks at
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert wanted == set(model.parameters_of("adapters")) > first
    model.add_lora(LoraOptions(rank=2, targets=("gate_proj",)))
    assert not any("adapter" in name.split(".") for name in model.parameters_of("lora"))


def test_a_model_with_adapters_is_not_recorded() -> None:
    _, model, _ = pair()
    engine = Engine(model, slots=1)

    with pytest.raises(RuntimeError, match=r"what its adapters do \(VisualExpert\) depends on each pass"):
        engine.trace()
