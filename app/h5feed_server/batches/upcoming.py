"""Fetches the batches of an order that will be requested next, if its rows are in an object store.

A worker sees only the requests of its own connections, and several connections overtake each other. So an order counts
as read in sequence if requests move forward by not too much. If the workers share what they fetch, each goes on where
the batches that are known to be fetched end, whoever will be asked for them. If they do not, each fetches what it will
be asked for itself, which it knows if its requests move forward equally much each time.

In later epochs, everything may be on the local disk. To look up every batch there before it is read would cost as much
CPU time as to plan it twice, so then only a sample is looked up. What is missing from the others is fetched when they
are read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ..storage.objects.store import ObjectStore

_GAP = 32
"""Requests of other workers that may lie between two of this one, or that this one may come too late for."""

_MOST_UNITS = 64
"""Requests to fetch ahead of. Small ones take more time than bytes."""

_MOST_STEADY = 6

_TRUSTED = 16
"""If so many requests in a row needed nothing that is not on the disk, the next ones will probably need nothing."""

_SAMPLE = 8
"""Of so many requests that will probably need nothing, one is looked up."""


class Looked(NamedTuple):
    """What some batches need: their bytes, and what `FetchingAhead.fetch` returned for all of them."""

    nbytes: int
    has_room: bool
    was_needed: bool


Fetch = Callable[[int, int, bool], Looked]
"""``fetch(start, stop, urgent)`` begins to fetch batches start … stop-1."""


class Upcoming:
    """What is requested next of one order; shared by all requests of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._front = 0
        """No batch from here on was requested yet."""
        self._until = 0
        """No batch from here on is fetched yet."""
        self._last, self._step = 0, 0
        self._asked: deque[tuple[int, int]] = deque(maxlen=_GAP)
        """What was fetched when it was requested."""
        self._steady = 0
        """How many requests in a row have moved forward."""
        self._units: dict[int, tuple[int, int]] = {}
        """What is fetched and not requested yet, as far as this worker knows: end and bytes by the first batch."""
        self._present = 0
        """How many of those that were looked up last, in a row, needed nothing that is not on the disk."""
        self._unit_bytes = 0
        """Size of the request that was looked up last."""
        self._passed: list[tuple[int, int]] = []
        """Requests that were not looked up since, first batch and end: they will probably need nothing."""

    def requested(self, store: ObjectStore, fetch: Fetch, start: int, stop: int, batches: int) -> None:
        """Begin to fetch batches start … stop-1, which were requested, and those that probably will be.

        Parameters
        ----------
        store : ObjectStore
            Has the rows.
        fetch : callable
        batches : int
            Of the order.
        """
        ahead = store.ahead
        with self._lock:
            is_shared = ahead.is_shared
            is_fetched = stop <= self._until if is_shared else self._units.get(start, (0, 0))[0] >= stop
            # A request that had to wait for memory comes again.
            if not is_fetched and (start, stop) not in self._asked:
                self._asked.append((start, stop))
                self._look(fetch, start, stop, urgent=True)
            step = self._note(start, stop)
            stride = stop - start if is_shared else step
            if self._steady and stride and (is_shared or ahead.is_worthwhile):
                first = start + stride
                if is_shared:
                    first = max(self._until, self._front)
                elif (self._until - first) % stride == 0:
                    first = max(first, self._until)
                self._go_on(store, fetch, range(first, batches, stride), stop - start, batches)

    def _note(self, start: int, stop: int) -> int:
        """Note a request. Returns by how much the last two have moved forward if that was equally much, else 0."""
        unit = stop - start
        if self._front <= start <= self._front + _GAP * unit:
            self._steady = min(_MOST_STEADY, self._steady + (self._front > 0))
        elif not self._front - _GAP * unit <= start < self._front:
            self._front, self._until, self._steady = 0, 0, 0
            self._units.clear()
            self._present = 0
            self._passed.clear()
        self._front = max(self._front, stop)
        for begin in [begin for begin, (end, _) in self._units.items() if end <= start or begin == start]:
            del self._units[begin]
        step, self._last = start - self._last, start
        is_regular, self._step = step == self._step, step
        return step if is_regular and step >= unit else 0

    def _go_on(self, store: ObjectStore, fetch: Fetch, begins: range, unit: int, batches: int) -> None:
        window, most = store.window_bytes, min(_MOST_UNITS, 1 << self._steady)
        nbytes = sum(size for _, size in self._units.values())
        for begin in begins:
            each = nbytes // max(1, len(self._units))
            if self._units and (nbytes + each > window or len(self._units) >= most):
                break
            end = min(begin + unit, batches)
            if self._present >= _TRUSTED and len(self._passed) < _SAMPLE - 1:
                self._passed.append((begin, end))
            elif not self._look(fetch, begin, end):
                break
            self._until = begin + begins.step
            self._units[begin] = end, self._unit_bytes
            nbytes += self._unit_bytes

    def _look(self, fetch: Fetch, start: int, stop: int, *, urgent: bool = False) -> bool:
        """Begin to fetch batches start … stop-1; if they are not all on the disk, also those that were passed over.
        Returns whether there was room for the former.
        """
        self._unit_bytes, has_room, was_needed = fetch(start, stop, urgent)
        self._present = 0 if was_needed else self._present + 1
        passed, self._passed = self._passed, []
        if was_needed:
            for begin, end in passed:
                if begin >= self._front:
                    fetch(begin, end, False)
        return has_room
