"""Threads that decode chunks: how work is shared out to them, and the memory that each has to itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from h5feed.errors import DatasetCorrupt, ReadTimeout

from .codecs import decode_chunk
from .layout import ArrayLayout
from .source import LocalFile

_SCRATCH_BYTES = 16 << 20
"""Bytes: scratch memory that a thread keeps for the next chunk at most."""

Bytes = npt.NDArray[np.uint8]
J = TypeVar("J")


class Decoders:
    """Threads of one process that decode.

    Parameters
    ----------
    threads : int
    timeout : float
        Seconds that the work of one call may take.

    Attributes
    ----------
    decoded_bytes : int
        Bytes of all chunks decoded so far; threads may lose a count, it is for measuring.
    """

    def __init__(self, threads: int, timeout: float) -> None:
        self._threads = threads
        self._timeout = timeout
        self._executor = ThreadPoolExecutor(threads, "h5feed-decode")
        self._scratch = threading.local()
        self.decoded_bytes = 0

    def close(self) -> None:
        """End the threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def share(self, jobs: Iterable[J], work: Callable[[Iterator[J]], None]) -> None:
        """Let all threads call ``work(remaining)``: who is done takes the next job, nobody waits for the slowest."""
        listed = list(jobs)
        remaining = iter(listed)
        if len(listed) < 2 or self._threads == 1:
            work(remaining)
            return
        self._wait([self._executor.submit(work, remaining) for _ in range(min(self._threads, len(listed)))])

    def help(self, jobs: Iterable[J], work: Callable[[Iterator[J]], None]) -> None:
        """Call ``work(remaining)`` here, which may be one of the threads, and on those with nothing else to do.

        One that is busy is not waited for: threads that work on parts of each other's jobs never wait in a ring.
        """
        listed = list(jobs)
        remaining = iter(listed)
        helpers = [self._executor.submit(work, remaining) for _ in range(min(self._threads, len(listed)) - 1)]
        try:
            work(remaining)
        finally:
            self._wait([helper for helper in helpers if not helper.cancel()])

    def chunk(
        self, source: LocalFile, fd: int, array: ArrayLayout, place: tuple[int, int, int], itemsize: int, out: Bytes
    ) -> None:
        """Read and decode one chunk, (offset, stored bytes, mask), into `out`, (chunk bytes,) uint8.

        Raises
        ------
        DatasetCorrupt
        """
        offset, size, mask = place
        if size > 2 * len(out) + 4096:
            raise DatasetCorrupt(f"a chunk of {len(out)} bytes claims to be stored as {size}")
        stored = self.scratch("stored", size)
        view = memoryview(stored)
        received = os.preadv(fd, (view,), offset)
        if received != size:
            source.read_rest(fd, offset, view, received)
        self.decoded_bytes += len(out)
        decode_chunk(stored, array.filters, mask, itemsize, out)

    def scratch(self, use: str, nbytes: int) -> Bytes:
        """(nbytes,) uint8 that this thread may write to until it asks again for the same use."""
        held: Bytes | None = getattr(self._scratch, use, None)
        if held is None or len(held) < nbytes:
            held = np.empty(nbytes, np.uint8)
            if nbytes <= _SCRATCH_BYTES:
                setattr(self._scratch, use, held)
        return held[:nbytes]

    def _wait(self, futures: list[Future[Any]]) -> None:
        """All of them, even when one failed: the buffer must not be given back while a thread still writes to it."""
        failure: Exception | None = None
        for future in futures:
            try:
                future.result(self._timeout)
            except FuturesTimeout:
                failure = failure or ReadTimeout(f"reading took more than {self._timeout:g} s")
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
