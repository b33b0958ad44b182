"""A one-pass histogram: the bin width is a power of two, and bins are merged in pairs as the range grows.

Bin i covers i·2ᵏ ≤ value < (i+1)·2ᵏ. Two neighbouring bins are exactly one bin of exponent k+1. So every value is in
the right bin, the range need not be known in advance, and the result does not depend on the order of the values.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 256
"""Maximum number of bins. There are more than half as many, unless the range is too small for the narrowest bins."""

_MANTISSA_BITS = 52
_SMALLEST_EXPONENT = -1074
_SAFE_EXPONENT = 1000
"""Up to this exponent k, both 2**k and 2**-k are normal floats."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins.

    Attributes
    ----------
    edges : list of int or of float
        Ascending edges, one more than `counts`. A bin includes its left edge but not its right edge.
    counts : list of int
        Number of values in each bin.
    """

    edges: list[int] | list[float]
    counts: list[int]


class HistogramAccumulator:
    """Accumulates a histogram of finite values.

    Parameters
    ----------
    whole : bool
        Whether values are integers; then no bin is narrower than 1.
    """

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self._exponent: int | None = None
        self._first = 0
        self._counts = np.zeros(0, np.int64)

    def add(self, values: npt.NDArray[Any], low: Any, high: Any, counts: Int64s | None = None) -> None:
        """Count values.

        Parameters
        ----------
        values : (n,) of any integer dtype, or float64; n ≥ 1
        low, high : int or float
            Minimum and maximum of `values`, as Python numbers.
        counts : (n,) int64, optional
            How often each value occurs. Default: once.
        """
        self._widen(low, high)
        assert self._exponent is not None
        first = self._index(low)
        places = (self._scaled(values, low < 0) - values.dtype.type(first)).astype(np.intp)
        bin_counts = np.bincount(places) if counts is None else np.zeros(self._index(high) - first + 1, np.int64)
        if counts is not None:
            np.add.at(bin_counts, places, counts)
        self._add(first, bin_counts)

    def merge(self, other: HistogramAccumulator) -> None:
        """Add the counts of `other`."""
        if other._exponent is None:
            return
        exponent = other._exponent
        other = copy(other)
        if self._exponent is None:
            self._exponent, self._first, self._counts = exponent, other._first, other._counts.copy()
            return
        exponent = max(self._exponent, exponent)
        self._coarsen(exponent)
        other._coarsen(exponent)
        exponent += _excess(min(self._first, other._first), max(self._last, other._last))
        self._coarsen(exponent)
        other._coarsen(exponent)
        self._add(other._first, other._counts)

    def histogram(self) -> Histogram | None:
        """The histogram; None if nothing was counted."""
        if self._exponent is None:
            return None
        exponent, first = self._exponent, self._first
        if len(self._counts) == 1 and not self._whole:
            # A single bin is as narrow as one float. Widen it to the bin width of a histogram from 0 to the value.
            value = math.ldexp(first, exponent)
            wide = 0 if value == 0 else max(exponent, math.frexp(value)[1] - 8)
            first >>= wide - exponent
            exponent = wide
        indices = range(first, first + len(self._counts) + 1)
        if self._whole:
            return Histogram([index << exponent for index in indices], self._counts.tolist())
        return Histogram([_ldexp(index, exponent) for index in indices], self._counts.tolist())

    @property
    def _last(self) -> int:
        return self._first + len(self._counts) - 1

    def _index(self, value: Any) -> int:
        assert self._exponent is not None
        return _floor_index(value, self._exponent)

    def _scaled(self, values: npt.NDArray[Any], some_below_zero: bool) -> npt.NDArray[Any]:
        """Bin index of each value, in the dtype of `values`."""
        assert self._exponent is not None
        if values.dtype.kind in "iu":
            shifted: npt.NDArray[Any] = values >> values.dtype.type(self._exponent)
            return shifted
        if abs(self._exponent) < _SAFE_EXPONENT:
            places: npt.NDArray[Any] = np.floor(values * 2.0**-self._exponent)
        else:
            places = np.floor(np.ldexp(values, -self._exponent))
        if self._exponent > 0 and some_below_zero:
            # Tiny negative values underflow to -0.0, whose bin would be 0. They belong to the bin below zero.
            places[(values < 0) & (places == 0)] = -1
        return places

    def _widen(self, low: Any, high: Any) -> None:
        """Widen the bins until this range fits too."""
        exponent = 0 if self._whole else _narrowest(low, high)
        if self._exponent is not None:
            exponent = max(exponent, self._exponent)
        begin, end = _floor_index(low, exponent), _floor_index(high, exponent)
        if self._exponent is None:
            self._exponent = exponent + _excess(begin, end)
            return
        shift = exponent - self._exponent
        self._coarsen(exponent + _excess(min(begin, self._first >> shift), max(end, self._last >> shift)))

    def _coarsen(self, exponent: int) -> None:
        """Merge bins until their width is 2**exponent."""
        assert self._exponent is not None
        shift = exponent - self._exponent
        if not shift:
            return
        indices = [(self._first + number) >> shift for number in range(len(self._counts))]
        counts = np.zeros(indices[-1] - indices[0] + 1, np.int64)
        np.add.at(counts, [index - indices[0] for index in indices], self._counts)
        self._exponent, self._first, self._counts = exponent, indices[0], counts

    def _add(self, first: int, bin_counts: Int64s) -> None:
        if not len(self._counts):
            self._first, self._counts = first, bin_counts.astype(np.int64)
            return
        begin, end = min(self._first, first), max(self._last + 1, first + len(bin_counts))
        if end - begin != len(self._counts):
            counts = np.zeros(end - begin, np.int64)
            counts[self._first - begin :][: len(self._counts)] = self._counts
            self._first, self._counts = begin, counts
        self._counts[first - begin :][: len(bin_counts)] += bin_counts


def _excess(begin: int, end: int) -> int:
    """How many times bins begin … end must be merged in pairs until at most `BINS` remain."""
    shift = 0
    while (end >> shift) - (begin >> shift) >= BINS:
        shift += 1
    return shift


def _floor_index(value: Any, exponent: int) -> int:
    """``floor(value / 2**exponent)``, without rounding."""
    numerator, denominator = value.as_integer_ratio()
    below = denominator << max(0, exponent)
    return int((numerator << max(0, -exponent)) // below)


def _narrowest(low: float, high: float) -> int:
    """Exponent of the narrowest bins for a range: their width is the spacing of floats at its greatest magnitude."""
    greatest = max(abs(low), abs(high))
    return max(_SMALLEST_EXPONENT, math.frexp(greatest)[1] - 1 - _MANTISSA_BITS) if greatest else _SMALLEST_EXPONENT


def _ldexp(index: int, exponent: int) -> float:
    """``index * 2**exponent``, or the largest finite float of that sign on overflow."""
    try:
        return math.ldexp(index, exponent)
    except OverflowError:
        return math.copysign(np.finfo(np.float64).max, index)
