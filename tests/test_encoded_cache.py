"""The cache of encoded media: a budget in bytes, and the least recently used first."""

from __future__ import annotations

import numpy as np

from encoders.media import Modality
from services.boxes import Encoded
from services.encoded_cache import EncodedCache

IMAGE = Modality.IMAGE
BYTES = 4 * (3 * 4 + 4)


def encoded(tokens: int = 3) -> Encoded:
    return Encoded(IMAGE, np.zeros((tokens, 4), np.float32), np.zeros(4, np.float32), (tokens,))


def test_what_was_used_least_recently_goes_first() -> None:
    cache = EncodedCache(3 * BYTES)
    for name in "abc":
        cache.keep((name, IMAGE), encoded())
    assert cache.find(("a", IMAGE)) is not None
    cache.keep(("d", IMAGE), encoded())
    assert [name for name in "abcd" if cache.find((name, IMAGE)) is not None] == ["a", "c", "d"]
    assert cache.bytes == 3 * BYTES


def test_the_budget_is_one_of_bytes() -> None:
    cache = EncodedCache(4 * BYTES)
    cache.keep(("a", IMAGE), encoded())
    cache.keep(("b", IMAGE), encoded(3 + 4 * 3))  # as large as four
    assert cache.bytes == 4 * BYTES
    assert cache.find(("a", IMAGE)) is None
    cache.keep(("b", IMAGE), encoded())
    assert cache.bytes == BYTES


def test_what_is_larger_than_the_budget_pushes_nothing_out() -> None:
    cache = EncodedCache(2 * BYTES)
    cache.keep(("a", IMAGE), encoded())
    cache.keep(("b", IMAGE), encoded(100))
    assert cache.find(("a", IMAGE)) is not None
    assert cache.find(("b", IMAGE)) is None
    assert cache.bytes == BYTES


def test_a_film_read_as_a_sound_is_another_medium() -> None:
    cache = EncodedCache(BYTES)
    cache.keep(("a", Modality.VIDEO), encoded())
    assert cache.find(("a", Modality.AUDIO)) is None


def test_hits_and_misses_are_counted() -> None:
    cache = EncodedCache(BYTES)
    assert cache.counts()["cache_hit_rate"] == 0.0
    cache.keep(("a", IMAGE), encoded())
    for _ in range(3):
        cache.find(("a", IMAGE))
    assert cache.counts() == {
        "cache_hits_total": 3,
        "cache_misses_total": 1,
        "cache_hit_rate": 0.75,
        "cache_media": 1,
        "cache_bytes": BYTES,
    }
