"""Hedged requests: if a server stays silent for unusually long, another one is asked, too, and the first answer counts.

See J. Dean and L. A. Barroso, "The Tail at Scale", Communications of the ACM 56 (2013). All servers return the same
bytes for a request, so it does not matter whose answer is taken. The other attempt is cancelled.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .cancellation import Attempt, Cancellation

if TYPE_CHECKING:
    from .exchange import Answer
    from .servers import Server

LEAST_SECONDS, LONGEST_SECONDS = 0.5, 1.0
"""Bounds of the silence after which a second server is asked. Read-ahead hides shorter ones, such as those after a lost
packet, and a second answer would only take bandwidth from others."""

MAX_HEDGES = 16
"""Maximum number of second attempts in a short time. Each answered request allows for another `_SHARE` of one."""

_SHARE = 0.1

_QUANTILE, _RECENT, _LEAST_RECENT = 0.99, 256, 16
"""Silence is unusual if it is longer than this quantile of the waits of the recent requests. `LONGEST_SECONDS` is used
until there are enough of them."""

_IDLE_SECONDS = 5.0
"""The thread that watches requests ends if there were none for this long."""

Won = tuple["Answer", "Server"]


class NoOther(Exception):
    """There is no other server to ask at present."""


class Race:
    """A request that may be sent to two servers.

    Parameters
    ----------
    cancelled : Cancellation, optional
        That of the request.
    ask_another : callable
        Sends the request to another server, and returns the complete answer and who gave it; None if there is no
        answer that counts. Raises `NoOther`.

    Attributes
    ----------
    first : Attempt
    was_silent : float
        For how many seconds the first server had been silent when the second answered.
    """

    def __init__(self, cancelled: Cancellation | None, ask_another: Callable[[Attempt], Won | None]) -> None:
        self.first = Attempt(cancelled)
        self.was_silent = 0.0
        self.check_at = 0.0
        """`time.monotonic()` at which it may have been silent for too long."""
        self._ask_another = ask_another
        self._second: Attempt | None = None
        self._won: Won | None = None
        self._is_over = False
        self._lock = threading.Lock()

    def hedge(self) -> bool:
        """Ask another server. If its answer comes first, the first attempt is cancelled.

        Returns
        -------
        bool
            Whether there was one to ask.
        """
        with self._lock:
            if self._is_over:
                return False
            second = self._second = Attempt(self.first.request)
        try:
            won = self._ask_another(second)
        except NoOther:
            return False
        # Whatever happens to it, the first attempt goes on.
        except Exception:
            return True
        with self._lock:
            if won is None or self._is_over:
                return True
            self._is_over, self._won = True, won
            self.was_silent = self.first.silence()
        self.first.set()
        return True

    def end(self) -> Won | None:
        """The first attempt has ended: cancel the second, or return its answer if that came before."""
        with self._lock:
            self._is_over = True
            second, won, self._won = self._second, self._won, None
        if second is not None:
            second.set()
        return won


class Hedging:
    """Watches the requests of one client, and hedges those whose server is silent for too long."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=_RECENT)
        self._answered = 0
        self._delay = LONGEST_SECONDS
        self._left = float(MAX_HEDGES)
        self._under_way = 0
        self._races: set[Race] = set()
        self._lock = threading.Lock()
        self._is_watching = False
        self.count = 0
        """Number of second attempts so far."""

    @property
    def delay(self) -> float:
        """Seconds of silence after which a second server is asked."""
        return self._delay

    @contextlib.contextmanager
    def watch(self, race: Race) -> Iterator[None]:
        """Watch a request within this context."""
        race.check_at = time.monotonic() + self._delay
        with self._lock:
            self._races.add(race)
            if not self._is_watching:
                threading.Thread(target=self._watch, name="h5feed-hedging", daemon=True).start()
                self._is_watching = True
        try:
            yield
        finally:
            with self._lock:
                self._races.discard(race)

    def answered(self, attempt: Attempt) -> None:
        """Report an attempt that was answered."""
        wait = attempt.heard_at - attempt.began_at
        with self._lock:
            self._left = min(MAX_HEDGES, self._left + _SHARE)
            if 0 <= wait < float("inf"):
                self._waits.append(wait)
                self._answered += 1
                # Sorting them for each request would cost more than it helps.
                if self._answered % _LEAST_RECENT == 0:
                    usual = sorted(self._waits)[int(_QUANTILE * len(self._waits))]
                    self._delay = min(LONGEST_SECONDS, max(LEAST_SECONDS, usual))

    def after_fork(self) -> None:
        """In the child: neither the thread nor the requests exist."""
        self._lock = threading.Lock()
        self._races = set()
        self._is_watching, self._under_way = False, 0

    def _watch(self) -> None:
        """Body of the thread. No request wakes it up: one that begins while it sleeps is due after it wakes."""
        used_at = time.monotonic()
        while True:
            with self._lock:
                now, delay = time.monotonic(), self._delay
                used_at = now if self._races else used_at
                if now - used_at > _IDLE_SECONDS:
                    self._is_watching = False
                    return
                for race in [race for race in self._races if race.check_at <= now]:
                    silence = race.first.silence()
                    race.check_at = now + delay - silence
                    if silence >= delay:
                        self._hedge(race)
                until = min([now + delay, *(race.check_at for race in self._races)])
            time.sleep(max(1e-3, until - time.monotonic()))

    def _hedge(self, race: Race) -> None:
        """Call with the lock held."""
        # Look at it again: requests that are answered allow for more.
        if self._left < 1 or self._under_way >= MAX_HEDGES:
            race.check_at = time.monotonic() + self._delay
            return
        race.check_at = float("inf")

        def run() -> None:
            was_sent = race.hedge()
            with self._lock:
                self._under_way -= 1
                if was_sent:
                    self.count += 1
                else:
                    self._left += 1
                # If the first attempt still goes on, because the second has failed.
                race.check_at = time.monotonic() + self._delay

        try:
            threading.Thread(target=run, name="h5feed-hedge", daemon=True).start()
        except RuntimeError:
            # The system cannot start more threads.
            return
        self._left -= 1
        self._under_way += 1
