"""Reads of many ranges of one open file: with one system call where io_uring is available."""

from __future__ import annotations

import os

import numpy as np

from . import io_ring
from .scratch import Bytes
from .source import Int64s


class RangeReads:
    """Reads ranges of a file, whichever descriptor it is open as."""

    def __init__(self) -> None:
        self._is_direct: bool | None = None
        """See `io_ring.is_direct`; None: not known yet."""

    def read(self, fd: int, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> Int64s:
        """Fill ``target[begins[i]:]`` with the ``sizes[i]`` bytes from ``offsets[i]``, for all i.

        Parameters
        ----------
        fd : int
        offsets, sizes, begins : (k,) int64
        target : (n,) uint8, C-contiguous

        Returns
        -------
        (k,) int64
            The bytes read of each range, which may be fewer, and -1 after an error.

        Raises
        ------
        OSError
            A range cannot be read.
        """
        done = self._by_ring(fd, offsets, sizes, target, begins)
        if done is None:
            view = memoryview(target)
            ranges = zip(offsets.tolist(), begins.tolist(), (begins + sizes).tolist(), strict=True)
            # Do nothing else in this loop: it is most of the cost of reading in Python.
            done = np.array([os.preadv(fd, (view[begin:end],), where) for where, begin, end in ranges], np.int64)
        return done

    def _by_ring(self, fd: int, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> Int64s | None:
        """The bytes read of each range, -1 after an error; None if `preadv` is to be used instead."""
        # The kernel gets addresses, so nobody else checks whether they may be written to.
        if len(offsets) < io_ring.MIN_RANGES or self._is_direct is False or not target.flags.carray:
            return None
        if (ring := io_ring.this_thread()) is None:
            return None
        if self._is_direct is None:
            self._is_direct = io_ring.is_direct(fd)
        if not self._is_direct or sizes.max() > io_ring.MAX_RANGE_BYTES:
            return None
        # Not the sum of both, which could overflow.
        if begins.min() < 0 or sizes.min() < 0 or (begins > target.nbytes - sizes).any():
            raise ValueError("rows do not fit into their target")
        try:
            return ring.read(fd, offsets, target.ctypes.data + begins, sizes)
        except io_ring.Unusable:
            io_ring.drop()
            return None
