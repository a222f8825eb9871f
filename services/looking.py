"""The agent's second look: what a decoder made is read again, and asked for once more where it is not right.

It is there to gain something, so it never loses anything: whatever fails on the way, a medium that was made
is passed on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from alignment.second_look import SecondLook, likeness, next_seed
from decoders.settings import DecodeSettings
from services.artefacts import ArtefactStore
from services.boxes import EncodeBox, GenerateBox, Made, PromptMessage, SpokenSignal
from services.errors import translate
from services.messages import Role

LOOKS_WITHIN_S = 10.0
"""How long a medium waits to be looked at, where all models are busy with others."""

Decode = Callable[[DecodeSettings], Awaitable[Made]]

logger = logging.getLogger(__name__)


class Looking:
    """Looks at media with the encoder and the language model of the agent, as ``wish`` says."""

    def __init__(
        self, encode: EncodeBox, generate: GenerateBox, store: ArtefactStore, wish: SecondLook
    ) -> None:
        self.encode = encode
        self.generate = generate
        self.store = store
        self.wish = wish
        self.num_looks = self.num_retries = 0

    async def best(self, signal: SpokenSignal, settings: DecodeSettings, user: str, decode: Decode) -> Made:
        """Return what ``decode`` makes with ``settings``, or with a seed that follows where that is better.

        The manifest says how much it looks like its caption, and how many were made.
        """
        made = await decode(settings)
        if (
            signal.is_words
            or settings.seed is None
            or not self.wish.looks_at(signal.modality, signal.caption)
        ):
            return made
        like = await self._likeness(made, signal, user)
        if like is None:
            return made
        attempts = 1
        while self.wish.asks_again(like, attempts):
            self.num_retries += 1
            try:
                again = await decode(settings.with_seed(next_seed(settings.seed, attempts)))
            except Exception as error:  # noqa: BLE001  (there is a medium already)
                logger.warning("A %s was not made again: %s", signal.modality.value, translate(error).message)
                break
            attempts += 1
            like_again = await self._likeness(again, signal, user) or 0.0
            if like_again > like:
                made, again, like = again, made, like_again
            await self._drop(again)
        manifest = {**made.manifest, "likeness": round(like, 4), "attempts": attempts}
        return replace(made, manifest=manifest, attempts=attempts)

    async def _likeness(self, made: Made, signal: SpokenSignal, user: str) -> float | None:
        """Return how much a medium looks like its caption, or None where nobody can tell now."""
        self.num_looks += 1
        try:
            async with asyncio.timeout(LOOKS_WITHIN_S):
                encoded = await self.encode.encode(made.artefact.id, signal.modality)
                prompt = [PromptMessage(Role.USER, (encoded, self.wish.question))]
                found = await self.generate.score(prompt, signal.caption, user)
        except Exception as error:  # noqa: BLE001  (there is a medium already)
            logger.warning("A %s was not looked at: %s", signal.modality.value, translate(error).message)
            return None
        return likeness(found)

    async def _drop(self, made: Made) -> None:
        try:
            await asyncio.to_thread(self.store.delete, made.artefact.id)
        except Exception as error:  # noqa: BLE001  (it expires in any case)
            logger.warning("A medium that nobody needs stays: %s", translate(error).message)
