"""Statistics of the worker processes of a torch DataLoader, in memory that they share with the training loop."""

from __future__ import annotations

from dataclasses import fields
from multiprocessing import get_context
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch

from ..net.trace import clock
from .meter import Meter
from .wait_stats import BINS, LoopStats

_OTHERS = ("longest", "why", "unplaced", "waits", "last", "via", "replicas")
"""Attributes that are not sums of numbers."""

_SUMS = tuple(one.name for one in fields(LoopStats) if one.name not in _OTHERS)

_TIMES = ("seconds", "waiting", "transfer", "decode", "preparing", "steady_seconds", "steady_waited")

_TEXT_BYTES = 512
"""Maximum length of a reason."""

_PUBLISH_SECONDS = 0.5
"""Interval at which a worker adds what it has measured."""

_LOCK_SECONDS = 5.0


class WorkerStats:
    """What all DataLoader workers of a dataset have measured: steps, rows and bytes in total, times on average."""

    def __init__(self) -> None:
        # Locks of the spawn context can be passed to forked and to spawned workers.
        self._lock = get_context("spawn").Lock()
        # Sums, the longest wait, and the histogram of waits.
        self._numbers = torch.zeros(len(_SUMS) + 1 + BINS, dtype=torch.float64).share_memory_()
        self._reasons = torch.zeros(2, _TEXT_BYTES, dtype=torch.uint8).share_memory_()

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            # A copy that is not sent to a worker starts from zero.
            return WorkerStats, ()
        return _of_worker, (self._lock, self._numbers, self._reasons)

    def add(self, more: LoopStats) -> None:
        """Add what a worker has measured since it added before."""
        numbers = [*(getattr(more, name) for name in _SUMS), 0.0, *more.waits.tolist()]
        # A worker that was killed may have taken the lock with it: then statistics stay as they are.
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            return
        try:
            self._numbers += torch.tensor(numbers, dtype=torch.float64)
            self._numbers[len(_SUMS)] = max(more.longest, float(self._numbers[len(_SUMS)]))
            for place, reason in zip(self._reasons, (more.why, more.unplaced), strict=True):
                if reason:
                    content = reason.encode()[:_TEXT_BYTES]
                    place[:] = torch.tensor([*content.ljust(_TEXT_BYTES, b"\0")], dtype=torch.uint8)
        finally:
            self._lock.release()

    def read(self) -> LoopStats:
        """The statistics so far."""
        numbers = self._numbers.numpy().copy()
        sums: dict[str, Any] = {
            name: float(value) if name in _TIMES else round(value)
            for name, value in zip(_SUMS, numbers[: len(_SUMS)], strict=True)
        }
        why, unplaced = (bytes(reason.tolist()).rstrip(b"\0").decode(errors="ignore") for reason in self._reasons)
        waits = numbers[len(_SUMS) + 1 :].astype("i8")
        return LoopStats(**sums, longest=float(numbers[len(_SUMS)]), why=why, unplaced=unplaced, waits=waits)


class Reporting:
    """Adds what a `Meter` of a worker measures to the statistics of all workers, from time to time."""

    def __init__(self, stats: WorkerStats, meter: Meter, worker: int, workers: int) -> None:
        self._stats, self._meter, self._worker, self._workers = stats, meter, worker, workers
        self._told, self._told_at = LoopStats(), clock()

    def step(self) -> None:
        """Call after each step."""
        if clock() - self._told_at >= _PUBLISH_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Add what was measured since the last call."""
        now, before = self._meter.stats(), self._told
        more: dict[str, Any] = {name: getattr(now, name) - getattr(before, name) for name in _SUMS}
        more |= {name: more[name] / self._workers for name in _TIMES}
        # All workers take part in each pass.
        more["passes"] = 0 if self._worker else more["passes"]
        waits = now.waits - before.waits
        self._stats.add(LoopStats(**more, longest=now.longest, why=now.why, unplaced=now.unplaced, waits=waits))
        self._told, self._told_at = now, clock()


def _of_worker(lock: Any, numbers: torch.Tensor, reasons: torch.Tensor) -> WorkerStats:
    stats = object.__new__(WorkerStats)
    stats._lock, stats._numbers, stats._reasons = lock, numbers, reasons
    return stats
