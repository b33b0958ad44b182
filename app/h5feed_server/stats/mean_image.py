"""The elementwise mean of all samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_ITEMS = 1 << 22
"""Maximum number of values per sample. Larger samples get no mean image."""

_BYTE_ROWS = 257
"""Sums of this many bytes fit into uint16 (257 · 255 = 65,535), which numpy adds fastest."""


class MeanImage:
    """Accumulates the mean of samples.

    Parameters
    ----------
    sample_shape : tuple of int
    dtype : numpy dtype
        Dtype of the samples. Integers are added exactly if the sums fit into int64, otherwise in float64. NaN and
        infinities of floats are left out.
    rows : int
        Maximum number of samples.
    """

    def __init__(self, sample_shape: tuple[int, ...], dtype: np.dtype[Any], rows: int) -> None:
        self._exact = dtype.kind in "biu" and 8 * dtype.itemsize + rows.bit_length() < 64
        self._sums: npt.NDArray[Any] = np.zeros(sample_shape, np.int64 if self._exact else np.float64)
        self._rows = 0
        self._missing: npt.NDArray[np.int64] | None = None

    @staticmethod
    def suits(sample_shape: tuple[int, ...]) -> bool:
        """Whether samples of this shape are small enough for a mean image."""
        return 0 < math.prod(sample_shape) <= MAX_ITEMS

    def add(self, block: npt.NDArray[Any]) -> None:
        """Add samples, (rows, *sample)."""
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
        """The mean, (*sample,) float32. NaN where no sample is finite."""
        counts = self._rows if self._missing is None else self._rows - self._missing
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return np.asarray(self._sums / counts, np.float32)
