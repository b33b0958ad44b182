"""Finds the samples of an order whose samples are windows of rows: where the rows of an episode, or of a split, end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge

from ..row_bits import LISTED_ROWS, BitPacker, RowBits, RowRuns, RowSet
from .windows_spec import WindowsSpec

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_MOST_RUNS = 1 << 22
"""Bound on the runs of a dataset, which take 16 bytes each."""

_BLOCK = 1 << 20
"""Rows or samples that are looked at together."""


@dataclass(frozen=True)
class Windows:
    """The samples of an order.

    Attributes
    ----------
    starts, ends : (runs,) int64
        The runs of rows that samples are made of: consecutive rows of one episode and of one split. First row, and the
        row after the last; ascending.
    samples : (k,) int32, RowBits or RowRuns
        Ascending ids of the samples, each of which is the id of a row.
    """

    starts: Int64s
    ends: Int64s
    samples: RowSet

    @cached_property
    def nbytes(self) -> int:
        return self.starts.nbytes + self.ends.nbytes + self.samples.nbytes

    def rows(self, samples: Int64s, offsets: Int64s) -> Int64s:
        """Row ids at some offsets, (…), from samples, (k,): (k, …). Beyond an end of the run, its last row there."""
        firsts, ends = self.bounds(samples).T
        shape = (-1, *[1] * offsets.ndim)
        wanted = samples.reshape(shape) + offsets
        rows: Int64s = np.clip(wanted, firsts.reshape(shape), ends.reshape(shape) - 1)
        return rows

    def bounds(self, samples: Int64s) -> Int64s:
        """The runs of samples, (k,): first row, and the row after the last, (k, 2) int64."""
        run = np.searchsorted(self.starts, samples, side="right") - 1
        return np.stack([self.starts[run], self.ends[run]], axis=-1)

    def mask(self, samples: Int64s, offsets: Int64s) -> Bools:
        """Which of these rows are real, and not repeated; (k, …)."""
        real: Bools = self.rows(samples, offsets) == samples.reshape(-1, *[1] * offsets.ndim) + offsets
        return real

    def meet(self, samples: npt.NDArray[Any], offsets: Int64s, marked: Bools) -> Bools:
        """Which samples, (k,), have one of the marked rows at some offsets; (k,).

        Parameters
        ----------
        offsets : (n,) int64
            Ascending, without repeats.
        marked : (rows,) bool
            Of all rows of the dataset.
        """
        found = np.zeros(len(samples), bool)
        if not marked.any():
            return found
        # before: (rows + 1,), the number of marked rows before each
        before = np.zeros(len(marked) + 1, np.int64)
        np.cumsum(marked, out=before[1:])
        for begin in range(0, len(samples), _BLOCK):
            block = samples[begin : begin + _BLOCK].astype(np.int64)
            first, last = self.rows(block, offsets[[0, -1]]).T
            left = np.flatnonzero(before[last + 1] > before[first])
            if len(offsets) == offsets[-1] - offsets[0] + 1:
                found[begin + left] = True
                continue
            # Only some of the rows between the first and the last are part of the sample.
            for offset in offsets:
                is_met = marked[self.rows(block[left], offset)]
                found[begin + left[is_met]] = True
                left = left[~is_met]
        return found


def runs_of(rows: RowSet | None, bounds: Int64s) -> tuple[Int64s, Int64s]:
    """Consecutive rows of a set, cut where an episode ends: first rows, and the rows after the last, (runs,) int64.

    Parameters
    ----------
    rows : RowSet or None
        None: all rows.
    bounds : (episodes + 1,) int64
        First row of each episode, and the number of rows.

    Raises
    ------
    TooLarge
    """
    if rows is None:
        starts, ends = bounds[:1], bounds[-1:]
    elif isinstance(rows, RowRuns):
        runs = np.array(rows.runs, np.int64).reshape(-1, 2)
        starts, ends = runs[:, 0], runs[:, 1]
    elif isinstance(rows, RowBits):
        starts, ends = _runs_of_bits(rows)
    else:
        breaks = np.flatnonzero(np.diff(rows) != 1)
        starts = rows[np.concatenate([[0], breaks + 1])[: len(rows)]].astype(np.int64)
        ends = rows[np.concatenate([breaks, [-1]])[: len(rows)]].astype(np.int64) + 1
    run = np.searchsorted(starts, bounds, side="right") - 1
    cuts = bounds[(run >= 0) & (bounds > starts[run]) & (bounds < ends[run])] if len(starts) else bounds[:0]
    starts, ends = np.sort(np.concatenate([starts, cuts])), np.sort(np.concatenate([ends, cuts]))
    # Two datasets of no rows at all, or an episode of none.
    some = starts < ends
    return starts[some], ends[some]


def _runs_of_bits(rows: RowBits) -> tuple[Int64s, Int64s]:
    starts: list[Int64s] = []
    ends: list[Int64s] = []
    last, count = -2, 0
    for block in rows.blocks():
        if not len(block):
            continue
        is_first = np.diff(block, prepend=last) != 1
        starts.append(block[is_first])
        ends.append(np.concatenate([[last], block])[:-1][is_first] + 1)
        last = int(block[-1])
        count += len(starts[-1])
        if count > _MOST_RUNS:
            raise TooLarge(f"the rows of the split are in more than {_MOST_RUNS} runs, the limit for windows of rows")
    if not starts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(starts), np.concatenate([*ends, [last + 1]])[1:]


def samples_in(starts: Int64s, ends: Int64s, spec: WindowsSpec, rows: int, what: str) -> RowSet:
    """The samples in runs of rows.

    Parameters
    ----------
    rows : int
        Rows of the dataset.
    what : str
        What a run is, for messages.

    Raises
    ------
    BadParameter
        No run is long enough.
    """
    low, high = spec.needed
    first = starts - low
    stop = np.maximum(ends - high, first)
    counts = -((first - stop) // spec.sequence_stride)
    if len(starts) and not counts.any():
        longest = int((ends - starts).max())
        raise BadParameter(
            f"a sample spans {high - low + 1} rows, but the longest {what} has {longest}: use smaller offsets or a "
            "smaller sequence_length, or ends=pad"
        )
    if rows <= LISTED_ROWS:
        begins = np.cumsum(counts) - counts
        samples = np.arange(int(counts.sum()), dtype=np.int64) * spec.sequence_stride
        samples += np.repeat(first - begins * spec.sequence_stride, counts)
        return samples.astype(np.int32)
    if spec.sequence_stride == 1 or not len(first):
        return RowRuns(list(zip(first.tolist(), stop.tolist(), strict=True)))
    bits = BitPacker(rows)
    for begin in range(0, rows, _BLOCK):
        wanted = np.arange(begin, min(begin + _BLOCK, rows))
        run = np.maximum(np.searchsorted(first, wanted, side="right") - 1, 0)
        bits.add((wanted >= first[run]) & (wanted < stop[run]) & ((wanted - first[run]) % spec.sequence_stride == 0))
    return RowBits(bits.bits())
