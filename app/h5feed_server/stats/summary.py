"""What is known of a set of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from .histogram import Histogram

PIECE = 1 << 16
"""Values looked at together: what is made of them stays in the processor's cache."""


@dataclass(frozen=True)
class Summary:
    """What is known of a set of numbers.

    Attributes
    ----------
    count : int
        All of them, with NaN and infinities.
    nan, inf, zeros : int
    minimum, maximum : int or float or None
        Of the finite ones, as the four that follow; None where there is none.
    mean, std : float or None
        std is that of the population (``ddof=0``). None also where it is beyond float64.
    histogram : Histogram or None
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
    """Mean and standard deviation of whole numbers of 2**-scale, from their sum and that of their squares."""
    mean = Fraction(first, count << scale)
    variance = Fraction(count * second - first * first, (count * count) << (2 * scale))
    return float(mean), math.sqrt(variance)
