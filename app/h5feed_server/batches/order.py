"""Computes the row ids of any batches of an order, for many batches at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.order import BatchGrid, order_key, permute
from h5feed.runs import consecutive

from ..row_bits import RowBits, RowRuns, RowSet
from ..splits.bucketing import Bucketed
from ..splits.order_spec import OrderSpec
from ..splits.packing import Packed, PackedRows
from ..splits.resampling import Balanced, Weighted

BATCHES_AT_ONCE = 64
"""Number of batches computed together. One vectorised call takes nearly the same time for one batch as for this many,
and neighbouring batches are usually requested next."""

ROWS_AT_ONCE = 1 << 18
"""Limit on the rows computed together, for large batches."""

_PIECE = 1 << 18
"""Rows or blocks of a sequence processed at a time, which bounds temporary arrays."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of one epoch of a split.

    Attributes
    ----------
    split_rows : callable
        Returns the ascending rows of the split, or None for all rows, which need no list. It is a function so that the
        order does not hold a reference to the rows, which a cache may want to drop.
    grid : BatchGrid
        Divides the rows of the split, after ``limit``, into batches. If `resampled` is set, it divides the drawn rows.
    block : int
        Number of rows that are stored and decoded together. With a window, blocks are shuffled as a whole.
    resampled : callable or None
        Returns the table from which an epoch is drawn with repeats. None: each row is visited once.
    bucketed : callable or None
        Returns the division of the order into windows, in which rows of alike lengths come together.
    packed : callable or None
        Returns the packed rows. The order is then one of them: `rows` gives their numbers, and `unpacked` what they
        hold.
    samples_of_row : int
        Each row is so many samples, which have their own places in the order. Not with `resampled`, `bucketed` and
        `packed`.
    """

    spec: OrderSpec
    split_rows: Callable[[], RowSet | None]
    grid: BatchGrid

    block: int = 1

    resampled: Callable[[], Balanced | Weighted] | None = None

    bucketed: Callable[[], Bucketed] | None = None

    packed: Callable[[], Packed] | None = None

    samples_of_row: int = 1

    @cached_property
    def _key(self) -> bytes:
        return order_key(self.spec.seed, self.spec.epoch, self.spec.split)

    def _named_key(self, name: str) -> bytes:
        return order_key(self.spec.seed, self.spec.epoch, f"{self.spec.split}\0{name}")

    @cached_property
    def crop_key(self) -> bytes:
        """The key of the places of crops in their rows."""
        return self._named_key("crop")

    @cached_property
    def batches_at_once(self) -> int:
        """Number of batches to compute together."""
        most = max(1, min(BATCHES_AT_ONCE, ROWS_AT_ONCE // self.grid.batch_size))
        if self.bucketed is None:
            return most
        # Whole windows: else they would be sorted for each part again.
        steps = max(1, self.bucketed().window // self.grid.step)
        return steps * max(1, most // steps)

    def rows(
        self, start: int, stop: int, sequence: npt.NDArray[Any] | None = None
    ) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """Samples of batches start … stop-1, back to back, and which of them are real (not padding).

        Parameters
        ----------
        sequence : (n,) integers, optional
            The cached result of `sequence`, for orders with a window. Default: compute it.

        Returns
        -------
        samples : (k,) int64
            Row ids. If each row is several samples: their numbers, ``row * samples_of_row + number of the sample``.
        real : (k,) bool
            False for padding.

        Raises
        ------
        BatchOutOfRange
        """
        positions, real = self.grid.positions(start, stop)
        if self.bucketed is None:
            return self._rows_at(positions, sequence), real
        if self.spec.window is not None and sequence is None:
            sequence = self.sequence()
        key_of = (lambda number: self._named_key(f"bucket {number}")) if self.spec.shuffle else None
        at = partial(self._rows_at, sequence=sequence)
        return self.bucketed().draw(positions, self.grid.rows, at, key_of), real

    def unpacked(self, numbers: Int64s) -> PackedRows:
        """What packed rows hold, by number; only with `packed`."""
        assert self.packed is not None
        return self.packed().draw(numbers, self._named_key("pack") if self.spec.shuffle else None)

    def _rows_at(self, positions: Int64s, sequence: npt.NDArray[Any] | None) -> Int64s:
        """Row ids at positions of the order without buckets, (k,) int64. May modify `positions`."""
        if self.resampled is not None:
            key = self._named_key("draw") if self.spec.shuffle else None
            return self.resampled().draw(positions, self.grid.rows, key)
        window = self.spec.window
        if window is not None:
            if self.samples_of_row > 1:
                # No longer than the order: the product may be too large for positions.
                window = max(1, min(window * self.samples_of_row, self.grid.rows))
            sequence = self.sequence() if sequence is None else sequence
            for number in np.unique(positions // window).tolist():
                inside = np.flatnonzero(positions // window == number)
                first = number * window
                size = min(window, self.grid.rows - first)
                key = self._named_key(f"window {number}")
                positions[inside] = first + permute(positions[inside] - first, size, key)
            return self._samples_of(sequence, positions)
        if self.spec.shuffle:
            positions = permute(positions, self.grid.rows, self._key)
        split_rows = self.split_rows()
        return positions if split_rows is None else self._samples_of(split_rows, positions)

    def _samples_of(self, rows: RowSet | npt.NDArray[Any], positions: Int64s) -> Int64s:
        """The samples at positions of an order in which the samples of each row follow each other."""
        several = self.samples_of_row
        if several == 1:
            return rows[positions].astype(np.int64)
        return rows[positions // several].astype(np.int64) * several + positions % several

    def sequence(self) -> npt.NDArray[Any]:
        """All rows in the shuffled order of their blocks, (n,) int32 or int64; windows are consecutive parts of it.

        It is computed in pieces: for millions of rows, temporary arrays would otherwise be many times as large.
        """
        count, block = self.grid.rows // self.samples_of_row, self.block
        if not count:
            return np.zeros(0, np.int32)
        found = self.split_rows()
        split_rows = found.first(count) if isinstance(found, RowBits | RowRuns) else found
        last = count - 1 if split_rows is None else int(split_rows[count - 1])
        blocks = last // block + 1
        dtype: type[np.integer[Any]] = np.int32 if last < 1 << 31 else np.int64
        key = self._named_key("blocks")
        # order: (blocks,), block numbers in shuffled order
        order = np.empty(blocks, dtype)
        for first in range(0, blocks, _PIECE):
            numbers = np.arange(first, min(first + _PIECE, blocks), dtype=np.int64)
            order[permute(numbers, blocks, key)] = numbers
        rows = np.empty(count, dtype)
        done = 0
        step = max(1, _PIECE // block)
        for first in range(0, blocks, step):
            wanted = order[first : first + step].astype(np.int64)
            begins, ends = wanted * block, np.minimum((wanted + 1) * block, last + 1)
            if split_rows is not None:
                begins = np.searchsorted(split_rows[:count], begins)
                ends = np.searchsorted(split_rows[:count], ends)
            places = consecutive(begins, ends - begins)
            rows[done : done + len(places)] = places if split_rows is None else split_rows[places]
            done += len(places)
        return rows
