"""Pass numbers that the worker processes of a torch DataLoader agree on."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from ..forks import tell_after_fork

_PASSES_KNOWN = 64
"""Recent passes whose numbers workers can look up. Workers of a dropped DataLoader may still be starting one."""

_LOCK_SECONDS = 30.0

Pass = tuple[int, int, int]
"""How workers identify a pass: the thread that started them, the number of their first worker among the children of
that thread, and the number of the pass among those of these workers."""


class Start(NamedTuple):
    """How a pass starts.

    Attributes
    ----------
    number : int
    first : int
        Its first batch.
    revision : str
        The rows that it has, if the loop follows a growing dataset, and how many these are.
    rows : int
    """

    number: int
    first: int = 0
    revision: str = ""
    rows: int = 0


_START_NUMBERS = 5
"""A `Start` as integers of 64 bits. A revision of 16 characters is two of them."""

_PASS_NUMBERS = 3

_HEAD = 2 * _START_NUMBERS + 1


def _numbers_of(start: Start) -> list[int]:
    revision = start.revision.encode().ljust(2 * 8, b"\0")
    if len(revision) > 2 * 8:
        raise ValueError(f"revision {start.revision!r} has more than 16 characters")
    return [start.number, start.first, *struct.unpack("<2q", revision), start.rows]


def _start_of(numbers: Sequence[int]) -> Start:
    number, first, *revision, rows = numbers
    return Start(number, first, struct.pack("<2q", *revision).rstrip(b"\0").decode(), rows)


@dataclass(frozen=True)
class _Birth:
    """What a new process inherits: it is child number `child` of a thread, and the next pass was `following`.

    A DataLoader starts its workers one after another on one thread. So ``child - worker`` is the same for all workers
    of one iterator and differs between iterators, whatever their seeds.
    """

    thread: int
    child: int
    following: Start


class PassNumbers:
    """Numbers the passes of a process and of its DataLoader workers, persistent or not.

    The first worker that starts a pass assigns the next number; the others look it up by their `Pass` key. A copy in a
    process that is not a worker counts on independently.
    """

    def __init__(self, epoch: int, first: int = 0) -> None:
        self._birth: _Birth | None = None
        self._begin_at(Start(epoch, first))
        self._watch_forks()

    def _begin_at(self, start: Start) -> None:
        # A lock of the spawn context can be passed to forked and to spawned workers.
        self._lock = get_context("spawn").Lock()
        # The starts of the next and of the latest pass, and whether workers started that; then the known passes:
        # (*Pass, *Start).
        size = _HEAD + (_PASS_NUMBERS + _START_NUMBERS) * _PASSES_KNOWN
        self._shared = torch.zeros(size, dtype=torch.int64).share_memory_()
        self._tell(start, start, False)

    def _tell(self, following: Start, latest: Start, is_of_workers: bool) -> None:
        numbers = [*_numbers_of(following), *_numbers_of(latest), int(is_of_workers)]
        self._shared[:_HEAD] = torch.tensor(numbers, dtype=torch.int64)

    def _told(self) -> tuple[Start, Start, bool]:
        """The next pass, the latest, and whether workers started that."""
        *numbers, of_workers = self._shared[:_HEAD].tolist()
        return _start_of(numbers[:_START_NUMBERS]), _start_of(numbers[_START_NUMBERS:]), bool(of_workers)

    def _watch_forks(self) -> None:
        self._calls = 0
        self._children = threading.local()
        _TO_FORK.add(self)
        tell_after_fork(self)

    @property
    def following(self) -> int:
        self._part()
        with self._locked():
            return self._told()[0].number

    @property
    def first(self) -> int:
        """The batch that the next pass starts with."""
        with self._locked():
            return self._told()[0].first

    @property
    def latest(self) -> Start:
        """The latest pass, or the next one if there was none."""
        with self._locked():
            return self._told()[1]

    @property
    def is_of_workers(self) -> bool:
        """Whether the latest pass was started by DataLoader workers."""
        with self._locked():
            return self._told()[2]

    @property
    def is_shared(self) -> bool:
        """Whether this process is a DataLoader worker, which delivers a part of each pass."""
        return self._birth is not None and get_worker_info() is not None

    def go_to(self, start: Start) -> None:
        """Let this be the next pass."""
        self._part()
        with self._locked():
            self._tell(start, start, False)

    def call(self) -> Pass | None:
        """The key of the pass that a new iterator will start; None if no other process takes part in it."""
        self._part()
        worker = get_worker_info()
        if self._birth is None or worker is None:
            return None
        self._calls += 1
        return self.called

    @property
    def called(self) -> Pass | None:
        """The key of the pass of the last iterator of this worker; None if there was none."""
        worker = get_worker_info()
        if self._birth is None or worker is None or not self._calls:
            return None
        return self._birth.thread, self._birth.child - worker.id, self._calls

    def begin(self, called: Pass | None, resumed: Start | None = None, now: tuple[str, int] = ("", 0)) -> Start:
        """Start a pass; returns how it starts, the same for all workers.

        Parameters
        ----------
        resumed : Start, optional
            If the pass is resumed from a state; the same in all workers.
        now : (str, int)
            The revision that the dataset has now, and its rows. The first worker decides, unless the loop was resumed
            in the middle of a pass, or has had more rows before.
        """
        with self._locked():
            following, latest, _ = self._told()
            start = resumed or following
            if called is not None and resumed is None:
                known = self._shared[_HEAD:].view(_PASSES_KNOWN, _PASS_NUMBERS + _START_NUMBERS)
                for numbers in known.tolist():
                    if tuple(numbers[:_PASS_NUMBERS]) == called:
                        return _start_of(numbers[_PASS_NUMBERS:])
            if not start.revision:
                revision, rows = now if now[1] >= latest.rows else latest[2:]
                start = start._replace(revision=revision, rows=rows)
            if called is not None and resumed is None:
                known[1:] = known[:-1].clone()
                known[0] = torch.tensor([*called, *_numbers_of(start)], dtype=torch.int64)
            self._tell(Start(start.number + 1), start, called is not None)
            return start

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
            self._begin_at(self._birth.following)
            self._birth = None

    def before_fork(self) -> _Birth:
        """On the thread that starts a process: what the process inherits."""
        self._part()
        last: _Birth | None = getattr(self._children, "last", None)
        thread, child = (next(_THREADS), 0) if last is None else (last.thread, last.child + 1)
        self._children.last = birth = _Birth(thread, child, self._told()[0])
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
