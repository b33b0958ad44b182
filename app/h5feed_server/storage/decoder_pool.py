"""Threads that decode chunks, and their scratch memory."""

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
"""How long a thread works for one call before it yields to others that are waiting."""

J = TypeVar("J")


@dataclass
class _Shared(Generic[J]):
    """Work that several threads take part in."""

    remaining: Iterator[J]
    work: Callable[[Iterator[J]], None]
    is_over: bool = False


class Decoders:
    """Threads that decode chunks, one pool for each process.

    Long calls yield to others: a batch of a million chunks does not block a batch of two.

    Parameters
    ----------
    threads : int
    timeout : float
        Seconds that the work of one call may take.
    max_chunk_bytes : int
        Bound on the decoded bytes of one chunk, and of all large chunks that are decoded at the same time.

    Attributes
    ----------
    scratch : callable
        ``scratch(use, nbytes)`` returns memory that the calling thread may write to, see `Scratch.take`.
    decoded_chunks, decoded_bytes : int
        Chunks decoded so far, and their bytes. Updated without a lock, so both may be slightly too low.
    """

    def __init__(self, threads: int, timeout: float, max_chunk_bytes: int = 256 << 20) -> None:
        self._max_chunk_bytes = max_chunk_bytes
        self._great = 0
        self._changed = threading.Condition()
        self._threads = threads
        self._timeout = timeout
        self._executor = ThreadPoolExecutor(threads, "h5feed-decode")
        self.scratch = Scratch().take
        self.decoded_chunks = self.decoded_bytes = 0
        self._waiting = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def share(self, jobs: Iterable[J], work: Callable[[Iterator[J]], None]) -> None:
        """Call ``work(remaining)`` in all threads, each of which takes the next job from the shared iterator.

        Raises
        ------
        ReadTimeout
            The work took more than `timeout` seconds.
        Exception
            What `work` has raised.
        """
        listed = list(jobs)
        remaining = iter(listed)
        if len(listed) < 2 or self._threads == 1:
            work(remaining)
            return
        shared = _Shared(remaining, work)
        try:
            self._wait([self._begin(shared) for _ in range(min(self._threads, len(listed)))])
        finally:
            # If one thread has failed or the caller has given up, the others can stop.
            shared.is_over = True

    def _begin(self, shared: _Shared[J]) -> Future[None]:
        """Let a thread take part in some work, in slices. The future ends with the thread's last slice."""
        ended: Future[None] = Future()
        self._put(shared, ended)
        return ended

    def _put(self, shared: _Shared[J], ended: Future[None]) -> None:
        with self._lock:
            self._waiting += 1
        submitted = self._executor.submit(self._run, shared, ended)
        # The executor cancels waiting work at shutdown.
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
            # The traceback of the error refers to this frame: break the cycle.
            del ended

    def _slice(self, shared: _Shared[J], cut: list[bool]) -> Iterator[J]:
        """Yield jobs until none is left, or until `SLICE_SECONDS` have passed and other work waits.

        In the latter case, appends to `cut`: there may be more jobs.
        """
        end = time.monotonic() + SLICE_SECONDS
        for job in shared.remaining:
            yield job
            if shared.is_over:
                return
            if self._waiting and time.monotonic() > end:
                cut.append(True)
                return

    def help(self, jobs: Iterable[J], work: Callable[[Iterator[J]], None]) -> None:
        """Call ``work(remaining)`` in the calling thread and in idle threads of the pool.

        The calling thread may itself belong to the pool. Busy threads are not waited for, so threads that help each
        other cannot deadlock.
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
        """Read and decode one chunk.

        Parameters
        ----------
        source : LocalFile
        fd : int
            Descriptor of the file.
        array : ArrayLayout
        place : (int, int, int)
            Offset and stored bytes of the chunk in the file, and its filter mask.
        itemsize : int
        out : (chunk bytes,) uint8

        Raises
        ------
        DatasetCorrupt, RevisionChanged, Overloaded
        """
        offset, size, mask = place
        if size > 2 * len(out) + 4096:
            raise DatasetCorrupt(f"a chunk of {len(out)} bytes claims to be stored as {size} bytes")
        stored = self.scratch("stored", size)
        view = memoryview(stored)
        received = os.preadv(fd, (view,), offset)
        if received != size:
            source.read_rest(fd, offset, view, received)
        self.decoded_chunks += 1
        self.decoded_bytes += len(out)
        decode_chunk(stored, array.filters, mask, itemsize, out)

    @contextmanager
    def room_for(self, nbytes: int) -> Iterator[None]:
        """Reserve scratch memory for decoding a chunk. Large chunks wait until others are done.

        Raises
        ------
        ReadTimeout
            There was no room within the timeout.
        TooLarge
            The chunk is larger than `max_chunk_bytes`.
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
        """Wait for all, even if one has failed: the buffer must not be reused while a thread still writes to it."""
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
