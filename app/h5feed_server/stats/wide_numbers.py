"""Statistics of 32-bit and 64-bit values, and of 16-bit values with many channels, from sums and sums of squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from .histogram import HistogramAccumulator
from .summary import PIECE, Summary, exact_moments


class _Channel(Protocol):
    """Accumulates the values of one channel."""

    def merge(self, other: Self) -> None: ...

    def summary(self) -> Summary: ...


C = TypeVar("C", bound=_Channel)


class _ByChannel(Generic[C]):
    """Common base of the accumulators of wide numbers: holds one `kind` per channel."""

    def __init__(self, kind: Callable[[], C], channels: int) -> None:
        self._kind = kind
        self._channels = [kind() for _ in range(channels)]

    def merge(self, other: Self) -> None:
        for mine, theirs in zip(self._channels, other._channels, strict=True):
            mine.merge(theirs)

    def summaries(self) -> list[Summary]:
        return [channel.summary() for channel in self._channels]

    def overall(self) -> Summary:
        merged = self._kind()
        for channel in self._channels:
            merged.merge(channel)
        return merged.summary()


class IntAccumulator(_ByChannel["_IntChannel"]):
    """An exact `Accumulator` of integers of 16 to 64 bits: sums and products of their 16-bit digits fit into int64."""

    def __init__(self, dtype: np.dtype[Any], channels: int) -> None:
        self._dtype = dtype
        self._digits = dtype.itemsize // 2
        # Signed values are shifted to 0 … 2ⁿ-1 by flipping their highest bit.
        self._shift = 1 << (8 * dtype.itemsize - 1) if dtype.kind == "i" else 0
        super().__init__(_IntChannel, channels)

    def add(self, values: npt.NDArray[Any]) -> None:
        scratch = np.empty((self._digits, min(PIECE, len(values))), np.int64)
        for begin in range(0, len(values), PIECE):
            for number, channel in enumerate(self._channels):
                piece = np.ascontiguousarray(values[begin : begin + PIECE, number])
                stored = piece.view("<u2").reshape(-1, self._digits)
                # digits: (digits, n), lowest digit first
                digits = scratch[:, : len(piece)]
                digits[...] = stored.T
                if self._shift:
                    # In two's complement, flipping the highest bit adds 2¹⁵ to the highest digit, modulo 2¹⁶.
                    digits[-1] ^= 1 << 15
                low, high = piece.min().item(), piece.max().item()
                channel.histogram.add(piece, low, high)
                self._take(channel, digits, low, high, len(piece) - int(np.count_nonzero(piece)))

    def _take(self, channel: _IntChannel, digits: npt.NDArray[np.int64], low: int, high: int, zeros: int) -> None:
        count = digits.shape[1]
        first = sum(int(digit.sum()) << (16 * place) for place, digit in enumerate(digits))
        second = 0
        for i, one in enumerate(digits):
            for j, other in enumerate(digits[: i + 1]):
                # At most 2¹⁶ products below 2³²: their sum fits into int64.
                second += int(np.dot(one, other)) << (16 * (i + j) + (i != j))
        shift = self._shift
        channel.include(count, first - count * shift, second - 2 * shift * first + count * shift * shift, zeros)
        channel.low = low if channel.low is None else min(channel.low, low)
        channel.high = high if channel.high is None else max(channel.high, high)


@dataclass
class _IntChannel:
    histogram: HistogramAccumulator = field(default_factory=lambda: HistogramAccumulator(whole=True))
    count: int = 0
    first: int = 0
    second: int = 0
    zeros: int = 0
    low: int | None = None
    high: int | None = None

    def include(self, count: int, first: int, second: int, zeros: int) -> None:
        self.count += count
        self.first += first
        self.second += second
        self.zeros += zeros

    def merge(self, other: _IntChannel) -> None:
        if other.low is None or other.high is None:
            return
        self.include(other.count, other.first, other.second, other.zeros)
        self.histogram.merge(other.histogram)
        self.low = other.low if self.low is None else min(self.low, other.low)
        self.high = other.high if self.high is None else max(self.high, other.high)

    def summary(self) -> Summary:
        if not self.count:
            return Summary(0, 0, 0, 0, None, None, None, None, None)
        mean, std = exact_moments(self.count, self.first, self.second)
        return Summary(self.count, 0, 0, self.zeros, self.low, self.high, mean, std, self.histogram.histogram())


class FloatAccumulator(_ByChannel["_FloatChannel"]):
    """An `Accumulator` of floats, in float64."""

    def __init__(self, channels: int) -> None:
        super().__init__(_FloatChannel, channels)

    def add(self, values: npt.NDArray[Any]) -> None:
        for begin in range(0, len(values), PIECE):
            for number, channel in enumerate(self._channels):
                channel.add(values[begin : begin + PIECE, number].astype(np.float64))


@dataclass
class _FloatChannel:
    """Statistics of one channel of floats.

    Attributes
    ----------
    finite : int
        Number of finite values.
    mean, squares : float
        Mean of the finite values, and sum of their squared deviations from it.
    """

    histogram: HistogramAccumulator = field(default_factory=lambda: HistogramAccumulator(whole=False))
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    finite: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Add values, (n,)."""
        low, high = values.min().item(), values.max().item()
        # If any value is NaN, so are the minimum and maximum.
        if not (math.isfinite(low) and math.isfinite(high)):
            nan = int(np.count_nonzero(np.isnan(values)))
            finite = values[np.isfinite(values)]
            self.nan += nan
            self.inf += len(values) - len(finite) - nan
            values = finite
            if not len(values):
                return
            low, high = values.min().item(), values.max().item()
        self.zeros += len(values) - int(np.count_nonzero(values))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.histogram.add(values, low, high)
        with np.errstate(over="ignore", invalid="ignore"):
            mean = values.mean()
            deviations = values - mean
            # Correct the mean and the squares for the rounding error of the mean.
            rest = deviations.mean()
            # Not with BLAS: its threads wait for each other if other threads use the CPUs.
            squares = np.einsum("i,i->", deviations, deviations) - len(values) * rest * rest
            self._include(len(values), float(mean + rest), float(squares))

    def _include(self, count: int, mean: float, squares: float) -> None:
        total = self.finite + count
        difference = mean - self.mean
        self.squares += squares + difference * difference * (self.finite * count / total)
        self.mean += difference * (count / total)
        self.finite = total

    def merge(self, other: _FloatChannel) -> None:
        self.nan += other.nan
        self.inf += other.inf
        self.zeros += other.zeros
        if other.finite:
            self.histogram.merge(other.histogram)
            self.low, self.high = min(self.low, other.low), max(self.high, other.high)
            self._include(other.finite, other.mean, other.squares)

    def summary(self) -> Summary:
        count = self.nan + self.inf + self.finite
        if not self.finite:
            return Summary(count, self.nan, self.inf, self.zeros, None, None, None, None, None)
        std = math.sqrt(max(0.0, self.squares) / self.finite) if math.isfinite(self.squares) else math.inf
        return Summary(
            count,
            self.nan,
            self.inf,
            self.zeros,
            self.low,
            self.high,
            self.mean if math.isfinite(self.mean) else None,
            std if math.isfinite(std) else None,
            self.histogram.histogram(),
        )
