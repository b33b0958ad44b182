"""Sparse matrices as they are stored, and the layout of their copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from h5feed.stored.column import Segment

BLOCK = 4096
"""Bytes that are read and checked together."""


@dataclass(frozen=True)
class ByColumns:
    """A matrix that is stored by columns.

    Attributes
    ----------
    data : Segment
        The values. Its offsets say where those of each column begin.
    indices : Segment
        The row of each value.
    rows, columns : int
    """

    data: Segment
    indices: Segment
    rows: int
    columns: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values of the copy."""
        return np.dtype(self.data.array.dtype).newbyteorder("<")

    @property
    def index_dtype(self) -> np.dtype[Any]:
        """Of the column indices of the copy."""
        return np.dtype("<i4" if self.columns <= np.iinfo(np.int32).max else "<i8")

    @property
    def values(self) -> int:
        """Number of stored values."""
        return self.data.array.rows

    @property
    def indices_begin(self) -> int:
        """Where the column indices begin in the copy, behind the values."""
        return _in_blocks(self.values * self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Size of the copy."""
        return self.indices_begin + _in_blocks(self.values * self.index_dtype.itemsize)


def _in_blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
