"""Many replies from one model at once: requests join and leave between any two steps.

A step feeds every running request a little: one token, a whole signal block, or a piece of its prompt.
Requests that feed the same number of positions share a forward pass. What a slot has in its cache when
its request ends stays there, and a later request that begins the same way goes on from it.

No threads, no Ray, no HTTP here; see :mod:`llm.async_engine` for a front with streams.

Shape letters in this file:
    B rows of a pass   T positions of a pass   D LLM width   V vocabulary   k tokens of a block
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from llm.engine_request import Request, StepEvent
from llm.fair_line import FairLine
from llm.model import LanguageModel
from llm.pass_threads import PassThreads
from llm.reply import GenerationOptions
from llm.request_lora import LoraRows, RequestLora
from llm.sampling import Sampler
from llm.scoring import GivenReply, Scored
from llm.slots import Capture, SlotModel
from llm.template import Dialogue

LEAST_REUSED = 8  # a shorter common beginning is not worth copying
PADDING_WORTH_A_PASS = 32  # positions of padding that cost about as much as one more pass


@dataclass(eq=False)
class Slot:
    """One row of the cache: ``fed`` positions of it hold what ``keys`` name."""

    keys: list[int] = field(default_factory=list)
    fed: int = 0
    request: Request | None = None
    media: list[tuple[int, Tensor]] = field(default_factory=list)  # (start, (length, D)), still to be fed
    last_used: int = -1

    @property
    def running(self) -> Request:
        """The request, where there must be one."""
        assert self.request is not None
        return self.request

    @property
    def pending(self) -> int:
        """Positions that are not in the cache yet."""
        return len(self.running.ids) - self.fed


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counts since the engine was made; ``running`` and ``waiting`` are of now.

    Of ``prompt_tokens``, ``reused_tokens`` were still in a slot.
    """

    requests: int
    running: int
    waiting: int
    steps: int
    passes: int
    prompt_tokens: int
    reused_tokens: int

    @property
    def hit_rate(self) -> float:
        """The part of all prompt tokens that was not computed again, in [0, 1]."""
        return self.reused_tokens / max(1, self.prompt_tokens)


