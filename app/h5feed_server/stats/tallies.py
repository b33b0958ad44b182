"""Numbers that are added up block by block: count, extremes, mean, standard deviation, histogram.

Integers and float16 are added up exactly, so any order of the blocks gives the same to the last bit; float32 and
float64 by the pairwise formula of Chan, Golub and LeVeque (1979), in float64 and in the order of the blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from .histogram import Histogram, HistogramTally

Int64s = npt.NDArray[np.int64]

_PIECE = 1 << 16
"""Values looked at together: what is made of them stays in the processor's cache."""

_PAIRED_CHANNELS = 4
"""Bytes of so many channels are counted in pairs, which is twice as fast; tables of pairs of more would not pay."""

_TABLE_CHANNELS = 16
"""16-bit values of so many channels are counted in tables of 65,536."""


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


class Tally(Protocol):
    """Adds up the values of one dtype, per channel."""

    def add(self, values: npt.NDArray[Any]) -> None:
        """Add (n, channels) values, C-contiguous."""

    def merge(self, other: Self) -> None:
        """Add what `other` has added up, as if its values came after those here."""

    def summaries(self) -> list[Summary]:
        """One for each channel."""

    def overall(self) -> Summary:
        """Of all channels together."""


def tally_of(dtype: np.dtype[Any], channels: int) -> Tally:
    """An empty tally for values of a numeric dtype, little-endian."""
    if dtype.itemsize == 1 or (dtype.itemsize == 2 and channels <= _TABLE_CHANNELS):
        return _TableTally(dtype, channels)
    if dtype.kind in "iu":
        return _IntTally(dtype, channels)
    return _FloatTally(channels)


class _TableTally:
    """Values of 8 or 16 bits: how often each is there says everything, exactly."""

    def __init__(self, dtype: np.dtype[Any], channels: int) -> None:
        self._dtype = dtype
        self._channels = channels
        self._bits = 8 * dtype.itemsize
        self._paired = dtype.itemsize == 1 and channels <= _PAIRED_CHANNELS
        # Pairs of bytes come round after so many, whatever the channels.
        self._lanes = channels // 2 if channels % 2 == 0 else channels
        shape = (self._lanes, 1 << 16) if self._paired else (channels, 1 << self._bits)
        self._counts = np.zeros(shape, np.int64)
        self._rest = np.zeros((channels, 256), np.int64)
        self._scratch = np.empty(_PIECE * 4, np.intp)

    def add(self, values: npt.NDArray[Any]) -> None:
        flat = values.reshape(-1)
        if not self._paired:
            self._count(flat.view(f"<u{self._dtype.itemsize}").reshape(-1, self._channels))
            return
        pairs = len(flat) // (2 * self._lanes) * self._lanes
        self._count(flat[: 2 * pairs].view("<u2").reshape(-1, self._lanes))
        for channel, value in enumerate(flat[2 * pairs :].view(np.uint8).tolist()):
            self._rest[channel % self._channels, value] += 1

    def _count(self, lanes: npt.NDArray[Any]) -> None:
        """Count (n, lanes) unsigned integers, each lane in its own table."""
        step = len(self._scratch)
        for begin in range(0, len(lanes), step):
            piece = lanes[begin : begin + step]
            for lane, table in enumerate(self._counts):
                # numpy's own cast would take new memory each time.
                wide = self._scratch[: len(piece)]
                np.copyto(wide, piece[:, lane])
                found = np.bincount(wide)
                table[: len(found)] += found

    def merge(self, other: Self) -> None:
        self._counts += other._counts
        self._rest += other._rest

    @property
    def tables(self) -> Int64s:
        """How often each bit pattern is there, (channels, 256 or 65536)."""
        if not self._paired:
            return self._counts
        tables = self._rest.copy()
        for lane, counts in enumerate(self._counts):
            # The low byte comes first. pairs: (second, first)
            pairs = counts.reshape(256, 256)
            tables[2 * lane % self._channels] += pairs.sum(axis=0)
            tables[(2 * lane + 1) % self._channels] += pairs.sum(axis=1)
        return tables

    @property
    def values(self) -> npt.NDArray[Any]:
        """The value of each bit pattern."""
        patterns = np.arange(1 << self._bits, dtype=f"<u{self._dtype.itemsize}")
        return patterns.view(np.uint8) != 0 if self._dtype.kind == "b" else patterns.view(self._dtype)

    def summaries(self) -> list[Summary]:
        return [_summary_of_table(self.values, table) for table in self.tables]

    def overall(self) -> Summary:
        return _summary_of_table(self.values, self.tables.sum(axis=0))


