"""Read-ahead: fetch blocks of batches over several connections and deliver them in order, within a byte limit."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Generic, TypeVar

from ..blocks import Block, Fetch
from ..errors import BadParameter, ConnectionFailed
from ..net.cancellation import Cancellation
from ..net.concurrency import Link, Pace
from ..net.trace import DECODE, Trace, begin_trace

FEW_BLOCKS = 32
BYTES_PER_BLOCK = 4 << 20
"""The maximum number of blocks ahead is `FEW_BLOCKS`, plus one per `BYTES_PER_BLOCK` of the byte limit. Otherwise,
short passes would be fetched ahead by the hundred thousand, each with its own request."""

EXIT_SECONDS = 5.0
"""How long the interpreter waits at exit for threads that have been told to stop."""

T = TypeVar("T")


DEFAULT_READAHEAD = 64 << 20
"""Maximum number of bytes fetched ahead of the training loop."""

_SPARE_SECONDS = 10.0
"""What a block may take longer than its requests."""


class ReadAhead(Generic[T]):
    """Iterates over the batches of `blocks`, which background threads fetch ahead.

    Parameters
    ----------
    fetch : callable
        ``fetch(block, cancelled)`` returns the batches of the block. It is called from several threads and must return
        within `deadline` seconds. A block may be a part of one of `blocks`.
    blocks : iterator of Block
        In the order of delivery. May be endless; it is consumed lazily.
    max_bytes : int
        Limit on blocks that are in flight or wait for delivery. A single block may exceed it.
    deadline : float
        Maximum number of seconds to wait for one batch.
    pace : Pace, optional
        Determines the number and size of concurrent requests.
    waits : callable, optional
        Returns what to tell the server of the loop's waiting: see `h5feed.wire.WAIT_HEADER`. Called from several
        threads.

    Attributes
    ----------
    taken : Trace or None
        Trace of the block that the last `next` started; None if it continued the previous block.

    An error of `fetch` is raised at its position in the order. `close`, or dropping this object, ends the threads and
    cancels the requests in flight.
    """

    def __init__(
        self,
        fetch: Fetch[T],
        blocks: Iterator[Block],
        *,
        max_bytes: int,
        deadline: float,
        pace: Pace | None = None,
        waits: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._window = _Window[T](fetch, blocks, max_bytes, pace or Pace(max_bytes), waits)
        self._deadline = deadline
        self._ready: deque[T] = deque()
        self._delivered: Block | None = None
        self.taken: Trace | None = None
        self._finalizer = weakref.finalize(self, self._window.close)
        self._window.start_thread()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._ready:
            if self._window.pid != os.getpid():
                raise RuntimeError("this iterator was created before os.fork(): create a new one in the child process")
            if self._delivered is not None:
                self._window.release(self._delivered)
                self._delivered = None
            taken = self._window.take(time.monotonic() + self._deadline)
            if taken is None:
                self.close()
                raise StopIteration
            self._delivered, self.taken, batches = taken
            self._ready.extend(batches)
        else:
            self.taken = None
        return self._ready.popleft()

    def close(self) -> None:
        """Stop fetching: cancel requests in flight and end the threads."""
        self._finalizer()
        self._ready.clear()


def read_ahead(
    fetch: Fetch[T],
    blocks: Iterator[Block],
    seconds: float,
    connections: int | None,
    readahead: int | None,
    link: Link | None,
    waits: Callable[[], str | None],
) -> ReadAhead[T]:
    """Iterate over `blocks`, fetched ahead.

    Parameters
    ----------
    seconds : float
        Maximum number of seconds that the requests of a block may take.
    connections, readahead : int, optional
        Maximum number of concurrent requests, and of bytes fetched ahead.
    link : Link, optional
        What is known of the link to the servers.

    Raises
    ------
    BadParameter
    """
    if connections is not None and not (isinstance(connections, Real) and connections >= 1):
        raise BadParameter(f"connections={connections!r} must be 1 or more")
    readahead = DEFAULT_READAHEAD if readahead is None else readahead
    if not (isinstance(readahead, Real) and readahead >= 1):
        raise BadParameter(f"readahead={readahead!r} must be a number of bytes, 1 or more")
    pace = Pace(readahead, connections, link)
    return ReadAhead(fetch, blocks, max_bytes=readahead, pace=pace, deadline=seconds + _SPARE_SECONDS, waits=waits)


@dataclass(eq=False)
class _Window(Generic[T]):
    """State shared by the consumer and the threads: the blocks between the next to deliver and the next to fetch."""

    fetch: Fetch[T]
    blocks: Iterator[Block]
    max_bytes: int
    pace: Pace
    waits: Callable[[], str | None]
    lock: Any = field(default_factory=threading.RLock)
    """Reentrant: garbage collection may close the window in a thread that holds the lock."""
    cancelled: Cancellation = field(default_factory=Cancellation)
    pid: int = field(default_factory=os.getpid)
    threads: int = 0
    upcoming: Block | None = None
    rest: Block | None = None
    """The rest of the block that `upcoming` was cut from."""
    exhausted: bool = False
    lap: int = 0
    """Lap of the last delivered block."""
    asked: int = 0
    under_way: int = 0
    delivered: int = 0
    nbytes: int = 0
    """Bytes of blocks that are in flight, wait for delivery, or are being consumed."""
    results: dict[int, tuple[Block, Trace, list[T] | BaseException]] = field(default_factory=dict)
    past_waits: float = 0.0
    waits_since: float | None = None

    def __post_init__(self) -> None:
        self.max_blocks = FEW_BLOCKS + self.max_bytes // BYTES_PER_BLOCK
        # Two conditions, so that an arriving batch does not wake the threads that wait for room.
        self.room = threading.Condition(self.lock)
        self.arrival = threading.Condition(self.lock)
        _WINDOWS.add(self)

    @property
    def waited(self) -> float:
        """Seconds the consumer has waited so far."""
        since = self.waits_since
        return self.past_waits + (0.0 if since is None else time.monotonic() - since)

    def start_thread(self) -> None:
        """Start one more thread, if the pace allows it."""
        with self.lock:
            if self.threads >= self.pace.width or self.cancelled.is_set():
                return
            number = self.threads
            self.threads += 1
        # Threads refer only to the window, so that its owner can be garbage collected.
        thread = threading.Thread(target=self.work, name=f"h5feed-readahead-{number}", daemon=True)
        thread.start()
        # Not before start(): an unstarted thread cannot be joined.
        _THREADS.add(thread)

    def work(self) -> None:
        """Body of a thread: fetch the next block that fits, until none is left."""
        while (claimed := self._claim()) is not None:
            if self.threads < self.pace.width:
                # Each thread that finds work starts the next, so that there are only as many as needed. If the system
                # cannot start more, the existing ones continue.
                with contextlib.suppress(RuntimeError):
                    self.start_thread()
            number, block = claimed
            trace = begin_trace(self.waits)
            result: list[T] | BaseException
            try:
                result = self.fetch(block, self.cancelled)
            except BaseException as error:
                result = error
            trace.enter(DECODE)
            with self.lock:
                self.under_way -= 1
                if not self.cancelled.is_set():
                    self.results[number] = (block, trace, result)
                width = self.pace.width
                if not isinstance(result, BaseException):
                    self.pace.arrived(block.nbytes, time.monotonic(), self.waited)
                if number == self.delivered:
                    self.arrival.notify()
                if self.pace.width > width:
                    self.room.notify_all()
            del result

    def _claim(self) -> tuple[int, Block] | None:
        with self.lock:
            while not self.cancelled.is_set():
                if self.under_way < self.pace.width:
                    if self.upcoming is None and not self.exhausted:
                        self._draw()
                    if self.exhausted and self.upcoming is None:
                        return None
                    block = self.upcoming
                    assert block is not None
                    fits = (
                        self.nbytes + block.nbytes <= self.max_bytes and self.asked - self.delivered < self.max_blocks
                    )
                    # At most one pass ahead: for small sets, more would look like a leak and could be outdated.
                    if block.lap <= self.lap + 1 and (self.nbytes == 0 or fits):
                        self.upcoming = None
                        self.nbytes += block.nbytes
                        self.under_way += 1
                        number = self.asked
                        self.asked += 1
                        return number, block
                    self.pace.full()
                self.room.wait()
            return None

    def _draw(self) -> None:
        """Set the upcoming block, or `exhausted` if there is none."""
        whole = self.rest
        if whole is None:
            try:
                whole = next(self.blocks, None)
            except Exception as error:
                # Raised at its position too, after all requested blocks.
                self.results[self.asked] = Block(0, 0, 0, 0), Trace(), error
                self.asked += 1
        if whole is None:
            self.exhausted = True
            self.arrival.notify()
            self.room.notify_all()
        else:
            self.upcoming, self.rest = whole.cut(self.pace.block_bytes(time.monotonic()))

    def take(self, deadline: float) -> tuple[Block, Trace, list[T]] | None:
        """The next block in order; None after the last."""
        with self.lock:
            try:
                while self.delivered not in self.results:
                    if self.cancelled.is_set() or (self.exhausted and self.delivered == self.asked):
                        return None
                    if self.waits_since is None:
                        self.waits_since = time.monotonic()
                    if not self.arrival.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                        raise ConnectionFailed("no batch arrived before the deadline")
            finally:
                self.past_waits, self.waits_since = self.waited, None
            block, trace, result = self.results.pop(self.delivered)
            self.delivered += 1
            if block.lap > self.lap:
                self.lap = block.lap
                self.room.notify_all()
        if isinstance(result, BaseException):
            self.close()
            raise result
        return block, trace, result

    def release(self, block: Block) -> None:
        """Release the bytes of `block`, which the consumer has finished."""
        with self.lock:
            self.nbytes -= block.nbytes
            self.room.notify_all()

    def close(self) -> None:
        if self.pid != os.getpid():
            # In a forked child, threads and connections belong to the parent, and the lock may never be released.
            return
        self.cancelled.set()
        with self.lock:
            self.results.clear()
            self.arrival.notify_all()
            self.room.notify_all()


_WINDOWS: weakref.WeakSet[_Window[Any]] = weakref.WeakSet()
_THREADS: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """Stop all threads before the interpreter exits. It would kill them anywhere, which crashes the process if a thread
    is inside a C++ library (OpenCV)."""
    for window in list(_WINDOWS):
        window.close()
    deadline = time.monotonic() + EXIT_SECONDS
    for thread in list(_THREADS):
        thread.join(max(0.0, deadline - time.monotonic()))
