"""What a block of batches was at, moment by moment, while it was fetched: so that waiting for it can be explained.

A thread that fetches begins a `Trace`; whoever works for it beneath says when the work passes from one phase to the
next, without knowing for whom.
"""

from __future__ import annotations

import time
from contextvars import ContextVar

clock = time.perf_counter
"""Seconds; of all traces, and of those who wait."""

WAITING, TRANSFER, DECODE = range(3)
"""Phases. Waiting for the server: not asked yet, asked and no first byte, or about to be tried again. Transfer: the
body arrives. Decode: what is done here with what has arrived, or with rows of the local cache."""


class Trace:
    """The phases of one block; it waits until it enters another.

    Attributes
    ----------
    nbytes : int
        Of the bodies that arrived.
    retries : int
        Requests that were sent once more.
    cached : int
        Rows that the local cache held.
    """

    __slots__ = ("_entered", "cached", "nbytes", "retries")

    def __init__(self) -> None:
        self._entered: list[tuple[float, int]] = []
        self.nbytes = self.retries = self.cached = 0

    def enter(self, phase: int) -> None:
        self._entered.append((clock(), phase))

    def split(self, begin: float, end: float) -> tuple[float, float, float]:
        """Seconds of each phase between two times of `clock`."""
        seconds = [0.0, 0.0, 0.0]
        phase, since = WAITING, begin
        for at, following in self._entered:
            if at >= end:
                break
            if at > since:
                seconds[phase] += at - since
                since = at
            phase = following
        seconds[phase] += end - since
        return seconds[WAITING], seconds[TRANSFER], seconds[DECODE]


_CURRENT: ContextVar[Trace | None] = ContextVar("h5feed_trace", default=None)


def begin_trace() -> Trace:
    """The trace of what this thread fetches from now on."""
    trace = Trace()
    _CURRENT.set(trace)
    return trace


def enter(phase: int) -> None:
    """The work of this thread passes into another phase."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.enter(phase)


def received(nbytes: int) -> None:
    """A body has arrived, and is worked on now."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.nbytes += nbytes
        trace.enter(DECODE)


def retried() -> None:
    """A request has failed and will be sent once more."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.retries += 1
        trace.enter(WAITING)


def found(rows: int) -> None:
    """So many rows were in the local cache."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.cached += rows
