"""Which arrays of a growing file grow, and which rows all of them have in full chunks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from h5feed.errors import Preparing, Unreadable
from h5feed.stored.layout import ArrayLayout, FileLayout, describe, load_layout
from h5feed.wire import OFFSETS

from .declared import NAME as DECLARATION
from .declared import DeclaredDataset

MAX_CUTS = 1 << 16
"""Revisions of one dataset that can be asked for: the last ones, one for each boundary of chunks."""

_RETRY_SECONDS = 1.0

LISTS = "lists with offsets, and sparse rows, cannot grow"

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChunkSequence:
    """The chunks of all growing arrays in the order of their first rows: to add rows is to add chunks at the end.

    Attributes
    ----------
    begins : (n,) int64
        First row of each chunk.
    offsets, sizes, masks : (n,) int64
        See `ChunkTable`.
    """

    begins: Int64s
    offsets: Int64s
    sizes: Int64s
    masks: Int64s

    def __len__(self) -> int:
        return len(self.begins)

    def begins_with(self, other: ChunkSequence) -> bool:
        """Whether the first chunks are where all those of `other` are."""
        pairs = zip(self._columns, other._columns, strict=True)
        return all(np.array_equal(mine[: len(other)], theirs) for mine, theirs in pairs)

    @property
    def _columns(self) -> tuple[Int64s, ...]:
        return self.begins, self.offsets, self.sizes, self.masks


@dataclass(frozen=True)
class GrowingArrays:
    """A growing file at one moment.

    Attributes
    ----------
    data : bytes
        The layout, serialised.
    layout : FileLayout
    arrays : dict of str to ArrayLayout
        The arrays that grow, with the rows that they have, by path.
    why_not : dict of str to str
        Why the others do not grow, by path.
    rows : int
        Rows that are in full chunks of all of them.
    """

    data: bytes
    layout: FileLayout
    arrays: Mapping[str, ArrayLayout]
    why_not: Mapping[str, str]
    rows: int

    def fixed(self) -> bytes:
        """Digest of everything that stays the same when rows are added."""
        about = [
            describe(replace(one, shape=(0, *one.sample_shape), stored_bytes=0, text=None))
            if one.path in self.arrays
            else [one.path, one.text]
            for one in self.layout.arrays
        ]
        content = json.dumps([about, self.layout.attributes, self.layout.groups], sort_keys=True)
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass")).digest()

    def sequence(self) -> ChunkSequence:
        """The chunks of the rows."""
        begins, order, tables = [], [], {id(one.chunks): one for one in self.arrays.values()}
        columns: list[list[Int64s]] = [[], [], []]
        for place, array in enumerate(tables.values()):
            height, count = _height(array), chunks_of(array, self.rows)
            assert array.chunks is not None
            table = array.chunks.first(count)
            begins.append(table.numbers // array.cells * height)
            order.append(np.full(count, place))
            for column, part in zip(columns, (table.offsets, table.sizes, table.masks), strict=True):
                column.append(part)
        # Stable: the chunks of one row of chunks stay in their order.
        sorting = np.lexsort((np.concatenate(order), np.concatenate(begins)))
        return ChunkSequence(*(np.concatenate(column)[sorting] for column in (begins, *columns)))

    def cuts(self) -> Int64s:
        """Numbers of rows that it could have been served with before, ascending, and that it is served with now."""
        heights = {_height(one) for one in self.arrays.values()}
        return np.unique(np.concatenate([np.arange(step, self.rows + 1, step) for step in heights]))[-MAX_CUTS:]


def growing_arrays(data: bytes, declared: DeclaredDataset) -> GrowingArrays:
    """The arrays of a growing file that grow, and the rows that all of them have in full chunks.

    Raises
    ------
    Unreadable
        None does, or a declared one does not.
    Preparing
        There are no such rows yet.
    """
    layout = load_layout(data)
    paths = {array.path for array in layout.arrays}
    why_not = {one.path: why for one in layout.arrays if (why := _why_fixed(one, paths)) is not None}
    named = set((declared.fields or {}).values())
    # Names that a convention gives are not paths.
    named = named if named and named <= paths else paths
    if named is not paths and (fixed := sorted(named & why_not.keys())):
        raise Unreadable(f"{DECLARATION}: growing: array {fixed[0]!r} cannot grow: {why_not[fixed[0]]}")
    why_not |= dict.fromkeys(paths - named - why_not.keys(), "it is not among the fields that are declared to grow")
    arrays = {array.path: array for array in layout.arrays if array.path not in why_not}
    if not arrays:
        first = next(iter(sorted(why_not)), None)
        reason = "it has no arrays" if first is None else f"array {first!r} cannot grow: {why_not[first]}"
        raise Unreadable(f"{DECLARATION}: growing: {reason}")
    rows = {path: _full_chunks(array) * _height(array) for path, array in arrays.items()}
    shortest = min(rows, key=lambda path: rows[path])
    if not rows[shortest]:
        raise preparing(f"array {shortest!r} has no full chunk of {_height(arrays[shortest])} rows yet")
    return GrowingArrays(data, layout, arrays, why_not, rows[shortest])


def _why_fixed(array: ArrayLayout, paths: set[str]) -> str | None:
    """Why an array cannot grow; None if it can."""
    if array.unreadable is not None:
        return array.unreadable
    if array.by_h5py or array.external is not None:
        return "only h5py can read it"
    if array.chunks is None:
        return "it is not stored in chunks"
    if not array.extends:
        return "its first axis cannot be extended (maxshape)"
    flat = array.path.removesuffix(OFFSETS)
    if array.path + OFFSETS in paths or (flat != array.path and flat in paths):
        return LISTS
    return None


def _height(array: ArrayLayout) -> int:
    assert array.chunk_shape is not None
    return array.chunk_shape[0]


def chunks_of(array: ArrayLayout, rows: int) -> int:
    """Number of the chunks that hold any of the first `rows` rows."""
    return -(-rows // _height(array)) * array.cells


def _full_chunks(array: ArrayLayout) -> int:
    """Number of the first rows of chunks that are full and were written."""
    assert array.chunks is not None
    numbers = array.chunks.numbers
    # Ascending: before the first gap, each is at its own index.
    there = int(np.searchsorted(numbers - np.arange(len(numbers)), 1))
    return min(array.rows // _height(array), there // array.cells)


def preparing(detail: str) -> Preparing:
    return Preparing(detail, retry_after=_RETRY_SECONDS)
