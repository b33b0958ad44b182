"""Finds the rows of a column that were written to the file; all others hold the fill value."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from h5feed.stored.column import Column, Segment

from ..row_bits import RowBits, RowRuns, RowSet

Int64s = npt.NDArray[np.int64]


class WrittenRows:
    """The written rows among some rows of a column.

    Parameters
    ----------
    column : Column
    rows : RowSet or None
        The rows of interest, ascending; None: all.

    Attributes
    ----------
    count : int
        Number of written rows.
    unwritten : int
        Number of rows that were never written.
    example : int or None
        One of those.
    """

    def __init__(self, column: Column, rows: RowSet | None) -> None:
        runs = np.array([*_runs(column)], np.int64).reshape(-1, 2)
        # Merge adjacent runs.
        touching = np.flatnonzero(runs[1:, 0] == runs[:-1, 1])
        starts, stops = np.delete(runs[:, 0], touching + 1), np.delete(runs[:, 1], touching)
        self.example: int | None = None
        if rows is None:
            self._rows: RowSet | None = None
            total = column.rows
            self._starts, self._ends = starts, np.cumsum(stops - starts)
            self.count = int(self._ends[-1]) if len(starts) else 0
            if self.count < total:
                self.example = 0 if not len(starts) or starts[0] > 0 else int(stops[0])
        elif isinstance(rows, RowBits | RowRuns):
            total = len(rows)
            self._rows = _both(rows, RowRuns([*zip(starts.tolist(), stops.tolist(), strict=True)]), column.rows)
            self.count = len(self._rows)
            if self.count < total:
                self.example = _first_of(rows, self._rows)
        else:
            place = np.searchsorted(starts, rows, side="right") - 1
            written = (place >= 0) & (rows < stops[place]) if len(starts) else np.zeros(len(rows), np.bool_)
            self._rows, total = (rows if written.all() else rows[written]), len(rows)
            self.count = len(self._rows)
            if self.count < total:
                self.example = int(rows[np.argmin(written)])
        self.unwritten = total - self.count

    def between(self, begin: int, end: int) -> Int64s:
        """The written rows number `begin` to ``end - 1``, ascending, (end - begin,) int64."""
        if self._rows is not None:
            return np.asarray(self._rows[begin:end], np.int64)
        first, last = np.searchsorted(self._ends, [begin, end - 1], side="right").tolist()
        if first == last:
            start = int(self._starts[first]) + begin - (int(self._ends[first - 1]) if first else 0)
            return np.arange(start, start + end - begin, dtype=np.int64)
        places = np.arange(begin, end, dtype=np.int64)
        run = np.searchsorted(self._ends, places, side="right")
        before = np.where(run > 0, self._ends[run - 1], 0)
        return self._starts[run] + (places - before)


def _both(rows: RowBits | RowRuns, written: RowRuns, total: int) -> RowBits | RowRuns:
    if len(written) == total:
        return rows
    return written & (rows.bits if isinstance(rows, RowBits) else (rows & np.full(-(-total // 8), 255, np.uint8)).bits)


def _first_of(rows: RowBits | RowRuns, others: RowBits | RowRuns) -> int | None:
    """The first row that is not among the others."""
    for block in rows.blocks():
        if len(block):
            missing = ~others.mask(int(block[0]), int(block[-1]) + 1)[block - block[0]]
            if missing.any():
                return int(block[np.argmax(missing)])
    return None


def _runs(column: Column) -> Iterator[tuple[int, int]]:
    first = 0
    for segment in column.segments:
        for begin, end in _written(segment) if column.images is None else [(0, segment.rows)]:
            yield first + begin, first + end
        first += segment.rows


def _written(segment: Segment) -> list[tuple[int, int]]:
    array, rows = segment.array, segment.rows
    whole = [(0, rows)] if rows else []
    if array.by_h5py or segment.transposed or segment.offsets is not None or array.inline is not None:
        return whole
    if array.chunk_shape is None:
        return whole if array.offset is not None else []
    if array.chunks is None:
        return whole
    height = array.chunk_shape[0]
    tall = np.unique(array.chunks.numbers // array.cells)
    if not len(tall):
        return []
    apart = np.flatnonzero(np.diff(tall) != 1) + 1
    begins, ends = tall[[0, *apart]] * height, (tall[[*(apart - 1), -1]] + 1) * height
    return [*zip(begins.tolist(), np.minimum(ends, rows).tolist(), strict=True)]
