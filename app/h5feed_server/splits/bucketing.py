"""Bucketing: batches of rows with alike lengths, from windows of any order.

A window is a run of positions of the order. Its samples are sorted by length and cut into steps, which are shuffled.
So each sample is visited exactly once, and a batch can be computed from its window alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter
from h5feed.order import hashed, permute

from .ragged_spec import MAX_BUCKET
from .row_lengths import Lengths

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bucketed:
    """The division of an order into windows.

    Attributes
    ----------
    lengths : (rows,) int32
        Of all rows of the dataset.
    window : int
        Samples of a window, a multiple of `step`.
    step : int
        Samples of consecutive batches that have alike lengths.
    """

    lengths: Lengths
    window: int
    step: int

    def draw(
        self,
        positions: Int64s,
        epoch_rows: int,
        samples_at: Callable[[Int64s], Int64s],
        key_of: Callable[[int], bytes] | None,
    ) -> Int64s:
        """Row ids at positions of the bucketed order.

        Parameters
        ----------
        positions : (k,) int64
        epoch_rows : int
            Samples of the epoch.
        samples_at : callable
            The order without buckets: positions, (n,) int64, to row ids, (n,) int64.
        key_of : callable or None
            The key of the order of the steps of a window, by its number. None: they are sorted by length.

        Returns
        -------
        (k,) int64
        """
        rows = np.empty(len(positions), np.int64)
        windows = positions // self.window
        for number in np.unique(windows).tolist():
            inside = np.flatnonzero(windows == number)
            first = number * self.window
            size = min(self.window, epoch_rows - first)
            samples = samples_at(np.arange(first, first + size, dtype=np.int64))
            samples = samples[np.argsort(self.lengths[samples], kind="stable")]
            places = self._places(positions[inside] - first, size, None if key_of is None else key_of(number))
            rows[inside] = samples[places]
        return rows

    def _places(self, positions: Int64s, size: int, key: bytes | None) -> Int64s:
        """Places among the sorted samples of a window, (k,) int64, for positions within it."""
        steps, rest = divmod(size, self.step)
        numbers, within = np.divmod(positions, self.step)
        # Only the last step of an epoch may be incomplete. It is cut out of the sorted samples at a random place:
        # otherwise, last=drop would always lose the longest ones.
        cut = steps
        if key is not None and rest:
            cut = int(hashed(np.array([size], np.int64), key)[0] % np.uint64(steps + 1))
        is_whole = numbers < steps
        if key is not None:
            numbers[is_whole] = permute(numbers[is_whole], steps, key)
        begins = numbers * self.step + np.where(numbers >= cut, rest, 0)
        return np.where(is_whole, begins, cut * self.step) + within


def window_of(wanted: int, step: int) -> int:
    """Samples of a window: `wanted`, rounded up to whole steps, or down if that would be more than `MAX_BUCKET`.

    Raises
    ------
    BadParameter
        A single step has more.
    """
    if step > MAX_BUCKET:
        raise BadParameter(
            f"bucket={wanted}: batches of similar lengths have {step} rows together, more than {MAX_BUCKET}: use a "
            "smaller batch_size or bucket_group"
        )
    return min(-(-wanted // step), MAX_BUCKET // step) * step
