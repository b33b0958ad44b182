"""Statistics of 8-bit and 16-bit values: counting each value is fastest, and gives exact results."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .histogram import HistogramAccumulator
from .summary import PIECE, Summary, exact_moments

Int64s = npt.NDArray[np.int64]

_PAIRED_CHANNELS = 4
"""Up to this many channels, bytes are counted in pairs, which is twice as fast. With more, the tables get too large."""


class TableAccumulator:
    """An `Accumulator` of 8-bit or 16-bit values: counts how often each bit pattern occurs."""

    def __init__(self, dtype: np.dtype[Any], channels: int) -> None:
        self._dtype = dtype
        self._channels = channels
        self._bits = 8 * dtype.itemsize
        self._paired = dtype.itemsize == 1 and channels <= _PAIRED_CHANNELS
        # Consecutive byte pairs belong to the same channels again after this many pairs.
        self._lanes = channels // 2 if channels % 2 == 0 else channels
        shape = (self._lanes, 1 << 16) if self._paired else (channels, 1 << self._bits)
        self._counts = np.zeros(shape, np.int64)
        self._rest = np.zeros((channels, 256), np.int64)
        self._scratch = np.empty(PIECE * 4, np.intp)

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
                # Convert to intp in a reused array: bincount would allocate a new one each time.
                wide = self._scratch[: len(piece)]
                np.copyto(wide, piece[:, lane])
                counts = np.bincount(wide)
                table[: len(counts)] += counts

    def merge(self, other: Self) -> None:
        self._counts += other._counts
        self._rest += other._rest

    @property
    def tables(self) -> Int64s:
        """How often each bit pattern occurs, (channels, 256 or 65536) int64."""
        if not self._paired:
            return self._counts
        tables = self._rest.copy()
        for lane, counts in enumerate(self._counts):
            # The first byte of a pair is the low byte. pairs: (second byte, first byte)
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
    # Every finite float16 is a multiple of 2⁻²⁴, so sums of integers are exact.
    scale = 24 if floating else 0
    wide = values.astype(np.float64 if floating else np.int64)
    whole = np.ldexp(wide, scale).astype(np.int64).tolist() if floating else wide.tolist()
    often = counts.tolist()
    first = sum(value * times for value, times in zip(whole, often, strict=True))
    second = sum(value * value * times for value, times in zip(whole, often, strict=True))
    mean, std = exact_moments(sum(often), first, second, scale)
    low, high = wide.min().item(), wide.max().item()
    histogram = HistogramAccumulator(whole=not floating)
    histogram.add(wide, low, high, counts)
    zeros = int(counts[wide == 0].sum())
    return Summary(count, nan, inf, zeros, low, high, mean, std, histogram.histogram())
