"""Batches of which several blocks need a part: each is fetched once, by the block that asks first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from ..batch import Batch
from ..forks import tell_after_fork

_CANCELLED_SECONDS = 0.1
"""How often a block that waits for another one looks whether it is still wanted."""


@dataclass
class _Entry:
    """A batch that is being fetched, or of which rows have not been used yet."""

    came: threading.Event = field(default_factory=threading.Event)
    batch: Batch | None = None
    nbytes: int = 0
    unused: int = 0


class SharedBatches:
    """Keeps batches until all of their rows were used, within a limit.

    Whoever has claimed a batch has to `deliver` it or to `give_up`. Threads that wait for others must hold no claim:
    then no two of them wait for each other.

    Parameters
    ----------
    max_bytes : int
        Limit on the batches kept. Beyond it, the oldest are dropped, and fetched again if they are needed.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.after_fork()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In the child: nobody fetches what threads of the parent have claimed."""
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def claim(self, key: Hashable) -> bool:
        """Whether the caller is to fetch a batch; False if it is there, or another thread fetches it."""
        with self._lock:
            if key in self._entries:
                return False
            self._entries[key] = _Entry()
            return True

    def deliver(self, key: Hashable, batch: Batch, nbytes: int, used: int) -> None:
        """Hand over a batch that the caller has claimed.

        Parameters
        ----------
        nbytes : int
            How much memory it keeps: that of all batches that came with it.
        used : int
            Number of rows that the caller uses itself.
        """
        with self._lock:
            entry = self._entries[key]
            entry.batch, entry.nbytes, entry.unused = batch, nbytes, len(batch.rows)
            self._nbytes += nbytes
            self._use(key, entry, used)
            for other in [other for other, one in self._entries.items() if one.batch is not None]:
                if self._nbytes <= self._max_bytes:
                    break
                self._drop(other)
        entry.came.set()

    def give_up(self, key: Hashable) -> None:
        """Let others fetch a batch that the caller has claimed."""
        with self._lock:
            entry = self._entries.pop(key)
        entry.came.set()

    def get(self, key: Hashable, used: int, cancelled: threading.Event) -> Batch | None:
        """A batch that the caller could not claim. Waits while another thread fetches it.

        Parameters
        ----------
        used : int
            Number of rows that the caller uses.

        Returns
        -------
        Batch or None
            None if it was given up, or dropped.
        """
        with self._lock:
            entry = self._entries.get(key)
        if entry is None:
            return None
        while not entry.came.wait(_CANCELLED_SECONDS):
            if cancelled.is_set():
                return None
        with self._lock:
            if self._entries.get(key) is entry:
                self._use(key, entry, used)
        return entry.batch

    def _use(self, key: Hashable, entry: _Entry, rows: int) -> None:
        entry.unused -= rows
        if entry.unused <= 0:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        self._nbytes -= self._entries.pop(key).nbytes
