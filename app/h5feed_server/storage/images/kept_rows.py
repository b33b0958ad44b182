"""Decoded rows that stay in memory, because decoding them again costs far more than keeping them.

An epoch needs every row once, none of them sooner than the others. To make room for one by dropping another would only
cost both their turn, so that of data which do not fit, a cache of the least recently used would hold the wrong rows
always. Here what is kept stays, and serves its share of each epoch, until nobody has asked for that column for a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..byte_cache import ENTRY_BYTES

IDLE_SECONDS = 60.0
"""After this, rows of a column that nobody asks for make room for others."""


class KeptRows:
    """Rows of all columns.

    Parameters
    ----------
    max_bytes : int
        Bound on all rows together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._columns: dict[Hashable, KeptColumn] = {}
        self._nbytes = 0
        self._lock = threading.Lock()

    def of(self, key: Hashable) -> KeptColumn:
        """The rows of one column, which is in use from now on."""
        with self._lock:
            column = self._columns.get(key)
            if column is None:
                column = self._columns[key] = KeptColumn(self)
            column.used = time.monotonic()
            return column

    def admit(self, nbytes: int) -> bool:
        """Whether there is room for so many bytes more, which are then counted."""
        with self._lock:
            if self._nbytes + nbytes > self._max_bytes:
                self._drop_old(IDLE_SECONDS)
            if self._nbytes + nbytes > self._max_bytes:
                return False
            self._nbytes += nbytes
            return True

    def drop_old(self, seconds: float) -> None:
        """Let go of the rows of columns that nobody has asked for in so many seconds."""
        with self._lock:
            self._drop_old(seconds)

    def _drop_old(self, seconds: float) -> None:
        now = time.monotonic()
        for key, column in list(self._columns.items()):
            if now - column.used > seconds:
                del self._columns[key]
                self._nbytes -= column.nbytes
                # A request that still has it must not put rows there which nobody counts.
                column.closed = True


class KeptColumn:
    """Rows of one column, (*sample) each, read-only."""

    def __init__(self, kept: KeptRows) -> None:
        self._kept = kept
        self._rows: dict[int, npt.NDArray[Any]] = {}
        self.used = 0.0
        self.nbytes = 0
        self.closed = False

    def get(self, row: int) -> npt.NDArray[Any] | None:
        return self._rows.get(row)

    def put(self, row: int, value: npt.NDArray[Any]) -> None:
        """Keep a copy of a row, if there is room for it."""
        if self.closed or row in self._rows or not self._kept.admit(value.nbytes + ENTRY_BYTES):
            return
        self.nbytes += value.nbytes + ENTRY_BYTES
        self._rows[row] = np.array(value)
