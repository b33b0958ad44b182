"""Decodes chunk rows once and caches them for the batches that follow.

A chunk row is all chunks that hold the same rows of an array.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..buffers import BufferPool
from ..errors import FeedError
from .byte_cache import ByteCache, CacheUsage
from .column import Column
from .decoder_pool import Decoders
from .layout import ArrayLayout
from .no_store import OWN_CHUNKS
from .ranges import ranges_of_chunk_rows
from .scratch import Bytes
from .source import Ranges, Source

_KEPT = 3
"""Rows are read by chunk rows only if the cache has room for this many."""

_IDLE_SHARE = 8
"""Idle buffers for future chunk rows may take the cache's bound divided by this."""

_RECYCLED = 64 << 10
"""Bytes. The memory of chunk rows of at least this size is reused; smaller ones are allocated."""

_RUNS = 16
"""Number of jobs that the decoding of one chunk row is split into."""

_LONG_ROW = 4096
"""Bytes. Rows of at least this size are copied one by one."""

_MERGED = {1: np.uint8, 2: np.uint16, 4: np.int32, 8: np.float64}
"""Dtypes by item size in which OpenCV interleaves channels. It only copies bits, so any dtype of that size will do."""

_MOST_CHANNELS = 4

Int64s = npt.NDArray[np.int64]
Part = tuple[tuple[slice, ...], tuple[slice, ...]]


