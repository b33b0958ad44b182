"""A thread pool that is shared fairly: one caller may use almost all threads, several take turns."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

from .caller import CALLER

P = ParamSpec("P")
T = TypeVar("T")

SPARE = 2
"""Threads in addition to those that one caller may use. They serve other callers while its requests take long."""

MAX_LOST = 64
"""Maximum number of extra threads that replace threads that hang in abandoned work."""

IDLE_SECONDS = 30.0
"""A thread that was idle for this long ends."""

_Item = tuple["Future[Any]", Callable[[], Any]]


class FairThreads(Executor):
    """An executor that takes work from its callers in turn, and each caller's work in order.

    Parameters
    ----------
    threads : int
        Maximum number of threads that run work of the same caller. The pool has `SPARE` more.
    name : str
        Prefix of the threads' names.
    idle_seconds : float
        Threads start when they are needed, and end after this time without work.
    """

    def __init__(self, threads: int, name: str, idle_seconds: float = IDLE_SECONDS) -> None:
        self._most_of_one = threads
        self._idle_seconds = min(idle_seconds, threading.TIMEOUT_MAX)
        self._name = name
        self._lock = threading.Lock()
        self._tickets: SimpleQueue[None] = SimpleQueue()
        self._unused_tickets = 0
        self._waiting: dict[str, deque[_Item]] = {}
        self._running: dict[str, int] = {}
        self._threads: list[threading.Thread] = []
        self._lost: set[Future[Any]] = set()
        self._numbers = itertools.count()
        # Number of waiting threads, minus the tickets on their way to them.
        self._idle = 0
        self._closed = False

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submit work for `CALLER`; it runs in a copy of the current context.

        Raises
        ------
        MemoryError
            There is no thread, and the system starts none.
        """
        future: Future[T] = Future()
        context = copy_context()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            item = (future, lambda: context.run(work, *args, **kwargs))
            # One more ticket is on its way.
            self._idle -= 1
            if not self._start_thread() and len(self._threads) == len(self._lost):
                self._idle += 1
                raise MemoryError("no thread can be started")
            self._waiting.setdefault(CALLER.get(), deque()).append(item)
        self._tickets.put(None)
        return future

    def give_up(self, work: Future[Any]) -> None:
        """Abandon this work of `CALLER`. If it hangs, another thread may replace its thread."""
        with self._lock:
            if work.done() or work in self._lost or len(self._lost) >= MAX_LOST or not work.running():
                return
            self._lost.add(work)
            again = self._without(CALLER.get())
            self._start_thread()
        for _ in range(again):
            self._tickets.put(None)

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
            try:
                self._tickets.get(timeout=self._idle_seconds)
            except Empty:
                with self._lock:
                    if self._idle <= 0:
                        # A ticket is on its way.
                        continue
                    self._idle -= 1
                    self._threads.remove(threading.current_thread())
                    return
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
            with self._lock:
                if future in self._lost:
                    # Another thread has replaced this one.
                    self._lost.remove(future)
                    self._threads.remove(threading.current_thread())
                    return
                self._idle += 1
                again = self._without(caller)
            del upcoming, future, work
            for _ in range(again):
                self._tickets.put(None)

    def _start_thread(self) -> bool:
        """Start a thread if there are more tickets than threads that wait for one; call with the lock held. Returns
        False if the system starts none: those that there are do the work, later.
        """
        if self._idle < 0 and len(self._threads) - len(self._lost) < self._most_of_one + SPARE:
            thread = threading.Thread(target=self._run, name=f"{self._name}-{next(self._numbers)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._idle += 1
            self._threads.append(thread)
        return True

    def _without(self, caller: str) -> int:
        """A thread has finished work of a caller; call with the lock held. Returns the number of tickets to put."""
        self._running[caller] -= 1
        if not self._running[caller]:
            del self._running[caller]
        again = self._unused_tickets if self._closed else min(1, self._unused_tickets)
        self._unused_tickets -= again
        self._idle -= again
        return again

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
    except StopIteration as error:
        # As generators do. The futures of asyncio refuse it, and whoever waits for them would get no answer.
        future.set_exception(RuntimeError("it raised StopIteration").with_traceback(error.__traceback__))
        del future
    except BaseException as error:
        future.set_exception(error)
        # The traceback refers to this frame, and the frame to the future: break the cycle.
        del future
    else:
        future.set_result(result)