def _summary_of_table(values: npt.NDArray[Any], counts: Int64s) -> Summary:
    there = np.flatnonzero(counts)
    values, counts = values[there], counts[there]
    floating = values.dtype.kind == "f"
    finite = np.isfinite(values)
    nan, inf = int(counts[np.isnan(values)].sum()), int(counts[np.isinf(values)].sum())
    count = int(counts.sum())
    values, counts = values[finite], counts[finite]
    if not len(values):
        return Summary(count, nan, inf, 0, None, None, None, None, None)
    # Every float16 is a whole number of 2⁻²⁴.
    scale = 24 if floating else 0
    wide = values.astype(np.float64 if floating else np.int64)
    whole = np.ldexp(wide, scale).astype(np.int64).tolist() if floating else wide.tolist()
    often = counts.tolist()
    first = sum(value * times for value, times in zip(whole, often, strict=True))
    second = sum(value * value * times for value, times in zip(whole, often, strict=True))
    mean, std = _exact_moments(sum(often), first, second, scale)
    low, high = wide.min().item(), wide.max().item()
    histogram = HistogramTally(whole=not floating)
    histogram.add(wide, low, high, counts)
    zeros = int(counts[wide == 0].sum())
    return Summary(count, nan, inf, zeros, low, high, mean, std, histogram.histogram())


def _exact_moments(count: int, first: int, second: int, scale: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of whole numbers of 2**-scale, from their sum and that of their squares."""
    mean = Fraction(first, count << scale)
    variance = Fraction(count * second - first * first, (count * count) << (2 * scale))
    return float(mean), math.sqrt(variance)


class _IntTally:
    """Integers of 16 to 64 bits, exactly: by the sums and products of their 16-bit digits.

    A matrix product of digits is exact in float64 as long as its sums stay below 2⁵³, and it is the fastest sum of
    squares that there is.
    """

    def __init__(self, dtype: np.dtype[Any], channels: int) -> None:
        self._dtype = dtype
        self._digits = dtype.itemsize // 2
        # Signed ones are shifted to 0 … 2ⁿ-1 by turning their highest bit.
        self._shift = 1 << (8 * dtype.itemsize - 1) if dtype.kind == "i" else 0
        self._channels = [_IntChannel(HistogramTally(whole=True)) for _ in range(channels)]

    def add(self, values: npt.NDArray[Any]) -> None:
        rows = np.ones((self._digits + 1, min(_PIECE, len(values))))
        for begin in range(0, len(values), _PIECE):
            for number, channel in enumerate(self._channels):
                piece = np.ascontiguousarray(values[begin : begin + _PIECE, number])
                digits = piece.view("<u2").reshape(-1, self._digits)
                matrix = rows[:, : len(piece)]
                matrix[1:] = digits.T
                if self._shift:
                    # The highest digit is two's complement: turning its bit adds 2¹⁵ to it.
                    matrix[-1] = (digits[:, -1] ^ np.uint16(1 << 15)).astype(np.float64)
                low, high = piece.min().item(), piece.max().item()
                channel.histogram.add(piece, low, high)
                self._take(channel, matrix, len(piece), low, high, len(piece) - int(np.count_nonzero(piece)))

    def _take(
        self, channel: _IntChannel, matrix: npt.NDArray[np.float64], count: int, low: int, high: int, zeros: int
    ) -> None:
        # products: (1 + digits, 1 + digits); row 0 holds the plain sums
        products = [[int(value) for value in row] for row in (matrix @ matrix.T).tolist()]
        first = sum(products[0][i + 1] << (16 * i) for i in range(self._digits))
        second = sum(products[i + 1][j + 1] << (16 * (i + j)) for i in range(self._digits) for j in range(self._digits))
        shift = self._shift
        channel.include(count, first - count * shift, second - 2 * shift * first + count * shift * shift, zeros)
        channel.low = low if channel.low is None else min(channel.low, low)
        channel.high = high if channel.high is None else max(channel.high, high)

    def merge(self, other: Self) -> None:
        for mine, theirs in zip(self._channels, other._channels, strict=True):
            mine.merge(theirs)

    def summaries(self) -> list[Summary]:
        return [channel.summary() for channel in self._channels]

    def overall(self) -> Summary:
        together = _IntChannel(HistogramTally(whole=True))
        for channel in self._channels:
            together.merge(channel)
        return together.summary()


@dataclass
class _IntChannel:
    histogram: HistogramTally
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
        mean, std = _exact_moments(self.count, self.first, self.second)
        return Summary(self.count, 0, 0, self.zeros, self.low, self.high, mean, std, self.histogram.histogram())


class _FloatTally:
    """Floats, in float64."""

    def __init__(self, channels: int) -> None:
        self._channels = [_FloatChannel(HistogramTally(whole=False)) for _ in range(channels)]

    def add(self, values: npt.NDArray[Any]) -> None:
        for begin in range(0, len(values), _PIECE):
            for number, channel in enumerate(self._channels):
                channel.add(values[begin : begin + _PIECE, number].astype(np.float64))

    def merge(self, other: Self) -> None:
        for mine, theirs in zip(self._channels, other._channels, strict=True):
            mine.merge(theirs)

    def summaries(self) -> list[Summary]:
        return [channel.summary() for channel in self._channels]

    def overall(self) -> Summary:
        together = _FloatChannel(HistogramTally(whole=False))
        for channel in self._channels:
            together.merge(channel)
        return together.summary()


@dataclass
class _FloatChannel:
    """Attributes
    ----------
    finite : int
    mean, squares : float
        Of the finite ones: mean, and sum of the squared deviations from it.
    """

    histogram: HistogramTally
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
            squares = deviations @ deviations - len(values) * rest * rest
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
