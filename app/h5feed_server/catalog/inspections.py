"""Threads that inspect files: those that were requested first, then the rest in the order in which they were found."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from h5feed.errors import Preparing

T = TypeVar("T")

_YIELD_SECONDS = 0.5
"""How long jobs that were not requested wait for one that was. It usually takes a tenth of this."""


class NotYet(Exception):
    """The result is not known yet, but will be soon. Callers that can wait without blocking a thread should retry.

    Attributes
    ----------
    problem : Preparing
        The error to raise if waiting takes too long.
    asked : float
        When the request was made, in seconds of the monotonic clock: see `Catalog.asked_at`.
    seconds : float
        Minimum time to wait before a retry.
    """

    def __init__(self, problem: Preparing, asked: float, seconds: float) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.asked = asked
        self.seconds = seconds


class Inspections(Generic[T]):
    """Threads that inspect files.

    Parameters
    ----------
    threads : int
        Threads for all jobs. One more thread only runs requested jobs, so that these never wait for all the others.
    """

    def __init__(self, threads: int) -> None:
        self._changed = threading.Condition()
        self._found: dict[Future[T], Callable[[], T]] = {}
        self._asked: dict[Future[T], Callable[[], T]] = {}
        self._running: dict[Future[T], float] = {}
        self._urgent: dict[Future[T], float] = {}
        """Running jobs that were requested when they began, and when that was."""
        self._threads = [
            threading.Thread(target=self._run, args=(number > 0,), name=f"h5feed-inspect-{number}", daemon=True)
            for number in range(threads + 1)
        ]
        self._started = self._closed = False
        self.succeeded = self.failed = 0
        """Jobs that have ended."""

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queue a job after all others."""
        outcome: Future[T] = Future()
        with self._changed:
            if self._closed:
                outcome.cancel()
                return outcome
            self._found[outcome] = work
            if not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()
        return outcome

    def prefer(self, outcome: Future[T]) -> None:
        """Move a job before all those that were not requested."""
        if outcome.done() or outcome in self._asked:
            return
        with self._changed:
            if outcome in self._found:
                self._asked[outcome] = self._found.pop(outcome)
                self._changed.notify_all()

    def __contains__(self, outcome: object) -> bool:
        """Whether a job waits or runs."""
        return outcome in self._running or outcome in self._asked or outcome in self._found

    def describe(self, outcome: Future[T]) -> str:
        """The progress of a job, as text."""
        with self._changed:
            began = self._running.get(outcome)
            before = next((place for place, one in enumerate(self._asked) if one is outcome), len(self._asked))
            left = len(self._found) + len(self._asked) + len(self._running)
        where = f"{before} others before it" if began is None else f"for {time.monotonic() - began:.0f} s"
        return f"{where}; {left} left in all"

    @property
    def left(self) -> int:
        """Number of jobs that are waiting or running."""
        return len(self._found) + len(self._asked) + len(self._running)

    def close(self, *, wait: bool, error: Exception | None = None) -> None:
        """Cancel the waiting jobs; with `error`, they fail with it. If `wait`, also wait for the running ones."""
        with self._changed:
            self._closed = True
            for outcome in (*self._found, *self._asked):
                if error is None:
                    outcome.cancel()
                else:
                    outcome.set_exception(error)
            self._found.clear()
            self._asked.clear()
            self._changed.notify_all()
        for thread in self._threads if wait and self._started else ():
            thread.join()

    def _found_now(self) -> dict[Future[T], Callable[[], T]]:
        """Jobs that were not requested; none while a requested one has just begun: it shall have the processors."""
        now = time.monotonic()
        if self._found and any(now - began < _YIELD_SECONDS for began in self._urgent.values()):
            return {}
        return self._found

    def _run(self, any_work: bool) -> None:
        while True:
            with self._changed:
                while not (waiting := self._asked or (any_work and self._found_now())) and not self._closed:
                    self._changed.wait(_YIELD_SECONDS if any_work and self._found else None)
                if not waiting:
                    return
                outcome = next(iter(waiting))
                is_urgent = outcome in self._asked
                work = waiting.pop(outcome)
                self._running[outcome] = time.monotonic()
                if is_urgent:
                    self._urgent[outcome] = self._running[outcome]
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)
            finally:
                with self._changed:
                    self.failed += outcome.exception() is not None
                    self.succeeded += outcome.exception() is None
                    del self._running[outcome]
                    if self._urgent.pop(outcome, None) is not None:
                        self._changed.notify_all()


class Lanes(Generic[T]):
    """Inspections of files from several sources: those of one that does not answer delay none of another.

    Parameters
    ----------
    threads : int
        For each source, see `Inspections`.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._lanes: dict[str, Inspections[T]] = {}
        self._ended = [0, 0]
        """Jobs of sources that are closed: those that have succeeded, and the others."""
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, source: str, work: Callable[[], T]) -> Future[T]:
        """Queue a job after all others of its source."""
        with self._lock:
            if source not in self._lanes:
                self._lanes[source] = Inspections(self._threads)
                if self._closed:
                    self._lanes[source].close(wait=False)
            return self._lanes[source].submit(work)

    def prefer(self, outcome: Future[T]) -> None:
        """See `Inspections.prefer`."""
        for lane in self._all():
            lane.prefer(outcome)

    def describe(self, outcome: Future[T]) -> str:
        """See `Inspections.describe`."""
        return next((lane.describe(outcome) for lane in self._all() if outcome in lane), "it has just ended")

    @property
    def left(self) -> int:
        """Number of jobs that are waiting or running."""
        return sum(lane.left for lane in self._all())

    @property
    def succeeded(self) -> int:
        """Jobs that have succeeded."""
        return self._ended[0] + sum(lane.succeeded for lane in self._all())

    @property
    def failed(self) -> int:
        """Jobs that have failed."""
        return self._ended[1] + sum(lane.failed for lane in self._all())

    def end(self, source: str, error: Exception) -> None:
        """Let the waiting jobs of a source fail with this error, and end its threads."""
        with self._lock:
            if (lane := self._lanes.pop(source, None)) is not None:
                lane.close(wait=False, error=error)
                self._ended = [self._ended[0] + lane.succeeded, self._ended[1] + lane.failed]

    def close(self, *, wait: bool) -> None:
        """See `Inspections.close`."""
        with self._lock:
            self._closed = True
        for lane in self._all():
            lane.close(wait=wait)

    def _all(self) -> list[Inspections[T]]:
        return list(self._lanes.values())
