"""Read streams of batches for a limited time and a limited number of bytes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

from ..batch import Batch
from ..blocks import blocks_of_passes
from ..dataset import Dataset
from ..fetching.readahead import ReadAhead
from ..net.concurrency import Link, Pace
from ..plan import Plan
from .findings import Rate, Training

Tick = Callable[[float, float], None]
"""Called regularly with the progress of a phase (0 to 1) and the rows per second so far."""

_WARM_SHARE, _WARM_AT_MOST = 0.25, 0.5
_WARM_ARRIVALS = 24
"""A stream starts slowly. The first part of its time is not counted, provided that there were this many arrivals before
half of the time is over (batches that arrive together are one arrival). Otherwise everything counts, from the first
request on."""

_TOGETHER_SECONDS = 1e-3

_TICK_SECONDS = 0.1

PATIENCE = 8
"""A loop that needs some steps may take this many times its time."""


def fixed_width(dataset: Dataset, plan: Plan, epoch: int, connections: int, readahead: int) -> ReadAhead[Batch]:
    """Passes of a plan from `epoch` on, with a fixed number of concurrent requests, as far as `readahead` allows."""
    link = Link(width=connections, least=connections, hold=sys.maxsize)
    return ReadAhead(
        dataset._fetch(plan, None),
        blocks_of_passes(plan, epoch, 0),
        max_bytes=readahead,
        deadline=(1 + plan.parts) * dataset._client.deadline + 10,
        pace=Pace(readahead, connections, link),
    )


def drained(
    reading: ReadAhead[Batch],
    what: str,
    batch_size: int,
    *,
    seconds: float,
    max_bytes: float,
    tick: Tick,
    connections: int | None = None,
) -> Rate | None:
    """The rate at which batches arrive if nothing is computed; None if none arrived."""
    began = counted_from = last = time.monotonic()
    next_tick = began
    rows = nbytes = arrivals = total = 0
    warm = False
    for batch in until(reading, began + seconds):
        before, last = last, time.monotonic()
        arrived = last - before > _TOGETHER_SECONDS
        arrivals += arrived
        size = nbytes_of(batch)
        total += size
        done = max((last - began) / seconds, total / max_bytes)
        if not warm and arrived and _WARM_SHARE <= done < _WARM_AT_MOST and arrivals >= _WARM_ARRIVALS:
            # Start between two arrivals: batches that arrive together took the same time.
            warm, counted_from = True, before
            rows = nbytes = 0
        rows, nbytes = rows + len(batch.rows), nbytes + size
        if last >= next_tick:
            next_tick = last + _TICK_SECONDS
            tick(min(1.0, done), rows / max(last - counted_from, 1e-9))
        if done >= 1:
            break
    return Rate(what, rows, nbytes, last - counted_from, batch_size, connections) if rows else None


def trained(
    reading: ReadAhead[Batch],
    step: float,
    step_rows: int,
    *,
    seconds: float,
    max_bytes: float,
    tick: Tick,
    least: int = 0,
    count: Callable[[int, int], None] = lambda nbytes, rows: None,
) -> Training | None:
    """Loop over `reading`, sleeping `step` seconds for every `step_rows` rows; None if there were fewer than two steps.

    As in MLPerf Storage, a step only takes its time instead of computing, and the first step, in which the pipeline
    fills, does not count: accelerator utilisation = time in steps / total time. If fewer than
    `least` steps fit into the `seconds`, the loop takes up to `PATIENCE` times as long. `count` is told the bytes and
    rows of each batch.
    """
    began = ended = time.monotonic()
    counted_from: float | None = None
    rows = total = steps = 0
    compute = 0.0
    for batch in until(reading, began + seconds * (PATIENCE if least else 1)):
        nbytes = nbytes_of(batch)
        rows, total = rows + len(batch.rows), total + nbytes
        count(nbytes, len(batch.rows))
        if rows < step_rows:
            continue
        rows -= step_rows
        asked = time.monotonic()
        time.sleep(step)
        ended = time.monotonic()
        if counted_from is None:
            counted_from = ended
        else:
            steps, compute = steps + 1, compute + ended - asked
        done = max((ended - began) / seconds, total / max_bytes)
        tick(min(1.0, done), steps * step_rows / max(ended - counted_from, 1e-9))
        if done >= 1 and steps >= least:
            break
    else:
        # The time was over while the loop waited for a batch: that counts, too.
        ended = time.monotonic() if least else ended
    if not steps or counted_from is None:
        return None
    total_seconds = ended - counted_from
    return Training(step, steps, min(1.0, compute / total_seconds), total_seconds)


def nbytes_of(batch: Batch) -> int:
    """Bytes of the arrays of a batch, row ids included."""
    return batch.rows.nbytes + sum(array.nbytes for array in batch.values())


def until(reading: ReadAhead[Batch], end: float) -> Iterator[Batch]:
    """The batches of a stream until `end` (`time.monotonic()`); does not wait longer for the next one."""
    timer = threading.Timer(max(0.0, end - time.monotonic()), reading.close)
    timer.daemon = True
    timer.start()
    try:
        while True:
            try:
                batch = next(reading)
            except StopIteration:
                return
            except IndexError:
                # The timer closed the stream just before it delivered a batch.
                if time.monotonic() < end:
                    raise
                return
            yield batch
    finally:
        timer.cancel()
        reading.close()
