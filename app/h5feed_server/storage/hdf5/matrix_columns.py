"""Layouts for columns of a matrix: they are members of records, and the records are the rows of the matrix or chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from h5feed.stored.layout import MAX_RECORD_BYTES, ArrayLayout, ChunkTable


def columns_of(array: ArrayLayout, begin: int, stop: int, attributes: dict[str, Any]) -> ArrayLayout | None:
    """Return the layout of columns ``begin … stop-1`` of a matrix.

    Parameters
    ----------
    array : ArrayLayout
        Of shape (rows, columns).
    begin, stop : int
    attributes : dict
        Attributes of the new layout.

    Returns
    -------
    ArrayLayout or None
        Of shape (rows, stop - begin), or (rows,) for a single column. None if the columns are in several columns of
        chunks, if their records would be too large, or if h5py reads the matrix.
    """
    if array.unreadable is not None or array.by_h5py or len(array.shape) != 2:
        return None
    itemsize, count = np.dtype(array.dtype).itemsize, stop - begin
    path = f"{array.path}[:, {begin}]" if count == 1 else f"{array.path}[:, {begin}:{stop}]"
    known: dict[str, Any] = {
        "path": path,
        "shape": (array.rows,) if count == 1 else (array.rows, count),
        "stored_bytes": array.stored_bytes * count // max(1, array.shape[1]),
        "attributes": attributes,
        "text": None,
    }
    if array.record is not None:
        nbytes, first = array.record
        return replace(array, **known, record=(nbytes, first + begin * itemsize))
    width = array.shape[1]
    if array.chunk_shape is not None and array.chunks is not None:
        width = array.chunk_shape[1]
        column, across = begin // width, -(-array.shape[1] // width)
        if (stop - 1) // width != column:
            return None
        begin -= column * width
        known |= {"chunk_shape": array.chunk_shape[:1], "chunks": _chunks_of(array.chunks, column, across)}
    if width * itemsize > MAX_RECORD_BYTES:
        return None
    return replace(array, **known, fill=array.fill * width, record=(width * itemsize, begin * itemsize))


def _chunks_of(table: ChunkTable, column: int, across: int) -> ChunkTable:
    """The chunks of one column of the grid of chunks, numbered by their row in it."""
    if across == 1:
        return table
    mine = table.numbers % across == column
    return ChunkTable(table.numbers[mine] // across, table.offsets[mine], table.sizes[mine], table.masks[mine])
