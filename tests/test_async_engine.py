"""The engine's streams: many at once, closed within a step, and never left waiting."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from contextlib import aclosing
from typing import Any

import pytest

from encoders.media import Modality
from llm.async_engine import LAID_OUT_AT_ONCE, AsyncEngine
from llm.engine import Engine
from llm.engine_request import Request, StepEvent
from llm.generate import ContextTooLong, Finished, GenerationOptions, TextDelta, generate
from tests.test_generate import eager_model
from tests.test_language_engine import assert_same
from tests.tiny_llm import medium, tiny_model, user

LONG = GenerationOptions(allowed=frozenset(), max_new_tokens=200, temperature=1.0, seed=0)


async def all_of(engine: AsyncEngine, text: str, options: GenerationOptions) -> list[Any]:
    return [event async for event in engine.stream([user(text)], options)]


def whole(reply: list[Any]) -> list[Any]:
    """Return a reply with words that follow each other in one event: how many are told at once varies."""
    events: list[Any] = []
    for event in reply:
        if events and isinstance(event, TextDelta) and isinstance(events[-1], TextDelta):
            events[-1] = TextDelta(events[-1].text + event.text)
        else:
            events.append(event)
    return events


async def settled(engine: AsyncEngine) -> None:
    limit = time.monotonic() + 20
    while engine.stats.running or engine.stats.waiting:
        assert time.monotonic() < limit, engine.stats
        await asyncio.sleep(0.01)


async def test_streams_share_the_model_and_say_what_they_say_alone() -> None:
    model = eager_model()
    engine = AsyncEngine(Engine(model, slots=3))
    wishes = [GenerationOptions(temperature=1.5, seed=seed, max_new_tokens=15) for seed in range(7)]

    replies = await asyncio.gather(*(all_of(engine, f"draw {i}", wish) for i, wish in enumerate(wishes)))

    engine.close()
    for i, (reply, wish) in enumerate(zip(replies, wishes, strict=True)):
        assert_same(whole(reply), whole(list(generate(model, [user(f"draw {i}")], wish))))
    assert engine.stats.steps < sum(len(reply[-1].ids) for reply in replies)


async def test_a_prompt_that_was_forgotten_is_read_whole() -> None:
    engine = AsyncEngine(Engine(eager_model(), slots=3))
    reused = []
    for forgets in (False, False, True):
        if forgets:
            engine.forget()
        before = engine.stats.reused_tokens
        await all_of(engine, "draw a bell", GenerationOptions(max_new_tokens=3))
        reused.append(engine.stats.reused_tokens - before)

    engine.close()
    assert reused[0] == reused[2] == 0 < reused[1]


async def test_a_closed_stream_frees_its_slot_within_a_step() -> None:
    core = Engine(tiny_model(), slots=1)
    engine = AsyncEngine(core)
    async with aclosing(engine.stream([user("hi")], LONG)) as stream:
        async for event in stream:
            assert isinstance(event, TextDelta)
            break
    steps = core.stats.steps
    await settled(engine)
    assert core.stats.steps <= steps + 2
    engine.close()


async def test_a_cancelled_reader_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Engine(tiny_model(), slots=2)
    step = core.step

    def slow_step() -> list[tuple[Request, StepEvent]]:
        time.sleep(0.02)  # no reply can end before its reader is cancelled
        return step()

    monkeypatch.setattr(core, "step", slow_step)
    engine = AsyncEngine(core)
    readers = [asyncio.create_task(all_of(engine, f"say {i}", LONG)) for i in range(5)]
    while core.stats.running < 2:
        await asyncio.sleep(0.001)
    for reader in readers:
        reader.cancel()
    assert all(
        isinstance(end, asyncio.CancelledError)
        for end in await asyncio.gather(*readers, return_exceptions=True)
    )
    await settled(engine)
    monkeypatch.undo()
    assert isinstance((await all_of(engine, "still there?", LONG))[-1], Finished)
    engine.close()


async def test_what_does_not_fit_is_raised_where_the_stream_is_read() -> None:
    engine = AsyncEngine(Engine(tiny_model(), slots=1, context=8))
    with pytest.raises(ContextTooLong, match="at most 8"):
        await all_of(engine, "a long story", LONG)
    engine.close()


async def test_an_engine_that_breaks_ends_every_stream_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Engine(tiny_model(), slots=2)
    engine = AsyncEngine(core)
    speak = core._speak

    def broken(*args: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(core, "_speak", broken)
    ends = await asyncio.gather(*(all_of(engine, f"say {i}", LONG) for i in range(4)), return_exceptions=True)
    assert [str(end) for end in ends] == ["broken"] * 4
    monkeypatch.setattr(core, "_speak", speak)
    assert isinstance((await all_of(engine, "again", LONG))[-1], Finished)
    engine.close()


async def test_closing_ends_the_streams_that_are_read_and_refuses_new_ones() -> None:
    engine = AsyncEngine(Engine(tiny_model(), slots=1))
    reader = asyncio.create_task(all_of(engine, "hi", LONG))
    while not engine.stats.running:
        await asyncio.sleep(0.005)
    engine.close()
    with pytest.raises(RuntimeError, match="closed while it replied"):
        await reader
    with pytest.raises(RuntimeError, match="make a new one"):
        await all_of(engine, "hi", LONG)


def test_streams_may_be_read_in_one_event_loop_after_another() -> None:
    engine = AsyncEngine(Engine(tiny_model(), slots=1))
    options = GenerationOptions(max_new_tokens=5)
    replies = [asyncio.run(all_of(engine, "hi", options)) for _ in range(2)]
    engine.close()
    assert_same(*map(whole, replies))


async def test_only_what_takes_long_to_lay_out_is_laid_out_in_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = Engine(tiny_model(), slots=1)
    engine = AsyncEngine(core)
    prepare, where = core.prepare, []

    def noted(*args: Any) -> Request:
        where.append(threading.current_thread() is threading.main_thread())
        return prepare(*args)

    monkeypatch.setattr(core, "prepare", noted)
    options = GenerationOptions(max_new_tokens=1, allowed=frozenset())
    for parts in (["hi"], ["hear ", medium(Modality.AUDIO)], ["a bell"] * (LAID_OUT_AT_ONCE // 6 + 1)):
        with contextlib.suppress(ContextTooLong):
            async for _ in engine.stream([user(*parts)], options):
                pass
    engine.close()

    assert where == [True, False, False]
