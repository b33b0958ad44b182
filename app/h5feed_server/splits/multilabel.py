"""Iterative stratification: divides rows with several labels so that each part has its share of every label.

The algorithm is that of Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011.
The rows of the rarest label are distributed first, each to the part that lacks that label most; then those of the
rarest label among the remaining rows, and so on. There are three differences from the paper:

- Parts have exactly the requested sizes.
- All rows of a label are distributed in one step.
- Rows with the same set of labels are spread over the parts, as Szymański and Kajdanowicz (2017) do for pairs of
  labels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from h5feed.runs import consecutive

Indices = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def stratify(table: npt.NDArray[np.uint8], sizes: Int64s, seed: int) -> npt.NDArray[np.uint16]:
    """Distribute rows over parts.

    Parameters
    ----------
    table : (n, labels) uint8
        1 for each label that a row has.
    sizes : (parts,) int64
        Rows of each part; their sum is n.
    seed : int
        Seed of numpy's ``RandomState``, which breaks ties and chooses among rows with the same labels.

    Returns
    -------
    (n,) uint16
        Index of each row's part.
    """
    random = np.random.RandomState(seed)
    parts = np.zeros(len(table), np.uint16)
    waiting = np.arange(len(table), dtype=np.int32)
    random.shuffle(waiting)
    room = sizes.astype(np.int64)
    # wanted: (parts, labels), how many more rows with each label each part needs
    wanted = np.outer(sizes / max(1, len(table)), table.sum(axis=0, dtype=np.int64))
    left = table.sum(axis=0, dtype=np.int64)
    while len(waiting) and left.any():
        rarest = int(np.where(left > 0, left, left.max() + 1).argmin())
        has = table[waiting, rarest] != 0
        rows, waiting = waiting[has], waiting[~has]
        own = table[rows]
        counts = _dealt(len(rows), wanted[:, rarest], room, random)
        order = np.lexsort(own.T) if own.shape[1] <= _MAX_KEYS else np.arange(len(rows))
        dealt = np.empty(len(rows), np.uint16)
        dealt[order] = _spread(counts, random)
        parts[rows] = dealt
        room -= counts
        for part in np.flatnonzero(counts):
            given = own[dealt == part].sum(axis=0, dtype=np.int64)
            wanted[part] -= given
            left -= given
    # Rows without labels fill the remaining room.
    parts[waiting] = np.arange(len(sizes), dtype=np.uint16).repeat(room)
    return parts


_MAX_KEYS = 64
"""Rows with the same labels are grouped only up to this many labels; with more, sorting costs more than it gains."""


def _dealt(rows: int, wanted: npt.NDArray[np.float64], room: Int64s, random: np.random.RandomState) -> Int64s:
    """How many of `rows` rows each part gets, (parts,) int64: as many as it wants, within its room.

    The result is that of giving one row after another to the part that wants most. Doing so lowers the highest wants
    to a common level, so the level is computed directly.
    """
    counts = np.zeros(len(wanted), np.int64)
    while (missing := rows - int(counts.sum())) > 0:
        open_parts = np.flatnonzero(counts < room)
        want = wanted[open_parts] - counts[open_parts]
        falling = np.sort(want)[::-1]
        above = np.arange(1, len(falling) + 1)
        level = (np.cumsum(falling) - missing) / above
        last = int(np.flatnonzero(falling > level)[-1])
        share = np.floor(np.maximum(0, want - level[last])).astype(np.int64)
        share = np.minimum(share, room[open_parts] - counts[open_parts])
        if not share.any():
            # Less than one row for each part: the highest wants come first, then the most room, then a random order.
            ties = random.permutation(len(open_parts))
            ranked = np.lexsort((ties, -(room - counts)[open_parts], -want))[:missing]
            share[ranked] = 1
        counts[open_parts] += share
    return counts


def _spread(counts: Int64s, random: np.random.RandomState) -> npt.NDArray[np.uint16]:
    """Part of each of ``counts.sum()`` rows: those of a part are evenly spaced, from a random start."""
    numbers = np.arange(len(counts), dtype=np.uint16).repeat(counts)
    starts = random.random_sample(len(counts))
    places = (consecutive(0, counts) + starts[numbers]) / counts[numbers]
    spread: npt.NDArray[np.uint16] = numbers[np.argsort(places, kind="stable")]
    return spread
