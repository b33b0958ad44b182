"""Row ids of any batches of an order, computed for many batches at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from h5feed.order import BatchGrid, order_key, permute

from .resampling import Balanced, Weighted
from .spec import OrderSpec
from .splits import Rows

BATCHES_AT_ONCE = 64
"""One vectorised call costs nearly the same for one batch as for so many: neighbours are asked for next."""

ROWS_AT_ONCE = 1 << 18
"""Bound on the rows of such a call, for big batches."""

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

    def rows(self, start: int, stop: int, sequence: Int64s | None = None) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """Row ids of batches start … stop-1 back to back, and which of them are real (not padding).

        Parameters
        ----------
        sequence : (n,) int64, optional
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
            return sequence[positions], real
        if self.spec.shuffle:
            positions = permute(positions, self.grid.rows, self._key)
        split_rows = self.split_rows()
        return (positions if split_rows is None else split_rows[positions].astype(np.int64)), real

    def sequence(self) -> Int64s:
        """All rows, block after block in the order drawn for the blocks; windows are cut from it."""
        split_rows = self.split_rows()
        every = np.arange(self.grid.rows, dtype=np.int64)
        rows = every if split_rows is None else split_rows[: self.grid.rows].astype(np.int64)
        if not len(rows):
            return rows
        blocks = rows // self.block
        count = int(blocks[-1]) + 1
        place = permute(np.arange(count, dtype=np.int64), count, self._named_key("blocks"))
        return rows[np.argsort(place[blocks], kind="stable")]
