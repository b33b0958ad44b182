"""A cache of decoded images that does not evict single rows.

An epoch needs every row exactly once. If the data does not fit, an LRU cache evicts each row before it is needed again,
and never hits. Here cached rows stay, and hit once in every epoch, until the column has not been used for a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.stored.byte_cache import ENTRY_BYTES, CacheUsage
from h5feed.stored.no_store import may_keep

IDLE_SECONDS = 60.0
"""Rows of a column that was not used for this long may be evicted to make room for others."""


class RowCache:
    """Cached rows of all columns.

    Parameters
    ----------
    max_bytes : int
        Bound on all rows together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._columns: dict[Hashable, CachedColumn] = {}
        self._nbytes = 0
        self._lock = threading.Lock()
        # Counted without the lock, so both may be slightly too low.
        self.hits = self.misses = 0

    @property
    def usage(self) -> CacheUsage:
        """Of now."""
        return CacheUsage(self._nbytes, self._max_bytes, self.hits, self.misses)

    def of(self, key: Hashable) -> CachedColumn:
        """The cached rows of one column. Marks the column as used."""
        with self._lock:
            column = self._columns.get(key)
            if column is None:
                column = self._columns[key] = CachedColumn(self)
            column.used = time.monotonic()
            return column

    def admit(self, nbytes: int) -> bool:
        """Whether there is room for `nbytes` more; if so, they are counted as used."""
        with self._lock:
            if self._nbytes + nbytes > self._max_bytes:
                self._drop_old(IDLE_SECONDS)
            if self._nbytes + nbytes > self._max_bytes:
                return False
            self._nbytes += nbytes
            return True

    def drop_old(self, seconds: float) -> None:
        """Evict the rows of columns that were not used for this many seconds."""
        with self._lock:
            self._drop_old(seconds)

    def _drop_old(self, seconds: float) -> None:
        now = time.monotonic()
        for key, column in list(self._columns.items()):
            if now - column.used > seconds:
                del self._columns[key]
                self._nbytes -= column.nbytes
                # A request may still hold it. Rows that it adds now would not be counted.
                column.closed = True


class CachedColumn:
    """Cached rows of one column, each an array of the sample shape. Do not write to them."""

    def __init__(self, cache: RowCache) -> None:
        self._cache = cache
        self._rows: dict[int, npt.NDArray[Any]] = {}
        self.used = 0.0
        self.nbytes = 0
        self.closed = False

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def get(self, row: int) -> npt.NDArray[Any] | None:
        value = self._rows.get(row)
        if value is None:
            self._cache.misses += 1
        else:
            self._cache.hits += 1
        return value

    def put(self, row: int, value: npt.NDArray[Any]) -> None:
        """Cache a copy of a row if there is room for it, and the current read may fill caches."""
        if self.closed or row in self._rows or not may_keep() or not self._cache.admit(value.nbytes + ENTRY_BYTES):
            return
        self.nbytes += value.nbytes + ENTRY_BYTES
        self._rows[row] = np.array(value)
