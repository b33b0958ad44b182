"""Looks something up periodically in a thread, because a source that does not respond must not stop training."""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

LOOK_UP_SECONDS = 10.0
"""Time after which what is in use is looked up again."""

SOON_SECONDS = 1.0
"""The same after a connection has failed, or after a look-up that has failed."""

MAX_KNOWN = 32
"""Maximum number of items of one source that are used. Of more, each client takes others."""

_any = random.Random()
"""Not the global generator: a look-up must not change the random numbers of a seeded training run."""


class Refreshing(ABC):
    """Items from one source, safe to use from any thread.

    Attributes
    ----------
    known : tuple of str
        Those of the last look-up that succeeded; empty before it.
    """

    def __init__(self) -> None:
        self.known: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._done: threading.Event | None = None
        self._looked_up_at = -1e9

    @abstractmethod
    def _find(self, is_urgent: bool) -> Iterable[str]:
        """All items; nothing if there are none, or if the look-up fails: what is known stays."""

    def refresh(self, *, is_urgent: bool, wait: float, found: Callable[[tuple[str, ...]], None]) -> None:
        """Look up in a thread, unless that was done a short time ago or goes on.

        Parameters
        ----------
        is_urgent : bool
            No connection to the known items works.
        wait : float
            Seconds to wait until a look-up that goes on is done.
        found : callable
            Called in the thread with the items, if they have changed.
        """
        with self._lock:
            age = time.monotonic() - self._looked_up_at
            if self._done is None and age > (SOON_SECONDS if is_urgent or not self.known else LOOK_UP_SECONDS):
                self._looked_up_at = time.monotonic()
                self._done = threading.Event()
                arguments = is_urgent, found, self._done
                threading.Thread(target=self._run, args=arguments, name="h5feed-look-up", daemon=True).start()
            done = self._done
        if done is not None and wait > 0:
            done.wait(wait)

    def after_fork(self) -> None:
        """In the child: a thread that looks up exists in the parent only."""
        self._lock = threading.Lock()
        self._done = None

    def _run(self, is_urgent: bool, found: Callable[[tuple[str, ...]], None], done: threading.Event) -> None:
        try:
            known = self._bounded(list(dict.fromkeys(self._find(is_urgent))))
            if known and known != self.known:
                self.known = known
                found(known)
        finally:
            with self._lock:
                self._looked_up_at, self._done = time.monotonic(), None
            done.set()

    def _bounded(self, items: list[str]) -> tuple[str, ...]:
        kept = [item for item in items if item in self.known][:MAX_KNOWN]
        others = [item for item in items if item not in self.known]
        _any.shuffle(others)
        return tuple(sorted([*kept, *others[: MAX_KNOWN - len(kept)]]))
