"""Values of 32 or 64 bits, and 16-bit ones of many channels: sums of them and of their squares."""

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
    """Adds up the values of one channel."""

    def merge(self, other: Self) -> None: ...

    def summary(self) -> Summary: ...


C = TypeVar("C", bound=_Channel)


class _ByChannel(Generic[C]):
    """What accumulators of wide numbers have in common: one of `kind` for each channel."""

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
    """Integers of 16 to 64 bits, exactly: by the sums and products of their 16-bit digits, which 64 bits hold."""

    def __init__(self, dtype: np.dtype[Any], channels: int) -> None:
        self._dtype = dtype
        self._digits = dtype.itemsize // 2
        # Signed ones are shifted to 0 … 2ⁿ-1 by turning their highest bit.
        self._shift = 1 << (8 * dtype.itemsize - 1) if dtype.kind == "i" else 0
        super().__init__(_IntChannel, channels)

    def add(self, values: npt.NDArray[Any]) -> None:
        scratch = np.empty((self._digits, min(PIECE, len(values))), np.int64)
        for begin in range(0, len(values), PIECE):
            for number, channel in enumerate(self._channels):
                piece = np.ascontiguousarray(values[begin : begin + PIECE, number])
                stored = piece.view("<u2").reshape(-1, self._digits)
                # digits: (digits, n), the lowest first
                digits = scratch[:, : len(piece)]
                digits[...] = stored.T
                if self._shift:
                    # The highest digit is two's complement: turning its bit adds 2¹⁵ to it.
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
                # Products below 2³², of 2¹⁶ values: far within 64 bits.
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
    """Floats, in float64."""

    def __init__(self, channels: int) -> None:
        super().__init__(_FloatChannel, channels)

    def add(self, values: npt.NDArray[Any]) -> None:
        for begin in range(0, len(values), PIECE):
            for number, channel in enumerate(self._channels):
                channel.add(values[begin : begin + PIECE, number].astype(np.float64))


@dataclass
class _FloatChannel:
    """Attributes
    ----------
    finite : int
    mean, squares : float
        Of the finite ones: mean, and sum of the squared deviations from it.
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
        """Add (n,) values."""
        low, high = values.min().item(), values.max().item()
        # Either is NaN where any value is.
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
            # What rounding left in the mean is taken out again.
            rest = deviations.mean()
            # Not by BLAS, whose threads would wait for each other where others use the processor.
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
