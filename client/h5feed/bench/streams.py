"""Streams of batches, read for a bounded time and a bounded number of bytes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

from ..batch import Batch
from ..blocks import blocks_of_passes
from ..dataset import Dataset
from ..fetching.readahead import ReadAhead
from ..net.pace import Link, Pace
from ..plan import Plan
from ..remote_dataset import BLOCK_BYTES
from .findings import Rate, Training

Tick = Callable[[float, float], None]
"""Called now and then with the share that is done of a phase (0 … 1) and the rows per second until now."""

_WARM_SHARE, _WARM_AT_MOST = 0.25, 0.5
_WARM_ARRIVALS = 24
"""A stream begins slowly. What comes in the first part of its time does not count, if batches have arrived so many
times before half of it is over, those that come together being one arrival. Of fewer, which are as many as are under
way at a time, all count, from the first request on."""

_TOGETHER_SECONDS = 1e-3

_TICK_SECONDS = 0.1


def fixed_width(dataset: Dataset, plan: Plan, epoch: int, connections: int, readahead: int) -> ReadAhead[Batch]:
    """Passes of a plan from `epoch` on, with exactly so many requests under way as long as the budget has room."""
    link = Link(width=connections, least=connections, hold=sys.maxsize)
    return ReadAhead(
        dataset._fetch(plan, None),
        blocks_of_passes(plan, epoch, 0, BLOCK_BYTES),
        max_bytes=readahead,
        deadline=2 * dataset._client.deadline + 10,
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
    """How fast batches come when nobody works on them; None if none came."""
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
            # Between two arrivals: those that come together with this batch took as long as it did.
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
    reading: ReadAhead[Batch], step: float, step_rows: int, *, seconds: float, max_bytes: float, tick: Tick
) -> Training | None:
    """A loop over `reading` that sleeps `step` seconds for every `step_rows` rows; None if it did not get to two steps.

    As MLPerf Storage measures it: what a step would compute is replaced by its time, and the first step, for which the
    pipeline has to fill, is left out of accelerator utilisation = time in steps / time in all.
    """
    began = ended = time.monotonic()
    counted_from: float | None = None
    rows = total = steps = 0
    compute = 0.0
    for batch in until(reading, began + seconds):
        rows, total = rows + len(batch.rows), total + nbytes_of(batch)
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
        if done >= 1:
            break
    if not steps or counted_from is None:
        return None
    return Training(step, steps, min(1.0, compute / (ended - counted_from)))


def nbytes_of(batch: Batch) -> int:
    """Bytes of its arrays, the row ids included."""
    return batch.rows.nbytes + sum(array.nbytes for array in batch.values())


def until(reading: ReadAhead[Batch], end: float) -> Iterator[Batch]:
    """The batches of a stream until `end` (`time.monotonic()`), even if the next one would be waited for longer."""
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
                # Closed between its arrival and its delivery, a batch is no more there.
                if time.monotonic() < end:
                    raise
                return
            yield batch
    finally:
        timer.cancel()
        reading.close()
