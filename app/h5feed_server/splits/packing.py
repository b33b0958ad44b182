"""Packing: whole rows one after the other in packed rows of a fixed number of items.

Which lengths share a packed row is found once, by best-fit decreasing over the histogram of lengths (Krell et al.,
"Efficient Sequence Packing without Cross-contamination", 2021): a *pattern* is a set of lengths that fit together, and
how many packed rows have it. An epoch then decides which of the rows of a length take its places in the patterns, by a
keyed permutation for each length, and shuffles the packed rows. Lengths are rounded up a little for this: otherwise
many would be unique, and rows would always have the same company. So

- every epoch has the same number of packed rows, which is known before the first one;
- every row is in an epoch exactly once, in other company each time;
- any packed row can be computed alone, from the patterns and the rows sorted by length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, TooLarge
from h5feed.order import hashed, permute_each
from h5feed.runs import consecutive

from .row_lengths import Lengths

ROUNDING = 64
"""Lengths are rounded up to a multiple of this part of their mean, which leaves less than 1/128 of the places empty."""

Int64s = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32]

_Pattern = tuple[tuple[int, int], ...]
"""Lengths, descending, each with how often it occurs."""


class PackedRows(NamedTuple):
    """Some packed rows.

    Attributes
    ----------
    offsets : (k + 1,) int64
        Where each packed row begins among `rows`.
    rows : (n,) int64
        Row ids.
    begins, lengths : (n,) int64
        Which items of each row: the first, and how many.
    """

    offsets: Int64s
    rows: Int64s
    begins: Int64s
    lengths: Int64s


@dataclass(frozen=True)
class Packed:
    """All rows of a split, packed. Rows without items are left out.

    Attributes
    ----------
    name : str
        The field whose lengths count.
    size : int
        Items of a packed row.
    samples, empty : int
        Number of rows that are packed, and of those left out.
    rows : (n,) int32
        Row ids, sorted by length.
    begins : (n,) int32 or None
        First item of each of them; None: 0. With ``overlong="split"``, a row has several pieces.
    lengths : (n,) int32
        Number of items of each of them.
    starts : (classes + 1,) int64
        Where each class of alike lengths begins in `rows`.
    bins : (patterns + 1,) int64
        The first packed row of each pattern.
    entries : (patterns + 1,) int64
        Where the entries of each pattern begin in the following arrays.
    classes, counts, bases : (entries,) int64
        The number of a class that a pattern has; how often; and how many rows of this class the patterns before have.
    """

    name: str
    size: int
    samples: int
    empty: int
    rows: Rows
    begins: Rows | None
    lengths: Rows
    starts: Int64s
    bins: Int64s
    entries: Int64s
    classes: Int64s
    counts: Int64s
    bases: Int64s

    @classmethod
    def of(
        cls, rows: Rows | None, lengths: Lengths, size: int, overlong: str | None, name: str, most: int = 1 << 31
    ) -> Packed:
        """Pack rows.

        Parameters
        ----------
        rows : (n,) int32 or None
            Row ids. None: all rows.
        lengths : (all rows,) int32
        size : int
            Items of a packed row.
        overlong : ``"truncate"``, ``"split"`` or None
            What to do with rows of more items.
        name : str
            Of the field, for messages.
        most : int
            Maximum number of rows, or of pieces of rows.

        Raises
        ------
        BadParameter
            A row is too long.
        TooLarge
            There are too many rows.
        """
        rows = np.arange(len(lengths), dtype=np.int32) if rows is None else rows
        _check_count(len(rows), most)
        own = lengths[rows]
        samples = int(np.count_nonzero(own))
        empty = len(own) - samples
        begins: Rows | None = None
        if len(own) and own.max() > size:
            if overlong is None:
                place = int(np.argmax(own > size))
                raise BadParameter(
                    f"row {rows[place]} of {name!r} has {own[place]} items, more than pack={size}: use a larger pack, "
                    "or overlong=truncate or overlong=split"
                )
            if overlong == "truncate":
                own = np.minimum(own, size)
            else:
                pieces = -(-own.astype(np.int64) // size)
                _check_count(int(pieces.sum()), most)
                rows = np.repeat(rows, pieces)
                begins = consecutive(0, pieces).astype(np.int32) * np.int32(size)
                own = np.minimum(np.repeat(own, pieces) - begins, size)
        order = np.argsort(own, kind="stable")
        order = order[np.searchsorted(own[order], 1) :]
        own = own[order].astype(np.int32)
        part = np.int32(max(1, int(own.mean()) // ROUNDING if len(own) else 1))
        found, starts = np.unique(np.minimum(-(-own // part) * part, size), return_index=True)
        starts = np.append(starts, len(own)).astype(np.int64)
        patterns = fitted(found.tolist(), np.diff(starts).tolist(), size)
        number_of = {length: number for number, length in enumerate(found.tolist())}
        classes = np.array([number_of[length] for pattern, _ in patterns for length, _ in pattern], np.int64)
        counts = np.array([count for pattern, _ in patterns for _, count in pattern], np.int64)
        entries = np.cumsum([0, *(len(pattern) for pattern, _ in patterns)], dtype=np.int64)
        bins = np.cumsum([0, *(times for _, times in patterns)], dtype=np.int64)
        used = counts * np.repeat(np.diff(bins), np.diff(entries))
        return cls(
            name,
            size,
            samples,
            empty,
            rows[order],
            None if begins is None else begins[order],
            own,
            starts,
            bins,
            entries,
            classes,
            counts,
            _before(classes, used),
        )

    @property
    def count(self) -> int:
        """Number of packed rows."""
        return int(self.bins[-1])

    @property
    def items(self) -> int:
        """Items in all packed rows together."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def fill(self) -> float:
        """Share of the places of all packed rows that hold items."""
        return self.items / (self.count * self.size) if self.count else 1.0

    @property
    def nbytes(self) -> int:
        arrays = (self.rows, self.begins, self.starts, self.lengths, self.bins, self.entries, self.classes)
        return sum(array.nbytes for array in arrays if array is not None) + 2 * self.counts.nbytes

    def draw(self, numbers: Int64s, key: bytes | None) -> PackedRows:
        """Packed rows, by number.

        Parameters
        ----------
        numbers : (k,) int64
            Each in 0 … count - 1.
        key : bytes or None
            Key of the epoch. None: rows of alike lengths ascend by length.
        """
        patterns = np.searchsorted(self.bins, numbers, side="right") - 1
        # entry, owner: (m,), an entry of the pattern of each packed row, and the place of that in `numbers`
        entry, owner = _runs(self.entries[patterns], np.diff(self.entries)[patterns])
        times = self.counts[entry]
        first = self.bases[entry] + (numbers - self.bins[patterns])[owner] * times
        # place, of_entry: (n,), a row among those of its class, and the place of its entry in `entry`
        place, of_entry = _runs(first, times)
        owner, number = owner[of_entry], self.classes[entry][of_entry]
        sizes = self.starts[number + 1] - self.starts[number]
        if key is not None:
            place = permute_each(place, sizes, key, number)
            # Within a packed row, lengths would otherwise always descend.
            order = np.lexsort((hashed(self.starts[number] + place, key), owner))
            place, number = place[order], number[order]
        place = place + self.starts[number]
        offsets = np.zeros(len(numbers) + 1, np.int64)
        np.cumsum(np.bincount(owner, minlength=len(numbers)), out=offsets[1:])
        begins = np.zeros(len(place), np.int64) if self.begins is None else self.begins[place].astype(np.int64)
        return PackedRows(offsets, self.rows[place].astype(np.int64), begins, self.lengths[place].astype(np.int64))