class ChunkRows:
    """Decodes and caches chunk rows.

    Parameters
    ----------
    decoders : Decoders
    max_bytes : int
        Bound on the cached chunk rows.
    timeout : float
        Seconds to wait for a chunk row that another request is decoding.
    """

    def __init__(self, decoders: Decoders, max_bytes: int, timeout: float) -> None:
        self._decoders = decoders
        self._kept: ByteCache[Bytes] = ByteCache(max_bytes, timeout)
        # Chunk rows that requests use are in addition to those in the cache. The idle share of the buffers is small.
        self._buffers = BufferPool(2 * max_bytes, max_bytes // _IDLE_SHARE)
        self._ahead = ThreadPoolExecutor(1, "h5feed-ahead")
        self._reading_ahead: Future[None] | None = None

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    @property
    def usage(self) -> CacheUsage:
        """Of the cache."""
        return self._kept.usage

    def keeps(self, array: ArrayLayout) -> bool:
        """Whether the chunk rows of an array are cached.

        They are if chunks are filtered, are not exactly one row each, and the cache has room for `_KEPT` chunk rows.
        """
        assert array.chunk_shape is not None
        height, *widths = array.chunk_shape
        if not array.filters or (height == 1 and tuple(widths) == array.sample_shape):
            return False
        return height * array.row_bytes * _KEPT <= self._kept.max_bytes

    def read(self, source: Source, array: ArrayLayout, rows: Int64s, places: Int64s | None, target: Bytes) -> None:
        """Read rows into ``target[places]``, or into all of `target` in order if `places` is None.

        Parameters
        ----------
        source : Source
        array : ArrayLayout
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
                # Indexing with arrays would first copy all rows to a temporary array.
                for place, row in zip(where[picked].tolist(), within[picked].tolist(), strict=True):
                    target[place] = held[row]

        self._decoders.share(zip(numbers.tolist(), pairwise(bounds), strict=True), work)

    def read_ahead(self, column: Column, rows: Int64s) -> None:
        """Start decoding the chunk rows of these rows in the background, if they are cached. Does not wait."""
        if self._reading_ahead is not None and not self._reading_ahead.done():
            return
        parts: list[tuple[Source, ArrayLayout, Int64s]] = []
        nbytes = 0
        for segment, _, local in column.divide(rows):
            array = segment.array.records if segment.array.record else segment.array
            if array.chunk_shape is None or segment.transposed or not self.keeps(array):
                return
            height = array.chunk_shape[0]
            numbers = np.unique(local // height)
            parts.append((segment.source, array, numbers))
            nbytes += len(numbers) * height * array.row_bytes
            if nbytes > self._kept.max_bytes // _KEPT:
                return

        def work() -> None:
            for source, array, numbers in parts:
                fetched = source.ahead(partial(self._ranges, source, array, numbers))
                for number in numbers.tolist():
                    # Ignore errors: a request for these rows will get them.
                    with contextlib.suppress(FeedError):
                        self.chunk_row(fetched, array, number)

        with contextlib.suppress(RuntimeError):
            self._reading_ahead = self._ahead.submit(work)

    def chunk_row(self, source: Source, array: ArrayLayout, number: int) -> Bytes:
        """Return one chunk row, from the cache if possible.

        Returns
        -------
        (height * row bytes,) uint8
            Rows ``number * height`` to ``(number + 1) * height - 1``. Do not write to it.

        Raises
        ------
        DatasetCorrupt, RevisionChanged, SourceUnavailable, Overloaded, ReadTimeout
        """
        if not self.keeps(array):
            return self._decoded(source, array, number)
        key, kept = self._key(source, array, number), self._kept
        if (own := OWN_CHUNKS.get()) is not None and key not in kept:
            kept = own
        return kept.get(key, partial(self._decoded, source, array, number), _held)

    @contextlib.contextmanager
    def chunk(self, source: Source, array: ArrayLayout, entry: int) -> Iterator[Bytes]:
        """One chunk, (chunk bytes,) uint8, by its index into the chunk table: from the cache if possible. Do not write
        to it; without room for it in the cache, it is valid in the ``with`` block only.

        Raises
        ------
        DatasetCorrupt, RevisionChanged, SourceUnavailable, Overloaded, ReadTimeout, TooLarge
        """
        assert array.chunks is not None and array.chunk_shape is not None
        table, itemsize = array.chunks, np.dtype(array.dtype).itemsize
        nbytes = math.prod(array.chunk_shape) * itemsize
        place = (int(table.offsets[entry]), int(table.sizes[entry]), int(table.masks[entry]))

        def decoded_into(out: Bytes) -> Bytes:
            with source.reading() as fd:
                self._decoders.chunk(source, fd, array, place, itemsize, out)
            return out

        if not self._keeps_chunk(array):
            with self._decoders.room_for(nbytes):
                yield decoded_into(self._decoders.scratch("decoded", nbytes))
            return

        def compute() -> Bytes:
            is_recycled = nbytes >= _RECYCLED
            return decoded_into(self._buffers.lease_or_new(nbytes) if is_recycled else np.empty(nbytes, np.uint8))

        key, kept = self._chunk_key(source, array, entry), self._kept
        if (own := OWN_CHUNKS.get()) is not None and key not in kept:
            kept = own
        yield kept.get(key, compute, _held)

    def has_chunk(self, source: Source, array: ArrayLayout, entry: int) -> bool:
        """Whether a chunk is in the cache."""
        return self._keeps_chunk(array) and self._chunk_key(source, array, entry) in self._kept

    def _keeps_chunk(self, array: ArrayLayout) -> bool:
        assert array.chunk_shape is not None
        nbytes = math.prod(array.chunk_shape) * np.dtype(array.dtype).itemsize
        return bool(array.filters) and nbytes * _KEPT <= self._kept.max_bytes

    def _chunk_key(self, source: Source, array: ArrayLayout, entry: int) -> tuple[Hashable, ...]:
        assert array.chunks is not None
        return (*source.key, "chunk", int(array.chunks.offsets[entry]), array.chunk_shape, array.dtype)

    def missing(self, source: Source, array: ArrayLayout, numbers: Int64s) -> Int64s:
        """Those of these chunk rows, (n,) int64, that will be decoded; those that are cached are decoded once."""
        if not self.keeps(array):
            return numbers
        wanted = np.unique(numbers).tolist()
        return np.array([one for one in wanted if self._key(source, array, one) not in self._kept], np.int64)

    def _ranges(self, source: Source, array: ArrayLayout, numbers: Int64s) -> Ranges:
        return ranges_of_chunk_rows(array, self.missing(source, array, numbers))

    def _key(self, source: Source, array: ArrayLayout, number: int) -> tuple[Hashable, ...]:
        assert array.chunks is not None
        # Use the position of the first chunk as the name: members of a table of records share its chunk rows, and so do
        # columns of a block. Columns may have only some of the chunks.
        # Without a position, rows are fill values. Arrays of several files may be in one received body.
        name = int(array.chunks.offsets[0]) if len(array.chunks.offsets) else (array.path, array.fill)
        # The shape is part of the key: a file can be one row in one dataset, and many rows in another.
        return (*source.key, name, array.chunk_shape, array.row_bytes, number)

    def drop_old(self, seconds: float) -> None:
        """Evict chunk rows that were not used for this many seconds, and free all idle buffers."""
        self._kept.drop_old(seconds)
        self._buffers.drop_idle()

    def _decoded(self, source: Source, array: ArrayLayout, number: int) -> Bytes:
        """Decode all chunks of a chunk row and assemble them, (height * row bytes,) uint8."""
        assert array.chunks is not None and array.chunk_shape is not None
        height, *widths = array.chunk_shape
        itemsize = np.dtype(array.dtype).itemsize
        nbytes = height * array.row_bytes
        # The buffer is reused when the last view of it is gone. Small buffers are not pooled: there would be thousands,
        # and each takes whole pages.
        chunk_row = self._buffers.lease_or_new(nbytes) if nbytes >= _RECYCLED else np.empty(nbytes, np.uint8)
        # view: (height, *sample, itemsize)
        view = chunk_row.reshape(height, *array.sample_shape, itemsize)
        table, parts = array.chunks, parts_of(array)
        entries = table.find(np.arange(number * len(parts), (number + 1) * len(parts), dtype=np.int64))
        chunk_bytes = math.prod(array.chunk_shape) * itemsize
        channels = _channels(array)
        # Compare shapes, not sizes: a chunk of 4 × 3 has as many bytes as a row of 3 × 4.
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

        # Neighbouring chunks go to the same thread, so that threads do not write to the same cache lines.
        step = -(-len(parts) // (_RUNS * channels)) * channels
        runs = [range(first, min(first + step, len(parts)), channels) for first in range(0, len(parts), step)]
        self._decoders.help(runs, work)
        return chunk_row


def _held(chunk_row: Bytes) -> int:
    """Memory that a chunk row takes: that of its buffer, which may be longer."""
    return chunk_row.nbytes if chunk_row.base is None else int(chunk_row.base.nbytes)


def grouped(owners: Int64s) -> tuple[Int64s, Int64s, list[int]]:
    """Group equal values.

    Parameters
    ----------
    owners : (n,) int64

    Returns
    -------
    order : (n,) int64
        A stable order that sorts `owners`.
    unique : (m,) int64
        Each owner once, ascending.
    bounds : list of int
        Where each owner begins in `order`, and the end: m + 1 numbers.
    """
    order = np.argsort(owners, kind="stable")
    sorted_owners = owners[order]
    begins = np.concatenate([[0], np.flatnonzero(np.diff(sorted_owners)) + 1])
    return order, sorted_owners[begins], [*begins.tolist(), len(owners)]


def parts_of(array: ArrayLayout) -> list[Part]:
    """The part of a sample that each chunk of a row holds, as slices into the sample and into the chunk."""
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
    """Number of adjacent chunks that hold one channel each of the same pixels; 1 if chunks are not split by channel.

    h5py's automatic chunk shape splits images this way.
    """
    assert array.chunk_shape is not None
    if len(array.sample_shape) < 2 or array.chunk_shape[-1] != 1 or np.dtype(array.dtype).itemsize not in _MERGED:
        return 1
    return array.sample_shape[-1] if array.sample_shape[-1] <= _MOST_CHANNELS else 1


def _merge(planes: Bytes, itemsize: int, out: Bytes) -> None:
    """Interleave channels.

    Three times as fast as writing the channels one after the other with a stride.

    Parameters
    ----------
    planes : (channels, n * itemsize) uint8
    itemsize : int
        1, 2, 4 or 8.
    out : (n * channels * itemsize,) uint8
    """
    # Imported late, because most servers never need it.
    import cv2

    dtype = _MERGED[itemsize]
    typed: Any = planes.view(dtype)
    cv2.merge([plane[None] for plane in typed], out.view(dtype).reshape(1, -1, len(planes)))
