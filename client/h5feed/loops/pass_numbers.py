"""Pass numbers that the worker processes of a torch DataLoader agree on."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch.utils.data import get_worker_info

from ..forks import tell_after_fork

_PASSES_KNOWN = 64
"""Recent passes whose numbers workers can look up. Workers of a dropped DataLoader may still be starting one."""

_LOCK_SECONDS = 30.0

Pass = tuple[int, int, int]
"""How workers identify a pass: the thread that started them, the number of their first worker among the children of
that thread, and the number of the pass among those of these workers."""


@dataclass(frozen=True)
class _Birth:
    """What a new process inherits: it is child number `child` of a thread, and the next pass was `following`, from
    batch `first` on.

    A DataLoader starts its workers one after another on one thread. So ``child - worker`` is the same for all workers
    of one iterator and differs between iterators, whatever their seeds.
    """

    thread: int
    child: int
    following: int
    first: int


class PassNumbers:
    """Numbers the passes of a process and of its DataLoader workers, persistent or not.

    The first worker that starts a pass assigns the next number; the others look it up by their `Pass` key. A copy in a
    process that is not a worker counts on independently.
    """

    def __init__(self, epoch: int, first: int = 0) -> None:
        self._birth: _Birth | None = None
        self._begin_at(epoch, first)
        self._watch_forks()

    def _begin_at(self, epoch: int, first: int) -> None:
        # A lock of the spawn context can be passed to forked and to spawned workers.
        self._lock = get_context("spawn").Lock()
        # The next pass and its first batch; the latest pass, its first batch, and whether workers started it; then
        # the known passes: (*Pass, number, first batch).
        self._shared = torch.zeros(5 + 5 * _PASSES_KNOWN, dtype=torch.int64).share_memory_()
        self._shared[:5] = torch.tensor([epoch, first, epoch, first, 0])

    def _watch_forks(self) -> None:
        self._calls = 0
        self._children = threading.local()
        _TO_FORK.add(self)
        tell_after_fork(self)

    @property
    def following(self) -> int:
        self._part()
        with self._locked():
            return int(self._shared[0])

    @property
    def first(self) -> int:
        """The batch that the next pass starts with."""
        with self._locked():
            return int(self._shared[1])

    @property
    def latest(self) -> tuple[int, int]:
        """Number and first batch of the latest pass, or of the next one if there was none."""
        with self._locked():
            epoch, first = self._shared[2:4].tolist()
            return int(epoch), int(first)

    @property
    def is_of_workers(self) -> bool:
        """Whether the latest pass was started by DataLoader workers."""
        with self._locked():
            return bool(self._shared[4])

    @property
    def is_shared(self) -> bool:
        """Whether this process is a DataLoader worker, which delivers a part of each pass."""
        return self._birth is not None and get_worker_info() is not None

    def go_to(self, epoch: int, first: int = 0) -> None:
        """Let the next pass be `epoch`, from batch `first` on."""
        self._part()
        with self._locked():
            self._shared[:5] = torch.tensor([epoch, first, epoch, first, 0])

    def call(self) -> Pass | None:
        """The key of the pass that a new iterator will start; None if no other process takes part in it."""
        self._part()
        worker = get_worker_info()
        if self._birth is None or worker is None:
            return None
        self._calls += 1
        return self._birth.thread, self._birth.child - worker.id, self._calls

    def begin(self, called: Pass | None, resumed: tuple[int, int] | None = None) -> tuple[int, int]:
        """Start a pass; returns its number and its first batch, the same for all workers.

        `resumed` gives both if the pass is resumed from a state; then it is the same in all workers.
        """
        with self._locked():
            number, first = resumed or self._shared[:2].tolist()
            if called is not None and resumed is None:
                known = self._shared[5:].view(_PASSES_KNOWN, 5)
                for *other, known_number, known_first in known.tolist():
                    if tuple(other) == called:
                        return int(known_number), int(known_first)
                known[1:] = known[:-1].clone()
                known[0] = torch.tensor([*called, number, first])
            self._shared[:5] = torch.tensor([number + 1, 0, number, first, called is not None])
            return int(number), int(first)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise RuntimeError("a DataLoader worker died while starting a pass: create the dataset again")
        try:
            yield
        finally:
            self._lock.release()

    def _part(self) -> None:
        """In a process that is not a DataLoader worker: detach from the original."""
        if self._birth is not None and get_worker_info() is None:
            self._begin_at(self._birth.following, self._birth.first)
            self._birth = None

    def before_fork(self) -> _Birth:
        """On the thread that starts a process: what the process inherits."""
        self._part()
        last: _Birth | None = getattr(self._children, "last", None)
        thread, child = (next(_THREADS), 0) if last is None else (last.thread, last.child + 1)
        self._children.last = birth = _Birth(thread, child, *map(int, self._shared[:2].tolist()))
        return birth

    def after_fork(self) -> None:
        """In the child, whose only thread is the one that forked."""
        self._birth, self._calls = getattr(self._children, "last", None), 0

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            # A copy that is not sent to a worker counts on independently.
            return PassNumbers, (self.following, self.first)
        birth = self.before_fork()
        return _of_child, (self._lock, self._shared, birth)


def _of_child(lock: Any, shared: torch.Tensor, birth: _Birth) -> PassNumbers:
    numbers = object.__new__(PassNumbers)
    numbers._lock, numbers._shared, numbers._birth = lock, shared, birth
    numbers._watch_forks()
    return numbers


_THREADS = itertools.count()
"""Numbers of the threads that start processes. The system reuses its own thread ids."""

_TO_FORK: weakref.WeakSet[PassNumbers] = weakref.WeakSet()


def _before_fork() -> None:
    for numbers in list(_TO_FORK):
        numbers.before_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)
