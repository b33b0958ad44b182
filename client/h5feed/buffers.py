"""Recycled byte buffers.

Fresh memory costs as much as the transfer itself: every first touch of a page is a fault. So big bodies, on both
sides, are read into buffers that were used before. A buffer is handed out again only when nobody refers to it any
more: numpy makes the root array the base of every view and of every memoryview of a view, so the root's reference
count tells, however long a user keeps a slice of a batch.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from .forks import tell_after_fork

PAGE = 4096
"""Bytes: leases begin on a page, which also satisfies every alignment that frameworks ask for."""

_POLL_SECONDS = 0.002
"""How often a waiting `lease` looks whether a buffer has come free: nothing tells when a reference count falls."""


def _reference_counts(arrays: list[npt.NDArray[np.uint8]]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


_UNSHARED = _reference_counts([np.empty(0, np.uint8)])[0]
"""Count of an array that only a list holds. It differs between Pythons and between places in the code, so it is asked
for by the very function that is used later: one too many would hand out a buffer that is in use."""


class PoolExhausted(Exception):
    """No room for `nbytes` within the pool's bound came free in time."""

    def __init__(self, nbytes: int, max_bytes: int) -> None:
        super().__init__(f"{nbytes} bytes do not fit: {max_bytes} bytes of buffers are in use")
        self.nbytes = nbytes


class BufferPool:
    """Buffers that are handed out, found unused, and handed out again.

    Parameters
    ----------
    max_bytes : int
        Bound on all buffers together, in use and idle.
    max_idle_bytes : int, optional
        Idle buffers above this are let go as soon as the pool is next used; default: half of `max_bytes`.
    """

    def __init__(self, max_bytes: int, max_idle_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._max_idle_bytes = max_bytes // 2 if max_idle_bytes is None else max_idle_bytes
        self._roots: list[npt.NDArray[np.uint8]] = []
        self._owners: dict[int, str] = {}
        """Whom each root was leased to last, by its `id`."""
        self._lock = threading.Lock()
        tell_after_fork(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pool pickles as its bounds: the copy begins without buffers."""
        return BufferPool, (self.max_bytes, self._max_idle_bytes)

    def lease(self, nbytes: int, timeout: float = 0.0, owner: str = "") -> npt.NDArray[np.uint8]:
        """A page-aligned (nbytes,) uint8 array; it goes back by itself once it and all views of it are gone.

        `owner` is whom `bytes_by_owner` counts it for.

        Raises
        ------
        PoolExhausted
            The bound left no room within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while (buffer := self._take(nbytes, owner)) is None:
            if time.monotonic() >= deadline:
                raise PoolExhausted(nbytes, self.max_bytes)
            time.sleep(_POLL_SECONDS)
        return buffer

    def lease_or_new(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Same as `lease`; where the bound leaves no room, memory of its own, which costs more."""
        try:
            return self.lease(nbytes)
        except PoolExhausted:
            return np.empty(nbytes, np.uint8)

    def drop_idle(self) -> None:
        """Let go of all buffers that nobody uses."""
        with self._lock:
            for gone in self._idle():
                self._drop(gone)

    def after_fork(self) -> None:
        """In the child: a lock that a thread of the parent holds is never released here."""
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, in use and idle."""
        with self._lock:
            return sum(root.nbytes for root in self._roots)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the buffers that somebody still refers to."""
        with self._lock:
            # Not the plain sum minus the idle ones: listing them is what finds out.
            return sum(root.nbytes for root in self._roots) - sum(root.nbytes for root in self._idle())

    def bytes_by_owner(self) -> dict[str, int]:
        """Bytes of the buffers in use, by whom they were leased to."""
        held: dict[str, int] = {}
        with self._lock:
            counts = _reference_counts(self._roots)
            for root, count in zip(self._roots, counts, strict=True):
                if count > _UNSHARED:
                    owner = self._owners[id(root)]
                    held[owner] = held.get(owner, 0) + root.nbytes
        return held

    def _idle(self) -> list[npt.NDArray[np.uint8]]:
        """Roots that only this pool refers to; call with the lock held."""
        counts = _reference_counts(self._roots)
        return [root for root, count in zip(self._roots, counts, strict=True) if count <= _UNSHARED]

    def _drop(self, root: npt.NDArray[np.uint8]) -> None:
        """Call with the lock held."""
        self._roots = [other for other in self._roots if other is not root]
        del self._owners[id(root)]

    def _take(self, nbytes: int, owner: str) -> npt.NDArray[np.uint8] | None:
        size = _size_class(nbytes) + PAGE
        with self._lock:
            idle = sorted(self._idle(), key=len)
            root = next((root for root in idle if size <= len(root) <= 2 * size), None)
            if root is None:
                total = sum(len(root) for root in self._roots)
                keep = self._max_idle_bytes
                idle_bytes = sum(map(len, idle))
                while idle and (total + size > self.max_bytes or idle_bytes > keep):
                    gone = idle.pop()
                    self._drop(gone)
                    total -= len(gone)
                    idle_bytes -= len(gone)
                    del gone
                # A single body above the bound is let through when nothing else is out: whoever asks has its own limit.
                if total + size > self.max_bytes and total:
                    return None
                # numpy asks for huge pages on arrays of 4 MiB and more, which spares most of the page faults.
                root = np.empty(size, np.uint8)
                self._roots.append(root)
            self._owners[id(root)] = owner
            offset = -root.ctypes.data % PAGE
            return root[offset : offset + nbytes]


def _size_class(nbytes: int) -> int:
    """`nbytes` rounded up by at most an eighth, so that batches of nearly equal size share buffers."""
    step = max(PAGE, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step
