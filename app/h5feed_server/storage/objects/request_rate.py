"""How many requests per second may be sent to all stores of a process together."""

from __future__ import annotations

import threading

_BURST_SECONDS = 1.0
"""So many seconds' worth of requests may be sent at once."""


class RequestRate:
    """Turns of requests; shared by the threads of all stores.

    Parameters
    ----------
    per_second : float
        Requests per second at most; 0: any number.
    """

    def __init__(self, per_second: float) -> None:
        self._interval = 1 / per_second if per_second else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, now: float, until: float) -> float | None:
        """Take a turn. Returns the seconds until it comes; None if that is not before `until`. Time in which none was
        taken allows a burst.

        Parameters
        ----------
        now, until : float
            In seconds of the monotonic clock.
        """
        if not self._interval:
            return 0.0
        with self._lock:
            turn = max(self._next, now - _BURST_SECONDS)
            if turn >= until:
                return None
            self._next = turn + self._interval
        return max(0.0, turn - now)
