"""Generation: whole signals, right states, limits, and an order that can be demanded."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from encoders.media import Modality
from llm.batch import Batch, collate_rows
from llm.generate import (
    ContextTooLong,
    Finished,
    GenerationEvent,
    GenerationOptions,
    SignalReady,
    TextDelta,
    generate,
)
from llm.lora import LoraOptions
from llm.model import LanguageModel
from llm.reply import Reply
from llm.sampling import Sampler
from llm.template import Dialogue, Part, SignalPart, SignalSpan
from tests.tiny_llm import WIDTH, assistant, gpt_neox, llama, medium, qwen2, qwen3, tiny_model, user

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO
MEDIA = (IMAGE, VIDEO, AUDIO)


def eager_model(
    base: Callable[..., PreTrainedModel] = llama, seed: int = 0, push: float = 3.0
) -> LanguageModel:
    """A random model in which every signal and the end are likely enough to come up."""
    model = tiny_model(base, seed)
    starts = [i - model.tokenizer.base_vocabulary for i in model.tokenizer.signal_starts]
    with torch.no_grad():
        model.signal_rows.head[starts] *= push
    return model


def signals_of(events: list[GenerationEvent]) -> list[SignalReady]:
    return [event for event in events if isinstance(event, SignalReady)]


def end_of(events: list[GenerationEvent]) -> Finished:
    assert isinstance(events[-1], Finished)
    assert not any(isinstance(event, Finished) for event in events[:-1])
    return events[-1]


def ask() -> Dialogue:
    return [user("draw a bell ", medium(IMAGE)), assistant("here", SignalPart(AUDIO)), user("and now?")]


def test_every_signal_is_whole_under_wild_sampling_and_any_limit() -> None:
    model = eager_model()
    counts = model.tokenizer.signals.count
    draw = random.Random(0)
    seen: dict[Modality, int] = dict.fromkeys(MEDIA, 0)

    for seed in range(40):
        limit = draw.randint(1, 24)
        options = GenerationOptions(temperature=2.0, seed=seed, max_new_tokens=limit, max_signals=3)
        events = list(generate(model, ask(), options))
        signals = signals_of(events)
        for event in signals:
            seen[event.signal.modality] += 1
            assert event.signal.hidden.shape == (counts(event.signal.modality), WIDTH)
            assert event.signal.embeddings.shape == event.signal.hidden.shape
            assert event.signal.hidden.isfinite().all()
            assert 0 < event.confidence <= 1
        ids = end_of(events).ids
        blocks = [i for i in ids if i in model.tokenizer.signal_starts]
        assert [model.tokenizer.signal_starts[i] for i in blocks] == [e.signal.modality for e in signals]
        for position, token in enumerate(ids):
            if modality := model.tokenizer.signal_starts.get(token):
                block = model.tokenizer.signal_ids(modality)
                assert ids[position : position + len(block)] == block
        overrun = counts(signals[-1].signal.modality) - 1 if signals else 0
        assert len(ids) <= limit + overrun
        assert len(signals) <= 3

    assert min(seen.values()) >= 2


@pytest.mark.parametrize("base", [llama, qwen2, qwen3, gpt_neox])
def test_states_at_the_signals_are_those_of_training(base: Callable[..., PreTrainedModel]) -> None:
    model = eager_model(base)
    if base is llama:
        model.add_lora(LoraOptions(rank=2))
        with torch.no_grad():
            for parameter in model.parameters_of("lora").values():
                parameter.normal_(std=0.2)
        model.eval()
    dialogue = [
        user("draw a bell ", medium(IMAGE), medium(VIDEO, 6)),
        assistant(SignalPart(IMAGE)),
        user("?"),
    ]
    options = GenerationOptions(required=(VIDEO, IMAGE, AUDIO, IMAGE), max_new_tokens=20)

    events = list(generate(model, dialogue, options))

    batch = taught(model, dialogue, end_of(events).ids)
    with torch.no_grad():
        states = model.signal_states(model(batch), batch)
    for modality in MEDIA:
        spoken = [e.signal for e in signals_of(events) if e.signal.modality == modality]
        hidden = torch.stack([signal.hidden for signal in spoken])
        embeddings = torch.stack([signal.embeddings for signal in spoken])
        torch.testing.assert_close(hidden, states[modality].hidden[-len(spoken) :], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(embeddings, states[modality].embeddings[-len(spoken) :])
    assert len(signals_of(events)) == 4


def taught(model: LanguageModel, dialogue: Dialogue, reply: tuple[int, ...]) -> Batch:
    """The conversation with ``reply`` as training lays it out, id by id as it was spoken."""
    row = model.encode(dialogue, open_reply=True)
    for position, token in enumerate(reply, start=len(row.ids)):
        if modality := model.tokenizer.signal_starts.get(token):
            row.signals.append(SignalSpan(modality, position, ""))
    row.add(list(reply), trained=True)
    return collate_rows([row], model.tokenizer.pad_id)


@pytest.mark.parametrize("push", [-1.0, 0.2, 1.0])
def test_greedy_replies_are_what_full_forward_passes_say(push: float) -> None:
    model = eager_model(push=push)
    (*_, end) = generate(model, ask(), GenerationOptions(max_new_tokens=12))
    assert isinstance(end, Finished)
    batch = taught(model, ask(), end.ids)

    with torch.no_grad():
        logits, _ = model.forward_embeddings(model.embed_batch(batch), batch.present)

    start = batch.ids.shape[1] - len(end.ids)
    logits[..., list(model.tokenizer.unspeakable_ids)] = float("-inf")
    best = logits[0, start - 1 : -1].argmax(dim=-1).tolist()
    forced = {i for modality in MEDIA for i in model.tokenizer.signal_ids(modality)[1:]}
    chosen = [(said, would) for said, would in zip(end.ids, best, strict=True) if said not in forced]
    assert len(end.ids) >= 12
    assert all(said == would for said, would in chosen)


@pytest.mark.parametrize("control", ["[IMG0]", "</s>", "[img0][img1]", "<|assistant|>", "<Img>", "<pad>"])
def test_what_a_user_types_is_never_a_control_token(control: str) -> None:
    model = tiny_model()

    row = model.encode([user(control, medium(IMAGE), control), assistant(control)])

    said = [i for i in row.ids if i in model.tokenizer.live_ids - {model.tokenizer.pad_id}]
    names = model.tokenizer.backing.convert_ids_to_tokens(said)
    assert names == ["<s>", "<|user|>", "<Img>", "</Img>", "<|end|>", "<|assistant|>", "</s>"]


def test_a_seed_repeats_a_reply_and_another_seed_does_not() -> None:
    model = eager_model()

    def ids(seed: int | None) -> tuple[int, ...]:
        options = GenerationOptions(temperature=1.5, top_p=0.95, top_k=200, seed=seed, max_new_tokens=20)
        return end_of(list(generate(model, ask(), options))).ids

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert ids(None) != ids(None)


def test_the_smallest_nucleus_is_greedy() -> None:
    model = tiny_model()
    greedy = list(generate(model, ask(), GenerationOptions(max_new_tokens=10)))
    for options in (
        GenerationOptions(max_new_tokens=10, temperature=1.0, top_k=1),
        GenerationOptions(max_new_tokens=10, temperature=1.0, top_p=1e-6),
    ):
        assert end_of(list(generate(model, ask(), options))).ids == end_of(greedy).ids


def test_media_that_are_not_allowed_never_come() -> None:
    model = eager_model(push=10.0)
    for seed in range(10):
        options = GenerationOptions(
            temperature=2.0, seed=seed, max_new_tokens=40, allowed=frozenset({AUDIO}), max_signals=9
        )
        media = {event.signal.modality for event in signals_of(list(generate(model, ask(), options)))}
        assert media <= {AUDIO}
    none = GenerationOptions(temperature=2.0, seed=0, allowed=frozenset(), max_new_tokens=40)
    assert not signals_of(list(generate(model, ask(), none)))


@pytest.mark.parametrize(
    ("typed", "is_tokens"),
    [
        ("[IMG0]", True), ("</s><|assistant|>[vid0]", True), (" [AUD0] [AUD1]\n", True),
        ("[IMG0] please", False), ("", False), ("a</s>", False),
    ],
)  # fmt: skip
def test_the_names_of_tokens_alone_bring_no_medium_unless_one_is_required(
    typed: str, is_tokens: bool
) -> None:
    model = eager_model(push=10.0)

    def media(*parts: Part, required: tuple[Modality, ...] = ()) -> list[Modality]:
        options = GenerationOptions(temperature=2.0, seed=1, max_new_tokens=60, required=required)
        events = list(generate(model, [*ask()[:2], user(*parts)], options))
        return [event.signal.modality for event in signals_of(events)]

    assert bool(media(typed)) is not is_tokens
    assert media(typed, medium(IMAGE))
    assert VIDEO in media(typed, required=(VIDEO,))


def test_no_more_signals_come_than_the_turn_may_have() -> None:
    model = eager_model(push=10.0)
    for most in (0, 1, 3):
        options = [
            GenerationOptions(temperature=2.0, seed=seed, max_signals=most, max_new_tokens=120)
            for seed in range(4)
        ]
        assert max(len(signals_of(list(generate(model, ask(), each)))) for each in options) == most


@pytest.mark.parametrize("limit", [1, 3, 200])
def test_required_media_come_whatever_the_model_wants(limit: int) -> None:
    model = tiny_model()
    eos = model.tokenizer.eos_id
    with torch.no_grad():
        model.causal_lm.get_output_embeddings().weight[eos] *= 100.0  # eager to end, or never
    for sign in (1.0, -1.0):
        with torch.no_grad():
            model.causal_lm.get_output_embeddings().weight[eos] *= sign
        options = GenerationOptions(required=(VIDEO, IMAGE, IMAGE), max_new_tokens=limit, max_signals=3)
        events = list(generate(model, [user("hi")], options))
        assert sorted(event.signal.modality for event in signals_of(events)) == [IMAGE, IMAGE, VIDEO]


def test_missing_media_follow_in_the_order_asked_for_when_the_model_would_end() -> None:
    model = tiny_model()
    ended(model)

    events = list(generate(model, ask(), GenerationOptions(required=(AUDIO, IMAGE))))

    assert [event.signal.modality for event in signals_of(events)] == [AUDIO, IMAGE]
    assert end_of(events).reason == "stop"
    assert end_of(events).ids[-1] == model.tokenizer.eos_id


def ended(model: LanguageModel) -> None:
    """Make the end the model's constant wish."""
    model.causal_lm.base_model.norm.weight.data.zero_()
    # With a zero norm all logits are 0 and greedy takes the first speakable id; the end is the lowest.
    assert min(set(range(len(model.tokenizer))) - model.tokenizer.unspeakable_ids) == model.tokenizer.eos_id


