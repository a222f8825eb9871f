import asyncio
import threading
import time
from contextlib import aclosing

import pytest

from services.worker import Emit, Worker


async def test_a_job_streams_what_it_emits() -> None:
    def job(emit: Emit[int], stop: threading.Event) -> None:
        for number in range(3):
            emit(number)

    worker: Worker[int] = Worker("test")
    assert [value async for value in worker.stream(job)] == [0, 1, 2]
    worker.close()


async def test_the_error_of_a_job_is_raised_where_its_stream_is_read() -> None:
    def job(emit: Emit[int], stop: threading.Event) -> None:
        emit(1)
        raise ValueError("no")

    worker: Worker[int] = Worker("test")
    stream = worker.stream(job)
    assert await anext(stream) == 1
    with pytest.raises(ValueError, match="no"):
        await anext(stream)
    worker.close()


async def test_jobs_that_are_dropped_never_run_beside_each_other() -> None:
    running, most, stopped_after = 0, 0, []
    guard = threading.Lock()

    def job(emit: Emit[int], stop: threading.Event) -> None:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        for step in range(100):
            if stop.is_set():
                stopped_after.append(step)
                break
            emit(step)
            time.sleep(0.01)
        with guard:
            running -= 1

    worker: Worker[int] = Worker("test")

    async def start_and_leave() -> None:
        async with aclosing(worker.stream(job)) as stream:
            async for _ in stream:
                return

    async def start_and_be_cancelled() -> None:
        async with aclosing(worker.stream(job)) as stream:
            async for _ in stream:
                pass

    tasks = [asyncio.create_task(start_and_be_cancelled()) for _ in range(3)]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(start_and_leave(), start_and_leave(), *tasks, return_exceptions=True)
    assert most == 1
    assert running == 0
    assert max(stopped_after) < 20
    worker.close()


async def test_a_cancel_that_comes_while_a_stream_closes_is_neither_early_nor_lost() -> None:
    gate = threading.Event()
    went_on: list[bool] = []

    def job(emit: Emit[int], stop: threading.Event) -> None:
        emit(1)
        gate.wait(10)

    worker: Worker[int] = Worker("test")

    async def read() -> None:
        async with aclosing(worker.stream(job)) as stream:
            await anext(stream)
        went_on.append(True)

    task = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    waited = not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    worker.close()
    assert (waited, went_on) == (True, [])
