"""Sets of numbers of one dtype, as sorted intervals. Every condition on a field of numbers is such a set.

Bounds are first converted to values of the field's dtype, so that comparisons never mix types: ``x < 2.5`` for integers
becomes ``x <= 2``, and ``x < 3.0`` for float32 becomes ``x <=`` the largest float32 below 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Number = int | float

Interval = tuple[Number, Number]
"""Lowest and highest value, inclusive."""


class Integers:
    """The integers of a dtype; False and True are 0 and 1."""

    has_nan = False

    def __init__(self, dtype: np.dtype[Any]) -> None:
        bounds = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        self.least, self.most = map(int, bounds)

    def up(self, value: Number) -> int:
        """The smallest integer of the dtype >= `value`; `most` + 1 if there is none."""
        if not self.least <= value <= self.most:
            return self.least if value < self.least else self.most + 1
        return math.ceil(value)

    def down(self, value: Number) -> int:
        """The largest integer of the dtype <= `value`; `least` - 1 if there is none."""
        if not self.least <= value <= self.most:
            return self.least - 1 if value < self.least else self.most
        return math.floor(value)

    def above(self, value: Number) -> int:
        """The next integer."""
        return int(value) + 1

    def below(self, value: Number) -> int:
        """The previous integer."""
        return int(value) - 1


class Floats:
    """The floats of a dtype; bfloat16 is compared as float32, and bounds are numbers of bfloat16."""

    has_nan = True
    least, most = -math.inf, math.inf

    def __init__(self, dtype: np.dtype[Any], *, is_bfloat16: bool = False) -> None:
        self._type = dtype.type
        self._is_bfloat16 = is_bfloat16

    def up(self, value: Number) -> float:
        """`value` rounded to the dtype, as numpy 2 does with a Python number: ``x = 0.1`` finds the nearest float32."""
        try:
            number = float(value)
        except OverflowError:
            number = math.inf if value > 0 else -math.inf
        with np.errstate(over="ignore", under="ignore"):
            rounded = self._type(number)
        if self._is_bfloat16 and np.isfinite(rounded):
            bits = int(rounded.view(np.uint32))
            # Round half to even. Numbers that are too large become infinite.
            rounded = np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
        # -0.0 and 0.0 are equal, so they get the same text.
        return float(rounded) + 0.0

    down = up

    def above(self, value: Number) -> float:
        """The next float of the dtype; NaN after infinity."""
        if value == math.inf:
            return math.nan
        following = np.nextafter(self._type(value), self._type(math.inf))
        if self._is_bfloat16:
            # Cut off the lower half of the float32: towards zero, so below zero that is up.
            bits = int(following.view(np.uint32)) + (0xFFFF if following > 0 else 0)
            following = np.uint32(bits & 0xFFFF0000).view(np.float32)
        return float(following) + 0.0

    def below(self, value: Number) -> float:
        """The previous float of the dtype; NaN before minus infinity."""
        return -self.above(-value) + 0.0


Scale = Integers | Floats
"""The values of a dtype."""


@dataclass(frozen=True)
class Numbers:
    """A set of numbers of a dtype.

    Attributes
    ----------
    intervals : tuple of Interval
        Sorted, with gaps in between.
    nan : bool
        Whether NaN belongs to the set.
    """

    intervals: tuple[Interval, ...]
    nan: bool = False

    @classmethod
    def of(cls, scale: Scale, intervals: Iterable[Interval], nan: bool = False) -> Numbers:
        """The union of intervals, in any order. Intervals with a low bound above the high bound are empty."""
        merged: list[Interval] = []
        # An interval with a NaN bound is empty, too: the comparison is false.
        for low, high in sorted(one for one in intervals if one[0] <= one[1]):
            if merged and (low <= merged[-1][1] or low == scale.above(merged[-1][1])):
                merged[-1] = merged[-1][0], max(high, merged[-1][1])
            else:
                merged.append((low, high))
        return cls(tuple(merged), nan and scale.has_nan)

    def inverted(self, scale: Scale) -> Numbers:
        """The complement."""
        return Numbers.of(scale, _gaps(self.intervals, scale), not self.nan)

    def common(self, other: Numbers, scale: Scale) -> Numbers:
        """The intersection."""
        gaps = [*_gaps(self.intervals, scale), *_gaps(other.intervals, scale)]
        apart = Numbers.of(scale, gaps)
        return Numbers.of(scale, _gaps(apart.intervals, scale), self.nan and other.nan)

    def holds(self, values: npt.NDArray[Any], scale: Scale) -> npt.NDArray[np.bool_]:
        """Whether each value belongs to the set, (n,) bool.

        Parameters
        ----------
        values : (n,) of the scale's dtype
        """
        if not self.intervals:
            found = np.zeros(len(values), np.bool_)
        elif len(self.intervals) <= _FEW:
            found = _between(values, *self.intervals[0], scale)
            for low, high in self.intervals[1:]:
                found |= _between(values, low, high, scale)
        elif values.dtype.kind in "iu" and values.itemsize <= 2:
            # A table of all values. Negative values are its last entries, as negative indices expect.
            every = np.arange(1 << 8 * values.itemsize).astype(values.dtype)
            found = self._searched(every)[values]
        else:
            found = self._searched(values)
        if self.nan:
            found |= values != values
        return found

    def _searched(self, values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        lows, highs = (np.array(bounds, values.dtype) for bounds in zip(*self.intervals, strict=True))
        places = np.searchsorted(lows, values, side="right") - 1
        # Values below the first interval get place -1, the last interval. Checking its low bound, too, excludes them.
        found: npt.NDArray[np.bool_] = (lows[places] <= values) & (values <= highs[places])
        return found


_FEW = 4
"""Maximum number of intervals to compare one by one, which is then faster than a binary search."""


def _between(values: npt.NDArray[Any], low: Number, high: Number, scale: Scale) -> npt.NDArray[np.bool_]:
    if low == high:
        return np.asarray(values == values.dtype.type(low))
    if low == scale.least and high == scale.most:
        return np.asarray(values == values) if scale.has_nan else np.ones(len(values), np.bool_)
    if low == scale.least:
        return np.asarray(values <= values.dtype.type(high))
    if high == scale.most:
        return np.asarray(values >= values.dtype.type(low))
    return np.asarray((values >= values.dtype.type(low)) & (values <= values.dtype.type(high)))


def _gaps(intervals: Sequence[Interval], scale: Scale) -> Iterator[Interval]:
    """The intervals before, between and after the given ones; some may be empty."""
    low: Number = scale.least
    for first, last in intervals:
        yield low, scale.below(first)
        low = scale.above(last)
    yield low, scale.most
