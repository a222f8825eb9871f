"""The language model: new rows, spliced media, LoRA and adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from encoders.media import Modality
from llm.adapters import Step
from llm.lora import LoraOptions
from llm.model import LanguageModel, ModelPart, mean_loss
from llm.projectors import ProjectorConfig, Prompt
from llm.template import SignalPart
from tests.tiny_llm import (
    ENCODER_WIDTH,
    WIDTH,
    assistant,
    gpt_neox,
    llama,
    medium,
    mixed_dialogue,
    qwen2,
    qwen3,
    tiny_model,
    tiny_projectors,
    tiny_tokenizer,
    user,
)

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO
SMALL = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2}


def cohere(rows: int) -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(vocab_size=rows, logit_scale=0.3, **SMALL))


def granite(rows: int) -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(vocab_size=rows, logits_scaling=5.0, **SMALL))


def gemma2(rows: int) -> PreTrainedModel:
    config = Gemma2Config(vocab_size=rows, head_dim=8, final_logit_softcapping=0.5, **SMALL)
    return Gemma2ForCausalLM(config)


def tied(rows: int) -> PreTrainedModel:
    return llama(rows, tie_word_embeddings=True)


@pytest.mark.parametrize("base", [llama, tied, qwen2, qwen3, gpt_neox, cohere, granite, gemma2])
def test_base_tokens_get_the_logits_of_the_untouched_base(base: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(base)
    n = model.tokenizer.base_vocabulary
    ids = torch.randint(0, n, (2, 7))
    present = torch.ones_like(ids, dtype=torch.bool)

    with torch.no_grad():
        logits, hidden = model.forward_embeddings(model.embed(ids), present)
        expected = model.causal_lm(input_ids=ids, output_hidden_states=True)

    assert logits.shape == (2, 7, len(model.tokenizer))
    torch.testing.assert_close(logits[..., :n], expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden, expected.hidden_states[-1], atol=1e-5, rtol=1e-5)


def test_added_tokens_have_their_own_rows_in_embedding_and_head() -> None:
    model = tiny_model(tied)
    n = model.tokenizer.base_vocabulary
    rows = model.signal_rows

    embeddings = model.embed(torch.tensor([n - 1, n, n + 3]))
    logits = model.logits(torch.eye(WIDTH))

    torch.testing.assert_close(embeddings[1:], rows.embedding[[0, 3]])
    torch.testing.assert_close(embeddings[0], model.causal_lm.get_input_embeddings().weight[n - 1])
    torch.testing.assert_close(logits[:, n:], rows.head.T)


def test_spare_rows_of_the_base_are_ignored() -> None:
    tokenizer = tiny_tokenizer()
    n = tokenizer.base_vocabulary
    model = LanguageModel(llama(n + 64), tokenizer, {})

    assert model.logits(torch.randn(3, WIDTH)).shape == (3, len(tokenizer))
    torch.testing.assert_close(model.embed(torch.tensor(n)), model.signal_rows.embedding[0])


def test_a_tokenizer_of_another_base_is_refused() -> None:
    tokenizer = tiny_tokenizer()

    with pytest.raises(ValueError, match=r"base has 100 embedding rows and its tokenizer \d+ tokens"):
        LanguageModel(llama(100), tokenizer, {})


def test_projected_media_lie_in_their_slots() -> None:
    model = tiny_model()
    batch = model.collate([mixed_dialogue(), [user("hi"), assistant("bell")]])

    embeddings = model.embed_batch(batch)

    plain = model.embed(batch.ids)
    changed = (embeddings != plain).any(dim=-1)
    expected = torch.zeros_like(changed)
    for row, slot in batch.media:
        expected[row, slot.start : slot.start + slot.length] = True
    assert torch.equal(changed, expected)
    assert [slot.length for _, slot in batch.media] == [3, 5, 1]
    audio = next(slot for _, slot in batch.media if slot.media.modality == AUDIO)
    assert audio.media.pooled is not None
    projected = model.projectors["audio"].project(audio.media.pooled)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(embeddings[0, audio.start], projected)


def test_batches_by_length_give_the_loss_of_one_batch_with_less_padding() -> None:
    model = tiny_model()
    short = [[user("hello"), assistant("hi")], [user("a drum"), assistant("no")]]
    long = [[user("bell " * 20), assistant("a bell")], [user("drum " * 20), assistant("a drum and a bell")]]
    dialogues = [long[0], short[0], long[1], short[1]]

    together = model.collate(dialogues)
    groups = model.collate_by_length(dialogues)

    assert [len(group.ids) for group in groups] == [2, 2]
    assert sum(group.ids.numel() for group in groups) < together.ids.numel()
    torch.testing.assert_close(mean_loss([model(group) for group in groups]), model(together).loss)


def test_a_batch_gives_what_its_rows_give_alone() -> None:
    model = tiny_model()
    dialogues = [mixed_dialogue(), [user(medium(VIDEO, 2, seed=1)), assistant("drum", SignalPart(VIDEO))]]

    both = model.collate(dialogues)
    together = model(both)
    alone = [model(model.collate([dialogue])) for dialogue in dialogues]

    total = sum(output.loss * len(output.targets) for output in alone)
    torch.testing.assert_close(together.loss * len(together.targets), total)
    states = model.signal_states(together, both)
    second = model.collate(dialogues[1:])
    torch.testing.assert_close(
        states[VIDEO].hidden, model.signal_states(alone[1], second)[VIDEO].hidden, atol=1e-5, rtol=1e-5
    )
    assert states[VIDEO].rows == [1]
    assert states[IMAGE].captions == ["a bell."]
    assert {m: tuple(s.hidden.shape) for m, s in states.items()} == {
        IMAGE: (1, 4, WIDTH),
        VIDEO: (1, 24, WIDTH),
        AUDIO: (1, 8, WIDTH),
    }


def test_signal_embeddings_are_those_of_the_signal_tokens() -> None:
    model = tiny_model()
    batch = model.collate([mixed_dialogue()])

    states = model.signal_states(model(batch), batch)

    ids = torch.tensor(model.tokenizer.signal_ids(AUDIO))
    torch.testing.assert_close(states[AUDIO].embeddings[0], model.embed(ids))


def test_the_loss_is_over_the_next_trained_tokens() -> None:
    model = tiny_model()
    batch = model.collate([mixed_dialogue()])
    output = model(batch)

    logits, _ = model.forward_embeddings(model.embed_batch(batch), batch.present)
    expected = nn.functional.cross_entropy(logits[0, :-1], batch.labels[0, 1:], ignore_index=-100)

    torch.testing.assert_close(output.loss, expected)
    forced = set(model.tokenizer.signal_ids(IMAGE)[1:]) | set(model.tokenizer.signal_ids(AUDIO)[1:])
    assert forced.isdisjoint(output.targets.tolist())
    assert model.tokenizer.signal_ids(IMAGE)[0] in output.targets


def test_a_batch_without_trained_tokens_has_no_loss() -> None:
    model = tiny_model()

    assert model(model.collate([[user("hi")]])).loss == 0


def test_a_medium_that_the_model_cannot_read_is_named() -> None:
    model = LanguageModel(llama(300), tiny_tokenizer(), {IMAGE: tiny_projectors()[IMAGE]})

    with pytest.raises(ValueError, match=r"cannot read video; it reads text, image"):
        model.collate([[user(medium(VIDEO))]])


def test_features_of_another_encoder_are_refused() -> None:
    model = LanguageModel(
        llama(300), tiny_tokenizer(), {IMAGE: ProjectorConfig(kind="mlp", encoder_width=7, llm_width=WIDTH)}
    )

    with pytest.raises(ValueError, match=r"image features are 12 wide; this model's projector expects 7"):
        model.collate([[user(medium(IMAGE))]])


class PromptedProjector(nn.Module):
    """Adds the mean of the prompt's embeddings to one token."""

    needs_prompt = True
    reads_pooled = False

    def num_slots(self, num_tokens: int) -> int:
        return 1

    def forward(self, tokens: Tensor, present: Tensor, prompt: Prompt | None = None) -> Tensor:
        assert prompt is not None
        real = prompt.present[..., None]
        return (prompt.embeddings * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)


