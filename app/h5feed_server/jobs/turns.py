"""Time slices for long-running work, so that short work and work on other datasets need not wait for it to end."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

SLICE_SECONDS = 0.5
"""How long work runs before it lets work on other datasets have a turn, if any is waiting."""

_POLL_SECONDS = 0.25


class Turns:
    """Limits how much work runs at the same time; the dataset that has had the least time goes first.

    Parameters
    ----------
    at_once : int
        Maximum number of turns that run at the same time.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._changed = threading.Condition()
        self._arrived = 0
        self._waiting: list[Turn] = []
        self._running: list[Turn] = []
        self._spent: dict[str, float] = {}
        """Seconds that the work of each dataset has run, for datasets with unfinished work. A new dataset starts with
        the least of the others."""

    def of(self, dataset: str, is_cancelled: Callable[[], bool]) -> Turn:
        """A turn for work on a dataset. Enter it with a ``with`` statement, which waits until the work may run."""
        with self._changed:
            self._arrived += 1
            return Turn(self, dataset, self._arrived, is_cancelled)

    def take(self, turn: Turn) -> None:
        """Wait for a turn, or for cancellation."""
        with self._changed:
            self._spent.setdefault(turn.dataset, min(self._spent.values(), default=0.0))
            self._waiting.append(turn)
            while not turn.is_cancelled() and not (len(self._running) < self._at_once and self._next() is turn):
                self._changed.wait(_POLL_SECONDS)
            self._waiting.remove(turn)
            self._running.append(turn)
            turn.began = time.monotonic()
            self._changed.notify_all()

    def give(self, turn: Turn) -> None:
        """End the time slice of a turn, so that others can run."""
        with self._changed:
            self._running.remove(turn)
            self._spent[turn.dataset] += time.monotonic() - turn.began
            self._changed.notify_all()

    def leave(self, turn: Turn) -> None:
        """End a turn whose work is finished."""
        self.give(turn)
        with self._changed:
            if all(other.dataset != turn.dataset for other in (*self._waiting, *self._running)):
                del self._spent[turn.dataset]

    def is_over(self, turn: Turn) -> bool:
        """Whether the time slice is used up and work on other datasets is waiting."""
        return time.monotonic() - turn.began >= SLICE_SECONDS and any(
            other.dataset != turn.dataset for other in self._waiting
        )

    def _next(self) -> Turn:
        """The waiting turn to run next.

        Datasets with the fewest running turns come first, then those whose work has run least. Within a dataset, it is
        first come, first served.
        """
        running = Counter(turn.dataset for turn in self._running)
        return min(self._waiting, key=lambda turn: (running[turn.dataset], self._spent[turn.dataset], turn.arrived))


class Turn:
    """Work in time slices; made by `Turns.of`."""

    def __init__(self, turns: Turns, dataset: str, arrived: int, is_cancelled: Callable[[], bool]) -> None:
        self.dataset = dataset
        self.arrived = arrived
        self.is_cancelled = is_cancelled
        self.began = 0.0
        self._turns = turns

    def __enter__(self) -> Turn:
        self._turns.take(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._turns.leave(self)

    def give_way(self) -> None:
        """Yield if others are waiting and the time slice is used up; call it often."""
        if self._turns.is_over(self):
            self._turns.give(self)
            self._turns.take(self)
