"""The engine: equal to one reply at a time, whoever else is there, and nothing is lost or leaked."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from encoders.media import Modality
from llm.engine import Engine, Slot
from llm.engine_request import Request, StepEvent
from llm.generate import (
    ContextTooLong,
    Finished,
    GenerationOptions,
    SignalReady,
    TextDelta,
    generate,
)
from llm.slots import SlotModel
from llm.template import Dialogue, SignalPart
from tests.test_generate import eager_model
from tests.tiny_llm import WIDTH, assistant, gpt_neox, llama, medium, qwen2, qwen3, tiny_model, user

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO
WORDS = ("draw a bell", "what does this picture sound like?", "here is a small blue drum", "and how?")


def mistral(rows: int) -> PreTrainedModel:
    """A base that looks back six positions only."""
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return MistralForCausalLM(MistralConfig(vocab_size=rows, sliding_window=6, **sizes))


def run(engine: Engine, requests: list[Request]) -> dict[Request, list[StepEvent]]:
    """Submit all at once, step until nothing is left, and return the events by request."""
    events: dict[Request, list[StepEvent]] = {request: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.busy:
        for request, event in engine.step():
            events[request].append(event)
    return events


def end_of(events: list[StepEvent]) -> Finished:
    assert isinstance(events[-1], Finished), events[-1]
    return events[-1]


def text_of(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def random_dialogue(draw: random.Random) -> Dialogue:
    dialogue: Dialogue = []
    for _ in range(draw.randint(0, 2)):
        dialogue += [user(draw.choice(WORDS)), assistant("here", SignalPart(draw.choice([IMAGE, AUDIO])))]
    parts: list[Any] = [draw.choice(WORDS) for _ in range(draw.randint(1, 3))]
    if draw.random() < 0.5:
        parts.insert(0, medium(draw.choice([IMAGE, VIDEO, AUDIO]), draw.randint(2, 9), draw.randint(0, 2)))
    return [*dialogue, user(*parts)]


def random_options(draw: random.Random) -> GenerationOptions:
    return GenerationOptions(
        max_new_tokens=draw.randint(1, 20),
        temperature=draw.choice([0.0, 0.0, 1.0, 2.0]),
        top_p=draw.choice([1.0, 0.9]),
        top_k=draw.choice([0, 0, 50]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
        seed=draw.randint(0, 99),
        max_signals=draw.randint(0, 3),
        stop=draw.choice([(), (), ("a",)]),
    )


def assert_same(one: list[Any], other: list[Any]) -> None:
    """Compare two replies event by event; text may come in the same pieces only."""
    assert [type(event) for event in one] == [type(event) for event in other]
    for ours, theirs in zip(one, other, strict=True):
        if isinstance(ours, SignalReady):
            assert ours.confidence == pytest.approx(theirs.confidence, abs=1e-4)
            assert (ours.signal.modality, ours.signal.caption) == (
                theirs.signal.modality,
                theirs.signal.caption,
            )
            torch.testing.assert_close(ours.signal.hidden, theirs.signal.hidden, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.signal.embeddings, theirs.signal.embeddings)
        else:
            assert ours == theirs


@pytest.mark.parametrize("base", [llama, qwen2, qwen3, gpt_neox, mistral])
def test_states_at_any_rows_and_positions_are_those_of_full_passes(
    base: Callable[..., PreTrainedModel],
) -> None:
    model = tiny_model(base)
    lengths = [3, 11, 0, 7]
    rows = torch.randn(4, 20, WIDTH)
    with torch.no_grad():
        expected = model.run(rows)
        slots = SlotModel(model, 6, 256)
        for row, length in enumerate(lengths):
            if length:
                slots.run(rows[row : row + 1, :length], [row + 1], [0])

        def check(chosen: list[int], count: int) -> None:
            starts = [lengths[row] for row in chosen]
            fed = torch.stack([rows[row, lengths[row] : lengths[row] + count] for row in chosen])
            hidden = slots.run(fed, [row + 1 for row in chosen], starts)
            for i, row in enumerate(chosen):
                whole = expected[row, lengths[row] : lengths[row] + count]
                torch.testing.assert_close(hidden[i], whole, atol=1e-4, rtol=1e-4)
                lengths[row] += count

        check([0, 1, 2, 3], 1)
        check([0, 3], 4)
        assert [len(place) for place in slots.cache.room_together(0)] == [256, 256]  # copied together there
        check([1, 2, 3], 2)
        slots.cache.swap(1, 4, 20)
        slots.cache.copy(1, 5, 20)
        hidden = slots.run(rows[3:, lengths[3] : lengths[3] + 1], [5], [lengths[3]])
    torch.testing.assert_close(hidden[0], expected[3, lengths[3] : lengths[3] + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", [llama, mistral])
def test_a_slot_fed_alone_goes_on_where_it_was_left_among_others(
    base: Callable[..., PreTrainedModel],
) -> None:
    model = tiny_model(base)
    rows = torch.randn(2, 300, WIDTH)
    with torch.no_grad():
        expected = model.run(rows)
        slots = SlotModel(model, 3, 300)
        fed = [0, 0]

        def check(chosen: list[int], places: list[int], count: int) -> None:
            starts = [fed[row] for row in chosen]
            states = slots.run(
                torch.stack([rows[row, fed[row] : fed[row] + count] for row in chosen]), places, starts
            )
            for row, found in zip(chosen, states, strict=True):
                whole = expected[row, fed[row] : fed[row] + count]
                torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
                fed[row] += count

        check([0, 1], [0, 1], 5)
        check([0], [0], 3)
        check([1], [1], 1)
        check([1], [1], 1)
        slots.cache.swap(0, 2, 10)
        check([0], [2], 1)
        check([0], [2], 270)  # the cache grows
        check([0], [2], 1)
        check([1, 0], [1, 2], 1)
        check([0], [2], 300 - fed[0])
        slots.cache.clear(1)
        assert all(not tensor[1].any() for tensor in slots.cache.tensors())


def test_padding_beyond_the_context_changes_nothing() -> None:
    model = tiny_model(llama, max_position_embeddings=12)
    rows = torch.randn(2, 12, WIDTH)
    with torch.no_grad():
        expected = model.run(rows)
        slots = SlotModel(model, 2, 12)
        slots.run(rows[:1, :11], [0], [0])
        fed = torch.stack([torch.cat([rows[0, 11:], torch.zeros(4, WIDTH)]), rows[1, :5]])
        hidden = slots.run(fed, [0, 1], [11, 0])
    torch.testing.assert_close(hidden[0, 0], expected[0, 11], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden[1], expected[1, :5], atol=1e-4, rtol=1e-4)


def test_a_full_row_beside_one_that_speaks_leads_out_of_no_table() -> None:
    model = tiny_model(llama, max_position_embeddings=12)
    rows = torch.randn(2, 12, WIDTH)
    with torch.no_grad():
        expected = model.run(rows)
        slots = SlotModel(model, 2, 12)
        slots.run(rows, [0, 1], [0, 0])
        at: list[Tensor] = []
        model.causal_lm.base_model.register_forward_pre_hook(
            lambda base, args, named: at.append(named["position_ids"]), with_kwargs=True
        )
        hidden = slots.run(torch.stack([torch.zeros(1, WIDTH), rows[1, 11:]]), [0, 1], [12, 11])
        again = slots.run(rows[:1, 11:], [0], [11])
    assert [places.tolist() for places in at] == [[[11], [11]], [[11]]]
    torch.testing.assert_close(hidden[1, 0], expected[1, 11], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again[0, 0], expected[0, 11], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_random_arrivals_and_cancels_lose_nothing_and_change_no_reply(seed: int) -> None:
    draw = random.Random(seed)
    model = eager_model()
    engine = Engine(model, slots=draw.randint(2, 4), step_tokens=draw.choice([6, 20, 200]))
    todo = [(random_dialogue(draw), random_options(draw)) for _ in range(16)]
    requests: list[Request] = []
    events: dict[Request, list[StepEvent]] = {}
    cancelled: set[Request] = set()
    while len(requests) < len(todo) or engine.busy:
        while len(requests) < len(todo) and draw.random() < 0.4:
            request = engine.prepare(*todo[len(requests)])
            requests.append(request)
            events[request] = []
            engine.submit(request)
        if draw.random() < 0.1 and (open_ := [r for r in requests if not events[r] or not ended(events[r])]):
            cancelled.add(victim := draw.choice(open_))
            engine.cancel(victim)
        for request, event in engine.step():
            assert not ended(events[request])
            events[request].append(event)

    assert engine.stats.running == engine.stats.waiting == 0
    assert engine.stats.requests == len(todo)
    assert cancelled
    for request, (dialogue, options) in zip(requests, todo, strict=True):
        alone = list(generate(model, dialogue, options))
        if request not in cancelled:
            assert_same(events[request], alone)
            continue
        end = end_of(events[request])
        assert end.reason == "cancelled" or request.reply.reason == end.reason
        whole = cast(Finished, alone[-1]).ids
        assert end.ids == whole[: len(end.ids)]
        assert text_of(alone).startswith(text_of(events[request]).rstrip("\ufffd"))


def ended(events: list[Any]) -> bool:
    return bool(events) and isinstance(events[-1], (Finished, Exception))


def test_a_user_who_floods_the_engine_delays_another_by_no_more_than_one_turn_of_a_slot() -> None:
    model = tiny_model()
    engine = Engine(model, slots=2, context=128, step_tokens=32)
    options = GenerationOptions(max_new_tokens=6, seed=0)
    flood = [engine.prepare([user(f"draw a bell {i}")], options, user="ann") for i in range(50)]
    other = engine.prepare([user("and how?")], options, user="bob")
    for request in flood:
        engine.submit(request)
    ended: list[Request] = []
    while len(ended) < 5:
        ended += [request for request, event in engine.step() if isinstance(event, Finished)]
    before = len(ended)

    engine.submit(other)
    while not any(slot.request is other for slot in engine._slots):
        ended += [request for request, event in engine.step() if isinstance(event, Finished)]

    assert len(ended) - before <= 2  # the two that ran, if they ended in one step; 45 more of hers wait
    while engine.busy:
        ended += [request for request, event in engine.step() if isinstance(event, Finished)]
    assert len(ended) == 51
    assert ended.index(other) < 10


def test_a_cancel_ends_a_running_and_a_waiting_request_with_the_next_step() -> None:
    model = eager_model()
    engine = Engine(model, slots=1)
    one, two, three = (engine.prepare([user("hi")], GenerationOptions(allowed=frozenset())) for _ in range(3))
    for request in (one, two, three):
        engine.submit(request)
    engine.step()
    engine.cancel(one)
    engine.cancel(two)

    events = engine.step()

    finished = {request: event.reason for request, event in events if isinstance(event, Finished)}
    assert finished[one] == finished[two] == "cancelled"
    assert engine.stats.running == 1
    assert three in run_on(engine)


def run_on(engine: Engine) -> dict[Request, list[StepEvent]]:
    events: dict[Request, list[StepEvent]] = {}
    while engine.busy:
        for request, event in engine.step():
            events.setdefault(request, []).append(event)
    return events


def test_long_prompts_are_read_in_pieces_while_others_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    engine = Engine(model, slots=4, step_tokens=12)
    options = GenerationOptions(allowed=frozenset(), max_new_tokens=30)
    short = engine.prepare([user("hi")], options)
    engine.submit(short)
    engine.step()
    long = engine.prepare([user(WORDS[1] * 6)], options)
    engine.submit(long)
    said = len(short.reply.ids)
    fed: list[int] = []
    shares = engine._shares

    def noted() -> list[tuple[Slot, int]]:
        fed.append(sum(count for _, count in shares()))
        return shares()

    monkeypatch.setattr(engine, "_shares", noted)
    steps = 0
    while not long.reply.ids:
        passes = engine.stats.passes
        engine.step()
        steps += 1
        assert len(short.reply.ids) == said + steps
        assert engine.stats.passes - passes <= 2
    assert steps >= len(long.row.ids) // 12
    assert set(fed[:-1]) == {12}  # the word of one and the piece of the other share the step
    assert fed[-1] <= 12
    whole = list(generate(model, [user(WORDS[1] * 6)], options))
    assert end_of(run_on(engine)[long]).ids == end_of(cast(list[StepEvent], whole)).ids


def test_a_next_turn_reads_only_what_is_new() -> None:
    model = eager_model()
    engine = Engine(model, slots=3)
    options = GenerationOptions(
        required=(IMAGE,), max_signals=1, max_new_tokens=4, allowed=frozenset({IMAGE})
    )
    first = [user("draw a bell like this ", medium(IMAGE, 6), "please")]
    (events,) = run(engine, [engine.prepare(first, options)]).values()
    run(engine, [engine.prepare([user(WORDS[2])], options)])
    before = engine.stats.reused_tokens

    text = text_of(events[: [isinstance(e, SignalReady) for e in events].index(True)])
    follow_up = [*first, assistant(text, SignalPart(IMAGE)), user("and smaller")]
    request = engine.prepare(follow_up, options)
    (reply,) = run(engine, [request]).values()

    first_length = len(model.encode(first, open_reply=True).ids)
    assert engine.stats.reused_tokens - before >= first_length
    assert engine.stats.hit_rate == engine.stats.reused_tokens / engine.stats.prompt_tokens > 0
    assert_same(reply, list(generate(model, follow_up, options)))


def test_what_is_forgotten_is_read_whole() -> None:
    engine = Engine(eager_model(), slots=2)
    options = GenerationOptions(max_new_tokens=4)
    dialogue = [user("what is this in the picture?")]
    (first,) = run(engine, [engine.prepare(dialogue, options)]).values()

    engine.forget()
    (second,) = run(engine, [engine.prepare(dialogue, options)]).values()

    assert engine.stats.reused_tokens == 0
    assert_same(second, first)


def test_another_picture_in_the_same_place_is_read_anew() -> None:
    model = eager_model()
    engine = Engine(model, slots=3)
    options = GenerationOptions(max_new_tokens=6)
    replies = []
    for seed in (0, 1, 0):
        dialogue = [user("what is this in the picture? ", medium(IMAGE, 6, seed), "tell me")]
        before = engine.stats.reused_tokens
        (events,) = run(engine, [engine.prepare(dialogue, options)]).values()
        replies.append(engine.stats.reused_tokens - before)
        assert_same(events, list(generate(model, dialogue, options)))
    row = model.encode([user("what is this in the picture? ", medium(IMAGE, 6), "tell me")], open_reply=True)
    assert replies == [0, row.media[0].start, len(row.ids) - 1]


def test_the_conversation_that_was_idle_longest_loses_its_slot() -> None:
    model = tiny_model()
    engine = Engine(model, slots=2)
    options = GenerationOptions(max_new_tokens=1, allowed=frozenset())
    asked = [
        "aaaaaaaaaaaaaaaa",
        "bbbbbbbbbbbbbbbb",
        "aaaaaaaaaaaaaaaa",
        "cccccccccccccccc",
        "aaaaaaaaaaaaaaaa",
    ]
    reused = []
    for text in asked:
        before = engine.stats.reused_tokens
        run(engine, [engine.prepare([user(text)], options)])
        reused.append(engine.stats.reused_tokens - before)
    assert [bool(count) for count in reused] == [False, False, True, False, True]


def test_a_request_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = eager_model()
    engine = Engine(model, slots=4)
    options = GenerationOptions(max_new_tokens=8)
    good = [[user(text)] for text in WORDS[:2]]
    poisoned, unreadable = [user("poison please")], [user("see ", medium(VIDEO))]
    project, step = model.project_slot, engine._slot_model.run

    def broken_project(slot: Any) -> Tensor:
        if slot.media.modality is VIDEO:
            raise RuntimeError("unreadable")
        return project(slot)

    def broken_pass(embeddings: Tensor, rows: list[int], starts: list[int], *, plain: bool) -> Tensor:
        if any(engine._slots[row].request is bad for row in rows):
            raise RuntimeError("poisoned")
        return step(embeddings, rows, starts)

    monkeypatch.setattr(model, "project_slot", broken_project)
    monkeypatch.setattr(engine._slot_model, "run", broken_pass)
    bad = engine.prepare(poisoned, options)
    requests = [engine.prepare(good[0], options), bad, engine.prepare(unreadable, options)]
    requests.append(engine.prepare(good[1], options))
    events = run(engine, requests)

    assert [str(event) for event in events[bad]] == ["poisoned"]
    assert [str(event) for event in events[requests[2]]] == ["unreadable"]
    assert engine.stats.running == 0
    for request, dialogue in ((requests[0], good[0]), (requests[3], good[1])):
        assert_same(events[request], list(generate(model, dialogue, options)))


def test_numbers_that_are_none_end_one_reply_and_stay_in_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    engine = Engine(model, slots=2)
    options = GenerationOptions(max_new_tokens=8, allowed=frozenset())
    bad, good = engine.prepare([user("hear")], options), engine.prepare([user("hi")], options)
    step = engine._slot_model.run

    @torch.inference_mode()
    def broken_pass(embeddings: Tensor, rows: list[int], starts: list[int], *, plain: bool) -> Tensor:
        hidden = step(embeddings, rows, starts)
        for i, row in enumerate(rows):
            if engine._slots[row].request is bad:
                hidden[i] = float("nan")
                engine._slot_model.cache.kept[0].keys[row] = float("nan")
        return hidden

    monkeypatch.setattr(engine._slot_model, "run", broken_pass)
    events = run(engine, [bad, good])

    (error,) = events[bad]
    assert isinstance(error, ArithmeticError)
    assert "not finite" in str(error)
    assert all(layer.keys.isfinite().all() for layer in engine._slot_model.cache.kept)
    assert_same(events[good], list(generate(model, [user("hi")], options)))


@pytest.mark.parametrize("text", ["draw", "here"])
def test_a_stop_string_ends_the_text_before_it(text: str) -> None:
    model = tiny_model()
    options = GenerationOptions(temperature=1.0, seed=3, max_new_tokens=60, allowed=frozenset())
    free = text_of(list(generate(model, [user(text)], options)))
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    assert len(stop) == 3

    events = list(generate(model, [user(text)], replace(options, stop=("never to be said", stop))))

    assert text_of(events) == free[: free.index(stop)]
    assert cast(Finished, events[-1]).reason == "stop"
    assert cast(Finished, events[-1]).usage.completion_tokens < 60


def test_required_media_follow_a_stop_string() -> None:
    model = tiny_model()
    options = GenerationOptions(temperature=1.0, seed=3, max_new_tokens=60, required=(IMAGE,), max_signals=1)
    options = replace(options, allowed=frozenset({IMAGE}))
    free = text_of(list(generate(model, [user("hi")], replace(options, required=(), max_signals=0))))
    events = list(generate(model, [user("hi")], replace(options, stop=(free[3],))))
    (signal,) = [event.signal for event in events if isinstance(event, SignalReady)]
    assert signal.modality == IMAGE
    assert free[3] not in text_of(events)
    assert cast(Finished, events[-1]).reason == "stop"


def test_a_repetition_penalty_is_for_words_that_were_used() -> None:
    model = tiny_model()
    options = GenerationOptions(max_new_tokens=40, allowed=frozenset())
    free = cast(Finished, list(generate(model, [user("hi")], options))[-1]).ids
    shy = cast(
        Finished, list(generate(model, [user("hi")], replace(options, repetition_penalty=1e6)))[-1]
    ).ids
    assert len(set(free)) < len(free)
    words = [token for token in shy if token != model.tokenizer.eos_id]
    assert len(set(words)) == len(words)


def test_a_request_that_cannot_fit_is_refused_before_it_waits() -> None:
    engine = Engine(tiny_model(), slots=2, context=16)
    with pytest.raises(ContextTooLong, match="sees at most 16"):
        engine.prepare([user(WORDS[1])])
    assert not engine.busy


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"slots": 0}, "slots is 0; expected at least 1"),
        ({"context": 300}, "context is 300; this model sees 1 to 256"),
        ({"slots": 8, "step_tokens": 8}, "step_tokens is 8; expected more than the 8 slots"),
    ],
)
def test_wrong_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(tiny_model(), **sizes)


def test_another_engine_attention_is_refused() -> None:
    model = tiny_model()
    model.causal_lm.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="Load it with attn_implementation='sdpa'"):
        Engine(model)


def test_a_block_is_one_pass() -> None:
    model = tiny_model()
    engine = Engine(model, slots=1)
    options = GenerationOptions(required=(VIDEO,), max_new_tokens=3, max_signals=1)
    (events,) = run(engine, [engine.prepare([user("hi")], options)]).values()
    words = len(end_of(events).ids) - model.tokenizer.signals.count(VIDEO)
    assert engine.stats.passes == words + 2
