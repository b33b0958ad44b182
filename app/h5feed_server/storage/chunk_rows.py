"""Chunk rows – all chunks that hold the same rows of an array – decoded once, and kept for the batches that follow."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.buffers import BufferPool
from h5feed.errors import FeedError

from .byte_cache import ByteCache
from .column import Column
from .decoder_pool import Decoders
from .layout import ArrayLayout
from .local_file import LocalFile
from .scratch import Bytes

_KEPT = 3
"""Chunk rows that the cache must have room for, where rows are to be read by chunk rows."""

_IDLE_SHARE = 8
"""Of the cache's bound: bytes of buffers that nobody uses, for the chunk rows to come."""

_RECYCLED = 64 << 10
"""Bytes: smaller chunk rows are memory of their own."""

_RUNS = 16
"""Runs of chunks that the decoding of one chunk row is shared out in."""

_LONG_ROW = 4096
"""Bytes of a row from which on rows are copied one by one."""

_MERGED = {1: np.uint8, 2: np.uint16, 4: np.int32, 8: np.float64}
"""Numbers by their bytes, as OpenCV interleaves channels of them; it copies bits and computes nothing."""

_MOST_CHANNELS = 4

Int64s = npt.NDArray[np.int64]
Part = tuple[tuple[slice, ...], tuple[slice, ...]]


