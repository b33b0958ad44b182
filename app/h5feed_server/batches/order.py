"""Row ids of any batches of an order, computed for many batches at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.order import BatchGrid, order_key, permute

from ..splits.compute import Rows
from ..splits.order_spec import OrderSpec
from ..splits.resampling import Balanced, Weighted

BATCHES_AT_ONCE = 64
"""One vectorised call costs nearly the same for one batch as for so many: neighbours are asked for next."""

ROWS_AT_ONCE = 1 << 18
"""Bound on the rows of such a call, for big batches."""

_PIECE = 1 << 18
"""Rows of a sequence that are put together at once."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of one epoch of a split.

    Attributes
    ----------
    split_rows : callable
        Returns the ascending rows of the split, (n,) int32, or None for all rows, which need no list. Not the rows
        themselves: they would be held as long as anybody remembers the order.
    grid : BatchGrid
        Over the split's rows, after ``limit``.
    """

    spec: OrderSpec
    split_rows: Callable[[], Rows | None]
    grid: BatchGrid

    block: int = 1
    """Rows that are stored, and decoded, together: with a window, their order is drawn as a whole."""

    resampled: Callable[[], Balanced | Weighted] | None = None
    """Where an epoch is drawn with repeats; then `grid` is over the rows of the epoch."""

    @cached_property
    def _key(self) -> bytes:
        return order_key(self.spec.seed, self.spec.epoch, self.spec.split)

    def _named_key(self, name: str) -> bytes:
        return order_key(self.spec.seed, self.spec.epoch, f"{self.spec.split}\0{name}")

    @cached_property
    def batches_at_once(self) -> int:
        """Batches that are worth computing together."""
        return max(1, min(BATCHES_AT_ONCE, ROWS_AT_ONCE // self.grid.batch_size))

    def rows(
        self, start: int, stop: int, sequence: npt.NDArray[Any] | None = None
    ) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """Row ids of batches start … stop-1 back to back, and which of them are real (not padding).

        Parameters
        ----------
        sequence : (n,) integers, optional
            From `sequence`, where there is a window and somebody has kept it.

        Returns
        -------
        rows : (k,) int64
        real : (k,) bool
        """
        positions, real = self.grid.positions(start, stop)
        if self.resampled is not None:
            key = self._named_key("draw") if self.spec.shuffle else None
            return self.resampled().draw(positions, self.grid.rows, key), real
        window = self.spec.window
        if window is not None:
            sequence = self.sequence() if sequence is None else sequence
            for number in np.unique(positions // window).tolist():
                inside = np.flatnonzero(positions // window == number)
                first = number * window
                size = min(window, self.grid.rows - first)
                key = self._named_key(f"window {number}")
                positions[inside] = first + permute(positions[inside] - first, size, key)
            return sequence[positions].astype(np.int64), real
        if self.spec.shuffle:
            positions = permute(positions, self.grid.rows, self._key)
        split_rows = self.split_rows()
        return (positions if split_rows is None else split_rows[positions].astype(np.int64)), real

    def sequence(self) -> npt.NDArray[Any]:
        """All rows, block after block in the order drawn for the blocks; windows are cut from it.

        It is put together by pieces: of millions of rows, what is made on the way would be many times as long.
        """
        count, block = self.grid.rows, self.block
        split_rows = self.split_rows()
        if not count:
            return np.zeros(0, np.int32)
        last = count - 1 if split_rows is None else int(split_rows[count - 1])
        blocks = last // block + 1
        dtype: type[np.integer[Any]] = np.int32 if last < 1 << 31 else np.int64
        key = self._named_key("blocks")
        # order: (blocks,), the blocks as they follow each other
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
            lengths = ends - begins
            # Where each block's rows are to lie, less where they are.
            shifts = np.cumsum(lengths) - lengths - begins
            places = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(shifts, lengths)
            rows[done : done + len(places)] = places if split_rows is None else split_rows[places]
            done += len(places)
        return rows
