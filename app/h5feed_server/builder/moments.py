"""Sums of pixels and of their squares per row, for channel means of the rows that end up in train."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

MAX_CHANNELS = 4
"""Last axes of so many are channels; of more, a row is one."""

Float64s = npt.NDArray[np.float64]


def channels_of(shape: tuple[int, ...]) -> int:
    """Number of channels of a sample."""
    return shape[-1] if len(shape) == 3 and shape[-1] <= MAX_CHANNELS else 1


def moments(rows: npt.NDArray[Any]) -> tuple[Float64s, Float64s, npt.NDArray[np.int64]]:
    """Sums, sums of squares and number of NaN values (which are not summed); each (rows, `MAX_CHANNELS`).

    Float64; exact for integers below 2⁵³.
    """
    count, channels = len(rows), channels_of(rows.shape[1:])
    sums, squares = np.zeros((2, count, MAX_CHANNELS))
    missing = np.zeros((count, MAX_CHANNELS), np.int64)
    size = math.prod(rows.shape[1:])
    if rows.dtype == np.uint8 and rows.ndim == 4 and channels == rows.shape[-1] and size:
        planes = [np.empty(rows.shape[1:3], np.uint8) for _ in range(channels)]
        for index, row in enumerate(rows):
            # OpenCV adds integers several at once, if they are of one channel.
            cv2.split(row, planes)
            sums[index, :channels] = [cv2.sumElems(plane)[0] for plane in planes]
            # Exact, apart from a square root that it squares again.
            squares[index, :channels] = [round(cv2.norm(plane, cv2.NORM_L2SQR)) for plane in planes]
        return sums, squares, missing
    for index, row in enumerate(rows):
        wide = row.reshape(-1, channels).astype(np.float64)
        absent = np.isnan(wide)
        if absent.any():
            missing[index, :channels] = absent.sum(axis=0)
            wide[absent] = 0
        sums[index, :channels] = wide.sum(axis=0)
        squares[index, :channels] = np.einsum("ij,ij->j", wide, wide)
    return sums, squares, missing


def mean_and_std(
    sums: Float64s, squares: Float64s, missing: npt.NDArray[np.int64], channels: int, each: int
) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation per channel over all rows, ignoring NaN; NaN if there is nothing else.

    `each` is the number of values per row and channel.
    """
    means, stds = [], []
    for channel in range(channels):
        count = len(sums) * each - int(missing[:, channel].sum())
        mean = _sum(sums[:, channel]) / count if count else math.nan
        variance = _sum(squares[:, channel]) / count - mean * mean if count else math.nan
        means.append(mean)
        # Rounding may leave a little less than nothing.
        stds.append(math.sqrt(variance) if variance > 0 else variance if math.isnan(variance) else 0.0)
    return means, stds


def _sum(values: Float64s) -> float:
    """Exact, where there is such a sum: infinities of both signs have none."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        with np.errstate(all="ignore"):
            return float(values.sum())
