"""How a thread tells streams: what is urgent at once, words a few at a time, all of it and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
import torch

from encoders.media import Modality
from llm import telling
from llm.engine_request import StepEvent
from llm.reply import Finished, SignalReady, TextDelta, Usage
from llm.signals import Signal
from llm.telling import Listener, Stream, joined

END = Finished("stop", Usage(1, 1), (2,))
SIGNAL = SignalReady(Signal(Modality.IMAGE, "a bell", torch.zeros(1, 2), torch.zeros(1, 2)), 1.0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let words wait for longer than any test takes."""
    monkeypatch.setattr(telling, "TOLD_EVERY_S", 60.0)


def listener() -> Listener:
    return Listener(asyncio.get_running_loop())


def step(*said: tuple[Stream, StepEvent | str]) -> list[tuple[Stream, StepEvent]]:
    return [(stream, TextDelta(event) if isinstance(event, str) else event) for stream, event in said]


async def heard(stream: Stream) -> list[StepEvent]:
    """Return what is in a stream once the loop has done what it was woken for."""
    for _ in range(3):
        await asyncio.sleep(0)
    return [stream.events.get_nowait() for _ in range(stream.events.qsize())]


def words(events: Iterable[StepEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, TextDelta)]


@pytest.mark.usefixtures("patient")
async def test_first_words_are_told_at_once_also_while_others_wait() -> None:
    ears = listener()
    one, other = Stream(ears), Stream(ears)

    ears.tell(step((one, "Here")))
    assert words(await heard(one)) == ["Here"]
    ears.tell(step((one, " is")))
    assert await heard(one) == []
    ears.tell(step((one, " a"), (other, "No")))
    assert words(await heard(other)) == ["No"]
    assert words(await heard(one)) == [" is a"]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("event", [END, SIGNAL, ArithmeticError("not finite")])
async def test_what_is_not_words_is_told_at_once_behind_the_words_before_it(event: StepEvent) -> None:
    stream = Stream(listener())
    for said in ("Here", " is", " a bell"):
        stream.listener.tell(step((stream, said)))
        await asyncio.sleep(0)
    stream.listener.tell(step((stream, event)))

    *before, last = await heard(stream)

    assert last is event
    assert words(before) == ["Here", " is a bell"]


async def test_words_that_come_fast_are_told_together_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "TOLD_EVERY_S", 0.5)
    stream = Stream(listener())
    stream.listener.tell(step((stream, "Here")))
    assert words(await heard(stream)) == ["Here"]

    for said in (" is", " a", " bell"):
        stream.listener.tell(step((stream, said)))
        assert await heard(stream) == []
    async with asyncio.timeout(20):
        assert await stream.events.get() == TextDelta(" is a bell")


async def test_all_that_a_thread_says_is_told_in_order() -> None:
    stream = Stream(listener())
    said = [f" {i}" for i in range(2000)]

    def speak() -> None:
        for word in said:
            stream.listener.tell(step((stream, word)))

    speaking = asyncio.create_task(asyncio.to_thread(speak))
    told = ""
    async with asyncio.timeout(20):
        while not told.endswith(said[-1]):
            told += "".join(words([await stream.events.get()]))
    await speaking

    assert told == "".join(said)


async def test_words_that_come_slowly_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "TOLD_EVERY_S", 0.0)
    stream = Stream(listener())
    for said in ("Here", " is", " a bell"):
        stream.listener.tell(step((stream, said)))
        assert words(await heard(stream)) == [said]
        await asyncio.sleep(0.02)  # the loop looks, and finds nothing


async def test_nobody_listens_in_a_closed_loop_also_where_it_was_about_to_look() -> None:
    loop = asyncio.new_event_loop()
    stream = Stream(Listener(loop))
    assert stream.listener.tell(step((stream, "Here")))
    loop.close()
    assert not stream.listener.tell(step((stream, " is")))
    assert not stream.listener.tell(step((stream, END)))


async def test_only_words_that_follow_each_other_in_their_stream_are_joined() -> None:
    ears = listener()
    one, other = Stream(ears), Stream(ears)

    said = step((one, "a"), (other, "x"), (one, "b"), (one, SIGNAL), (other, "y"), (one, "c"), (one, END))
    told = joined(said)

    assert told == step((one, "ab"), (other, "xy"), (one, SIGNAL), (one, "c"), (one, END))
