"""Slots for work that only a few may do at a time, such as reading in child processes or drawing plots.

A thread that waits for a slot is blocked. If all threads were, requests that need no slot would have to wait too. So
only a few wait in their threads; the others give theirs back and try again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from h5feed.errors import Overloaded

MAX_WAITING = 2
"""Threads that wait for a slot of one kind, at most, of those whose work can begin anew."""

MAY_RESTART: ContextVar[bool] = ContextVar("may_restart", default=False)
"""Whether the work at hand can be dropped and begun anew: nothing of it is worth keeping yet."""


class QueueFull(Exception):
    """Too many are waiting for this slot; try again later.

    Attributes
    ----------
    problem : Overloaded
        What to say when that has taken too long.
    """

    def __init__(self, problem: Overloaded) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class Slots:
    """A semaphore with a limit on the number of waiting threads.

    Parameters
    ----------
    slots : int
    timeout : float
        Seconds to wait for one.
    what : str
        Is in use, where all are taken: ``all readers``.
    """

    def __init__(self, slots: int, timeout: float, what: str) -> None:
        self._free = slots
        self._waiting = 0
        self._timeout = timeout
        self._problem = f"{what} are busy; come again in a moment"
        self._changed = threading.Condition()

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """Hold a slot.

        Raises
        ------
        Overloaded
            None came free in time.
        Crowded
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
                raise QueueFull(Overloaded(self._problem, retry_after=1))
            self._waiting += 1
            try:
                while not self._free:
                    if not self._changed.wait(deadline - time.monotonic()):
                        raise Overloaded(self._problem, retry_after=1)
                self._free -= 1
            finally:
                self._waiting -= 1
        # What it does with it would be lost.
        MAY_RESTART.set(False)