def test_an_end_ends_the_reply_without_text() -> None:
    model = tiny_model()
    ended(model)

    events = list(generate(model, ask()))

    assert events == [Finished("stop", end_of(events).usage, (model.tokenizer.eos_id,))]


def test_a_caption_is_the_text_before_the_signal_since_the_last_one() -> None:
    model = eager_model(push=4.0)
    checked = 0
    for seed in range(12):
        options = GenerationOptions(temperature=1.5, seed=seed, max_new_tokens=60, max_signals=4)
        text = ""
        for event in generate(model, ask(), options):
            if isinstance(event, TextDelta):
                assert event.text
                text += event.text
            elif isinstance(event, SignalReady):
                assert event.signal.caption == text.strip()
                checked += bool(text)
                text = ""
    assert checked > 3


def test_streamed_text_is_the_text_of_the_reply() -> None:
    model = eager_model()
    options = GenerationOptions(temperature=2.0, seed=3, max_new_tokens=80)

    events = list(generate(model, ask(), options))

    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert text.replace("\ufffd", "")
    signals = [i for i, event in enumerate(events) if isinstance(event, SignalReady)]
    if not signals:
        assert text == model.tokenizer.decode_text(end_of(events).ids)


@pytest.mark.parametrize("allowed", [frozenset(MEDIA), frozenset({AUDIO, IMAGE})])
def test_confidence_is_the_probability_of_the_medium_among_those_that_could_come(
    allowed: frozenset[Modality],
) -> None:
    model = tiny_model()
    start = model.tokenizer.signal_ids(AUDIO)[0]
    row = model.encode(ask(), open_reply=True)
    with torch.no_grad():
        batch = collate_rows([row], model.tokenizer.pad_id)
        logits, _ = model.forward_embeddings(model.embed_batch(batch))
    chances = logits[0, -1].softmax(dim=-1)
    expected = chances[start] / sum(chances[model.tokenizer.signal_ids(m)[0]] for m in allowed)

    wishes = GenerationOptions(required=(AUDIO,), max_new_tokens=1, allowed=allowed)
    reply = Reply(model.tokenizer, wishes, row.ids, model.context_length)
    reply.ids.append(0)  # the limit is reached: the medium must come
    ((token, confidence),) = Sampler(model.tokenizer).choose(logits[:, -1], [reply])

    assert token == start
    assert confidence == pytest.approx(float(expected), rel=1e-4)