def test_a_projector_that_needs_the_prompt_is_given_the_words_of_the_message() -> None:
    model = tiny_model()
    model.projectors["image"] = PromptedProjector()
    batch = model.collate(
        [[user("a bell"), user("what", medium(IMAGE), " is it")], [user("a", medium(IMAGE))]]
    )

    embeddings = model.embed_batch(batch)

    encode = model.tokenizer.encode_text
    for (row, slot), words in zip(batch.media, [encode("what") + encode(" is it"), encode("a")], strict=True):
        expected = model.embed(torch.tensor(words)).mean(dim=0)
        torch.testing.assert_close(embeddings[row, slot.start], expected)


def test_lora_is_the_identity_at_birth_and_merging_keeps_what_it_learnt() -> None:
    model = tiny_model()
    batch = model.collate([mixed_dialogue()])
    before = model(batch).logits

    model.add_lora(LoraOptions(rank=4, alpha=4))
    torch.testing.assert_close(model(batch).logits, before)

    with torch.no_grad():
        for name, parameter in model.parameters_of("lora").items():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    learnt = model(batch).logits
    assert (learnt - before).abs().max() > 1e-3

    model.merge_adapter()
    assert not isinstance(model.base, PeftModel)
    torch.testing.assert_close(model(batch).logits, learnt, atol=1e-5, rtol=1e-5)


