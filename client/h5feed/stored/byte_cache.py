"""A memory cache, bounded in bytes, that computes each value only once, even for concurrent requests."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from ..errors import ReadTimeout

V = TypeVar("V")

ENTRY_BYTES = 512
"""Memory of an entry in addition to the bytes of its value: the key, the entry, the object of the value. For small
values this is nearly all, and there may be very many."""

FRESH_SECONDS = 60.0
"""`admits` does not count on evicting entries used within this time: two working sets that do not fit together would
otherwise be read again for every batch."""


class CacheUsage(NamedTuple):
    """How full a cache is, and how often it had what it was asked for."""

    nbytes: int
    max_bytes: int
    hits: int
    misses: int


@dataclass
class _Entry(Generic[V]):
    value: V
    nbytes: int
    used: float


class ByteCache(Generic[V]):
    """A cache that evicts the least recently used values.

    Parameters
    ----------
    max_bytes : int
        Bound on all cached values. A larger value is computed and returned, but not cached.
    timeout : float
        Seconds to wait for a value that another thread is computing.
    """

    def __init__(self, max_bytes: int, timeout: float) -> None:
        self.max_bytes = max_bytes
        self._timeout = timeout
        self._entries: OrderedDict[Hashable, _Entry[V]] = OrderedDict()
        self._flights: dict[Hashable, Future[V]] = {}
        self._nbytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    @property
    def usage(self) -> CacheUsage:
        """Of now. Values that another thread was computing count as found."""
        return CacheUsage(self._nbytes, self.max_bytes, self._hits, self._misses)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._entries

    def get(self, key: Hashable, compute: Callable[[], V], nbytes: Callable[[V], int]) -> V:
        """Return the value of `key`. If it is not cached, compute it, or wait for a thread that is computing it.

        Parameters
        ----------
        key : hashable
        compute : callable
            Returns the value.
        nbytes : callable
            Returns the size of a value.

        Raises
        ------
        ReadTimeout
            Another thread took longer than the timeout.
        Exception
            What `compute` has raised, here or in the other thread.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._hits += 1
                entry.used = time.monotonic()
                self._entries.move_to_end(key)
                return entry.value
            flight = self._flights.get(key)
            mine = flight is None
            if flight is not None:
                self._hits += 1
            else:
                self._misses += 1
                flight = self._flights[key] = Future()
        if not mine:
            try:
                return flight.result(self._timeout)
            except TimeoutError:
                raise ReadTimeout(f"another request has been computing the same data for {self._timeout:g} s") from None
            finally:
                # An error refers to this frame, and the future to the error: break the cycle.
                del flight
        try:
            value = compute()
        except BaseException as error:
            with self._lock:
                del self._flights[key]
            flight.set_exception(error)
            # As above.
            del flight
            raise
        with self._lock:
            del self._flights[key]
            self._keep(key, value, nbytes(value))
        flight.set_result(value)
        return value

    def find(self, key: Hashable) -> V | None:
        """The value of `key` if it is cached; else None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            entry.used = time.monotonic()
            self._entries.move_to_end(key)
            return entry.value

    def put(self, key: Hashable, value: V, nbytes: int) -> None:
        """Cache a value, replacing an earlier one."""
        with self._lock:
            if (before := self._entries.pop(key, None)) is not None:
                self._nbytes -= before.nbytes
            self._keep(key, value, nbytes)

    def admits(self, key: Hashable, nbytes: int) -> bool:
        """Whether the value is cached or being computed, or would fit without evicting one that is in use."""
        with self._lock:
            if key in self._entries or key in self._flights:
                return True
            lacking = nbytes + ENTRY_BYTES - (self.max_bytes - self._nbytes)
            if lacking <= 0:
                return True
            if lacking > self._nbytes:
                return False
            old = time.monotonic() - FRESH_SECONDS
            # In order of their last use, and no further than needed: a table may have thousands of columns, and each of
            # them asks.
            for entry in self._entries.values():
                if entry.used >= old:
                    break
                lacking -= entry.nbytes
                if lacking <= 0:
                    return True
            return False

    def drop_old(self, seconds: float) -> None:
        """Evict values that were not used for this many seconds."""
        with self._lock:
            old = time.monotonic() - seconds
            # Entries are in order of their last use.
            while self._entries and next(iter(self._entries.values())).used < old:
                self._drop_first()

    def _drop_first(self) -> None:
        _, gone = self._entries.popitem(last=False)
        self._nbytes -= gone.nbytes

    def _keep(self, key: Hashable, value: V, nbytes: int) -> None:
        nbytes += ENTRY_BYTES
        if nbytes > self.max_bytes:
            return
        while self._nbytes + nbytes > self.max_bytes:
            self._drop_first()
        self._entries[key] = _Entry(value, nbytes, time.monotonic())
        self._nbytes += nbytes