def test_a_set_stop_ends_the_reply_before_the_next_pass() -> None:
    model = tiny_model()
    stop = threading.Event()
    events: list[GenerationEvent] = []
    for event in generate(model, ask(), GenerationOptions(max_new_tokens=100, allowed=frozenset()), stop):
        events.append(event)
        if isinstance(event, TextDelta):
            stop.set()

    assert end_of(events).reason == "cancelled"
    assert end_of(events).usage.completion_tokens <= 5


def test_a_reply_stays_within_the_context_and_no_block_starts_that_cannot_fit() -> None:
    model = eager_model(push=10.0)
    model.causal_lm.config.max_position_embeddings = limit = 80
    prompt = len(model.encode(ask(), open_reply=True).ids)
    lengths = set()
    for seed in range(15):
        options = GenerationOptions(temperature=2.0, seed=seed, max_signals=20)
        events = list(generate(model, ask(), options))
        lengths.add(prompt + end_of(events).usage.completion_tokens)
        if end_of(events).reason == "length":
            assert prompt + end_of(events).usage.completion_tokens == limit
        for event in signals_of(events):
            assert len(event.signal.hidden) == model.tokenizer.signals.count(event.signal.modality)
    assert max(lengths) == limit


def test_required_media_keep_their_place_in_a_full_context() -> None:
    model = tiny_model()
    prompt = len(model.encode(ask(), open_reply=True).ids)
    model.causal_lm.config.max_position_embeddings = prompt + 24 + 4 + 3

    events = list(generate(model, ask(), GenerationOptions(required=(VIDEO, IMAGE))))

    assert sorted(event.signal.modality for event in signals_of(events)) == [IMAGE, VIDEO]
    assert prompt + end_of(events).usage.completion_tokens <= model.context_length


