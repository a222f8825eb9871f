"""The encode box: one encoding for each content, whoever sends it and when."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from encoders.features import Features
from encoders.media import Medium, Modality
from services.artefacts import ArtefactStore
from services.errors import NotFound
from services.local_encoder import LocalEncoder
from services.presets import load_preset
from tests.scripted_agent import PNG

IMAGE = Modality.IMAGE


@pytest.fixture
def box(tiny_preset: Path, tmp_path: Path) -> LocalEncoder:
    return LocalEncoder(load_preset(str(tiny_preset)), ArtefactStore(tmp_path.as_uri()))


def stored(box: LocalEncoder, data: bytes = PNG) -> str:
    return box.store.put(data, media_type="image/png", filename="a.png").id


async def test_a_medium_is_encoded_once_for_each_content(box: LocalEncoder) -> None:
    encoder = box.load()
    work: list[Modality] = []
    encode = encoder.encode
    encoder.encode = lambda medium: (work.append(medium.modality), encode(medium))[1]  # type: ignore[method-assign, func-returns-value]

    first = await box.encode(stored(box), IMAGE)
    at_once = await asyncio.gather(*(box.encode(stored(box), IMAGE) for _ in range(3)))

    assert work == [IMAGE]
    for same in at_once:
        np.testing.assert_array_equal(same.tokens, first.tokens)
    counts = (await box.counts())["local"]
    assert (counts["cache_hits_total"], counts["cache_misses_total"]) == (3, 1)
    assert counts["cache_bytes"] == first.tokens.nbytes + first.pooled.nbytes


async def test_those_who_wait_for_the_same_content_need_no_encoding_of_their_own(box: LocalEncoder) -> None:
    encoder, looked = box.load(), []
    encode, find = encoder.encode, box.cache.find

    def once_all_have_looked(medium: Medium) -> Features:
        until = time.monotonic() + 2
        while len(looked) < 5 and time.monotonic() < until:  # four when they came, one when its turn came
            time.sleep(0.001)
        return encode(medium)

    encoder.encode = once_all_have_looked  # type: ignore[method-assign]
    box.cache.find = lambda key: (looked.append(key), find(key))[1]  # type: ignore[method-assign, func-returns-value]
    await asyncio.gather(*(box.encode(stored(box), IMAGE) for _ in range(4)))
    assert len(looked) == 8
    assert (await box.counts())["local"]["cache_misses_total"] == 1


async def test_without_a_budget_everything_is_encoded_anew(box: LocalEncoder) -> None:
    box.cache.max_bytes = 0
    for _ in range(2):
        await box.encode(stored(box), IMAGE)
    assert (await box.counts())["local"]["cache_misses_total"] == 2


async def test_what_is_no_longer_stored_is_not_served_from_memory(box: LocalEncoder) -> None:
    name = stored(box)
    await box.encode(name, IMAGE)
    box.store.delete(name)
    with pytest.raises(NotFound):
        await box.encode(name, IMAGE)
