"""Reads that add nothing to caches: the request directive ``no-store`` of RFC 9111, 5.2.1.5, for stored and decoded
data."""

from __future__ import annotations

from contextvars import ContextVar

from .byte_cache import ByteCache
from .scratch import Bytes

OWN_CHUNK_BYTES = 64 << 20
"""Maximum size of the chunk rows that such a read keeps for itself, because several of its rows are in each of them."""

OWN_CHUNKS: ContextVar[ByteCache[Bytes] | None] = ContextVar("own_chunks", default=None)
"""The chunk rows that the current read keeps for itself; None if the shared caches may keep what it reads."""


def keep_nothing(timeout: float) -> None:
    """From now on, caches keep nothing that is read in this context. What is cached already is still used.

    Parameters
    ----------
    timeout : float
        Seconds to wait for a chunk row that another thread of the same read is decoding.
    """
    OWN_CHUNKS.set(ByteCache(OWN_CHUNK_BYTES, timeout))


def may_keep() -> bool:
    """Whether caches may keep what is read in this context."""
    return OWN_CHUNKS.get() is None