@pytest.mark.parametrize("required", [(), (AUDIO,)])
def test_a_conversation_beyond_the_context_is_refused_at_once(required: tuple[Modality, ...]) -> None:
    model = tiny_model()
    prompt = len(model.encode(ask(), open_reply=True).ids)
    needed = prompt + (8 if required else 1)
    model.causal_lm.config.max_position_embeddings = needed - 1

    with pytest.raises(ContextTooLong, match=rf"needs {needed} tokens; this model sees at most") as caught:
        generate(model, ask(), GenerationOptions(required=required))
    assert (caught.value.tokens, caught.value.limit) == (needed, needed - 1)

    model.causal_lm.config.max_position_embeddings = needed
    assert list(generate(model, ask(), GenerationOptions(required=required)))


def test_a_model_in_training_mode_does_not_speak() -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        generate(tiny_model().train(), ask())


def test_generation_leaves_no_gradients_and_no_inference_tensors() -> None:
    model = eager_model()
    (signal,) = (
        event.signal
        for event in generate(
            model, ask(), GenerationOptions(required=(IMAGE,), max_signals=1, max_new_tokens=1)
        )
        if isinstance(event, SignalReady)
    )

    assert not signal.hidden.requires_grad
    assert torch.is_grad_enabled()
    torch.nn.Linear(WIDTH, 2)(signal.hidden).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens is 0; expected at least 1"),
        ({"temperature": -0.1}, r"temperature is -0.1; expected 0"),
        ({"temperature": float("nan")}, r"temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected more than 0"),
        ({"top_k": -1}, r"top_k is -1; expected 0"),
        ({"max_signals": -1}, r"max_signals is -1"),
        ({"required": (IMAGE,), "allowed": frozenset({AUDIO})}, r"required is image; expected .* \(audio\)"),
        ({"required": (IMAGE, IMAGE), "max_signals": 1}, r"at most max_signals \(1\)"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)