class Engine:
    """Continuous batching over a language model.

    Not for several threads at once, except :meth:`prepare` and :meth:`cancel`.

    Args:
        model: in evaluation mode; its weights stay as they are while the engine is used.
        slots: how many requests run at the same time; of more, the user for whom least was done is next.
        context: positions per slot, prompt and reply; the model's own context by default.
        step_tokens: the most positions that one step feeds, except that all running replies always get
            their next token or block. What they leave over is for prompts, the oldest request first.
        most_threads: of the CPU, for a pass over many positions; taken where they make it faster, see
            :mod:`llm.pass_threads`. Other threads of this process should then not compute.

    Raises:
        ValueError: a size that cannot be, a model in training mode, or a base that the engine cannot
            run (see :class:`llm.slots.SlotModel`).

    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int = 8,
        context: int | None = None,
        step_tokens: int = 256,
        most_threads: int = 1,
    ) -> None:
        if model.training:
            raise ValueError("The model is in training mode; call model.eval() before it speaks.")
        if slots < 1:
            raise ValueError(f"slots is {slots}; expected at least 1.")
        self.context = model.context_length if context is None else context
        if not 1 <= self.context <= model.context_length:
            raise ValueError(
                f"context is {context}; this model sees 1 to {model.context_length} positions. "
                f"Leave it out for all of them."
            )
        if step_tokens <= slots:
            raise ValueError(
                f"step_tokens is {step_tokens}; expected more than the {slots} slots, or prompts would wait "
                f"for ever."
            )
        self.model, self.step_tokens = model, step_tokens
        self._tables = model.tables()
        self._slot_model = SlotModel(model, slots, self.context)
        self._threads = PassThreads(most_threads if model.device.type == "cpu" else 1)
        self._lora_rows = LoraRows(model.causal_lm)
        self._sampler = Sampler(model.tokenizer, model.device)
        self._slots = [Slot() for _ in range(slots)]
        self._num_running = 0  # these are the first slots
        self._waiting: FairLine[Request] = FairLine()
        self._clock = itertools.count()
        self._requests = self._steps = self._passes = self._prompt_tokens = self._reused_tokens = 0

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile steps of running replies, but not prompts, blocks and what has LoRA; before any request.

        Raises:
            RuntimeError: it cannot be compiled, for want of a C++ compiler for instance. The engine goes on
                uncompiled.

        """
        self._slot_model.compile(backend)

    def trace(self) -> None:
        """Record passes and repeat them without Python, but not those with LoRA; before any request.

        Raises:
            RuntimeError: the base cannot be recorded. The engine goes on as before.

        """
        self._slot_model.trace()

    def graph(self, capture: Capture) -> None:
        """Replay steps of running replies as CUDA graphs, which ``capture`` makes; before any request.

        Raises:
            RuntimeError: there is no GPU, or a pass cannot be captured. The engine goes on as before.

        """
        self._slot_model.graph(capture)

    # --- requests ---------------------------------------------------------------------------------

    def prepare(
        self,
        dialogue: Dialogue,
        options: GenerationOptions | None = None,
        lora: RequestLora | None = None,
        user: str = "",
    ) -> Request:
        """Lay out a request of ``user``. Any thread may call this. ``lora`` is on the model's device.

        Raises:
            ContextTooLong: the dialogue does not fit.
            ValueError: a medium that the model cannot read or make.

        """
        return Request.to_reply(self.model, self.context, dialogue, options, lora, user)

    def prepare_given(self, dialogue: Dialogue, user: str = "") -> Request:
        """Lay out a request that scores the last reply of ``dialogue``. Any thread may call this.

        It takes a slot for as long as a prompt of its length, and its events are :class:`Scored` and
        ``Finished``.

        Raises:
            ContextTooLong: the dialogue does not fit.
            ValueError: a medium that the model cannot read, or there is no such reply.

        """
        return Request.to_score(self.model, self.context, dialogue, user)

    def submit(self, request: Request) -> None:
        """Let a request run as soon as a slot is its user's; its first event comes with a later step."""
        self._requests += 1
        self._waiting.add(request.user, request)

    def cancel(self, request: Request) -> None:
        """End a request at the beginning of the next step. Any thread may call this."""
        request.cancelled = True

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._num_running or len(self._waiting))

    @property
    def stats(self) -> EngineStats:
        """Counts since the engine was made."""
        return EngineStats(
            requests=self._requests,
            running=self._num_running,
            waiting=len(self._waiting),
            steps=self._steps,
            passes=self._passes,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused_tokens,
        )

    # --- one step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[tuple[Request, StepEvent]]:
        """Take all requests one step further; return what happened, in order per request.

        The last event of a request is ``Finished`` or the exception that ended it. A request's error
        ends no other request.
        """
        events: list[tuple[Request, StepEvent]] = []
        self._drop_cancelled(events)
        self._admit(events)
        self._pack()
        if not self._num_running:
            return events
        self._steps += 1
        speaking: list[Slot] = []
        last: list[Tensor] = []
        for group in _groups(self._shares()):
            for part, hidden in self._feed(group, events):
                speaking += part
                last.append(hidden)
        if speaking:
            self._speak(speaking, torch.cat(last) if len(last) > 1 else last[0], events)
        return events

    def abort(self) -> None:
        """Forget every request, and all that slots hold. No event tells of it."""
        self._waiting.clear()
        for slot in self._slots:
            slot.request = None
        self._num_running = 0
        self.forget()

    def forget(self) -> None:
        """Let go of what idle slots have read; the next prompts are read whole."""
        for index, slot in enumerate(self._slots):
            if slot.request is None and slot.last_used >= 0:  # the others are clear
                self._slot_model.cache.clear(index)
                slot.keys, slot.fed, slot.media, slot.last_used = [], 0, [], -1

    def _drop_cancelled(self, events: list[tuple[Request, StepEvent]]) -> None:
        for slot in self._slots:
            if slot.request is not None and slot.request.cancelled:
                events += [(slot.request, event) for event in slot.request.reply.finish("cancelled")]
                self._retire(slot)
        if any(request.cancelled for request in self._waiting):
            for request in self._waiting.drop(lambda request: request.cancelled):
                events += [(request, event) for event in request.reply.finish("cancelled")]

    def _retire(self, slot: Slot) -> None:
        self._waiting.leave(slot.running.user)
        slot.keys = slot.running.keys[: slot.fed]
        slot.request, slot.media = None, []
        slot.last_used = next(self._clock)
        self._num_running -= 1

    def _fail(self, slot: Slot, error: Exception, events: list[tuple[Request, StepEvent]]) -> None:
        events.append((slot.running, error))
        self._retire(slot)
        slot.keys, slot.fed, slot.last_used = [], 0, -1
        self._slot_model.cache.clear(self._slots.index(slot))

    # --- slots ------------------------------------------------------------------------------------

    def _admit(self, events: list[tuple[Request, StepEvent]]) -> None:
        while len(self._waiting) and self._num_running < len(self._slots):
            request = self._waiting.next()
            self._prompt_tokens += len(request.ids)
            slot, reused = self._place(request)
            slot.request, slot.keys, slot.fed = request, [], reused
            slot.last_used = next(self._clock)
            self._num_running += 1
            self._reused_tokens += reused
            try:
                slot.media = [
                    (medium.start, self.model.project_slot(medium))
                    for medium in request.row.media
                    if medium.start >= reused
                ]
            except Exception as error:  # noqa: BLE001  (one request's error must not end the others)
                self._fail(slot, error, events)

    def _place(self, request: Request) -> tuple[Slot, int]:
        """Return an idle slot whose cache begins like ``request``, and how many positions it shares."""
        shared = [min(request.most_reused, _common(_known(slot), request.keys)) for slot in self._slots]
        best = max(range(len(shared)), key=lambda i: (shared[i], self._slots[i].request is None))
        length = shared[best]
        for medium in request.row.media:  # a medium is there as a whole, or it is projected again
            if medium.start < length < medium.start + medium.length:
                length = medium.start
        idle = [i for i, slot in enumerate(self._slots) if slot.request is None]
        oldest = min(idle, key=lambda i: self._slots[i].last_used)
        if length < LEAST_REUSED:
            return self._slots[oldest], 0
        if self._slots[best].request is None and length >= self._slots[best].fed:
            return self._slots[best], length  # the conversation goes on where it was left
        if best != oldest:
            self._slot_model.cache.copy(best, oldest, length)
        return self._slots[oldest], length

    def _pack(self) -> None:
        """Bring the running requests to the first slots, so that a pass over them copies no cache."""
        low, high = 0, len(self._slots) - 1
        slots = self._slots
        while True:
            while low < high and slots[low].request is not None:
                low += 1
            while low < high and slots[high].request is None:
                high -= 1
            if low >= high:
                return
            self._slot_model.cache.swap(low, high, max(slots[low].fed, slots[high].fed))
            slots[low], slots[high] = slots[high], slots[low]

    # --- passes -----------------------------------------------------------------------------------

    def _shares(self) -> list[tuple[Slot, int]]:
        """Return how many positions each running request is fed in this step, none left out but prompts."""
        running = self._slots[: self._num_running]
        shares = [(slot, slot.pending) for slot in running if slot.running.reply.ids]
        left = max(1, self.step_tokens - sum(count for _, count in shares))
        prompts = [slot for slot in running if not slot.running.reply.ids]
        prompts.sort(key=lambda slot: slot.last_used)
        for slot in prompts:
            count = min(slot.pending, left)
            if count:
                shares.append((slot, count))
                left -= count
        return shares

    def _feed(
        self, group: list[tuple[Slot, int]], events: list[tuple[Request, StepEvent]]
    ) -> list[tuple[list[Slot], Tensor]]:
        """Run one pass over ``group``; return slots that may speak, with their last states ``(B, D)``."""
        counts = {id(slot): count for slot, count in group}
        rows = [i for i, slot in enumerate(self._slots) if id(slot) in counts]
        length = max(counts.values())
        if (rows[-1] - rows[0] + 1 - len(rows)) * length <= PADDING_WORTH_A_PASS:
            rows = list(range(rows[0], rows[-1] + 1))  # what this leaves in the others is written over
        shares = [(self._slots[row], counts.get(id(self._slots[row]), 0)) for row in rows]
        try:
            embeddings = self._embed(shares, length)  # (B, T, D)
            loras = [slot.running.lora if count else None for slot, count in shares]
            starts = [slot.fed for slot, _ in shares]
            media = self._media_places(shares, length) if self.model.adapters else None
            worn = self._lora_rows.over(loras) if any(loras) else nullcontext()
            with worn, self.model.step(embeddings, media), self._threads.over(len(shares) * length):
                hidden = self._slot_model.run(embeddings, rows, starts, plain=any(loras))  # (B, T, D)
        except Exception as error:  # noqa: BLE001  (one request's error must not end the others)
            if len(group) == 1:
                self._fail(group[0][0], error, events)
                return []
            return [result for one in group for result in self._feed([one], events)]
        self._passes += 1

        speaking: list[Slot] = []
        where: list[tuple[int, int]] = []
        for i, (slot, count) in enumerate(shares):
            if not count:
                continue
            slot.fed += count
            self._waiting.charge(slot.running.user, count)
            slot.media = [(start, values) for start, values in slot.media if start + len(values) > slot.fed]
            if slot.running.given is not None:
                events += self._looked_up(slot, slot.running.given, hidden[i, :count])
                continue
            if slot.pending:
                continue
            speaking.append(slot)
            where.append((i, count - 1))
            reply = slot.running.reply
            if reply.block is not None:
                signal = reply.signal(hidden[i, :count].clone().float(), embeddings[i, :count].clone())
                events.append((slot.running, signal))
        if not speaking:
            return []
        if length == 1 and len(speaking) == len(shares):
            return [(speaking, hidden[:, 0])]
        at, last = zip(*where, strict=True)
        return [(speaking, hidden[list(at), list(last)])]

    def _looked_up(self, slot: Slot, given: GivenReply, hidden: Tensor) -> list[tuple[Request, StepEvent]]:
        """Look up what follows the states that were just made, ``(T, D)``; return the score at the end."""
        request = slot.running
        given.look_up(hidden, slot.fed - len(hidden), self.model.logits)
        if slot.pending:
            return []
        events: list[StepEvent] = [Scored(tuple(given.found)), *request.reply.finish("stop")]
        self._retire(slot)
        slot.last_used = 0  # no conversation goes on from here
        return [(request, event) for event in events]

    def _embed(self, shares: list[tuple[Slot, int]], length: int) -> Tensor:
        """Return the next input embeddings ``(B, T, D)`` of some slots, padded at the right."""
        pad = self.model.tokenizer.pad_id
        ids = [
            (slot.running.ids[slot.fed : slot.fed + count] if count else []) + [pad] * (length - count)
            for slot, count in shares
        ]
        embeddings = self._tables.embed_ids(ids)
        for row, (slot, count) in zip(embeddings, shares, strict=True) if _any_media(shares) else ():
            for start, values in slot.media if count else ():
                low, high = max(slot.fed, start), min(slot.fed + count, start + len(values))
                if low < high:
                    row[low - slot.fed : high - slot.fed] = values[low - start : high - start]
        return embeddings

    def _media_places(self, shares: list[tuple[Slot, int]], length: int) -> Tensor:
        """Return ``(B, T)`` bool, True where what is fed next belongs to a medium."""
        places = torch.zeros(len(shares), length, dtype=torch.bool)
        for row, (slot, count) in zip(places, shares, strict=True):
            for start, values in slot.media if count else ():
                row[:count][max(0, start - slot.fed) : max(0, start + len(values) - slot.fed)] = True
        return places.to(self.model.device)

    @torch.inference_mode()
    def _speak(self, slots: list[Slot], hidden: Tensor, events: list[tuple[Request, StepEvent]]) -> None:
        """Choose the next token of each slot from its last state, ``(B, D)``."""
        logits = self._tables.logits(hidden)  # (B, V)
        choices = self._sampler.choose(logits, [slot.running.reply for slot in slots])
        for slot, (token, confidence) in zip(slots, choices, strict=True):
            request = slot.running
            reply = request.reply
            if token == -1:
                error = ArithmeticError("The model's logits are not finite. Check its weights and inputs.")
                self._fail(slot, error, events)
                continue
            said = len(reply.ids)
            try:
                events += [(request, event) for event in reply.say(token, confidence)]
            except Exception as error:  # noqa: BLE001  (one request's error must not end the others)
                self._fail(slot, error, events)
                continue
            request.ids += reply.ids[said:]
            request.keys += reply.ids[said:]
            if reply.reason is not None:
                self._retire(slot)


def _known(slot: Slot) -> list[int]:
    return slot.keys if slot.request is None else slot.request.keys[: slot.fed]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _groups(shares: list[tuple[Slot, int]]) -> list[list[tuple[Slot, int]]]:
    """Split what a step feeds into passes: equal lengths together, and others where padding is cheap."""
    if len(shares) == 1:
        return [shares]
    groups: list[list[tuple[Slot, int]]] = []
    longest = padding = 0
    for count, members in groupby(sorted(shares, key=itemgetter(1), reverse=True), key=itemgetter(1)):
        same = list(members)
        more = len(same) * (longest - count)
        if groups and padding + more <= PADDING_WORTH_A_PASS:
            groups[-1] += same
            padding += more
        else:
            groups.append(same)
            longest, padding = count, 0
    return groups


def _any_media(shares: list[tuple[Slot, int]]) -> bool:
    return any(slot.media for slot, count in shares if count)
