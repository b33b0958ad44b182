"""Numbers that are added up block by block: count, extremes, mean, standard deviation, histogram.

Integers and float16 are added up exactly, so any order of the blocks gives the same to the last bit; float32 and
float64 by the pairwise formula of Chan, Golub and LeVeque (1979), in float64 and in the order of the blocks.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from .narrow_numbers import TableAccumulator
from .summary import Summary
from .wide_numbers import FloatAccumulator, IntAccumulator

_TABLE_CHANNELS = 16
"""16-bit values of so many channels are counted in tables of 65,536."""


class Accumulator(Protocol):
    """Adds up the values of one dtype, per channel."""

    def add(self, values: npt.NDArray[Any]) -> None:
        """Add (n, channels) values, C-contiguous."""

    def merge(self, other: Self) -> None:
        """Add what `other` has added up, as if its values came after those here."""

    def summaries(self) -> list[Summary]:
        """One for each channel."""

    def overall(self) -> Summary:
        """Of all channels together."""


def accumulator_for(dtype: np.dtype[Any], channels: int) -> Accumulator:
    """An empty accumulator for values of a numeric dtype, little-endian."""
    if dtype.itemsize == 1 or (dtype.itemsize == 2 and channels <= _TABLE_CHANNELS):
        return TableAccumulator(dtype, channels)
    if dtype.kind in "iu":
        return IntAccumulator(dtype, channels)
    return FloatAccumulator(channels)
