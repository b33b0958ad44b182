"""Checks layouts against libhdf5 before they are used: reads a few rows both ways and compares them bit for bit.

Runs in the child process that inspects files, where libhdf5 is confined. The time is bounded: at first every array is
compared, then only the first of each kind of storage, then none.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5feed.stored.byte_cache import ByteCache
from h5feed.stored.column import Column, Segment
from h5feed.stored.decoder_pool import Decoders
from h5feed.stored.layout import ArrayLayout
from h5feed.stored.local_file import Identity, LocalFile, OpenFiles
from h5feed.stored.source import Source

from ..reader import Reader
from .reader_pool import ReaderPool

_MOST_BYTES = 32 << 20
"""Upper bound on the bytes of one array that are decoded, each way."""

_ALL = 1 / 15
"""Share of the inspection timeout, in CPU time, during which every array is compared."""

_KINDS = 1 / 5
"""Share of the inspection timeout, in CPU time, during which the first array of each kind is compared."""

_END = 1 / 2
"""Share of the inspection timeout, in wall time, after which nothing more is compared."""

_TIMEOUT = 1e9
"""Seconds. Practically no timeout: there is only one thread, so nothing ever waits."""

Compared = tuple[str, ArrayLayout]
"""Name of a record member (empty if the array has no records), and its layout."""


class Guard:
    """Compares the arrays of one file.

    Parameters
    ----------
    source : Source or None
        The file, as it is read without libhdf5: see `held`. None if h5py reads all of it, so that there is nothing to
        compare.
    seconds : float
        Timeout of the whole inspection.
    is_remote : bool
        Reading takes time, but no CPU time: only the first array of each kind is compared.
    is_written : bool
        Another process is writing to the file: chunks that are not full yet may change between the two reads.
    """

    def __init__(
        self, source: Source | None, seconds: float, *, is_remote: bool = False, is_written: bool = False
    ) -> None:
        self._source = source
        self._is_written = is_written
        self._decoders = Decoders(1, _TIMEOUT)
        began = time.process_time()
        self._all_until = began + (0 if is_remote else _ALL * seconds)
        self._kinds_until = began + _KINDS * seconds
        self._end = time.monotonic() + _END * seconds
        self._seen: set[Hashable] = set()

    def agrees(self, dataset: h5py.Dataset, arrays: Sequence[Compared]) -> bool:
        """Whether these layouts give the same bytes as libhdf5.

        Rows that neither can read count as equal. Returns True without reading anything when the time is used up.

        Parameters
        ----------
        dataset : h5py.Dataset
        arrays : sequence of (str, ArrayLayout)
            The layout of the dataset, or those of the members of its records.
        """
        arrays = [(name, one) for name, one in arrays if one.rows and one.row_bytes and one.external is None]
        if self._is_written:
            arrays = [(name, full) for name, one in arrays if (full := _full_chunks(one)) is not None]
        if not arrays or self._source is None:
            return True
        kind = tuple(_kind(one) for _, one in arrays)
        until = self._all_until if kind in self._seen else self._kinds_until
        if time.process_time() > until or time.monotonic() > self._end:
            return True
        self._seen.add(kind)
        # No cache: its keys contain paths, which these layouts do not have yet.
        self._reader = Reader(1, ByteCache(0, _TIMEOUT), 3 * _MOST_BYTES, _TIMEOUT, ReaderPool(0, 0, 0))
        rows = _rows(arrays[0][1])
        if not len(rows):
            return all(self._chunk_agrees(dataset, entry, arrays) for entry in _entries(arrays[0][1]))
        if self._rows_agree(dataset, rows, arrays):
            return True
        # One broken chunk fails all rows that are read together with it, so compare the rows one by one.
        return all(self._rows_agree(dataset, rows[i : i + 1], arrays, both_fail=True) for i in range(len(rows)))

    def _rows_agree(
        self, dataset: h5py.Dataset, rows: npt.NDArray[np.int64], arrays: Sequence[Compared], both_fail: bool = False
    ) -> bool:
        names = [name for name, _ in arrays if name]
        try:
            source = dataset.fields(names) if names else dataset
            # Row by row: selecting a list of rows takes h5py time in proportion to the length of the array.
            theirs = np.concatenate([source[row : row + 1] for row in rows.tolist()])
        except Exception:
            theirs = None
        for name, one in arrays:
            mine = self._read(one, rows)
            if mine is None or theirs is None:
                if not (both_fail and mine is None and theirs is None):
                    return False
            elif not _same(mine, theirs[name] if name else theirs, one):
                return False
        return True

    def _read(self, array: ArrayLayout, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any] | None:
        assert self._source is not None
        column = Column((Segment(self._source, array),))
        out = np.empty((len(rows), *column.sample_shape), column.dtype)
        try:
            self._reader.read_from_source(column, rows, out)
        except Exception:
            return None
        return out

    def _chunk_agrees(self, dataset: h5py.Dataset, entry: int, arrays: Sequence[Compared]) -> bool:
        """Whether the chunk at index `entry` is equal; for arrays whose rows are too large to compare."""
        _, array = arrays[0]
        assert self._source is not None and array.chunks is not None and array.chunk_shape is not None
        itemsize = np.dtype(array.dtype).itemsize
        grid = [-(-extent // width) for extent, width in zip(array.shape, array.chunk_shape, strict=True)]
        cell = np.unravel_index(int(array.chunks.numbers[entry]), grid)
        starts = [int(index) * width for index, width in zip(cell, array.chunk_shape, strict=True)]
        ends = [min(a + w, n) for a, w, n in zip(starts, array.chunk_shape, array.shape, strict=True)]
        place = tuple(int(column[entry]) for column in (array.chunks.offsets, array.chunks.sizes, array.chunks.masks))
        out = np.empty(math.prod(array.chunk_shape) * itemsize, np.uint8)
        mine: npt.NDArray[Any] | None = None
        theirs = None
        with contextlib.suppress(Exception), self._source.reading() as fd:
            self._decoders.chunk(self._source, fd, array, (place[0], place[1], place[2]), itemsize, out)
            mine = out.view(array.dtype).reshape(array.chunk_shape)
            mine = mine[tuple(slice(end - start) for start, end in zip(starts, ends, strict=True))]
        with contextlib.suppress(Exception):
            theirs = dataset[tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))]
        if mine is None or theirs is None:
            return mine is None and theirs is None
        return np.ascontiguousarray(mine).tobytes() == np.asarray(theirs).astype(mine.dtype, copy=False).tobytes()


def held(file: h5py.File, identity: Identity) -> Source | None:
    """An open file as a source that uses the same descriptor, so that no file is opened; None if it has several parts.

    Parameters
    ----------
    file : h5py.File
    identity : Identity
        Of that file.
    """
    with contextlib.suppress(ValueError, TypeError, RuntimeError, NotImplementedError):
        return _Held(file.id.get_vfd_handle(), identity)
    return None


class _Held(LocalFile):
    """A file that libhdf5 has open; this process can open no further files."""

    def __init__(self, fd: int, identity: Identity) -> None:
        super().__init__(OpenFiles(0), "", identity)
        self._fd = fd

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        yield self._fd


def _kind(array: ArrayLayout) -> Hashable:
    """A key that is equal for arrays that are stored in the same way."""
    chunks = array.chunks is None or len(array.chunks.numbers) > 0
    shape = array.chunk_shape and (array.chunk_shape[1:] == array.sample_shape, array.rows % array.chunk_shape[0] == 0)
    where = (array.offset is None, array.inline is None, chunks, len(array.shape), shape)
    return (array.dtype, array.filters, array.record, array.padding, where)


def _full_chunks(array: ArrayLayout) -> ArrayLayout | None:
    """The rows of an array that are in full chunks; None if there are none, or if a chunk among them is missing."""
    if array.chunk_shape is None or array.chunks is None:
        return None
    full = array.rows // array.chunk_shape[0]
    there = int(np.searchsorted(array.chunks.numbers, full * array.cells))
    if not full or there != full * array.cells:
        return None
    shape = (full * array.chunk_shape[0], *array.shape[1:])
    return replace(array, shape=shape, chunks=array.chunks.first(there))


def _rows(array: ArrayLayout) -> npt.NDArray[np.int64]:
    """The last, first and middle row, or as many of them, in this order, as fit into `_MOST_BYTES`."""
    stored = array.records if array.record else array
    nbytes = stored.row_bytes
    if stored.chunk_shape is not None and stored.filters:
        nbytes = stored.cells * math.prod(stored.chunk_shape) * np.dtype(stored.dtype).itemsize
    chosen = [array.rows - 1, 0, array.rows // 2][: _MOST_BYTES // max(1, nbytes)]
    return np.array(sorted({*chosen}), np.int64)


def _entries(array: ArrayLayout) -> list[int]:
    """Indices of the first and last chunk in the table; empty if chunks are too large or cannot be compared."""
    if array.record or array.chunks is None or array.chunk_shape is None or np.dtype(array.dtype).kind in "Sc":
        return []
    if math.prod(array.chunk_shape) * np.dtype(array.dtype).itemsize > _MOST_BYTES or array.is_bfloat16:
        return []
    return sorted({0, len(array.chunks.numbers) - 1}) if len(array.chunks.numbers) else []


def _same(mine: npt.NDArray[Any], theirs: Any, array: ArrayLayout) -> bool:
    values = np.asarray(theirs)
    if array.is_bfloat16:
        # h5py converts them to float32, and all NaNs to the same one.
        wide = (mine.astype(np.uint32) << 16).view(np.float32)
        return np.array_equal(wide, values.astype(np.float32), equal_nan=True)
    if values.dtype.kind == "c":
        values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    else:
        values = values.astype(mine.dtype, copy=False)
    return values.nbytes == mine.nbytes and values.tobytes() == mine.tobytes()
