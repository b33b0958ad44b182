"""Datasets whose disk hangs: requests that would wait for it, too, are refused.

A disk or file server that hangs reports no error, and a thread that waits for it cannot be ended. Its request gets 504
at the deadline, but if clients repeat it, more and more threads wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from h5feed.errors import SourceUnavailable

MOST_OF_ONE = 4
"""Overdue requests for a dataset, per worker, from which on further ones are refused."""

_RETRY_SECONDS = 2.0


@dataclass
class Attempt:
    """What a thread does for a request: it tells the dataset to those who wait for the thread."""

    dataset: str = ""


ATTEMPT: ContextVar[Attempt | None] = ContextVar("attempt", default=None)


class Hanging:
    """The work that goes on although its request was given up, by dataset."""

    def __init__(self) -> None:
        self._since: dict[str, dict[Future[Any], float]] = {}
        self._lock = threading.Lock()

    def check(self, name: str) -> None:
        """Note that the current work is about a dataset.

        Raises
        ------
        SourceUnavailable
            Too many threads hang at it already.
        """
        attempt = ATTEMPT.get()
        if attempt is not None:
            attempt.dataset = name
        if self._since and len(self._since.get(name, ())) >= MOST_OF_ONE:
            raise SourceUnavailable(
                f"dataset {name!r} is unavailable at the moment: {self._how_many(name)}", retry_after=_RETRY_SECONDS
            )

    def add(self, name: str, work: Future[Any], since: float) -> None:
        """The request for this work, which has begun then by the monotonic clock, was given up."""
        if not name:
            return
        with self._lock:
            self._since.setdefault(name, {})[work] = since
        # Called at once if it has just ended.
        work.add_done_callback(lambda ended: self._remove(name, ended))

    def trouble(self, counts: Callable[[str], bool]) -> str | None:
        """What hangs, in words; None if nothing does. Only datasets of which `counts` of the name is true."""
        with self._lock:
            name = next(filter(counts, self._since), None)
        return None if name is None else f"dataset {name!r}: {self._how_many(name)}"

    def _how_many(self, name: str) -> str:
        with self._lock:
            begun = list(self._since.get(name, {}).values())
        longest = time.monotonic() - min(begun, default=time.monotonic())
        return f"requests have been waiting for its disk for {longest:.0f} s"

    def _remove(self, name: str, work: Future[Any]) -> None:
        with self._lock:
            rest = self._since.get(name, {})
            rest.pop(work, None)
            if not rest:
                self._since.pop(name, None)