def fitted(lengths: list[int], counts: list[int], size: int) -> list[tuple[_Pattern, int]]:
    """Best-fit decreasing: each length, in descending order, goes where the least space is left.

    Parameters
    ----------
    lengths : list of int
        Distinct, ascending, each in 1 … size.
    counts : list of int
        How many rows have each length.

    Returns
    -------
    list of (pattern, int)
        The patterns, and how many packed rows have each.
    """
    # Packed rows with space left, by space; the spaces in ascending order. Equal packed rows are one group.
    groups: dict[int, list[tuple[_Pattern, int]]] = {}
    spaces: list[int] = []
    done: list[tuple[_Pattern, int]] = []

    def put(pattern: _Pattern, times: int, space: int) -> None:
        if not space:
            done.append((pattern, times))
            return
        if space not in groups:
            groups[space] = []
            insort(spaces, space)
        groups[space].append((pattern, times))

    for length, count in zip(reversed(lengths), reversed(counts), strict=True):
        while count:
            pattern: _Pattern = ()
            at = bisect_left(spaces, length)
            if at == len(spaces):
                space, times = size, -(-count // (size // length))
            else:
                space = spaces[at]
                pattern, times = groups[space].pop()
                if not groups[space]:
                    del groups[space], spaces[at]
            # A packed row is filled as far as possible before the next: then it has the least space left.
            most = space // length
            full, rest = divmod(count, most)
            full = min(full, times)
            if full:
                put((*pattern, (length, most)), full, space - most * length)
            count -= full * most
            times -= full
            if times and count:
                # Fewer than `most` are left, for one packed row.
                put((*pattern, (length, rest)), 1, space - rest * length)
                count, times = 0, times - 1
            if times:
                put(pattern, times, space)
    return done + [group for space in spaces for group in groups[space]]


def _check_count(rows: int, most: int) -> None:
    if rows > most:
        raise TooLarge(
            f"packing {rows} rows or pieces of rows takes more memory than H5FEED_ORDER_CACHE_BYTES allows, which is "
            f"enough for {most}"
        )


def _before(classes: Int64s, used: Int64s) -> Int64s:
    """How many of each class the entries before use, (entries,) int64."""
    order = np.argsort(classes, kind="stable")
    sums = np.cumsum(used[order]) - used[order]
    _, begins = np.unique(classes[order], return_index=True)
    sizes = np.diff(begins, append=len(classes))
    before = np.empty(len(classes), np.int64)
    before[order] = sums - np.repeat(sums[begins], sizes)
    return before


def _runs(firsts: Int64s, sizes: Int64s) -> tuple[Int64s, Int64s]:
    """The numbers ``first … first + size - 1`` of each run, back to back, and the place of the run of each."""
    return consecutive(firsts, sizes), np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
