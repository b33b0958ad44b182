"""Epochs drawn with repeats: every class equally often, or every row in proportion to its weight.

The row at a position of the epoch is a pure function of the position, so any batch can be computed alone. There is no
state. Only the rows sorted by class, or the cumulative sum of the weights, are held in memory.
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
    """Draws each class equally often.

    Positions are divided into turns. Each turn has every class once, in a random order of its own. The rows of a class
    are drawn in passes. Each pass has every row of the class once, in a random order of its own. As a result, to within
    one row:

    - every batch has equal shares of all classes;
    - an epoch of E rows has each of C classes E/C times;
    - all rows of a class are drawn equally often.

    Attributes
    ----------
    rows : (n,) int32
        Row ids, sorted by class.
    starts, sizes : (classes,) int64
        Start in `rows` and number of rows of each class that has rows.
    """

    rows: Rows
    starts: Int64s
    sizes: Int64s

    @classmethod
    def of(cls, rows: Rows | None, codes: Codes) -> Balanced:
        """Build the table for these rows.

        Parameters
        ----------
        rows : (n,) int32 or None
            Row ids. None: all rows, 0 … n-1.
        codes : (n,) unsigned int
            Class of each of these rows.
        """
        grouped, bounds = group(codes)
        sizes = np.diff(bounds)
        present = np.flatnonzero(sizes)
        return cls(grouped if rows is None else rows[grouped], bounds[present], sizes[present])

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.starts.nbytes + self.sizes.nbytes

    def draw(self, positions: Int64s, epoch_rows: int, key: bytes | None) -> Int64s:
        """Row ids at positions of the epoch.

        Parameters
        ----------
        positions : (k,) int64
        epoch_rows : int
            Not used; for the same signature as `Weighted.draw`.
        key : bytes or None
            Key of the epoch's order. None: do not shuffle; classes alternate, and rows of a class ascend.

        Returns
        -------
        (k,) int64
        """
        classes = len(self.sizes)
        turns, chosen = np.divmod(positions, classes)
        if key is not None:
            chosen = permute_each(chosen, np.full(len(chosen), classes), key, turns)
        sizes = self.sizes[chosen]
        passes, places = np.divmod(turns, sizes)
        if key is not None:
            # Negative names select other permutations than the turns, whose names are 0 or more.
            places = permute_each(places, sizes, key, -1 - (passes * classes + chosen))
        return np.asarray(self.rows[self.starts[chosen] + places], np.int64)


@dataclass(frozen=True)
class Weighted:
    """Draws each row in proportion to its weight.

    Stratified resampling (Kitagawa, 1996): the sum of the weights is cut into as many equal pieces as the epoch has
    rows, and one point is drawn in each piece. The number of times that a row is drawn differs from its expected number
    by less than two. With independent draws, it would differ by about the square root of that number.

    Attributes
    ----------
    rows : (n,) int32 or None
        Row ids. None: all rows.
    ends : (n,) float64
        Cumulative sum of the weights.
    """

    rows: Rows | None
    ends: npt.NDArray[np.float64]

    @property
    def nbytes(self) -> int:
        return self.ends.nbytes + (0 if self.rows is None else self.rows.nbytes)

    def draw(self, positions: Int64s, epoch_rows: int, key: bytes | None) -> Int64s:
        """Row ids at positions of the epoch.

        Parameters
        ----------
        positions : (k,) int64
        epoch_rows : int
            Rows of the epoch.
        key : bytes or None
            Key of the epoch's order. None: do not shuffle; rows ascend, and points are the middles of the pieces.

        Returns
        -------
        (k,) int64
        """
        if key is None:
            points = positions + 0.5
        else:
            pieces = permute(positions, epoch_rows, key)
            points = pieces + uniform(pieces, key[8:])
        drawn = np.searchsorted(self.ends, points / epoch_rows * self.ends[-1], side="right")
        # Rounding may give a point at the very end, past the last row with a weight above 0.
        last = np.searchsorted(self.ends, self.ends[-1], side="left")
        places = np.minimum(drawn, last)
        return np.asarray(places if self.rows is None else self.rows[places], np.int64)
