"""One reply, event by event: the engine with one slot.

The values that a reply is asked for with and made of are here too, for whoever calls it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from llm.engine import Engine
from llm.engine_request import Request
from llm.model import LanguageModel
from llm.reply import (
    ALL_MEDIA,
    ContextTooLong,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationOptions,
    SignalReady,
    TextDelta,
    Usage,
)
from llm.scoring import Scored
from llm.template import Dialogue

__all__ = [
    "ALL_MEDIA",
    "ContextTooLong",
    "FinishReason",
    "Finished",
    "GenerationEvent",
    "GenerationOptions",
    "SignalReady",
    "TextDelta",
    "Usage",
    "generate",
]


def generate(
    model: LanguageModel,
    dialogue: Dialogue,
    options: GenerationOptions | None = None,
    stop: threading.Event | None = None,
) -> Iterator[GenerationEvent]:
    """Reply to ``dialogue``, one event after another; the last is :class:`Finished`.

    The model chooses a block's first token; the rest is fed with it in one forward pass, and the states
    at these tokens are the signal's. ``stop`` is looked at before every pass.

    Raises:
        ContextTooLong: the dialogue does not fit. This and what follows comes from the call itself.
        ValueError: a medium that the model cannot read or make, or a model in training mode.

    """
    engine = Engine(model, slots=1, step_tokens=max(2, model.context_length))
    return _events(engine, engine.prepare(dialogue, options), stop or threading.Event())


def _events(engine: Engine, request: Request, stop: threading.Event) -> Iterator[GenerationEvent]:
    engine.submit(request)
    while engine.busy:
        if stop.is_set():
            engine.cancel(request)
        for _, event in engine.step():
            if isinstance(event, Exception):
                raise event
            assert not isinstance(event, Scored)  # no reply was given
            yield event
