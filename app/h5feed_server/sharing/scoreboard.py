"""Shared memory in which every worker publishes its numbers, so that each of them can report the totals.

The supervisor allocates the memory before it starts workers, and assigns a place to each. A worker that replaces
another one gets a free place and continues with the counts there, so counters never go backwards, and the number of
places is fixed. Files would work, too, but every killed worker would leave one behind.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterator, Sequence

MAX_NUMBERS = 8190
"""Capacity of a place. Memory that is never written to costs nothing."""

SUPERVISOR = 0
"""The place of the supervisor."""

_PID, _WRITES, _FIRST = range(3)
_CELLS = _FIRST + MAX_NUMBERS
_ATTEMPTS = 1000
"""Attempts to read a place that is being written to. If its worker was killed while writing, the numbers are used as
they are: each of them is either the old or the new one."""


class Scoreboard:
    """The numbers of all processes of one server.

    Parameters
    ----------
    workers : int
        Maximum number of workers. There are more places, because a reload starts new workers before the old ones have
        ended.
    """

    def __init__(self, workers: int) -> None:
        self.places = 1 + 3 * workers
        self._cells = memoryview(mmap.mmap(-1, self.places * _CELLS * 8)).cast("d")

    def take(self) -> int | None:
        """A free place for a new worker, to be passed to `occupy`; None if all are in use."""
        return next((place for place in range(1, self.places) if not self._cells[place * _CELLS + _PID]), None)

    def occupy(self, place: int, pid: int) -> None:
        """Assign this place to a process."""
        self._cells[place * _CELLS + _PID] = pid

    def leave(self, pid: int) -> None:
        """Release the place of a process that has ended. Its counts remain."""
        for place in range(self.places):
            if self._cells[place * _CELLS + _PID] == pid:
                self._cells[place * _CELLS + _PID] = 0

    def write(self, place: int, numbers: Sequence[float]) -> None:
        """Publish the numbers of a place. Only its process may call this."""
        cells, begin = self._cells, place * _CELLS
        # The number of writes is odd while the place is being written to.
        cells[begin + _WRITES] += 1
        cells[begin + _FIRST : begin + _FIRST + len(numbers)] = memoryview(array("d", numbers))
        cells[begin + _WRITES] += 1

    def begin(self, place: int, count: int) -> list[float]:
        """The numbers that the previous process in this place has left."""
        cells, begin = self._cells, place * _CELLS
        if cells[begin + _WRITES] % 2:
            # The previous process was killed while writing.
            cells[begin + _WRITES] += 1
        return self._numbers(place, count)

    def read(self, count: int) -> Iterator[tuple[int, int, list[float]]]:
        """Place, process id (0 if its process has ended) and numbers of each place that was ever used."""
        for place in range(self.places):
            pid = int(self._cells[place * _CELLS + _PID])
            if pid or self._cells[place * _CELLS + _WRITES]:
                yield place, pid, self._numbers(place, count)

    def _numbers(self, place: int, count: int) -> list[float]:
        cells, begin = self._cells, place * _CELLS
        for _ in range(_ATTEMPTS):
            writes = cells[begin + _WRITES]
            numbers: list[float] = cells[begin + _FIRST : begin + _FIRST + count].tolist()  # type: ignore[assignment]
            if not writes % 2 and cells[begin + _WRITES] == writes:
                break
            os.sched_yield()
        return numbers
