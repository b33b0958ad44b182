"""Traces: which phase the fetch of a block was in at any time, to explain why training waited for it.

The fetching thread starts a `Trace`. The code it calls reports the transitions between phases, without access to the
trace itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar

clock = time.perf_counter
"""The clock of all traces and measurements, in seconds."""

WAITING, TRANSFER, DECODE = range(3)
"""Phases. Waiting for the server: before the request, before the first byte, or before a retry. Transfer: the body
arrives. Decode: work in this process on what has arrived, or reading the local cache or the server's files."""

Waits = Callable[[], "str | None"]
"""Returns what to tell the server of the loop's waiting: see `h5feed.wire.WAIT_HEADER`."""


class Trace:
    """The phases of one block, starting with waiting.

    Attributes
    ----------
    nbytes : int
        Bytes of the bodies that arrived.
    retries : int
        Number of retried requests.
    cached : int
        Rows found in the local cache.
    from_files, from_chunks : int
        Rows read here: from files of the server, and from compressed chunks.
    from_images : int
        Rows whose images were decoded here.
    file_bytes : int
        Bytes of the rows from files.
    items, places : int
        Items of rows that were padded or packed here, and places in their arrays.
    why : str
        Why rows were fetched as tensors; empty if they were not.
    unplaced : str
        Why rows did not come from the servers that own them; empty if they did, or if they have no owners.
    waits : callable or None
        Returns what the request of this block tells the server of the loop's waiting, see `h5feed.wire.WAIT_HEADER`.
        Called only if there is a request: a block that is read here reports nothing.
    """

    __slots__ = (
        *("_entered", "cached", "file_bytes", "from_files", "from_images", "from_chunks", "nbytes", "retries"),
        *("items", "places", "unplaced", "waits", "why"),
    )

    def __init__(self, waits: Waits | None = None) -> None:
        self._entered: list[tuple[float, int]] = []
        self.waits = waits
        self.nbytes = self.retries = self.cached = self.from_files = self.from_chunks = self.file_bytes = 0
        self.from_images = self.items = self.places = 0
        self.why = self.unplaced = ""

    def enter(self, phase: int) -> None:
        self._entered.append((clock(), phase))

    def split(self, begin: float, end: float) -> tuple[float, float, float]:
        """Seconds spent in each phase between two times of `clock`."""
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


def begin_trace(waits: Waits | None = None) -> Trace:
    """Start a new trace for this thread."""
    trace = Trace(waits)
    _CURRENT.set(trace)
    return trace


def enter(phase: int) -> None:
    """Report that this thread enters another phase."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.enter(phase)


def received(nbytes: int) -> None:
    """Report that a body has arrived; enters the decode phase."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.nbytes += nbytes
        trace.enter(DECODE)


def retried() -> None:
    """Report that a request failed and will be retried."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.retries += 1
        trace.enter(WAITING)


def waits_to_tell() -> str | None:
    """The value of `h5feed.wire.WAIT_HEADER` for the next request of this thread. It is told only once."""
    trace = _CURRENT.get()
    if trace is None:
        return None
    waits, trace.waits = trace.waits, None
    return None if waits is None else waits()


def found(rows: int) -> None:
    """Report rows found in the local cache."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.cached += rows


def read_here(rows: int, nbytes: int, *, from_files: bool) -> None:
    """Report rows read from files of the server, of `nbytes`, or decoded from chunks that have arrived."""
    trace = _CURRENT.get()
    if trace is not None and from_files:
        trace.from_files += rows
        trace.nbytes += nbytes
        trace.file_bytes += nbytes
    elif trace is not None:
        trace.from_chunks += rows


def decoded_images(rows: int) -> None:
    """Report rows whose images were decoded here: for these, there is no reason why they came as tensors."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.from_images += rows
        trace.why = ""


def laid(items: int, places: int) -> None:
    """Report rows that were padded or packed here: their items, and the places in their arrays."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.items += items
        trace.places += places


def as_tensors(why: str) -> None:
    """Report why rows are fetched as tensors, or are not compressed."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.why = why


def not_placed(why: str) -> None:
    """Report why rows do not come from the servers that own them."""
    trace = _CURRENT.get()
    if trace is not None:
        trace.unplaced = why
