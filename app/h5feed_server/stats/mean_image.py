"""The mean of all samples, place by place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_ITEMS = 1 << 22
"""Numbers of a sample: of greater ones no mean image is made."""

_BYTE_ROWS = 257
"""Bytes of so many rows add up within 16 bits, which numpy does fastest."""


class MeanImage:
    """Adds up samples.

    Parameters
    ----------
    sample_shape : tuple of int
    dtype : numpy dtype
        Integers are added up exactly, where 64 bits hold that; of floats, NaN and infinities are left out.
    rows : int
        Samples at most.
    """

    def __init__(self, sample_shape: tuple[int, ...], dtype: np.dtype[Any], rows: int) -> None:
        self._exact = dtype.kind in "biu" and 8 * dtype.itemsize + rows.bit_length() < 64
        self._sums: npt.NDArray[Any] = np.zeros(sample_shape, np.int64 if self._exact else np.float64)
        self._rows = 0
        self._missing: npt.NDArray[np.int64] | None = None

    @staticmethod
    def suits(sample_shape: tuple[int, ...]) -> bool:
        """Whether samples are small enough."""
        return 0 < math.prod(sample_shape) <= MAX_ITEMS

    def add(self, block: npt.NDArray[Any]) -> None:
        """Add (rows, *sample)."""
        self._rows += len(block)
        if block.dtype.itemsize == 1 and block.dtype.kind == "u":
            for begin in range(0, len(block), _BYTE_ROWS):
                self._sums += np.add.reduce(block[begin : begin + _BYTE_ROWS], axis=0, dtype=np.uint16)
            return
        with np.errstate(invalid="ignore", over="ignore"):
            sums = np.add.reduce(block, axis=0, dtype=self._sums.dtype)
        if not self._exact and not np.isfinite(sums).all():
            finite = np.isfinite(block)
            sums = np.add.reduce(block, axis=0, dtype=self._sums.dtype, where=finite)
            missing = len(block) - np.count_nonzero(finite, axis=0)
            self._missing = missing if self._missing is None else self._missing + missing
        self._sums += sums

    def merge(self, other: MeanImage) -> None:
        self._sums += other._sums
        self._rows += other._rows
        if other._missing is not None:
            self._missing = other._missing if self._missing is None else self._missing + other._missing

    def mean(self) -> npt.NDArray[np.float32]:
        """(*sample,) float32; NaN where nothing finite is."""
        counts = self._rows if self._missing is None else self._rows - self._missing
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return np.asarray(self._sums / counts, np.float32)
