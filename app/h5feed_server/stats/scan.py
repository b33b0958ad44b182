"""One pass over the rows of a column: blocks are read and added up by several threads, in bounded memory.

Rows in which nothing was ever written are not read: one of them tells what all are.
"""

from __future__ import annotations

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
from h5feed.errors import TooLarge

from ..jobs.registry import Cancelled
from ..storage.column import Column
from ..storage.reader import Reader
from ..storage.written import WrittenRows
from .accumulators import Accumulator, accumulator_for
from .mean_image import MeanImage
from .value_counts import Indicators, Values, strings_of

BLOCK_BYTES = 4 << 20
"""Bytes read at once by a thread."""

PARTS = 8
"""Runs of rows that are added up one by one, and their sums in order: so the last digit of a sum of floats depends on
the rows alone, not on how many threads there are."""

_DENSE = 4
"""Of rows that lie closer together than this, the ones between are read as well: fewer, longer reads."""

_SMALL_ROW_BYTES = 64 << 10
"""Bytes: rows above are read one by one as fast as together."""

_MAX_ROW_BYTES = 256 << 20

_POLL_SECONDS = 0.5

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Subject:
    """What is looked at in a column.

    Attributes
    ----------
    channels : int
        Length of the channel axis; 1 where there is none.
    channels_first : bool
        The channel axis is the first of a sample, not the last.
    mean_image : bool
    values : bool
        Each distinct value is counted.
    indicators : bool
        Samples may be one-hot, or one 0 or 1 for each of several labels.
    """

    column: Column
    channels: int = 1
    channels_first: bool = False
    mean_image: bool = False
    values: bool = False
    indicators: bool = False


class ColumnAccumulator:
    """What was found in some rows of a subject.

    Attributes
    ----------
    rows : int
    numbers : Accumulator or None
        Of numbers.
    lengths : Accumulator or None
        Of the lengths of lists, and of texts in bytes.
    values, indicators, mean_image
        Those that were wanted.
    """

    def __init__(self, subject: Subject) -> None:
        column = subject.column
        self.rows = 0
        dtype = np.dtype("<f4") if column.is_bfloat16 else column.dtype
        self.numbers: Accumulator | None = None if dtype.kind == "S" else accumulator_for(dtype, subject.channels)
        self.lengths: Accumulator | None = accumulator_for(np.dtype("<i8"), 1) if column.is_ragged else None
        self.values = Values() if subject.values else None
        self.indicators = Indicators(column.sample_shape[0]) if subject.indicators else None
        self.mean_image = MeanImage(column.sample_shape, column.dtype, column.rows) if subject.mean_image else None

    def add(self, subject: Subject, block: npt.NDArray[Any]) -> None:
        """Add (rows, *sample) numbers."""
        self.rows += len(block)
        if subject.column.is_bfloat16:
            block = (block.astype(np.uint32) << np.uint32(16)).view(np.float32)
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
        """Add lists or texts, which begin at `offsets`."""
        self.rows += len(offsets) - 1
        if self.lengths is not None:
            self.lengths.add(np.diff(offsets).reshape(-1, 1))
        if self.numbers is not None and items.size:
            self.numbers.add(items.reshape(-1, 1))
        if self.values is not None:
            self.values.add(strings_of(items, offsets))

    def merge(self, other: ColumnAccumulator) -> None:
        """Add what was found in the rows after these."""
        self.rows += other.rows
        for name in ("numbers", "lengths", "values", "indicators", "mean_image"):
            mine: Any = getattr(self, name)
            if mine is not None:
                mine.merge(getattr(other, name))


def scan(
    reader: Reader,
    subject: Subject,
    rows: npt.NDArray[np.integer[Any]] | None,
    threads: int,
    advance: Callable[[int], None],
    cancelled: threading.Event,
) -> ColumnAccumulator:
    """Look at rows of a column.

    Parameters
    ----------
    rows : (n,) integers, or None
        Ascending; None: all.
    advance : callable
        Called by any thread with the number of rows that are done.

    Raises
    ------
    Cancelled
    DatasetCorrupt, RevisionChanged, ReadTimeout, TooLarge
    """
    column = subject.column
    if column.row_bytes > _MAX_ROW_BYTES:
        raise TooLarge(f"rows of {column.row_bytes} bytes are more than the {_MAX_ROW_BYTES} that statistics read")
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

    # What is in memory at the same time is bounded, however long the rows are.
    threads = max(1, min(threads, PARTS, _MAX_ROW_BYTES // max(1, 2 * step * column.row_bytes)))
    whole = ColumnAccumulator(subject)
    with ThreadPoolExecutor(threads, "h5feed-stats") as executor:
        begun = deque(executor.submit(add_up, part) for part in range(min(PARTS, threads + 1)))
        following = iter(range(len(begun), PARTS))
        try:
            while begun and not cancelled.is_set():
                wait([future for future in begun if not future.done()], _POLL_SECONDS, FIRST_COMPLETED)
                if any(future.done() and future.exception() for future in begun):
                    break
                # In order, and as soon as they are there: sums of eight parts would take eight times the memory.
                while begun and begun[0].done():
                    whole.merge(begun.popleft().result())
                    begun.extend(executor.submit(add_up, part) for part in islice(following, 1))
        finally:
            stop.set()
    if begun:
        _raise_reason(begun)
    if wanted.example is not None:
        fill = ColumnAccumulator(subject)
        _add_rows(fill, reader, subject, np.array([wanted.example], np.int64))
        whole.merge(_repeated(fill, subject, wanted.unwritten))
    return whole


def _raise_reason(ended: deque[Future[ColumnAccumulator]]) -> NoReturn:
    """Why they have not all ended well; they are let go."""
    failures = [future.exception() for future in ended]
    reason = next((one for one in failures if one is not None and not isinstance(one, Cancelled)), Cancelled())
    # The error's traceback holds the caller's frame: with what had ended in it, all would stay until it is collected.
    ended.clear()
    try:
        raise reason
    finally:
        del failures, reason


def _add_rows(accumulator: ColumnAccumulator, reader: Reader, subject: Subject, rows: Int64s) -> None:
    if subject.column.is_ragged:
        accumulator.add_ragged(*reader.read_ragged(subject.column, rows))
    else:
        accumulator.add(subject, _read(reader, subject.column, rows))


def _repeated(one: ColumnAccumulator, subject: Subject, times: int) -> ColumnAccumulator:
    """What is found in `times` such rows: they are doubled as often as it takes."""
    accumulator = ColumnAccumulator(subject)
    while True:
        if times & 1:
            accumulator.merge(one)
        times >>= 1
        if not times:
            return accumulator
        one.merge(deepcopy(one))


def _block_rows(reader: Reader, column: Column) -> int:
    """Rows of a block: as many as make `BLOCK_BYTES`, by whole chunks where that is possible."""
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
