"""Recycled byte buffers.

New memory costs as much as the transfer itself, because every first touch of a page is a page fault. So large bodies,
on both sides, are read into reused buffers. A buffer is reused only when nothing refers to it: numpy makes the root
array the base of every view and of every memoryview of a view, so its reference count covers every slice of a batch
that a user keeps.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .forks import tell_after_fork

Bytes = npt.NDArray[np.uint8]

PAGE = 4096
"""Bytes. Leases start at a page, which also satisfies the alignment that frameworks need."""

_POLL_SECONDS = 0.002
"""Polling interval of a waiting `lease`: there is no event when a reference count drops."""


def _reference_counts(arrays: list[Bytes]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


_UNSHARED = _reference_counts([np.empty(0, np.uint8)])[0]
"""Reference count of an array that only a list holds. It depends on the Python version and on the calling code, so it
is measured with the same function: a wrong count would reuse a buffer that is in use."""


class PoolExhausted(Exception):
    """The limit of the pool left no room for `nbytes` in time."""

    def __init__(self, nbytes: int, max_bytes: int) -> None:
        super().__init__(f"no room for {nbytes} bytes: the {max_bytes} bytes of the buffer pool are in use")
        self.nbytes = nbytes


class BufferPool:
    """A pool of buffers that are reused when nothing refers to them.

    Parameters
    ----------
    max_bytes : int
        Maximum size of all buffers, in use and idle.
    max_idle_bytes : int, optional
        Idle buffers beyond this are freed at the next use of the pool; default: half of `max_bytes`.
    allocate : callable, optional
        Returns new memory, (nbytes,) uint8, which must not be a view. A forked child may share it with its parent, so
        the child does not use it. Default: `numpy.empty`.
    """

    def __init__(
        self, max_bytes: int, max_idle_bytes: int | None = None, allocate: Callable[[int], Bytes] | None = None
    ) -> None:
        self.max_bytes = max_bytes
        self._max_idle_bytes = max_bytes // 2 if max_idle_bytes is None else max_idle_bytes
        self._roots: list[Bytes] = []
        self._owners: dict[int, str] = {}
        """The last owner of each root, by its `id`."""
        self._allocate = allocate
        self._lock = threading.Lock()
        tell_after_fork(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the limits only: the copy starts without buffers."""
        return BufferPool, (self.max_bytes, self._max_idle_bytes)

    def lease(self, nbytes: int, timeout: float = 0.0, owner: str = "") -> Bytes:
        """A page-aligned (nbytes,) uint8 array, returned to the pool once it and all its views are gone.

        `owner` is the key for `bytes_by_owner`.

        Raises
        ------
        PoolExhausted
            The limit left no room within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while (buffer := self._take(nbytes, owner)) is None:
            if time.monotonic() >= deadline:
                raise PoolExhausted(nbytes, self.max_bytes)
            time.sleep(_POLL_SECONDS)
        return buffer

    def lease_or_new(self, nbytes: int) -> Bytes:
        """Same as `lease`, but allocate new memory, which costs more, if the pool is full."""
        try:
            return self.lease(nbytes)
        except PoolExhausted:
            return aligned(np.empty(nbytes + PAGE, np.uint8), nbytes, PAGE)

    def drop_idle(self) -> None:
        """Free all idle buffers."""
        with self._lock:
            for gone in self._idle():
                self._drop(gone)

    def after_fork(self) -> None:
        """In the child: a lock held by a thread of the parent would never be released."""
        self._lock = threading.Lock()
        if self._allocate is not None:
            self._roots, self._owners, self._allocate = [], {}, None

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes, in use and idle."""
        with self._lock:
            return sum(root.nbytes for root in self._roots)

    @property
    def bytes_in_use(self) -> int:
        """Size of the buffers in use, in bytes."""
        with self._lock:
            # Not the plain sum: only listing the idle ones shows which are in use.
            return sum(root.nbytes for root in self._roots) - sum(root.nbytes for root in self._idle())

    def bytes_by_owner(self) -> dict[str, int]:
        """Size of the buffers in use in bytes, by owner."""
        held: dict[str, int] = {}
        with self._lock:
            counts = _reference_counts(self._roots)
            for root, count in zip(self._roots, counts, strict=True):
                if count > _UNSHARED:
                    owner = self._owners[id(root)]
                    held[owner] = held.get(owner, 0) + root.nbytes
        return held

    def _idle(self) -> list[Bytes]:
        """Roots that nothing but this pool refers to; call with the lock held."""
        counts = _reference_counts(self._roots)
        return [root for root, count in zip(self._roots, counts, strict=True) if count <= _UNSHARED]

    def _smallest_idle(self, size: int) -> Bytes | None:
        """The smallest idle root that fits; of several, always the same, so that it stays in the processor's cache."""
        best: Bytes | None = None
        for root in self._idle():
            if size <= len(root) <= 2 * size and (best is None or len(root) < len(best)):
                best = root
        return best

    def _drop(self, root: Bytes) -> None:
        """Call with the lock held."""
        self._roots = [other for other in self._roots if other is not root]
        del self._owners[id(root)]

    def _take(self, nbytes: int, owner: str) -> Bytes | None:
        size = _size_class(nbytes) + PAGE
        with self._lock:
            root = self._smallest_idle(size)
            if root is None:
                idle = sorted(self._idle(), key=len)
                total = sum(len(root) for root in self._roots)
                keep = self._max_idle_bytes
                idle_bytes = sum(map(len, idle))
                while idle and (total + size > self.max_bytes or idle_bytes > keep):
                    gone = idle.pop()
                    self._drop(gone)
                    total -= len(gone)
                    idle_bytes -= len(gone)
                    del gone
                # A single body may exceed the limit if nothing else is in use: the caller has its own limit.
                if total + size > self.max_bytes and total:
                    return None
                # numpy requests huge pages for arrays of 4 MiB and more, which avoids most page faults.
                root = np.empty(size, np.uint8) if self._allocate is None else self._allocate(size)
                self._roots.append(root)
            self._owners[id(root)] = owner
            return aligned(root, nbytes, PAGE)


def aligned(memory: Bytes, nbytes: int, alignment: int) -> Bytes:
    """The first `nbytes` of `memory` that begin at a multiple of `alignment`. It is longer by so many bytes."""
    offset = -memory.ctypes.data % alignment
    return memory[offset : offset + nbytes]


def _size_class(nbytes: int) -> int:
    """Round `nbytes` up by at most an eighth, so that batches of similar size share buffers."""
    step = max(PAGE, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step
