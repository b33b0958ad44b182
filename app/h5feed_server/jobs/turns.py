"""Whose work goes on: long work takes turns, so that what is short, or of other data, does not wait for its end."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

SLICE_SECONDS = 0.5
"""How long work goes on before it lets others have a turn, if any wait."""

_POLL_SECONDS = 0.25


class Turns:
    """Lets so much work go on at the same time; what has had the least time goes first, by dataset.

    Parameters
    ----------
    at_once : int
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._changed = threading.Condition()
        self._arrived = 0
        self._waiting: list[Turn] = []
        self._running: list[Turn] = []
        self._spent: dict[str, float] = {}
        """Seconds that each dataset's work has had, of those that have any; who comes last begins with the least."""

    def of(self, dataset: str, is_cancelled: Callable[[], bool]) -> Turn:
        """Work on a dataset, which waits until it is entered."""
        with self._changed:
            self._arrived += 1
            return Turn(self, dataset, self._arrived, is_cancelled)

    def take(self, turn: Turn) -> None:
        """Wait until it is this one's turn, or it is cancelled."""
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
        """Let others go on."""
        with self._changed:
            self._running.remove(turn)
            self._spent[turn.dataset] += time.monotonic() - turn.began
            self._changed.notify_all()

    def leave(self, turn: Turn) -> None:
        """It is over."""
        self.give(turn)
        with self._changed:
            if all(other.dataset != turn.dataset for other in (*self._waiting, *self._running)):
                del self._spent[turn.dataset]

    def is_over(self, turn: Turn) -> bool:
        """Whether it is time to give way."""
        return time.monotonic() - turn.began >= SLICE_SECONDS and any(
            other.dataset != turn.dataset for other in self._waiting
        )

    def _next(self) -> Turn:
        """Of a dataset's work, what came first."""
        running = Counter(turn.dataset for turn in self._running)
        return min(self._waiting, key=lambda turn: (running[turn.dataset], self._spent[turn.dataset], turn.arrived))


class Turn:
    """Work that goes on while it is entered, and gives way when it is asked to; made by `Turns.of`."""

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
        """Called by the work, often: let others go on, if any wait and this has had its time."""
        if self._turns.is_over(self):
            self._turns.give(self)
            self._turns.take(self)
