"""Accumulates statistics of numbers block by block: count, extremes, mean, standard deviation and histogram.

Integers, and float16 with up to `_TABLE_CHANNELS` channels, are accumulated exactly, so the order of the blocks does
not matter. Other floats use the pairwise formula of Chan, Golub and LeVeque (1979), in float64, and depend in the last
digits on the order of the blocks.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from .narrow_numbers import TableAccumulator
from .summary import Summary
from .wide_numbers import FloatAccumulator, IntAccumulator

_TABLE_CHANNELS = 16
"""Up to this many channels, 16-bit values are counted in tables with 65,536 entries per channel."""


class Accumulator(Protocol):
    """Accumulates values of one dtype, per channel."""

    def add(self, values: npt.NDArray[Any]) -> None:
        """Add values, (n, channels), C-contiguous."""

    def merge(self, other: Self) -> None:
        """Add the values of `other`, as if they followed the values here."""

    def summaries(self) -> list[Summary]:
        """The summary of each channel."""

    def overall(self) -> Summary:
        """The summary of all channels together."""


def accumulator_for(dtype: np.dtype[Any], channels: int) -> Accumulator:
    """An empty accumulator for a little-endian numeric dtype."""
    if dtype.itemsize == 1 or (dtype.itemsize == 2 and channels <= _TABLE_CHANNELS):
        return TableAccumulator(dtype, channels)
    if dtype.kind in "iu":
        return IntAccumulator(dtype, channels)
    return FloatAccumulator(channels)