class ChunkRows:
    """The chunk rows of arrays, put together from their chunks.

    Parameters
    ----------
    decoders : Decoders
    max_bytes : int
        Bound on the chunk rows that are kept.
    timeout : float
        Seconds to wait for a chunk row that another request decodes.
    """

    def __init__(self, decoders: Decoders, max_bytes: int, timeout: float) -> None:
        self._decoders = decoders
        self._kept: ByteCache[Bytes] = ByteCache(max_bytes, timeout)
        # Chunk rows in use by a request are beyond the bound of the cache; idle ones, on top of it, are few.
        self._buffers = BufferPool(2 * max_bytes, max_bytes // _IDLE_SHARE)
        self._ahead = ThreadPoolExecutor(1, "h5feed-ahead")
        self._reading_ahead: Future[None] | None = None

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    def keeps(self, array: ArrayLayout) -> bool:
        """Whether decoded chunks of many rows are kept for the rows that are asked for later."""
        assert array.chunk_shape is not None
        height, *widths = array.chunk_shape
        if not array.filters or (height == 1 and tuple(widths) == array.sample_shape):
            return False
        return height * array.row_bytes * _KEPT <= self._kept.max_bytes

    def read(self, source: LocalFile, array: ArrayLayout, rows: Int64s, places: Int64s | None, target: Bytes) -> None:
        """Rows to ``target[places]``; None: to all of it, in order.

        Parameters
        ----------
        rows, places : (k,) int64
        target : (n, row bytes) uint8
        """
        assert array.chunk_shape is not None
        height = array.chunk_shape[0]
        order, numbers, bounds = grouped(rows // height)
        within = rows % height
        where = np.arange(len(rows)) if places is None else places

        def work(remaining: Iterator[tuple[int, tuple[int, int]]]) -> None:
            for number, (start, stop) in remaining:
                # held: (rows of the chunk row, row bytes)
                held = self.chunk_row(source, array, number).reshape(height, array.row_bytes)
                picked = order[start:stop]
                if array.row_bytes < _LONG_ROW:
                    target[where[picked]] = held[within[picked]]
                    continue
                # numpy would copy them all to a place of its own first.
                for place, row in zip(where[picked].tolist(), within[picked].tolist(), strict=True):
                    target[place] = held[row]

        self._decoders.share(zip(numbers.tolist(), pairwise(bounds), strict=True), work)

    def read_ahead(self, column: Column, rows: Int64s) -> None:
        """Begin to decode what these rows will be read from, where it is kept; nobody waits for it."""
        if self._reading_ahead is not None and not self._reading_ahead.done():
            return
        chunk_rows: list[tuple[LocalFile, ArrayLayout, int]] = []
        nbytes = 0
        for segment, _, local in column.divide(rows):
            array = segment.array.records if segment.array.record else segment.array
            if array.chunk_shape is None or segment.transposed or not self.keeps(array):
                return
            height = array.chunk_shape[0]
            numbers = np.unique(local // height).tolist()
            chunk_rows += [(segment.source, array, number) for number in numbers]
            nbytes += len(numbers) * height * array.row_bytes
            if nbytes > self._kept.max_bytes // _KEPT:
                return

        def work() -> None:
            for chunk_row in chunk_rows:
                # What is wrong with it will be told to who asks for it.
                with contextlib.suppress(FeedError):
                    self.chunk_row(*chunk_row)

        with contextlib.suppress(RuntimeError):
            self._reading_ahead = self._ahead.submit(work)

    def chunk_row(self, source: LocalFile, array: ArrayLayout, number: int) -> Bytes:
        """Rows ``number * height`` and those that follow, to be read only, (height * row bytes,) uint8."""
        assert array.chunks is not None
        if not self.keeps(array):
            return self._decoded(source, array, number)
        # Members of one table of records share its chunks; so do columns of a block, which may be of some of them only.
        name = array.path if len(array.chunks.offsets) == 0 else int(array.chunks.offsets[0])
        # A file that is one row has other chunk rows than the same file as rows.
        key = (*source.key, name, array.chunk_shape, array.row_bytes, number)
        return self._kept.get(key, partial(self._decoded, source, array, number), _held)

    def drop_old(self, seconds: float) -> None:
        """Let go of chunk rows that nobody has asked for in so many seconds, and of all buffers that nobody uses."""
        self._kept.drop_old(seconds)
        self._buffers.drop_idle()

    def _decoded(self, source: LocalFile, array: ArrayLayout, number: int) -> Bytes:
        """All chunks of `height` rows, decoded and put together, (height * row bytes,) uint8."""
        assert array.chunks is not None and array.chunk_shape is not None
        height, *widths = array.chunk_shape
        itemsize = np.dtype(array.dtype).itemsize
        nbytes = height * array.row_bytes
        # Used again when the last one who looks at it has gone. Of small ones there would be thousands to look through,
        # each of which takes some pages.
        chunk_row = self._buffers.lease_or_new(nbytes) if nbytes >= _RECYCLED else np.empty(nbytes, np.uint8)
        # view: (height, *sample, itemsize)
        view = chunk_row.reshape(height, *array.sample_shape, itemsize)
        table, parts = array.chunks, parts_of(array)
        entries = table.find(np.arange(number * len(parts), (number + 1) * len(parts), dtype=np.int64))
        chunk_bytes = math.prod(array.chunk_shape) * itemsize
        channels = _channels(array)
        # By shape: chunks of 4 × 3 have as many bytes as rows of 3 × 4.
        whole_rows = tuple(widths) == array.sample_shape

        def decode(fd: int, part: int, out: Bytes) -> None:
            entry = entries[part]
            place = (int(table.offsets[entry]), int(table.sizes[entry]), int(table.masks[entry]))
            self._decoders.chunk(source, fd, array, place, itemsize, out)

        def put_part(fd: int, part: int) -> None:
            inside, inside_chunk = parts[part]
            if entries[part] < 0:
                view[(slice(None), *inside)] = np.frombuffer(array.fill, np.uint8)
            elif whole_rows:
                decode(fd, part, chunk_row)
            else:
                decoded = self._decoders.scratch("decoded", chunk_bytes)
                decode(fd, part, decoded)
                chunk = decoded.reshape(height, *widths, itemsize)
                view[(slice(None), *inside)] = chunk[(slice(None), *inside_chunk)]

        def put_channels(fd: int, first: int) -> None:
            planes = self._decoders.scratch("decoded", channels * chunk_bytes).reshape(channels, chunk_bytes)
            for channel, plane in enumerate(planes):
                decode(fd, first + channel, plane)
            pixels = self._decoders.scratch("merged", planes.size)
            _merge(planes, itemsize, pixels)
            inside, inside_chunk = parts[first]
            chunk = pixels.reshape(height, *widths[:-1], channels, itemsize)
            view[(slice(None), *inside[:-1])] = chunk[(slice(None), *inside_chunk[:-1])]

        def work(remaining: Iterator[range]) -> None:
            with source.reading() as fd:
                for first in chain.from_iterable(remaining):
                    if channels > 1 and entries[first : first + channels].min() >= 0:
                        put_channels(fd, first)
                    else:
                        for part in range(first, first + channels):
                            put_part(fd, part)

        # Neighbours by one thread: two that wrote to the same cache lines would hinder each other.
        step = -(-len(parts) // (_RUNS * channels)) * channels
        runs = [range(first, min(first + step, len(parts)), channels) for first in range(0, len(parts), step)]
        self._decoders.help(runs, work)
        return chunk_row


def _held(chunk_row: Bytes) -> int:
    """Bytes that a chunk row holds: those of its buffer, which may be longer."""
    return chunk_row.nbytes if chunk_row.base is None else int(chunk_row.base.nbytes)


def grouped(owners: Int64s) -> tuple[Int64s, Int64s, list[int]]:
    """An order that puts equal owners together; each owner once; and where each begins in that order, with the end."""
    order = np.argsort(owners, kind="stable")
    sorted_owners = owners[order]
    begins = np.concatenate([[0], np.flatnonzero(np.diff(sorted_owners)) + 1])
    return order, sorted_owners[begins], [*begins.tolist(), len(owners)]


def parts_of(array: ArrayLayout) -> list[Part]:
    """Which part of a sample each chunk of a row holds: in the sample, and in the chunk."""
    assert array.chunk_shape is not None
    widths = array.chunk_shape[1:]
    cells = [-(-extent // width) for extent, width in zip(array.sample_shape, widths, strict=True)]
    parts = []
    for cell in np.ndindex(*cells):
        starts = [index * width for index, width in zip(cell, widths, strict=True)]
        extents = [
            min(width, extent - start) for start, width, extent in zip(starts, widths, array.sample_shape, strict=True)
        ]
        parts.append(
            (
                tuple(slice(start, start + extent) for start, extent in zip(starts, extents, strict=True)),
                tuple(slice(0, extent) for extent in extents),
            )
        )
    return parts


def _channels(array: ArrayLayout) -> int:
    """Chunks that hold one channel each of the same pixels, as h5py lays out images by itself; 1: none do."""
    assert array.chunk_shape is not None
    if len(array.sample_shape) < 2 or array.chunk_shape[-1] != 1 or np.dtype(array.dtype).itemsize not in _MERGED:
        return 1
    return array.sample_shape[-1] if array.sample_shape[-1] <= _MOST_CHANNELS else 1


def _merge(planes: Bytes, itemsize: int, out: Bytes) -> None:
    """Pixels of channels, (channels, n * itemsize) uint8, to (n * channels * itemsize,) uint8.

    Three times as fast as to write every third item three times over.
    """
    # Here, for most servers never need it.
    import cv2

    dtype = _MERGED[itemsize]
    typed: Any = planes.view(dtype)
    cv2.merge([plane[None] for plane in typed], out.view(dtype).reshape(1, -1, len(planes)))
