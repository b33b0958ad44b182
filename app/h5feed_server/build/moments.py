"""Sums of pixels and of their squares, row by row: channel means of whichever rows turn out to be train."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_CHANNELS = 4
"""Last axes of so many are channels; of more, a row is one."""

Float64s = npt.NDArray[np.float64]


def channels_of(shape: tuple[int, ...]) -> int:
    """Channels of a sample."""
    return shape[-1] if len(shape) == 3 and shape[-1] <= MAX_CHANNELS else 1


def moments(rows: npt.NDArray[Any]) -> tuple[Float64s, Float64s]:
    """Sums and sums of squares, both (rows, `MAX_CHANNELS`) float64; exact for integers below 2⁵³."""
    count, channels = len(rows), channels_of(rows.shape[1:])
    sums, squares = np.zeros((2, count, MAX_CHANNELS))
    size = math.prod(rows.shape[1:])
    # lines: (lines, width) with whole pixels in each, so that numpy adds long lines to each other, which is fast.
    width = rows.shape[-1] * rows.shape[-2] if rows.ndim == 4 else size
    if rows.dtype == np.uint8 and size // max(1, width) <= 1 << 16:
        for index, row in enumerate(rows.reshape(count, -1, width)):
            squared = row.astype(np.uint16)
            squared *= squared
            sums[index, :channels] = row.sum(axis=0, dtype=np.uint32).reshape(-1, channels).sum(axis=0, dtype=np.uint64)
            squares[index, :channels] = (
                squared.sum(axis=0, dtype=np.uint32).reshape(-1, channels).sum(axis=0, dtype=np.uint64)
            )
        return sums, squares
    for index, row in enumerate(rows):
        wide = row.reshape(-1, channels).astype(np.float64)
        sums[index, :channels] = wide.sum(axis=0)
        squares[index, :channels] = np.einsum("ij,ij->j", wide, wide)
    return sums, squares


def mean_and_std(sums: Float64s, squares: Float64s, channels: int, each: int) -> tuple[list[float], list[float]]:
    """Of all rows together, per channel; `each` is how many values a row has of one. The std is the population's."""
    count = len(sums) * each
    means, stds = [], []
    for channel in range(channels):
        mean = math.fsum(sums[:, channel]) / count
        means.append(mean)
        stds.append(math.sqrt(max(0.0, math.fsum(squares[:, channel]) / count - mean * mean)))
    return means, stds
