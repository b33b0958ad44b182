"""A pool of child processes that run libhdf5. They are started when needed, and each serves one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from h5feed.errors import Overloaded

from ...sharing.slots import Slots
from .child import Child


class Children:
    """A pool of child processes that run the same module.

    Parameters
    ----------
    module : str
        What they run, see `Child`.
    arguments : sequence of str
        Command-line arguments of the module.
    most : int
        Maximum number of processes.
    timeout : float
        Seconds that a request waits for a process.
    what : str
        Name of the processes in error messages, such as ``readers``.
    max_answer_bytes : int
        Maximum size of a response.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], most: int, timeout: float, what: str, max_answer_bytes: int
    ) -> None:
        self._slots = Slots(most, timeout, f"all {what}", "readers")
        self._what = what
        self._child = (module, arguments, max_answer_bytes)
        self._idle: list[Child] = []
        self._busy: set[Child] = set()
        self._lock = threading.Lock()
        self.failures = 0
        """Processes that were ended because a request failed in them."""
        self.are_closed = False
        """Whether `close` was called: no process is started any more."""

    def close(self) -> None:
        """End all processes, including busy ones, whose requests fail."""
        with self._lock:
            self.are_closed = True
            idle, self._idle = self._idle, []
            for child in self._busy:
                child.kill()
        for child in idle:
            child.end(patience=0.2)

    def count(self) -> tuple[int, int]:
        """Number of processes, and of those that are busy."""
        with self._lock:
            return len(self._idle) + len(self._busy), len(self._busy)

    def rest(self) -> None:
        """End the idle processes. The next request starts a new one."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    @contextmanager
    def lent(self) -> Iterator[Child]:
        """Lend a child for a ``with`` block. If the block raises an exception, the child is ended.

        Raises
        ------
        Overloaded
            No child became free in time, or none can be started.
        """
        with self._slots.acquire():
            child = self._take()
            try:
                yield child
            except BaseException:
                child.end(patience=0.0)
                with self._lock:
                    self._busy.discard(child)
                    self.failures += not self.are_closed
                raise
            self._give_back(child)

    def _take(self) -> Child:
        with self._lock:
            if self.are_closed:
                raise Overloaded("the server is stopping", retry_after=1).because_of("stopping")
            try:
                child = self._idle.pop() if self._idle else Child(*self._child)
            except OSError as error:
                none = Overloaded(f"cannot start {self._what}: {error.strerror}", retry_after=1)
                raise none.because_of("readers") from None
            self._busy.add(child)
            return child

    def _give_back(self, child: Child) -> None:
        with self._lock:
            self._busy.discard(child)
            keep = not self.are_closed
            if keep:
                self._idle.append(child)
        if not keep:
            child.end(patience=0.0)
