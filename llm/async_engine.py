"""The engine for asyncio: one thread steps the model, every request is a stream of events.

Words that come fast are told a few at a time; see :mod:`llm.telling`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from weakref import WeakValueDictionary

from llm.engine import Engine, EngineStats
from llm.engine_request import Request, StepEvent
from llm.reply import Finished, GenerationEvent, GenerationOptions
from llm.request_lora import RequestLora
from llm.scoring import Scored
from llm.telling import Listener, Stream
from llm.template import Dialogue, MediaTokens

LAID_OUT_AT_ONCE = 1000
"""Characters of a dialogue, about a quarter of a millisecond, for which no thread is asked."""

logger = logging.getLogger(__name__)


class AsyncEngine:
    """Streams replies from an engine, which belongs to this object's thread from now on.

    Streams may be read in any number of event loops. The thread is made with the first stream.
    """

    def __init__(self, engine: Engine, name: str = "engine") -> None:
        self._engine = engine
        self._name = name
        self._streams: dict[Request, Stream] = {}  # the thread's own
        self._arrived: list[tuple[Request, Stream]] = []
        self._listeners: WeakValueDictionary[asyncio.AbstractEventLoop, Listener] = WeakValueDictionary()
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = self._forgets = False

    @property
    def stats(self) -> EngineStats:
        """Counts of the engine, as they were a moment ago."""
        return self._engine.stats

    async def stream(
        self,
        dialogue: Dialogue,
        options: GenerationOptions | None = None,
        lora: RequestLora | None = None,
        user: str = "",
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the events of a reply, spoken with ``lora`` if there is one; the last is ``Finished``.

        Users share the engine: where slots are short, the one for whom least was done is next.

        Closing the stream, or cancelling the task that reads it, ends the request with the step that
        runs now. The request's error is raised here.

        Raises:
            ContextTooLong: the dialogue does not fit.
            ValueError: a medium that the model cannot read or make.
            RuntimeError: the engine is closed.

        """
        if _is_short(dialogue):
            request = self._engine.prepare(dialogue, options, lora, user)
        else:
            request = await asyncio.to_thread(self._engine.prepare, dialogue, options, lora, user)
        stream = self._send(request)
        ended = False
        try:
            while not ended:
                event = await stream.events.get()
                ended = isinstance(event, (Finished, Exception))
                if isinstance(event, Exception):
                    raise event
                assert not isinstance(event, Scored)  # no reply was given
                yield event
        finally:
            if not ended:
                self._engine.cancel(request)

    async def score(self, dialogue: Dialogue, user: str = "") -> Scored:
        """Return how probable the last reply of a dialogue is, word by word.

        It takes its turn with the replies, and cancelling the task ends it with the step that runs now.

        Raises:
            ContextTooLong: the dialogue does not fit.
            ValueError: a medium that the model cannot read, or there is no such reply.
            RuntimeError: the engine is closed.

        """
        request = await asyncio.to_thread(self._engine.prepare_given, dialogue, user)
        stream = self._send(request)
        try:
            event = await stream.events.get()
        except asyncio.CancelledError:
            self._engine.cancel(request)
            raise
        if isinstance(event, Exception):
            raise event
        assert isinstance(event, Scored)
        return event

    def forget(self) -> None:
        """Let idle slots forget what they have read, before anything that is asked for from now on."""
        with self._news:
            self._forgets = True

    def close(self) -> None:
        """End the requests that run, and the thread after them; new streams raise ``RuntimeError``."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join()

    def _listener(self, loop: asyncio.AbstractEventLoop) -> Listener:
        with self._news:
            return self._listeners.setdefault(loop, Listener(loop))

    def _send(self, request: Request) -> Stream:
        stream = Stream(self._listener(asyncio.get_running_loop()))
        with self._news:
            if self._closed:
                raise RuntimeError("The engine is closed; make a new one.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._arrived.append((request, stream))
            self._news.notify()
        return stream

    def _run(self) -> None:
        while True:
            with self._news:
                while not (self._arrived or self._engine.busy or self._closed):
                    self._news.wait()
                arrived, self._arrived = self._arrived, []
                closed, forgets, self._forgets = self._closed, self._forgets, False
            if forgets:
                self._engine.forget()
            for request, stream in arrived:
                self._streams[request] = stream
                self._engine.submit(request)
            if closed:
                self._end_all(RuntimeError("The engine was closed while it replied."))
                return
            try:
                events = self._engine.step()
            except Exception as error:
                logger.exception("The engine failed; all its requests end.")
                self._end_all(error)
            else:
                self._deliver(events)

    def _end_all(self, error: Exception) -> None:
        self._engine.abort()
        self._deliver([(request, error) for request in self._streams])

    def _deliver(self, events: list[tuple[Request, StepEvent]]) -> None:
        """Hand the events of a step to the event loops that read them, to each at once."""
        told: dict[Listener, list[tuple[Stream, StepEvent]]] = {}
        for request, event in events:
            stream = self._streams[request]
            told.setdefault(stream.listener, []).append((stream, event))
            if isinstance(event, (Finished, Exception)):
                del self._streams[request]
        for listener, batch in told.items():
            if not listener.tell(batch):
                for request in [r for r, stream in self._streams.items() if stream.listener is listener]:
                    self._engine.cancel(request)


def _is_short(dialogue: Dialogue) -> bool:
    """Whether a dialogue is laid out sooner than a thread is found for it."""
    length = 0
    for message in dialogue:
        for part in message.parts:
            if isinstance(part, MediaTokens):
                return False  # their content has to be digested
            length += len(part) if isinstance(part, str) else 0
    return length <= LAID_OUT_AT_ONCE
