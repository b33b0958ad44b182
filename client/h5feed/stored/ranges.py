"""Which stored bytes a read of some rows needs: a source that answers late begins with all of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..runs import consecutive
from .layout import ArrayLayout
from .scratch import SCRATCH_BYTES
from .source import Int64s, Ranges

NOTHING: Ranges = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def ranges_of_rows(array: ArrayLayout, rows: Int64s, is_needed: Callable[[Int64s], Int64s]) -> Ranges:
    """The ranges of some rows.

    Readers may read other ranges as well: this is about time, not about what is read.

    Parameters
    ----------
    array : ArrayLayout
    rows : (k,) int64
    is_needed : callable
        Returns those chunk rows of the given ones, (n,) int64 each, that will be decoded: see `ChunkRows.missing`.
    """
    if array.by_h5py or array.inline is not None or not len(rows):
        return NOTHING
    if array.chunk_shape is not None:
        return _of_chunked(array, rows, is_needed)
    if array.offset is None:
        return NOTHING
    return array.offset + rows * array.row_bytes, np.full(len(rows), array.row_bytes, np.int64)


def ranges_of_chunk_rows(array: ArrayLayout, numbers: Int64s) -> Ranges:
    """The ranges of all chunks of these chunk rows, (n,) int64."""
    assert array.chunks is not None
    cells = np.arange(array.cells, dtype=np.int64)
    entries = array.chunks.find((numbers[:, None] * array.cells + cells).reshape(-1))
    entries = entries[entries >= 0]
    return array.chunks.offsets[entries], array.chunks.sizes[entries]


def ranges_of_items(array: ArrayLayout, begins: Int64s, ends: Int64s, is_needed: Callable[[Int64s], Int64s]) -> Ranges:
    """The ranges of lists of items of a flat array, from item `begins[i]` to the one before `ends[i]`."""
    if array.inline is not None or not len(begins):
        return NOTHING
    if array.chunk_shape is not None:
        parts = parts_of_lists(begins, ends, array.chunk_shape[0])
        if array.filters:
            return ranges_of_chunk_rows(array, is_needed(np.unique(parts.chunks)))
        return stored_parts(array, parts)[:2]
    if array.offset is None:
        return NOTHING
    return array.offset + begins * array.row_bytes, (ends - begins) * array.row_bytes


class ListParts(NamedTuple):
    """Lists, cut at the borders of chunks. All are (n,) int64.

    Attributes
    ----------
    owners : int64
        Number of the list that each part belongs to; ascending.
    chunks : int64
        Number of the chunk that holds it.
    begins, ends : int64
        Its first item, and the one after the last, counted from the beginning of the array.
    """

    owners: Int64s
    chunks: Int64s
    begins: Int64s
    ends: Int64s


def parts_of_lists(begins: Int64s, ends: Int64s, height: int) -> ListParts:
    """The parts of lists from item `begins[i]` to the one before `ends[i]`, in chunks of `height` items."""
    filled = np.flatnonzero(ends > begins)
    first = begins[filled] // height
    counts = (ends[filled] - 1) // height - first + 1
    owners, chunks = np.repeat(filled, counts), consecutive(first, counts)
    return ListParts(
        owners,
        chunks,
        np.maximum(begins[owners], chunks * height),
        np.minimum(ends[owners], (chunks + 1) * height),
    )


def stored_parts(array: ArrayLayout, parts: ListParts) -> tuple[Int64s, Int64s, Int64s]:
    """Where the parts of lists are in unfiltered chunks.

    Returns
    -------
    offsets, sizes : (m,) int64
        In bytes.
    written : (m,) int64
        Which parts these are: the others are in chunks that were never written.
    """
    assert array.chunks is not None and array.chunk_shape is not None
    entries = array.chunks.find(parts.chunks)
    written = np.flatnonzero(entries >= 0)
    begins, ends = parts.begins[written], parts.ends[written]
    within = begins - parts.chunks[written] * array.chunk_shape[0]
    return (
        array.chunks.offsets[entries[written]] + within * array.row_bytes,
        (ends - begins) * array.row_bytes,
        written,
    )


def _of_chunked(array: ArrayLayout, rows: Int64s, is_needed: Callable[[Int64s], Int64s]) -> Ranges:
    assert array.chunks is not None and array.chunk_shape is not None
    height, *widths = array.chunk_shape
    part_bytes = math.prod(widths) * np.dtype(array.dtype).itemsize
    whole_rows = tuple(widths) == array.sample_shape
    if array.filters or not (whole_rows or height * part_bytes > SCRATCH_BYTES):
        if array.filters and height == 1 and whole_rows:
            # Each is decoded into its place, also a row that is there twice.
            return ranges_of_chunk_rows(array, rows)
        return ranges_of_chunk_rows(array, is_needed(np.unique(rows // height)))
    # Of unfiltered chunks, only the rows are read.
    cells = np.arange(array.cells, dtype=np.int64)
    entries = array.chunks.find((rows[:, None] // height * array.cells + cells).reshape(-1))
    within = np.repeat(rows % height, array.cells)[entries >= 0]
    entries = entries[entries >= 0]
    return array.chunks.offsets[entries] + within * part_bytes, np.full(len(entries), part_bytes, np.int64)
