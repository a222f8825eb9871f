"""The media of replies while they are made: each can be stopped alone, and made again later.

What a medium is made from, its signal and its settings, is stored while its decoder works, under a name that
follows from the turn and the place. It is there before anybody hears how the medium ended, so any process can
make it again without the language model.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace

import numpy as np

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.artefacts import ArtefactStore
from services.boxes import DecodeBox, Made, Preview, Progress, SpokenSignal
from services.errors import Conflict, NotFound, ServiceError, Unavailable, translate
from services.looking import Looking

logger = logging.getLogger(__name__)

SIGNAL_PURPOSE = "signal"


@dataclass(frozen=True)
class PartFailure:
    """A medium could not be made, or somebody stopped it."""

    error: ServiceError


Told = Progress | Preview | Made | PartFailure


@dataclass(frozen=True, kw_only=True)
class Order:
    """One medium that is to be made: part ``index`` of the reply of ``turn``.

    ``source`` is the artefact of the newest medium of the same kind in the conversation. What is ``verified``
    is looked at again where the agent does so at all.
    """

    turn: str
    index: int
    signal: SpokenSignal
    settings: DecodeSettings
    user: str = ""
    previews: int = 0
    source: str | None = None
    verified: bool = True


class Making:
    """Makes the media of many replies at the same time, and looks at them again if it is given eyes."""

    def __init__(
        self, decode: Mapping[Modality, DecodeBox], store: ArtefactStore, looking: Looking | None = None
    ) -> None:
        self.decode = decode
        self.store = store
        self.looking = looking
        self._under_way: dict[tuple[str, int], asyncio.Task[None]] = {}

    def start(self, order: Order, tell: Callable[[Told], None], *, again: bool = False) -> asyncio.Task[None]:
        """Begin to make a medium; ``tell`` hears of it, last a :class:`Made` or a :class:`PartFailure`.

        ``again`` says that its signal is stored already. Cancelling the task stops the decoder.

        Raises:
            Conflict: the same medium is being made.

        """
        key = order.turn, order.index
        if key in self._under_way:
            raise Conflict(
                f"Part {order.index} is being made at the moment. Cancel it first, or wait until it is done.",
                code="part_running",
            )

        def ended(task: asyncio.Task[None]) -> None:
            del self._under_way[key]
            if task.cancelled():  # also before it began
                tell(PartFailure(_cancelled(order)))

        task = asyncio.create_task(self._make(order, tell, again))
        task.add_done_callback(ended)
        self._under_way[key] = task
        return task

    async def put_aside(self, order: Order) -> PartFailure | None:
        """Store what a medium is made from without making it; return why that is not possible."""
        try:
            await asyncio.to_thread(keep, self.store, order)
        except Exception as caught:
            logger.exception("The signal of a medium could not be stored.")
            return PartFailure(translate(caught))
        return None

    async def cancel(self, turn: str, index: int) -> bool:
        """Stop a medium; return False when it is not being made here. The decoder is rid of it then."""
        task = self._under_way.get((turn, index))
        if task is None:
            return False
        task.cancel()
        await asyncio.wait({task})
        return True

    async def _make(self, order: Order, tell: Callable[[Told], None], again: bool) -> None:
        keeping = None if again else asyncio.create_task(asyncio.to_thread(keep, self.store, order))
        try:
            try:
                made = await self._best(order, tell)
            finally:
                if keeping is not None:
                    await keeping  # who hears of the end, whatever it is, may ask for the medium again
            tell(made)
        except Exception as caught:
            error = translate(caught)
            if error.status == 500:
                kind, traced = order.signal.modality.value, error is not caught
                logger.error("The %s decoder failed: %s", kind, error.message, exc_info=traced)
            tell(PartFailure(error))

    async def _best(self, order: Order, tell: Callable[[Told], None]) -> Made:
        async def decode(settings: DecodeSettings) -> Made:
            return await self._decoded(order, settings, tell)

        if self.looking is None or not order.verified:
            return await decode(order.settings)
        return await self.looking.best(order.signal, order.settings, order.user, decode)

    async def _decoded(self, order: Order, settings: DecodeSettings, tell: Callable[[Told], None]) -> Made:
        modality = order.signal.modality
        work = self.decode[modality].decode(
            order.signal,
            settings,
            user=order.user,
            previews=order.previews,
            source=order.source,
        )
        made: Made | None = None
        async with aclosing(work) as stream:
            async for step in stream:
                if isinstance(step, Made):
                    made = step
                else:
                    tell(step)
        if made is None:
            raise Unavailable(
                f"The {modality.value} decoder stopped before it was done. Try again.",
                code="decoder_unavailable",
            )
        return made


def keep(store: ArtefactStore, order: Order) -> None:
    """Store what a medium is made from."""
    buffer = io.BytesIO()
    np.savez(buffer, hidden=order.signal.hidden, embeddings=order.signal.embeddings)
    store.put(
        buffer.getvalue(),
        media_type="application/octet-stream",
        filename="signal.npz",
        purpose=SIGNAL_PURPOSE,
        modality=order.signal.modality,
        caption=order.signal.caption,
        manifest={
            "settings": asdict(order.settings),
            "source": order.source,
            "verified": order.verified,
        },
        artefact_id=_signal_id(order.turn, order.index),
    )


def kept(store: ArtefactStore, turn: str, index: int) -> Order:
    """Return what a medium was made from, and how; for whom, it does not say.

    Raises:
        NotFound: there was no such medium, or it was so long ago that its files have expired.

    """
    name = _signal_id(turn, index)
    try:
        artefact, data = store.get(name), store.read(name)
    except NotFound as error:
        raise NotFound(
            f"No medium was part {index} of this reply, or it has expired. Parts are counted from 0, as in "
            "message.parts, and words cannot be made again alone.",
            code="part_not_found",
        ) from error
    assert artefact.modality is not None
    assert artefact.manifest is not None
    with np.load(io.BytesIO(data)) as arrays:
        signal = SpokenSignal(
            artefact.modality, artefact.caption or "", arrays["hidden"], arrays["embeddings"]
        )
    settings = DecodeSettings(**artefact.manifest["settings"])
    return Order(
        turn=turn,
        index=index,
        signal=signal,
        settings=settings,
        source=artefact.manifest.get("source"),
        verified=artefact.manifest.get("verified", True),
    )


def changed(settings: DecodeSettings, wishes: DecodeSettings) -> DecodeSettings:
    """Return ``settings`` with every wish that is not None."""
    return replace(settings, **{name: value for name, value in asdict(wishes).items() if value is not None})


def _signal_id(turn: str, index: int) -> str:
    """Return the id of the artefact; as hard to guess as the turn's."""
    return f"file-{hashlib.sha256(f'{turn}/{index}'.encode()).hexdigest()[:32]}"


def _cancelled(order: Order) -> ServiceError:
    return Unavailable(
        f"The {order.signal.modality.value} was cancelled. It can be made after all: retry this part.",
        code="part_cancelled",
    )
