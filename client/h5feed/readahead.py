"""Read-ahead: fetch blocks of batches over several connections, deliver them in order, bounded in bytes."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .errors import ConnectionFailed

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Batches start … stop-1 of one epoch, fetched by one request of about `nbytes` bytes."""

    epoch: int
    start: int
    stop: int
    nbytes: int


def blocks_of(epoch: int, batches: int, batch_bytes: int, block_bytes: int, start: int = 0) -> Iterator[Block]:
    """Cut an epoch into blocks of about `block_bytes`: small batches together, big ones alone."""
    per_block = max(1, block_bytes // max(1, batch_bytes))
    for first in range(start, batches, per_block):
        stop = min(first + per_block, batches)
        yield Block(epoch, first, stop, (stop - first) * batch_bytes)


Fetch = Callable[[Block, threading.Event], list[T]]
"""Fetches the batches of one block; the event is set when nobody wants them any more."""


class ReadAhead(Generic[T]):
    """Iterates over the batches of `blocks`, which are fetched ahead by threads of its own.

    Parameters
    ----------
    fetch : callable
        ``fetch(block, cancelled)`` returns the block's batches; it is called from `connections` threads and must end
        within `deadline` seconds.
    blocks : iterator of Block
        In the order of delivery; may be endless, is drawn from as room comes free.
    connections : int
        Requests in flight at most.
    max_bytes : int
        Bound on blocks that are in flight or wait for delivery; one block is always let through.
    deadline : float
        Seconds after which waiting for one batch fails.

    An error of `fetch` is raised in its place in the order. `close`, also by dropping this object, ends the threads.
    """

    def __init__(
        self, fetch: Fetch[T], blocks: Iterator[Block], *, connections: int, max_bytes: int, deadline: float
    ) -> None:
        self._window = _Window[T](fetch, blocks, max_bytes)
        self._deadline = deadline
        self._ready: deque[T] = deque()
        self._delivered: Block | None = None
        self.waited = 0.0
        """Seconds that `next` has waited for batches which were not there yet."""
        for number in range(connections):
            # Threads know the window only, so that dropping this object is noticed.
            threading.Thread(target=self._window.work, name=f"h5feed-readahead-{number}", daemon=True).start()
        self._finalizer = weakref.finalize(self, self._window.close)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._ready:
            if self._delivered is not None:
                self._window.release(self._delivered)
                self._delivered = None
            began = time.monotonic()
            taken = self._window.take(began + self._deadline)
            self.waited += time.monotonic() - began
            if taken is None:
                self.close()
                raise StopIteration
            self._delivered, batches = taken
            self._ready.extend(batches)
        return self._ready.popleft()

    def close(self) -> None:
        """Stop fetching and end the threads; requests in flight are finished and dropped."""
        self._finalizer()
        self._ready.clear()


@dataclass
class _Window(Generic[T]):
    """What the consumer and the threads share: the blocks between the next to fetch and the next to deliver."""

    fetch: Fetch[T]
    blocks: Iterator[Block]
    max_bytes: int
    lock: Any = field(default_factory=threading.RLock)
    """Reentrant: the collector may drop a `ReadAhead`, and close its window, in a thread that holds the lock."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    upcoming: Block | None = None
    exhausted: bool = False
    asked: int = 0
    delivered: int = 0
    nbytes: int = 0
    results: dict[int, tuple[Block, list[T] | BaseException]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Two, so that a batch which arrives does not wake the threads that wait for room.
        self.room = threading.Condition(self.lock)
        self.arrival = threading.Condition(self.lock)

    def work(self) -> None:
        """Body of a thread: fetch the next block that fits, until there is none."""
        while (claimed := self._claim()) is not None:
            number, block = claimed
            result: list[T] | BaseException
            try:
                result = self.fetch(block, self.cancelled)
            except BaseException as error:
                result = error
            with self.lock:
                self.results[number] = (block, result)
                if number == self.delivered:
                    self.arrival.notify()
            del result

    def _claim(self) -> tuple[int, Block] | None:
        with self.lock:
            while not self.cancelled.is_set():
                if self.upcoming is None and not self.exhausted:
                    self.upcoming = next(self.blocks, None)
                    if self.upcoming is None:
                        self.exhausted = True
                        self.arrival.notify()
                        self.room.notify_all()
                if self.exhausted:
                    return None
                block = self.upcoming
                assert block is not None
                if self.nbytes == 0 or self.nbytes + block.nbytes <= self.max_bytes:
                    self.upcoming = None
                    self.nbytes += block.nbytes
                    number = self.asked
                    self.asked += 1
                    return number, block
                self.room.wait()
            return None

    def take(self, deadline: float) -> tuple[Block, list[T]] | None:
        """The next block in order; None after the last."""
        with self.lock:
            while self.delivered not in self.results:
                if self.cancelled.is_set() or (self.exhausted and self.delivered == self.asked):
                    return None
                if not self.arrival.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise ConnectionFailed("no batch came within the deadline")
            block, result = self.results.pop(self.delivered)
            self.delivered += 1
        if isinstance(result, BaseException):
            self.close()
            raise result
        return block, result

    def release(self, block: Block) -> None:
        """The consumer has gone past `block`: there is room for another."""
        with self.lock:
            self.nbytes -= block.nbytes
            self.room.notify_all()

    def close(self) -> None:
        self.cancelled.set()
        with self.lock:
            self.results.clear()
            self.arrival.notify_all()
            self.room.notify_all()
