"""Summary statistics of a set of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from .histogram import Histogram

PIECE = 1 << 16
"""Values processed at a time, so that temporary arrays stay in the CPU's cache."""


@dataclass(frozen=True)
class Summary:
    """Summary statistics of a set of numbers.

    `zeros`, `minimum`, `maximum`, `mean`, `std` and `histogram` describe finite values only.

    Attributes
    ----------
    count : int
        Number of values, including NaN and infinities.
    nan, inf, zeros : int
        Number of NaN, of infinities (of either sign), and of zeros.
    minimum, maximum : int or float or None
        None if no value is finite.
    mean, std : float or None
        `std` is the population standard deviation (``ddof=0``). None if no value is finite, or on overflow of float64.
    histogram : Histogram or None
        None if no value is finite.
    """

    count: int
    nan: int
    inf: int
    zeros: int
    minimum: int | float | None
    maximum: int | float | None
    mean: float | None
    std: float | None
    histogram: Histogram | None


def exact_moments(count: int, first: int, second: int, scale: int = 0) -> tuple[float, float]:
    """Mean and standard deviation (``ddof=0``) from integer sums, rounded only at the end.

    Parameters
    ----------
    count : int
        Number of values.
    first, second : int
        Sum of the values and of their squares, where values are given in units of 2**-scale.
    scale : int
        See `first`.
    """
    mean = Fraction(first, count << scale)
    variance = Fraction(count * second - first * first, (count * count) << (2 * scale))
    return float(mean), math.sqrt(variance)
