"""Scores of given replies: equal however they are computed, and in the way of no other reply."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
import torch

from encoders.media import Modality
from llm.async_engine import AsyncEngine
from llm.engine import Engine
from llm.generate import ContextTooLong, Finished, GenerationOptions
from llm.scoring import Scored, score
from llm.template import Dialogue, SignalPart
from tests.test_language_engine import end_of, run
from tests.tiny_llm import assistant, medium, tiny_model, user

IMAGE, AUDIO = Modality.IMAGE, Modality.AUDIO


def described(seed: int = 0, words: str = "a small blue drum") -> Dialogue:
    return [user(medium(IMAGE, 5, seed), "what is this?"), assistant(words)]


def close(found: Scored, expected: Scored) -> bool:
    return found.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-4)


def test_a_score_is_the_probability_of_each_word_after_those_before_it_and_of_the_end() -> None:
    model = tiny_model()
    dialogue = described()
    row = model.encode(dialogue)
    with torch.inference_mode():
        logits, _ = model.forward_embeddings(model.embed_batch(model.collate([dialogue])))
    start = row.trained.index(True)
    assert row.ids[-1] == model.tokenizer.eos_id
    expected = [logits[0, at - 1].softmax(-1)[row.ids[at]].log().item() for at in range(start, len(row.ids))]

    (found,) = score(model, [dialogue])

    assert found.log_probabilities == pytest.approx(expected, abs=1e-4)


def test_a_token_of_ours_in_a_reply_is_words() -> None:
    model = tiny_model()
    assert "[IMG0]" in model.tokenizer.added_tokens
    (found,) = score(model, [described(words="[IMG0]")])
    assert len(found.log_probabilities) > 2  # the token and the end would be two


def test_only_the_last_reply_is_scored_and_neighbours_change_nothing() -> None:
    model = tiny_model()
    earlier = [user("draw a bell"), assistant("here", SignalPart(IMAGE)), *described()]
    both = score(model, [described(), earlier])
    assert close(both[0], score(model, [described()])[0])
    assert close(both[1], score(model, [earlier])[0])
    assert len(both[0].log_probabilities) == len(both[1].log_probabilities)


def test_an_engine_scores_in_pieces_what_a_pass_scores_at_once_while_others_speak() -> None:
    model = tiny_model()
    dialogues = [described(0), described(1, "here is a small blue drum, and how it sounds"), described(0)]
    alone = Engine(model, slots=1)
    plain = alone.prepare([user("draw a bell")])
    expected_ids = end_of(run(alone, [plain])[plain]).ids
    engine = Engine(model, slots=3, step_tokens=5)
    speaking = engine.prepare([user("draw a bell")])
    requests = [engine.prepare_given(dialogue) for dialogue in dialogues]

    events = run(engine, [speaking, *requests])

    assert end_of(events[speaking]).ids == expected_ids
    for request, expected in zip(requests, score(model, dialogues), strict=True):
        scored, finished = events[request]
        assert isinstance(scored, Scored)
        assert close(scored, expected)
        assert isinstance(finished, Finished)


def test_a_score_needs_no_more_of_its_prompt_than_a_slot_knows_not_yet() -> None:
    model = tiny_model()
    engine = Engine(model, slots=2)
    asked = described()[:1]
    run(engine, [engine.prepare(asked, GenerationOptions(max_new_tokens=1))])
    before = engine.stats.reused_tokens

    events = run(engine, [request := engine.prepare_given(described())])

    assert engine.stats.reused_tokens - before == request.most_reused
    scored = events[request][0]
    assert isinstance(scored, Scored)
    assert close(scored, score(model, [described()])[0])


def test_what_was_only_scored_is_given_up_before_any_conversation() -> None:
    model = tiny_model()
    engine = Engine(model, slots=2)
    talk = [user("what does this picture sound like?")]
    run(engine, [engine.prepare(talk, GenerationOptions(max_new_tokens=4))])
    for seed in range(4):
        run(engine, [engine.prepare_given(described(seed))])
    before = engine.stats.reused_tokens
    again = engine.prepare(talk, GenerationOptions(max_new_tokens=4))
    run(engine, [again])
    assert engine.stats.reused_tokens - before == len(again.row.ids) - 1


def test_what_cannot_be_scored_is_refused_before_it_waits() -> None:
    engine = Engine(tiny_model(), slots=1, context=12)
    with pytest.raises(ContextTooLong, match="at most 12"):
        engine.prepare_given(described())
    with pytest.raises(ValueError, match="end it with an assistant's message"):
        engine.prepare_given([user("draw")])


async def test_scores_take_their_turn_with_streams_and_leave_nothing_behind() -> None:
    model = tiny_model()
    engine = AsyncEngine(Engine(model, slots=1, step_tokens=4))
    try:
        async with aclosing(engine.stream([user("draw a bell")], GenerationOptions(seed=1))) as stream:
            scoring = asyncio.create_task(engine.score(described()))
            dropped = asyncio.create_task(engine.score(described(1)))
            await asyncio.sleep(0)  # both wait for the engine now, and neither can be done
            dropped.cancel()
            async for _ in stream:
                pass
        assert close(await scoring, score(model, [described()])[0])
        with pytest.raises(asyncio.CancelledError):
            await dropped
        while engine.stats.running or engine.stats.waiting:
            await asyncio.sleep(0.001)
        with pytest.raises(ValueError, match="cannot read"):
            await engine.score([user(medium(Modality.TEXT)), assistant("a bell")])
    finally:
        engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        await engine.score(described())
