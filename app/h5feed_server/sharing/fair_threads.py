"""A thread pool that is shared fairly: one caller may use almost all threads, several take turns."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from .caller import CALLER

P = ParamSpec("P")
T = TypeVar("T")

SPARE = 2
"""Threads in addition to those that one caller may use. They serve other callers while its work takes long."""

_Item = tuple["Future[Any]", Callable[[], Any]]


class FairThreads(Executor):
    """An executor that takes work from its callers in turn, and each caller's work in order.

    Parameters
    ----------
    threads : int
        Maximum number of threads that run work of the same caller. The pool has `SPARE` more.
    name : str
        Prefix of the threads' names.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._most_of_one = threads
        self._name = name
        self._lock = threading.Lock()
        self._tickets: SimpleQueue[None] = SimpleQueue()
        self._unused_tickets = 0
        self._waiting: dict[str, deque[_Item]] = {}
        self._running: dict[str, int] = {}
        self._threads: list[threading.Thread] = []
        # Number of waiting threads, minus the tickets on their way to them.
        self._idle = 0
        self._closed = False

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submit work for `CALLER`; it runs in a copy of the current context."""
        future: Future[T] = Future()
        context = copy_context()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            item = (future, lambda: context.run(work, *args, **kwargs))
            self._waiting.setdefault(CALLER.get(), deque()).append(item)
            if self._idle <= 0 and len(self._threads) < self._most_of_one + SPARE:
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            else:
                self._idle -= 1
        self._tickets.put(None)
        return future

    @property
    def busy(self) -> int:
        """Number of threads that are working."""
        with self._lock:
            return sum(self._running.values())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `Executor.shutdown`."""
        with self._lock:
            self._closed = True
            given_up = [future for queue in self._waiting.values() for future, _ in queue] if cancel_futures else []
            if cancel_futures:
                self._waiting.clear()
            threads = list(self._threads)
        for future in given_up:
            future.cancel()
        for _ in threads:
            self._tickets.put(None)
        if wait:
            for thread in threads:
                thread.join()

    def _run(self) -> None:
        while True:
            # There is one ticket for each piece of work and, after shutdown, one for each thread.
            self._tickets.get()
            with self._lock:
                upcoming = self._next()
                if upcoming is None:
                    if self._closed and not self._waiting:
                        return
                    self._unused_tickets += 1
                    self._idle += 1
                    continue
            caller, (future, work) = upcoming
            _do(future, work)
            del upcoming, future, work
            with self._lock:
                self._running[caller] -= 1
                if not self._running[caller]:
                    del self._running[caller]
                self._idle += 1
                again = self._unused_tickets if self._closed else min(1, self._unused_tickets)
                self._unused_tickets -= again
                self._idle -= again
            for _ in range(again):
                self._tickets.put(None)

    def _next(self) -> tuple[str, _Item] | None:
        """The next piece of work; call with the lock held."""
        for caller, queue in self._waiting.items():
            running = self._running.get(caller, 0)
            if running >= self._most_of_one:
                continue
            self._running[caller] = running + 1
            # Move the caller to the end of the queue.
            del self._waiting[caller]
            item = queue.popleft()
            if queue:
                self._waiting[caller] = queue
            return caller, item
        return None


def _do(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
        # The traceback refers to this frame, and the frame to the future: break the cycle.
        del future
    else:
        future.set_result(result)
