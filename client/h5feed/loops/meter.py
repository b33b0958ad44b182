"""Measure a loop over batches: how long it waits, for what, and how long it computes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..forks import tell_after_fork
from ..net.trace import Trace, clock
from .wait_stats import BINS, LoopStats, bins_of

_STEPS_TOGETHER = 256
"""Steps that are recorded before they are added up: adding each one would cost more than a small batch."""

_TELL_SECONDS = 1.0
"""Seconds between two reports to the server."""

_Step = tuple[float, float, float, int, Trace | None]
"""Times at which a batch was requested, had arrived and was handed out; its rows; the trace of its block."""


@dataclass(slots=True)
class _Pass:
    """One pass: sums, whose size does not depend on its length."""

    first_steps: int
    """Batches requested before the second step starts."""
    began: float | None = None
    until: float = 0.0
    """When the last batch was handed out, or when the pass ended."""
    has_ended: bool = False
    is_early: bool = False
    """Whether batches of it were handed out before `begin_pass`."""
    demands: int = 0
    steady_from: float = 0.0
    steady_after: float | None = None
    """When the first step ended, and the time waited until then."""
    steps: int = 0
    rows: int = 0
    nbytes: int = 0
    waiting: float = 0.0
    transfer: float = 0.0
    decode: float = 0.0
    preparing: float = 0.0
    longest: float = 0.0
    retries: int = 0
    cached: int = 0
    from_files: int = 0
    from_chunks: int = 0
    from_images: int = 0
    file_bytes: int = 0
    filled: int = 0
    places: int = 0
    why: str = ""
    unplaced: str = ""
    waits: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    @property
    def waited(self) -> float:
        return self.waiting + self.transfer + self.decode

    def steady(self, now: float, waited: float = 0.0) -> None:
        """The first step ends `now`. `waited` is time that has not been added yet."""
        if self.steady_after is None:
            self.steady_from, self.steady_after = now, self.waited + waited

    def add(self, steps: Sequence[_Step], began: float) -> None:
        """Add batches, the first of which was requested at `began`."""
        asked, came, ready, rows, traces = zip(*steps, strict=True)
        if self.began is None:
            self.began = began
        # waits, prepared: (steps,) float64 seconds
        waits, prepared = np.subtract(ready, asked), np.subtract(ready, came)
        second = self.first_steps - self.steps
        if not self.demands and 0 <= second < len(steps):
            self.steady(asked[second], float(waits[:second].sum()))
        waiting = transfer = 0.0
        for trace, begin, end in zip(traces, asked, came, strict=True):
            if trace is not None:
                parts = trace.split(begin, end)
                waiting += parts[0]
                transfer += parts[1]
                self.nbytes += trace.nbytes
                self.retries += trace.retries
                self.cached += trace.cached
                self.from_files += trace.from_files
                self.from_chunks += trace.from_chunks
                self.from_images += trace.from_images
                self.file_bytes += trace.file_bytes
                self.filled += trace.items
                self.places += trace.places
                self.why = trace.why or self.why
                self.unplaced = trace.unplaced or self.unplaced
        self.waiting += waiting
        self.transfer += transfer
        self.decode += max(0.0, float(waits.sum()) - waiting - transfer)
        self.preparing += float(prepared.sum())
        self.steps += len(steps)
        self.rows += sum(rows)
        self.longest = max(self.longest, float(waits.max()))
        self.waits += np.bincount(bins_of(waits), minlength=BINS)
        self.until = ready[-1]

    def stats(self) -> LoopStats:
        is_steady = self.steady_after is not None
        return LoopStats(
            passes=1,
            steps=self.steps,
            rows=self.rows,
            bytes=self.nbytes,
            seconds=0.0 if self.began is None else self.until - self.began,
            waiting=self.waiting,
            transfer=self.transfer,
            decode=self.decode,
            preparing=self.preparing,
            longest=self.longest,
            retries=self.retries,
            cached=self.cached,
            from_files=self.from_files,
            from_chunks=self.from_chunks,
            from_images=self.from_images,
            file_bytes=self.file_bytes,
            filled=self.filled,
            places=self.places,
            why=self.why,
            unplaced=self.unplaced,
            steady_seconds=self.until - self.steady_from if is_steady else 0.0,
            steady_waited=self.waited - (self.steady_after or 0.0) if is_steady else 0.0,
            waits=self.waits.copy(),
        )


class Meter:
    """Measures one loop, pass after pass.

    By default, waiting is the time from requesting a batch until it is handed out. TensorFlow takes batches ahead of
    the loop; there, `demand` marks when the loop needs them, and only the time after that counts as waiting.

    Thread-safe. A pickled copy starts from zero.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: list[_Step] = []
        self._before = LoopStats()
        self._pass = _Pass(1)
        self._ended: LoopStats | None = None
        self._handed = 0
        """Batches handed out since the current run started."""
        self._demanded: int | None = None
        self._demanded_at = 0.0
        self._told = 0.0, 0.0
        self._told_at = clock()
        tell_after_fork(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Meter, ()

    def after_fork(self) -> None:
        """In the child: a lock held by a thread of the parent would never be released."""
        self._lock = threading.Lock()

    def begin_pass(self, first_steps: int = 1, *, goes_on: bool = False) -> None:
        """Start a pass.

        Parameters
        ----------
        first_steps : int
            Batches requested before the second step starts.
        goes_on : bool
            The pass continues the current run, so some of its batches may already have been handed out.
        """
        with self._lock:
            self._count()
            if goes_on and self._pass.is_early:
                self._pass.is_early = False
            else:
                self._begin(first_steps)

    def end_pass(self) -> None:
        """End a pass: its last step is done."""
        now = clock()
        with self._lock:
            self._count()
            if self._pass.steps and not self._pass.has_ended:
                self._pass.until, self._pass.has_ended = now, True
                self._ended = self._pass.stats()

    def step(self, asked: float, came: float, trace: Trace | None, rows: int) -> None:
        """Record that a batch of `rows` rows is handed out now.

        Parameters
        ----------
        asked, came : float
            When it was requested, and when it had arrived; times of `h5feed.net.trace.clock`.
        trace : Trace or None
            The trace of its block, for the first batch of a block.
        """
        # Without the lock, which would double the cost. Steps appended during a count are left for the next one.
        self._steps.append((asked, came, clock(), rows, trace))
        if len(self._steps) >= _STEPS_TOGETHER or self._demanded is not None:
            with self._lock:
                self._count()

    def run_ahead(self, demanding: bool) -> None:
        """Set whether batches are taken ahead, so that `demand` marks when the loop needs them."""
        with self._lock:
            self._count()
            self._demanded = 0 if demanding else None
            self._handed = 0

    def begin_run(self) -> None:
        """Start handing out batches of a new run. Unused batches of the previous run are dropped."""
        with self._lock:
            self._count()
            self._handed = 0

    def begin_demands(self) -> None:
        """The loop starts to use the batches of a new run."""
        with self._lock:
            if self._demanded is not None:
                self._demanded = 0

    def demand(self, batches: int) -> None:
        """The loop needs `batches` more batches now. Ignored unless batches are taken ahead."""
        with self._lock:
            if self._demanded is None:
                return
            self._demanded_at = clock()
            self._demanded += batches
            if self._pass.demands:
                self._pass.steady(self._demanded_at)
            self._pass.demands += 1

    def stats(self) -> LoopStats:
        """The measurements so far."""
        with self._lock:
            return self._all()

    def waits(self) -> str | None:
        """Seconds waited since the last report: see `h5feed.wire.WAIT_HEADER`. None if that was a moment ago.

        The first step of each pass is excluded.
        """
        if clock() - self._told_at < _TELL_SECONDS:
            return None
        with self._lock:
            stats = self._all()
            now = stats.steady_waited, stats.steady_seconds
            before, self._told, self._told_at = self._told, now, clock()
        waited, seconds = now[0] - before[0], now[1] - before[1]
        return f"waited={min(max(0.0, waited), seconds):.3f}, of={seconds:.3f}" if seconds > 0 else None

    @property
    def ended(self) -> LoopStats | None:
        """The measurements of the last completed pass."""
        with self._lock:
            return self._ended

    def _all(self) -> LoopStats:
        self._count()
        return self._before.then(self._pass.stats()) if self._pass.steps else self._before

    def _begin(self, first_steps: int) -> None:
        self._before = self._all()
        self._pass = _Pass(first_steps)

    def _count(self) -> None:
        """Add up the recorded steps; call with the lock held."""
        steps = self._steps[:]
        if not steps:
            return
        del self._steps[: len(steps)]
        if self._pass.has_ended:
            self._begin(self._pass.first_steps)
            self._pass.is_early = True
        began = steps[0][0]
        # If nothing was ever demanded, the loop that called `run_ahead` was interrupted, and this is another one.
        if self._demanded:
            steps = [self._demanded_part(*step) for step in steps]
        self._pass.add(steps, began)

    def _demanded_part(self, asked: float, came: float, ready: float, rows: int, trace: Trace | None) -> _Step:
        """The same step, as if the batch had been requested when the loop needed it."""
        self._handed += 1
        since = self._demanded_at if self._handed <= (self._demanded or 0) else ready
        asked = max(asked, min(since, ready))
        return asked, max(asked, came), ready, rows, trace
