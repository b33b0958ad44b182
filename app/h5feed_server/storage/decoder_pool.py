"""Threads that decode chunks: how work is shared out to them, and the memory that each has to itself."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from h5feed.errors import DatasetCorrupt, ReadTimeout, TooLarge

from .codecs import decode_chunk
from .layout import ArrayLayout
from .local_file import LocalFile
from .scratch import SCRATCH_BYTES, Bytes, Scratch

SLICE_SECONDS = 0.05
"""How long a thread goes on with one piece of work while others wait."""

J = TypeVar("J")


@dataclass
class _Shared(Generic[J]):
    """Work that several threads take part in."""

    remaining: Iterator[J]
    work: Callable[[Iterator[J]], None]
    is_over: bool = False


class Decoders:
    """Threads of one process that decode.

    Whose work takes long lets others go on in between: a batch of a million chunks does not hold up one of two.

    Parameters
    ----------
    threads : int
    timeout : float
        Seconds that the work of one call may take.
    max_chunk_bytes : int
        Bound on the decoded bytes of a chunk, and of all great ones that are decoded at the same time.

    Attributes
    ----------
    scratch : callable
        ``scratch(use, nbytes)`` is memory that the calling thread may write to, see `Scratch.take`.
    decoded_bytes : int
        Bytes of all chunks decoded so far; threads may lose a count, it is for measuring.
    """

    def __init__(self, threads: int, timeout: float, max_chunk_bytes: int = 256 << 20) -> None:
        self._max_chunk_bytes = max_chunk_bytes
        self._great = 0
        self._changed = threading.Condition()
        self._threads = threads
        self._timeout = timeout
        self._executor = ThreadPoolExecutor(threads, "h5feed-decode")
        self.scratch = Scratch().take
        self.decoded_bytes = 0
        self._waiting = 0
        self._lock = threading.Lock()

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
        shared = _Shared(remaining, work)
        try:
            self._wait([self._begin(shared) for _ in range(min(self._threads, len(listed)))])
        finally:
            # Where one has failed, or nobody waits any more, the others need not go on.
            shared.is_over = True

    def _begin(self, shared: _Shared[J]) -> Future[None]:
        """Have a thread take part in work, which lets others go on whenever it has had its slice."""
        ended: Future[None] = Future()
        self._put(shared, ended)
        return ended

    def _put(self, shared: _Shared[J], ended: Future[None]) -> None:
        with self._lock:
            self._waiting += 1
        submitted = self._executor.submit(self._run, shared, ended)
        # At the end of the process.
        submitted.add_done_callback(lambda future: future.cancelled() and ended.cancel())

    def _run(self, shared: _Shared[J], ended: Future[None]) -> None:
        with self._lock:
            self._waiting -= 1
        cut: list[bool] = []
        try:
            shared.work(self._slice(shared, cut))
            if cut:
                self._put(shared, ended)
            else:
                ended.set_result(None)
        except BaseException as error:
            shared.is_over = True
            ended.set_exception(error)
            # The error's traceback holds this frame: neither would be freed.
            del ended

    def _slice(self, shared: _Shared[J], cut: list[bool]) -> Iterator[J]:
        """What is left, as long as nobody else waits, or for `SLICE_SECONDS`; tells `cut` that there may be more."""
        end = time.monotonic() + SLICE_SECONDS
        for job in shared.remaining:
            yield job
            if shared.is_over:
                return
            if self._waiting and time.monotonic() > end:
                cut.append(True)
                return

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

    @contextmanager
    def room_for(self, nbytes: int) -> Iterator[None]:
        """While a chunk is decoded that takes so much scratch memory: great ones wait for each other.

        Raises
        ------
        ReadTimeout, TooLarge
        """
        if nbytes <= SCRATCH_BYTES:
            yield
            return
        if nbytes > self._max_chunk_bytes:
            raise TooLarge(
                f"a chunk of {nbytes} bytes is more than the {self._max_chunk_bytes} that are decoded at once"
            )
        deadline = time.monotonic() + self._timeout
        with self._changed:
            while self._great and self._great + nbytes > self._max_chunk_bytes:
                if not self._changed.wait(deadline - time.monotonic()):
                    raise ReadTimeout(f"reading took more than {self._timeout:g} s")
            self._great += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._great -= nbytes
                self._changed.notify_all()

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