def test_lora_goes_where_other_architectures_have_their_projections() -> None:
    model = tiny_model(gpt_neox)
    model.add_lora(LoraOptions(rank=2, targets=("query_key_value", "dense")))

    assert len(model.parameters_of("lora")) == 2 * 2 * 2

    with pytest.raises(ValueError, match=r"has LoRA already"):
        model.add_lora(LoraOptions())
    with pytest.raises(ValueError, match=r"q_proj"):
        tiny_model(gpt_neox).add_lora(LoraOptions())


@pytest.mark.parametrize(
    "parts",
    [
        ["projectors"],
        ["signal_rows"],
        ["lora", "signal_rows"],
        ["base"],
        ["lora", "projectors", "signal_rows"],
    ],
)
def test_exactly_the_chosen_parts_train(parts: list[ModelPart]) -> None:
    model = tiny_model().train()
    model.add_lora(LoraOptions(rank=2))
    model.train_only(parts)

    model(model.collate([mixed_dialogue()])).loss.backward()

    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    chosen = {name for part in parts for name in model.parameters_of(part)}
    still = {name for name in chosen - moved if "lora_A" not in name}  # lora_B is zero at birth
    assert moved <= chosen
    assert not still


def test_a_fresh_model_trains_its_new_parts_only() -> None:
    model = tiny_model()

    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}

    assert trained == {"signal_rows", "projectors"}


def test_an_unknown_part_is_named() -> None:
    parts: Iterable[Any] = ["head"]
    with pytest.raises(ValueError, match=r"Unknown parts head; there are base, lora"):
        tiny_model().train_only(parts)


class GatedBias:
    """An adapter: each layer's feed-forward gains a bias behind a gate that is closed at birth."""

    def install(self, lm: nn.Module) -> None:
        for layer in lm.base_model.layers:  # type: ignore[union-attr]
            layer.mlp.adapter = nn.ParameterDict({"gate": torch.zeros(1), "bias": torch.ones(WIDTH)})
            layer.mlp.register_forward_hook(
                lambda mlp, _, out: out + mlp.adapter["gate"].tanh() * mlp.adapter["bias"]
            )

    def bind(self, step: Step) -> AbstractContextManager[None]:
        return nullcontext()


class Renaming:
    def install(self, lm: nn.Module) -> None:
        lm.add_module("extra", nn.Linear(2, 2))
        del lm.lm_head

    def bind(self, step: Step) -> AbstractContextManager[None]:
        return nullcontext()


def test_an_adapter_is_the_identity_at_birth_trains_apart_and_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tokenizer = llama(300), tiny_tokenizer()
    bare = LanguageModel(base, tokenizer, tiny_projectors())
    batch = bare.collate([mixed_dialogue()])
    before = bare(batch).hidden

    model = LanguageModel(base, tokenizer, tiny_projectors(), adapters=[GatedBias()])
    model.load_state_dict(bare.state_dict(), strict=False)
    torch.testing.assert_close(model(batch).hidden, before)
    model.train_only(["adapters"])
    model(batch).loss.backward()
    assert len(model.parameters_of("adapters")) == 4

    with torch.no_grad():
        for parameter in model.parameters_of("adapters").values():
            parameter.fill_(0.5)
    model.add_lora(LoraOptions(rank=2))
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path, adapters=[GatedBias()])
    torch.testing.assert_close(again(batch).hidden, model(batch).hidden)
    assert not (model(batch).hidden - before).abs().max() < 1e-3


def test_an_adapter_that_breaks_names_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Renaming lost the parameters \['lm_head.weight'\] and added"):
        LanguageModel(llama(300), tiny_tokenizer(), {}, adapters=[Renaming()])


def test_projectors_can_be_added_to_a_base_that_knew_words_only() -> None:
    torch.manual_seed(0)
    model = LanguageModel(llama(300), tiny_tokenizer(), {})
    model.add_projectors(tiny_projectors())

    assert model.readable == (IMAGE, VIDEO, AUDIO)
    assert model.collate([[user(medium(IMAGE))]]).media[0][1].length == 3
    with pytest.raises(ValueError, match=r"audio projector has llm_width 8; the base has 32"):
        model.add_projectors({AUDIO: ProjectorConfig(kind="mlp", encoder_width=ENCODER_WIDTH, llm_width=8)})


def test_words_alone_are_embedded_as_they_are_among_signals() -> None:
    model = tiny_model()
    new = model.tokenizer.base_vocabulary
    for ids in ([[3, 5], [7, new - 1]], [[3, new], [new + 1, 5]], [[new]]):
        torch.testing.assert_close(
            model.tables().embed_ids(ids), model.embed(torch.tensor(ids)), atol=0, rtol=0
        )
