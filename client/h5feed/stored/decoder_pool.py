"""Threads that decode chunks, and their scratch memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from ..errors import DatasetCorrupt, ReadTimeout, TooLarge
from .codecs import decode_chunk
from .layout import ArrayLayout
from .scratch import SCRATCH_BYTES, Bytes, Scratch
from .source import Source

SLICE_SECONDS = 0.05
"""How long a thread works for one call before it yields to others that are waiting."""

MAX_REPLACED = 16
"""Pools of threads that make way for others because they wait for a disk that hangs."""

J = TypeVar("J")


@dataclass
class _Shared(Generic[J]):
    """Work that several threads take part in."""

    remaining: Iterator[J]
    work: Callable[[Iterator[J]], None]
    is_over: bool = False
    context: Context = field(default_factory=copy_context)
    """That of the caller."""


class _Threads:
    """A pool of threads that knows whether it is at work."""

    def __init__(self, threads: int) -> None:
        self.executor = ThreadPoolExecutor(threads, "h5feed-decode")
        self.pending: set[Future[None]] = set()


class Decoders:
    """Threads that decode chunks, one pool for each process.

    Long calls yield to others: a batch of a million chunks does not block a batch of two. Threads that wait for a disk
    that hangs are replaced: data on other disks are decoded by others.

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
        self._pool = _Threads(threads)
        self._replaced: list[_Threads] = []
        self._closed = False
        self.scratch = Scratch().take
        self.decoded_chunks = self.decoded_bytes = 0
        self._waiting = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the threads."""
        self._closed = True
        self._pool.executor.shutdown(wait=False, cancel_futures=True)

    def share(self, jobs: Iterable[J], work: Callable[[Iterator[J]], None]) -> None:
        """Call ``work(remaining)`` in all threads, each of which takes the next job from the shared iterator.

        The threads work in copies of the caller's context.

        Raises
        ------
        MemoryError
            A thread cannot be started.
        ReadTimeout
            The work took more than `timeout` seconds. It is raised when the work has ended, because the threads still
            write to the caller's memory until then.
        Exception
            What `work` has raised.
        """
        listed = list(jobs)
        remaining = iter(listed)
        if len(listed) < 2 or self._threads == 1:
            work(remaining)
            return
        shared, pool = _Shared(remaining, work), self._pool
        begun: list[Future[None]] = []
        try:
            for _ in range(min(self._threads, len(listed))):
                begun.append(self._begin(shared))
        finally:
            # If one thread cannot begin, the others write to the caller's memory still.
            try:
                self._wait(begun, pool, shared)
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
            pool = self._pool
            self._waiting += 1
            try:
                submitted = pool.executor.submit(self._run, shared, ended)
            except RuntimeError:
                # It is in the queue nevertheless, for a thread that may come: that finds that the work is over.
                shared.is_over = True
                raise MemoryError("no thread can be started") from None
            pool.pending.add(submitted)

        def done(future: Future[None]) -> None:
            pool.pending.discard(future)
            if future.cancelled():
                self._put_again(shared, ended)

        submitted.add_done_callback(done)

    def _put_again(self, shared: _Shared[J], ended: Future[None]) -> None:
        """Waiting work was cancelled because its pool is replaced, or at the end."""
        with self._lock:
            self._waiting -= 1
        if self._closed:
            ended.cancel()
            return
        try:
            self._put(shared, ended)
        except MemoryError as error:
            ended.set_exception(error)

    def _run(self, shared: _Shared[J], ended: Future[None]) -> None:
        with self._lock:
            self._waiting -= 1
        if shared.is_over:
            ended.set_result(None)
            return
        cut: list[bool] = []
        try:
            # A context can be entered by one thread only.
            shared.context.copy().run(shared.work, self._slice(shared, cut))
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
        helpers: list[Future[None]] = []
        with self._lock:
            pool = self._pool
            for _ in range(min(self._threads, len(listed)) - 1):
                wanted = [True]
                try:
                    run = partial(copy_context().run, work, remaining)
                    helpers.append(pool.executor.submit(self._help, wanted, run))
                except RuntimeError:
                    # No thread can be started. It is in the queue nevertheless, and nobody would wait for it.
                    wanted.clear()
                    break
        try:
            work(remaining)
        finally:
            waiting = [helper for helper in helpers if not helper.cancel()]
            helpers.clear()
            self._wait(waiting, pool)

    def _help(self, wanted: list[bool], run: Callable[[], None]) -> None:
        with self._lock:
            if not wanted:
                return
        run()

    def chunk(
        self, source: Source, fd: int, array: ArrayLayout, place: tuple[int, int, int], itemsize: int, out: Bytes
    ) -> None:
        """Read and decode one chunk.

        Parameters
        ----------
        source : Source
        fd : int
            Handle of the source, see `Source.reading`.
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
        stored = source.stored(fd, offset, size, self.scratch)
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

    def _wait(self, futures: list[Future[Any]], pool: _Threads, shared: _Shared[Any] | None = None) -> None:
        """Wait for all, even if one has failed: the buffer must not be reused while a thread still writes to it.

        Leaves `futures` empty. No frame that an error has passed may refer to it afterwards: the cycle would keep all
        that the frames refer to, threads and buffers among it, until the next garbage collection.
        """
        failures: list[Exception] = []
        while futures:
            self._wait_for_first(futures, failures, pool, shared)
        if failures:
            del failures[1:]
            raise failures.pop()

    def _wait_for_first(
        self, futures: list[Future[Any]], failures: list[Exception], pool: _Threads, shared: _Shared[Any] | None
    ) -> None:
        try:
            try:
                futures[0].result(None if failures else self._timeout)
            except FuturesTimeout:
                failures.append(ReadTimeout(f"reading took more than {self._timeout:g} s"))
                if shared is not None:
                    shared.is_over = True
                self._replace(pool)
                futures[0].result()
        except Exception as error:
            failures.append(error)
        finally:
            del futures[0]

    def _replace(self, late: _Threads) -> None:
        """Let other threads do what waits: some of these have been at the same work for too long."""
        with self._lock:
            self._replaced = [pool for pool in self._replaced if pool.pending]
            if self._closed or self._pool is not late or len(self._replaced) >= MAX_REPLACED:
                return
            self._pool = _Threads(self._threads)
            self._replaced.append(late)
        late.executor.shutdown(wait=False, cancel_futures=True)
