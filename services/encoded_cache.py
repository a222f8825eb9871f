"""Encoded media by the digest of their bytes, within a budget: what was seen before is not encoded again."""

from __future__ import annotations

import threading
from collections import OrderedDict

from encoders.media import Modality
from services.boxes import Counts, Encoded

Key = tuple[str, Modality | None]
"""The SHA-256 of the bytes, and what the sender says that they are: a film can be read as a sound."""


class EncodedCache:
    """Keeps at most ``max_bytes`` of encoded media; the least recently used ones go first.

    May be used from several threads.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self._kept: OrderedDict[Key, Encoded] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Key) -> Encoded | None:
        """Return what is kept under ``key``; only what is found is counted."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self.hits += 1
                self._kept.move_to_end(key)
            return found

    def keep(self, key: Key, encoded: Encoded) -> None:
        """Keep what had to be encoded, and count that it had to be."""
        with self._lock:
            self.misses += 1
            if (before := self._kept.pop(key, None)) is not None:
                self.bytes -= _size(before)
            if _size(encoded) > self.max_bytes:  # it would push out all others and not fit even so
                return
            self._kept[key] = encoded
            self.bytes += _size(encoded)
            while self.bytes > self.max_bytes:
                self.bytes -= _size(self._kept.popitem(last=False)[1])

    def counts(self) -> Counts:
        """Return hits and misses since the start, and what is kept now."""
        with self._lock:
            asked = self.hits + self.misses
            return {
                "cache_hits_total": self.hits,
                "cache_misses_total": self.misses,
                "cache_hit_rate": self.hits / asked if asked else 0.0,
                "cache_media": len(self._kept),
                "cache_bytes": self.bytes,
            }


def _size(encoded: Encoded) -> int:
    return encoded.tokens.nbytes + encoded.pooled.nbytes
