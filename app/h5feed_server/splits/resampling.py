"""Epochs that are drawn with repeats: every class equally often, or every row as often as its weight says.

What comes at a position is a pure function of it, so that any batch can be asked for alone; there is no state, and
nothing is kept but the rows by class, or the running sum of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from h5feed.order import permute, permute_each, uniform

from .as_sklearn import Codes, group

Int64s = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Balanced:
    """Each class equally often.

    Positions go in turns: in each, every class comes once, in an order drawn for that turn. Within a class, rows come
    in passes: each once before any comes again, in an order drawn for that pass. So batches hold every class within one
    row of its share, an epoch of E rows each of C classes E/C times, and each row of a class as often as the others,
    within one.

    Attributes
    ----------
    rows : (n,) int32
        Row ids, class after class.
    starts, sizes : (classes,) int64
        Of the classes that have rows.
    """

    rows: Rows
    starts: Int64s
    sizes: Int64s

    @classmethod
    def of(cls, rows: Rows | None, codes: Codes) -> Balanced:
        """Of these rows (None: all), whose classes are `codes`, (n,)."""
        grouped, bounds = group(codes)
        sizes = np.diff(bounds)
        present = np.flatnonzero(sizes)
        return cls(grouped if rows is None else rows[grouped], bounds[present], sizes[present])

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.starts.nbytes + self.sizes.nbytes

    def draw(self, positions: Int64s, epoch_rows: int, key: bytes | None) -> Int64s:
        """Row ids at positions of the epoch, (k,) int64; `key` None: classes in turn, and ascending rows."""
        classes = len(self.sizes)
        turns, chosen = np.divmod(positions, classes)
        if key is not None:
            chosen = permute_each(chosen, np.full(len(chosen), classes), key, turns)
        sizes = self.sizes[chosen]
        passes, places = np.divmod(turns, sizes)
        if key is not None:
            # No turn is named so: names of turns are not negative.
            places = permute_each(places, sizes, key, -1 - (passes * classes + chosen))
        return np.asarray(self.rows[self.starts[chosen] + places], np.int64)


@dataclass(frozen=True)
class Weighted:
    """Each row as often as its weight says.

    The sum of the weights is cut into as many equal pieces as the epoch has rows, and a point is drawn in each
    (stratified resampling; Kitagawa, 1996): a row comes as often as its share of the epoch, within less than two, where
    independent draws would be off by its square root.

    Attributes
    ----------
    rows : (n,) int32 or None
        Row ids; None: all.
    ends : (n,) float64
        Running sum of the weights.
    """

    rows: Rows | None
    ends: npt.NDArray[np.float64]

    @property
    def nbytes(self) -> int:
        return self.ends.nbytes + (0 if self.rows is None else self.rows.nbytes)

    def draw(self, positions: Int64s, epoch_rows: int, key: bytes | None) -> Int64s:
        """Row ids at positions of the epoch, (k,) int64; `key` None: ascending."""
        if key is None:
            points = positions + 0.5
        else:
            pieces = permute(positions, epoch_rows, key)
            points = pieces + uniform(pieces, key[8:])
        drawn = np.searchsorted(self.ends, points / epoch_rows * self.ends[-1], side="right")
        # Rounding may reach the very end, where only rows of no weight would lie.
        last = np.searchsorted(self.ends, self.ends[-1], side="left")
        places = np.minimum(drawn, last)
        return np.asarray(places if self.rows is None else self.rows[places], np.int64)
