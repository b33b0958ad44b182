"""Runs of numbers in arrays: consecutive ones, and equal ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


def consecutive(firsts: Int64s | int, counts: Int64s) -> Int64s:
    """``counts[i]`` numbers from ``firsts[i]``, for all i: from ``[7, 2]``, counts of ``[2, 3]`` give 7, 8, 2, 3, 4.

    Parameters
    ----------
    firsts : (k,) int64, or int
        One number: all runs begin with it.
    counts : (k,) int64
        Each 0 or more.

    Returns
    -------
    (counts.sum(),) int64
    """
    numbers: Int64s = np.repeat(firsts - (np.cumsum(counts) - counts), counts)
    numbers += np.arange(len(numbers))
    return numbers


def equal_runs(values: npt.NDArray[Any]) -> tuple[Int64s, Int64s]:
    """Where each run of equal values begins and ends, both (runs,) int64."""
    if not len(values):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    begins = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    return begins, np.append(begins[1:], len(values))
