"""Writes a copy by rows in bounded memory, in two passes over the matrix.

The first counts the values of each row. The second divides them into groups of consecutive rows, in a temporary file.
Then each group is sorted by row.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import DatasetCorrupt
from h5feed.runs import equal_runs
from h5feed.stored.array_file import dump_arrays
from h5feed.stored.column import Column, Segment
from h5feed.stored.source import Int64s

from ...cache_folder.sealed import discard, write_sealed
from ..reader import Reader
from .by_columns import BLOCK, ByColumns
from .copy_file import TransposedFile

_ENTRIES = 1 << 20
"""Values that are divided, or sorted, at a time."""


def work_bytes(matrix: ByColumns) -> int:
    """Bytes that are read and written to transpose a matrix."""
    return matrix.values * (2 * matrix.indices.array.row_bytes + 2 * matrix.data.array.row_bytes)


def scratch_bytes(matrix: ByColumns) -> int:
    """Size of the temporary file."""
    return matrix.values * _entry(matrix).itemsize


def _entry(matrix: ByColumns) -> np.dtype[Any]:
    return np.dtype([("row", "<i8"), ("column", matrix.index_dtype), ("value", matrix.dtype)])


def write_copy(file: TransposedFile, reader: Reader, advance: Callable[[int], None]) -> None:
    """Write the copy of a matrix and its table. The errors are those of `transpose`."""
    matrix, part = file.matrix, file.copy.with_suffix(".part")
    offsets = _row_offsets(matrix, reader, advance)
    groups = _groups(offsets)
    try:
        with tempfile.TemporaryFile(dir=part.parent, buffering=0) as scratch, open(part, "wb+") as out:
            # Fails now if the disk is too full.
            if matrix.nbytes:
                os.posix_fallocate(out.fileno(), 0, matrix.nbytes)
                os.posix_fallocate(scratch.fileno(), 0, scratch_bytes(matrix))
            _divide(matrix, reader, offsets, groups, scratch, advance)
            sums = _sort(matrix, offsets, groups, scratch, out, advance)
            out.flush()
            os.fdatasync(out.fileno())
        os.replace(part, file.copy)
    except BaseException:
        discard(part)
        raise
    write_sealed(file.table, dump_arrays({}, {"offsets": offsets, "sums": sums}))


def _row_offsets(matrix: ByColumns, reader: Reader, advance: Callable[[int], None]) -> Int64s:
    """Where the values of each row begin in the copy, (rows + 1,)."""
    offsets = np.zeros(matrix.rows + 1, np.int64)
    for begin, end in _blocks(matrix):
        rows = _items(reader, matrix.indices, begin, end).astype(np.int64)
        # Unsigned numbers that are too large become negative.
        wrong = np.flatnonzero((rows < 0) | (rows >= matrix.rows))
        if len(wrong):
            at = begin + int(wrong[0])
            raise DatasetCorrupt(
                f"column {_columns(matrix, at, at + 1)[0]} of {matrix.data.array.path!r} has a row index that is not "
                f"one of its {matrix.rows} rows"
            )
        # Not bincount, which would return as many numbers as there are rows for each block.
        found, counts = np.unique(rows, return_counts=True)
        offsets[found + 1] += counts
        advance((end - begin) * matrix.indices.array.row_bytes)
    return np.cumsum(offsets, out=offsets)


def _groups(offsets: Int64s) -> Int64s:
    """First row of each group of rows that are sorted together, and the number of rows. A group has at most `_ENTRIES`
    values, or a single row."""
    bounds = [0]
    while bounds[-1] < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[bounds[-1]] + _ENTRIES, side="right")) - 1
        bounds.append(max(bounds[-1] + 1, end))
    return np.array(bounds, np.int64)


def _divide(
    matrix: ByColumns,
    reader: Reader,
    offsets: Int64s,
    groups: Int64s,
    scratch: IO[bytes],
    advance: Callable[[int], None],
) -> None:
    """Write the values of each group of rows to its part of a temporary file, in the order of the columns."""
    entry = _entry(matrix)
    filled = offsets[groups[:-1]]
    for begin, end in _blocks(matrix):
        entries = np.empty(end - begin, entry)
        entries["row"] = _items(reader, matrix.indices, begin, end)
        entries["column"] = _columns(matrix, begin, end)
        entries["value"] = _items(reader, matrix.data, begin, end)
        owners = np.searchsorted(groups, entries["row"], side="right") - 1
        order = np.argsort(owners, kind="stable")
        entries, owners = entries[order], owners[order]
        for first, stop in zip(*equal_runs(owners), strict=True):
            owner = int(owners[first])
            _put(scratch.fileno(), entries[first:stop], int(filled[owner]) * entry.itemsize)
            filled[owner] += stop - first
        advance((end - begin) * (matrix.indices.array.row_bytes + matrix.data.array.row_bytes))


def _sort(
    matrix: ByColumns,
    offsets: Int64s,
    groups: Int64s,
    scratch: IO[bytes],
    out: IO[bytes],
    advance: Callable[[int], None],
) -> npt.NDArray[np.uint32]:
    """Write the values and column indices of all rows. Returns the checksums of all blocks."""
    entry = _entry(matrix)
    values = _Section(out.fileno(), 0)
    columns = _Section(out.fileno(), matrix.indices_begin)
    bounds = offsets[groups]
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        # Only a single row, which is in order, has more than this.
        for begin in range(first, last, _ENTRIES):
            entries = np.empty(min(_ENTRIES, last - begin), entry)
            _get(scratch.fileno(), entries, begin * entry.itemsize)
            entries = entries[np.argsort(entries["row"], kind="stable")]
            values.write(entries["value"])
            columns.write(entries["column"])
            advance(len(entries) * matrix.data.array.row_bytes)
    return np.array(values.end() + columns.end(), np.uint32)


class _Section:
    """A part of the copy that is written in whole blocks, from its beginning."""

    def __init__(self, descriptor: int, begin: int) -> None:
        self._descriptor = descriptor
        self._at = begin
        self._rest = b""
        self._sums: list[int] = []

    def write(self, values: npt.NDArray[Any]) -> None:
        data = self._rest + values.tobytes()
        whole = len(data) - len(data) % BLOCK
        self._rest = data[whole:]
        self._write(memoryview(data)[:whole])

    def end(self) -> list[int]:
        """Fill the last block with zeros. Returns the checksums of all."""
        if self._rest:
            self._write(memoryview(self._rest.ljust(BLOCK, b"\0")))
        return self._sums

    def _write(self, view: memoryview) -> None:
        self._sums += [zlib.crc32(view[at : at + BLOCK]) for at in range(0, len(view), BLOCK)]
        _put(self._descriptor, view, self._at)
        self._at += len(view)


def _blocks(matrix: ByColumns) -> Iterator[tuple[int, int]]:
    """First value, and the one after the last, of parts of about `_ENTRIES` values: whole chunks, if there are any."""
    chunk = matrix.indices.array.chunk_shape[0] if matrix.indices.array.chunk_shape else 1
    step = max(1, _ENTRIES // chunk) * chunk if chunk <= 4 * _ENTRIES else _ENTRIES
    for begin in range(0, matrix.values, step):
        yield begin, min(begin + step, matrix.values)


def _items(reader: Reader, segment: Segment, begin: int, end: int) -> npt.NDArray[Any]:
    """Items of a flat array, as they are served."""
    bounds = np.array([begin, end], np.int64)
    column = Column((replace(segment, offsets=bounds, indices=None, below=None),))
    out = np.empty(end - begin, column.dtype)
    reader.read_lists_from_source(column, np.zeros(1, np.int64), bounds - begin, out)
    return out


def _columns(matrix: ByColumns, begin: int, end: int) -> Int64s:
    """The columns of some values."""
    assert matrix.data.offsets is not None
    offsets: Int64s = matrix.data.offsets[:]
    first = int(np.searchsorted(offsets, begin, side="right")) - 1
    stop = int(np.searchsorted(offsets, end, side="left"))
    bounds = np.clip(offsets[first : stop + 1], begin, end)
    return np.repeat(np.arange(first, stop, dtype=np.int64), np.diff(bounds))


def _put(descriptor: int, content: Any, offset: int) -> None:
    view = memoryview(content).cast("B") if isinstance(content, memoryview) else memoryview(content.view(np.uint8))
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _get(descriptor: int, content: npt.NDArray[Any], offset: int) -> None:
    view = memoryview(content.view(np.uint8))
    while view:
        received = os.preadv(descriptor, [view], offset)
        if not received:
            raise OSError("a temporary file of the cache folder was cut off")
        view, offset = view[received:], offset + received
