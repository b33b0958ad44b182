"""One pass over the rows of a column: several threads read and accumulate blocks, in bounded memory.

Rows that were never written all hold the fill value, so only one of them is read.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from h5feed.csr import SparseRows
from h5feed.errors import TooLarge
from h5feed.stored.column import Column

from ..jobs.registry import Cancelled
from ..row_bits import RowSet
from ..storage.reader import Reader
from ..storage.written import WrittenRows
from .accumulators import Accumulator, accumulator_for
from .mean_image import MeanImage
from .value_counts import Indicators, Values, strings_of

BLOCK_BYTES = 4 << 20
"""Size of the blocks that a thread reads, in bytes."""

PARTS = 8
"""Rows are divided into this many runs, which are accumulated separately and merged in order. The last digits of float
sums then depend only on the rows, not on the number of threads."""

_DENSE = 4
"""If rows span at most this many times their number, the rows in between are read too, for fewer and longer reads."""

_SMALL_ROW_BYTES = 64 << 10
"""Rows in between are not read if rows are larger than this, in bytes: separate reads are then as fast."""

_MAX_ROW_BYTES = 256 << 20
"""Maximum size of a row, and rough bound on the blocks in memory, in bytes."""

_POLL_SECONDS = 0.5

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Subject:
    """A column, and what to compute for it.

    Attributes
    ----------
    channels : int
        Length of the channel axis; 1 if there is none.
    channels_first : bool
        Whether the channel axis is the first axis of a sample, not the last.
    mean_image : bool
        Compute the mean image.
    values : bool
        Count each distinct value.
    indicators : bool
        Check whether samples are one-hot or multi-label vectors.
    """

    column: Column
    channels: int = 1
    channels_first: bool = False
    mean_image: bool = False
    values: bool = False
    indicators: bool = False


class ColumnAccumulator:
    """Accumulates statistics of rows of a subject.

    Attributes
    ----------
    rows : int
        Rows added so far.
    stored : int
        Values of sparse rows added so far, without zeros that are not stored.
    numbers : Accumulator or None
        Statistics of the numbers; None for text.
    lengths : Accumulator or None
        Statistics of the lengths of ragged rows: items of lists, bytes of text. None if rows are not ragged.
    values, indicators, mean_image
        None if the subject does not ask for them.
    """

    def __init__(self, subject: Subject) -> None:
        column = subject.column
        self.rows = self.stored = 0
        dtype = np.dtype("<f4") if column.is_bfloat16 else column.dtype
        self.numbers: Accumulator | None = None if dtype.kind == "S" else accumulator_for(dtype, subject.channels)
        self.lengths: Accumulator | None = accumulator_for(np.dtype("<i8"), 1) if column.is_ragged else None
        self.values = Values() if subject.values else None
        self.indicators = Indicators(column.sample_shape[0]) if subject.indicators else None
        self.mean_image = MeanImage(column.sample_shape, column.dtype, column.rows) if subject.mean_image else None

    def add(self, subject: Subject, block: npt.NDArray[Any]) -> None:
        """Add rows of numbers, (rows, *sample). bfloat16 is passed as its bits."""
        self.rows += len(block)
        block = subject.column.widened(block)
        if self.mean_image is not None:
            self.mean_image.add(block)
        if self.values is not None:
            self.values.add(block.reshape(-1))
        if self.indicators is not None:
            self.indicators.add(block)
        if subject.channels_first:
            block = np.ascontiguousarray(np.moveaxis(block, 1, -1))
        if self.numbers is not None and block.size:
            self.numbers.add(block.reshape(-1, subject.channels))

    def add_ragged(self, items: npt.NDArray[Any], offsets: Int64s) -> None:
        """Add rows of lists or text.

        Parameters
        ----------
        items : (n,) array
            Items of all rows, back to back.
        offsets : (rows + 1,) int64
            Start of each row in `items`, and the end of the last.
        """
        self.rows += len(offsets) - 1
        if self.lengths is not None:
            self.lengths.add(np.diff(offsets).reshape(-1, 1))
        if self.numbers is not None and items.size:
            self.numbers.add(items.reshape(-1, 1))
        if self.values is not None:
            self.values.add(strings_of(items, offsets))

    def add_sparse(self, rows: SparseRows) -> None:
        """Add the values of sparse rows that are stored; `add_zeros` adds the others at the end."""
        summed = rows.summed()
        self.rows += len(rows.indptr) - 1
        self.stored += len(summed)
        if self.lengths is not None:
            self.lengths.add(np.diff(rows.indptr).reshape(-1, 1))
        if self.numbers is not None and summed.size:
            self.numbers.add(summed.reshape(-1, 1))

    def add_zeros(self, subject: Subject) -> None:
        """Add the zeros of sparse rows that are not stored."""
        zeros = self.rows * math.prod(subject.column.sample_shape) - self.stored
        if self.numbers is not None and zeros:
            zero = ColumnAccumulator(subject)
            assert zero.numbers is not None
            zero.numbers.add(np.zeros((1, 1), subject.column.dtype))
            repeated = _repeated(zero, subject, zeros).numbers
            assert repeated is not None
            self.numbers.merge(repeated)

    def merge(self, other: ColumnAccumulator) -> None:
        """Add the statistics of the rows that follow."""
        self.rows += other.rows
        self.stored += other.stored
        for name in ("numbers", "lengths", "values", "indicators", "mean_image"):
            mine: Any = getattr(self, name)
            if mine is not None:
                mine.merge(getattr(other, name))


def scan(
    reader: Reader,
    subject: Subject,
    rows: RowSet | None,
    threads: int,
    advance: Callable[[int], None],
    cancelled: threading.Event,
) -> ColumnAccumulator:
    """Accumulate statistics of rows of a column.

    Parameters
    ----------
    rows : RowSet or None
        Ascending rows. None: all rows.
    threads : int
        Maximum number of threads.
    advance : callable
        Called with the number of rows done since the last call, from any of the threads.
    cancelled : Event
        Stops the work when it is set.

    Raises
    ------
    Cancelled
    DatasetCorrupt, RevisionChanged, ReadTimeout, TooLarge
    """
    column = subject.column
    if column.row_bytes > _MAX_ROW_BYTES:
        raise TooLarge(f"rows have {column.row_bytes} bytes, more than the limit of {_MAX_ROW_BYTES} for statistics")
    wanted = WrittenRows(column, rows)
    count = wanted.count
    step = _block_rows(reader, column)
    blocks = -(-count // step)
    stop = threading.Event()

    def add_up(part: int) -> ColumnAccumulator:
        accumulator = ColumnAccumulator(subject)
        for block in range(part * blocks // PARTS, (part + 1) * blocks // PARTS):
            if stop.is_set() or cancelled.is_set():
                raise Cancelled
            begin, end = block * step, min((block + 1) * step, count)
            _add_rows(accumulator, reader, subject, wanted.between(begin, end))
            advance(end - begin)
        return accumulator

    whole = ColumnAccumulator(subject)
    if blocks == 1:
        # Tables may have thousands of small columns: starting threads would take longer than the work.
        whole.merge(add_up(PARTS - 1))
    else:
        # Use fewer threads for large rows, to bound the blocks in memory.
        threads = max(1, min(threads, PARTS, _MAX_ROW_BYTES // max(1, 2 * step * column.row_bytes)))
        _merge_in_order(whole, add_up, threads, stop, cancelled)
    if wanted.example is not None:
        fill = ColumnAccumulator(subject)
        _add_rows(fill, reader, subject, np.array([wanted.example], np.int64))
        whole.merge(_repeated(fill, subject, wanted.unwritten))
    if column.indices is not None:
        whole.add_zeros(subject)
    return whole


def _merge_in_order(
    whole: ColumnAccumulator,
    add_up: Callable[[int], ColumnAccumulator],
    threads: int,
    stop: threading.Event,
    cancelled: threading.Event,
) -> None:
    """Merge all parts, which threads compute, into `whole`; see `scan`."""
    with ThreadPoolExecutor(threads, "h5feed-stats") as executor:
        begun = deque(executor.submit(add_up, part) for part in range(min(PARTS, threads + 1)))
        following = iter(range(len(begun), PARTS))
        try:
            while begun and not cancelled.is_set():
                wait([future for future in begun if not future.done()], _POLL_SECONDS, FIRST_COMPLETED)
                if any(future.done() and future.exception() for future in begun):
                    break
                # Merge in order, and as soon as possible: keeping the results of all parts would take more memory.
                while begun and begun[0].done():
                    whole.merge(begun.popleft().result())
                    begun.extend(executor.submit(add_up, part) for part in islice(following, 1))
        finally:
            stop.set()
    if begun:
        _raise_reason(begun)


def _raise_reason(ended: deque[Future[ColumnAccumulator]]) -> NoReturn:
    """Raise the first error of these futures that is not `Cancelled`, or else `Cancelled`. Clears `ended`."""
    failures = [future.exception() for future in ended]
    reason = next((one for one in failures if one is not None and not isinstance(one, Cancelled)), Cancelled())
    # The traceback refers to the caller's frame, and so to this deque. Without clearing it, the results in it would
    # stay in memory until the garbage collector runs.
    ended.clear()
    try:
        raise reason
    finally:
        del failures, reason


def _add_rows(accumulator: ColumnAccumulator, reader: Reader, subject: Subject, rows: Int64s) -> None:
    if subject.column.indices is not None:
        accumulator.add_sparse(reader.read_sparse(subject.column, rows))
    elif subject.column.is_ragged:
        accumulator.add_ragged(*reader.read_ragged(subject.column, rows))
    else:
        accumulator.add(subject, _read(reader, subject.column, rows))


def _repeated(one: ColumnAccumulator, subject: Subject, times: int) -> ColumnAccumulator:
    """The statistics of `times` rows, all equal to the row of `one`, by repeated doubling. Modifies `one`."""
    accumulator = ColumnAccumulator(subject)
    while True:
        if times & 1:
            accumulator.merge(one)
        times >>= 1
        if not times:
            return accumulator
        one.merge(deepcopy(one))


def _block_rows(reader: Reader, column: Column) -> int:
    """Rows per block: as many as fit into `BLOCK_BYTES`, in whole chunks if possible."""
    row_bytes = column.row_bytes
    if column.is_ragged:
        row_bytes = max(16, reader.typical_items(column) * column.dtype.itemsize) if column.rows else 1
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    array = column.segments[0].array
    height = array.chunk_shape[0] if array.chunk_shape else 1
    return rows // height * height or rows


def _read(reader: Reader, column: Column, rows: Int64s) -> npt.NDArray[Any]:
    """Rows of a column, (rows, *sample)."""
    first, span = int(rows[0]), int(rows[-1] - rows[0]) + 1
    together = len(rows) < span <= _DENSE * len(rows) and column.row_bytes <= _SMALL_ROW_BYTES
    wanted = np.arange(first, first + span, dtype=np.int64) if together else rows
    out = np.empty((len(wanted), *column.sample_shape), column.dtype)
    reader.read_from_source(column, wanted, out)
    return out[rows - first] if together else out
