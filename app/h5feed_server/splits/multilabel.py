"""Iterative stratification: rows with several labels at once, divided so that every part has its share of each label.

Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011: the rarest label is dealt
out first, each of its rows to the part that still lacks it most, then the rarest of what remains. Three things differ
from the paper, none of them the idea: parts have exactly the sizes that are asked for; all rows of a label are dealt at
once; and those that have the same labels besides are spread over the parts (as Szymański and Kajdanowicz, 2017, do for
pairs of labels).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def stratify(table: npt.NDArray[np.uint8], sizes: Int64s, seed: int) -> npt.NDArray[np.uint16]:
    """Deal rows out to parts.

    Parameters
    ----------
    table : (n, labels) uint8
        1 for the labels that a row has.
    sizes : (parts,) int64
        Rows of each part; n together.
    seed : int
        Of numpy's ``RandomState``: which rows of those that are alike, and ties.

    Returns
    -------
    (n,) uint16
        The part of each row.
    """
    random = np.random.RandomState(seed)
    parts = np.zeros(len(table), np.uint16)
    waiting = np.arange(len(table), dtype=np.int32)
    random.shuffle(waiting)
    room = sizes.astype(np.int64)
    # wanted: (parts, labels), how many more rows with each label a part should have
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
    # Rows without any label fill what room is left.
    parts[waiting] = np.arange(len(sizes), dtype=np.uint16).repeat(room)
    return parts


_MAX_KEYS = 64
"""Labels by which rows that are alike are told; sorting by more costs more than it brings."""


def _dealt(rows: int, wanted: npt.NDArray[np.float64], room: Int64s, random: np.random.RandomState) -> Int64s:
    """How many of `rows` each part gets: as many as it wants, as far as it has room.

    Giving row after row to the part that wants most evens out what is wanted beyond some level; this is that level.
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
            # Less than one each: who wants most, then who has most room, then by lot.
            ties = random.permutation(len(open_parts))
            ranked = np.lexsort((ties, -(room - counts)[open_parts], -want))[:missing]
            share[ranked] = 1
        counts[open_parts] += share
    return counts


def _spread(counts: Int64s, random: np.random.RandomState) -> npt.NDArray[np.uint16]:
    """So many of each part, each part's at equal distances from a start that is drawn."""
    numbers = np.arange(len(counts), dtype=np.uint16).repeat(counts)
    starts = random.random_sample(len(counts))
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    places = (within + starts[numbers]) / counts[numbers]
    spread: npt.NDArray[np.uint16] = numbers[np.argsort(places, kind="stable")]
    return spread
