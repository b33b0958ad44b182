"""Sets of rows of datasets with very many rows: a bit for each row of the dataset, or ranges of rows.

Up to `LISTED_ROWS`, a set of rows is a list of row ids, an ascending int32 array. A list of a billion rows would take
4 GB, but a bit for each takes 125 MB. `RowBits` and `RowRuns` are indexed like a list: ``rows[k]`` is the k-th row of
the set. For a bit vector, this is the operation "select" (Jacobson, "Space-efficient Static Trees and Graphs", 1989).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

LISTED_ROWS = 1 << 25
"""Sets of rows of datasets with up to this many rows are lists of row ids; those of larger datasets are bits."""

_GROUP = 256
"""The rows before each group of this many bytes are counted once, and a group is searched for each row."""

_AT_ONCE = 1 << 10
"""Rows looked up at a time: their groups take 256 KiB."""

_PIECE = 1 << 12
"""Bytes of bits unpacked at a time."""

_NTH = np.zeros((256, 8), np.uint8)
"""Position of the n-th 1 of a byte, from its highest bit."""
for _byte in range(256):
    _ones = np.flatnonzero(np.unpackbits(np.array([_byte], np.uint8)))
    _NTH[_byte, : len(_ones)] = _ones


class RowBits:
    """Ascending rows, as a bit for each row of the dataset.

    Parameters
    ----------
    bits : (⌈rows / 8⌉,) uint8
        As `numpy.packbits` packs them. Bits after the last row are 0.
    """

    def __init__(self, bits: Bits) -> None:
        self.bits = bits
        whole = len(bits) // _GROUP * _GROUP
        # groups: (groups, _GROUP / 8)
        self._groups = bits[:whole].view(np.uint64).reshape(-1, _GROUP // 8)
        tail = np.zeros(_GROUP, np.uint8)
        tail[: len(bits) - whole] = bits[whole:]
        self._tail = tail.view(np.uint64)
        # ends: (groups + 1,), how many rows of the set there are up to the end of each group
        ends = np.empty(len(self._groups) + 1, np.int64)
        for first in range(0, len(self._groups), _PIECE):
            counts = np.bitwise_count(self._groups[first : first + _PIECE])
            ends[first : first + len(counts)] = counts.sum(axis=1, dtype=np.int64)
        ends[-1] = np.bitwise_count(self._tail).sum(dtype=np.int64)
        self._ends = np.cumsum(ends, out=ends)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self._ends.nbytes

    def __getitem__(self, wanted: Int64s | slice) -> Int64s:
        """Row ids by their number in the set, (k,) int64: of an array of numbers, or of a slice."""
        if isinstance(wanted, slice):
            start, stop, step = wanted.indices(len(self))
            return self._between(start, stop)[::step] if step > 0 else self[np.arange(start, stop, step)]
        rows = np.empty(len(wanted), np.int64)
        for first in range(0, len(wanted), _AT_ONCE):
            rows[first : first + _AT_ONCE] = self._selected(np.asarray(wanted[first : first + _AT_ONCE], np.int64))
        return rows

    def _selected(self, numbers: Int64s) -> Int64s:
        group = np.searchsorted(self._ends, numbers, side="right")
        left = numbers - np.where(group > 0, self._ends[group - 1], 0)
        in_tail = group == len(self._groups)
        if len(self._groups):
            words = self._groups[np.minimum(group, len(self._groups) - 1)]
        else:
            words = np.empty((len(numbers), _GROUP // 8), np.uint64)
        if in_tail.any():
            words[in_tail] = self._tail
        word, left = _place(np.bitwise_count(words), left)
        # found: (k, 8), the bytes of the word with the row
        found = np.take_along_axis(words, word[:, None], axis=1).view(np.uint8)
        byte, left = _place(np.bitwise_count(found), left)
        bit = _NTH[np.take_along_axis(found, byte[:, None], axis=1)[:, 0], left]
        return group * (8 * _GROUP) + word * 64 + byte * 8 + bit

    def _between(self, start: int, stop: int) -> Int64s:
        """Rows number `start` … ``stop - 1``. Consecutive ones are found faster than single ones."""
        if start >= stop:
            return np.zeros(0, np.int64)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        before = int(self._ends[first - 1]) if first else 0
        found = [
            np.flatnonzero(np.unpackbits(self.bits[begin : min(begin + _PIECE, (last + 1) * _GROUP)])) + 8 * begin
            for begin in range(first * _GROUP, min((last + 1) * _GROUP, len(self.bits)), _PIECE)
        ]
        return np.concatenate(found)[start - before : stop - before]

    def blocks(self) -> Iterator[Int64s]:
        """All rows, in consecutive arrays."""
        for begin in range(0, len(self.bits), _PIECE):
            yield np.flatnonzero(np.unpackbits(self.bits[begin : begin + _PIECE])) + 8 * begin

    def mask(self, start: int, stop: int) -> Bools:
        """Whether each of the rows `start` … ``stop - 1`` of the dataset is in the set, (stop - start,) bool."""
        first = start // 8
        bits = np.unpackbits(self.bits[first : -(-stop // 8)], count=stop - 8 * first)
        return bits[start - 8 * first :].view(np.bool_)

    def place(self, row: int) -> int | None:
        """The number of a row in the set; None if it is not in it."""
        if not self.mask(row, row + 1)[0]:
            return None
        group = row // (8 * _GROUP)
        before = int(self._ends[group - 1]) if group else 0
        return before + int(np.count_nonzero(self.mask(group * 8 * _GROUP, row)))

    def first(self, count: int) -> npt.NDArray[Any]:
        """The first rows, (count,) int32 or int64."""
        return _listed(self, count)

    def __and__(self, other: Bits) -> RowBits:
        """The rows that are also in `other`, of the same form as `bits`."""
        return RowBits(self.bits & other)


class RowRuns:
    """Ascending rows that are a few ranges.

    Parameters
    ----------
    runs : sequence of (int, int)
        Ascending: first row, and the row after the last.
    """

    def __init__(self, runs: Sequence[tuple[int, int]]) -> None:
        bounds = np.array(runs, np.int64).reshape(-1, 2)
        bounds = bounds[bounds[:, 0] < bounds[:, 1]]
        self._starts = bounds[:, 0]
        self._ends = np.cumsum(bounds[:, 1] - bounds[:, 0])
        self.runs = [(begin, end) for begin, end in bounds.tolist()]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def nbytes(self) -> int:
        return 3 * self._starts.nbytes

    def __getitem__(self, wanted: Int64s | slice) -> Int64s:
        """As of `RowBits`."""
        if isinstance(wanted, slice):
            wanted = np.arange(*wanted.indices(len(self)), dtype=np.int64)
        run = np.searchsorted(self._ends, wanted, side="right")
        before = np.where(run > 0, self._ends[run - 1], 0)
        return np.asarray(self._starts[run] + (wanted - before), np.int64)

    def blocks(self) -> Iterator[Int64s]:
        """All rows, in consecutive arrays."""
        for begin, end in self.runs:
            for first in range(begin, end, 8 * _PIECE):
                yield np.arange(first, min(first + 8 * _PIECE, end), dtype=np.int64)

    def mask(self, start: int, stop: int) -> Bools:
        """As of `RowBits`."""
        inside = np.zeros(stop - start, np.bool_)
        for begin, end in self.runs:
            inside[max(0, begin - start) : max(0, end - start)] = True
        return inside

    def place(self, row: int) -> int | None:
        """As of `RowBits`."""
        run = int(np.searchsorted(self._starts, row, side="right")) - 1
        if run < 0 or row >= self.runs[run][1]:
            return None
        return int(self._ends[run]) - (self.runs[run][1] - row)

    def first(self, count: int) -> npt.NDArray[Any]:
        """As of `RowBits`."""
        return _listed(self, count)

    def __and__(self, other: Bits) -> RowBits:
        """As of `RowBits`."""
        both = np.zeros_like(other)
        for first in range(0, len(other), _PIECE):
            part = other[first : first + _PIECE]
            both[first : first + _PIECE] = part & np.packbits(self.mask(8 * first, 8 * (first + len(part))))
        return RowBits(both)


RowSet = npt.NDArray[np.int32] | RowBits | RowRuns
"""Ascending rows."""


def as_list(rows: RowSet) -> npt.NDArray[np.int32]:
    """The rows of a dataset of at most `LISTED_ROWS`, whose sets of rows are lists."""
    assert isinstance(rows, np.ndarray)
    return rows


def _listed(rows: RowBits | RowRuns, count: int) -> npt.NDArray[Any]:
    last = int(rows[np.array([count - 1])][0]) if count else 0
    listed = np.empty(count, np.int32 if last < 1 << 31 else np.int64)
    done = 0
    for block in rows.blocks():
        part = block[: count - done]
        listed[done : done + len(part)] = part
        done += len(part)
        if done == count:
            break
    return listed


def within(rows: RowSet, bits: Bits) -> RowBits:
    """The rows of a set that is not a list that are also in `bits`, of the same form as `RowBits.bits`."""
    assert not isinstance(rows, np.ndarray)
    return rows & bits


class BitPacker:
    """Packs the bits of rows, piece by piece.

    Parameters
    ----------
    rows : int
        Rows of the dataset.
    """

    def __init__(self, rows: int) -> None:
        self._bits = np.zeros(-(-rows // 8), np.uint8)
        self._left = np.zeros(0, np.bool_)
        self._done = 0

    def add(self, piece: Bools) -> None:
        """Add the next rows."""
        if len(self._left):
            piece = np.concatenate([self._left, piece])
        whole = len(piece) // 8
        self._bits[self._done : self._done + whole] = np.packbits(piece[: 8 * whole])
        self._left = piece[8 * whole :].copy()
        self._done += whole

    def bits(self) -> Bits:
        """All bits, after the last piece."""
        if len(self._left):
            self._bits[self._done : self._done + 1] = np.packbits(self._left)
        return self._bits


def _place(counts: npt.NDArray[np.uint8], numbers: Int64s) -> tuple[Int64s, Int64s]:
    """In which column of `counts`, (k, n), the row of each number is, and its number in this column."""
    # int16 is enough for the rows of a group.
    ends = np.cumsum(counts, axis=1, dtype=np.int16)
    column = np.count_nonzero(ends <= numbers[:, None].astype(np.int16), axis=1)
    before = np.take_along_axis(ends, np.maximum(column - 1, 0)[:, None], axis=1)[:, 0]
    return column, numbers - np.where(column > 0, before, 0)
