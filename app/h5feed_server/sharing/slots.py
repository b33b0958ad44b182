"""Slots for work that only a few may do at a time, such as reading in child processes or drawing plots.

A thread that waits for a slot is blocked. If all threads were blocked, requests that need no slot would have to wait
too. So only a few requests wait in their threads. The others free their threads and try again later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from h5feed.errors import Overloaded

MAX_WAITING = 2
"""Maximum number of threads that wait for a slot of one kind. Work that cannot be restarted may exceed it."""

MAY_RESTART: ContextVar[bool] = ContextVar("may_restart", default=False)
"""Whether the current work can be dropped and restarted: it has no results yet that would be lost."""


class QueueFull(Exception):
    """Too many threads are waiting for a slot; try again later.

    Attributes
    ----------
    problem : Overloaded
        The error to raise if retrying takes too long.
    """

    def __init__(self, problem: Overloaded) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class Slots:
    """A semaphore with a limit on the number of waiting threads.

    Parameters
    ----------
    slots : int
        Number of slots.
    timeout : float
        Seconds to wait for a slot.
    what : str
        What is busy when all slots are taken, for the error message: ``all readers``.
    lacking : str
        The same for metrics, see `Overloaded.lacking`.
    """

    def __init__(self, slots: int, timeout: float, what: str, lacking: str = "threads") -> None:
        self._free = slots
        self._waiting = 0
        self._timeout = timeout
        self._problem = f"{what} are busy; try again in a moment"
        self._lacking = lacking
        self._changed = threading.Condition()

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """Hold a slot.

        Raises
        ------
        Overloaded
            No slot became free in time.
        QueueFull
            Too many threads are waiting already, and the current work can be restarted.
        """
        self._take()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify()

    def _take(self) -> None:
        deadline = time.monotonic() + self._timeout
        with self._changed:
            if not self._free and self._waiting >= MAX_WAITING and MAY_RESTART.get():
                raise QueueFull(Overloaded(self._problem, retry_after=1).because_of(self._lacking))
            self._waiting += 1
            try:
                while not self._free:
                    if not self._changed.wait(deadline - time.monotonic()):
                        raise Overloaded(self._problem, retry_after=1).because_of(self._lacking)
                self._free -= 1
            finally:
                self._waiting -= 1
        # From here on, a restart would lose work.
        MAY_RESTART.set(False)
