"""Reads parts of rows, and of the stored bytes only what they touch: chunks, each once, or ranges of flat arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .chunk_rows import ChunkRows
from .column import Segment
from .decoder_pool import Decoders
from .layout import ArrayLayout
from .ranges import NOTHING
from .scratch import SCRATCH_BYTES, Bytes
from .source import Ranges, Source

GAP_BYTES = 8 << 10
"""Ranges of contiguous arrays that are at most this far apart are read as one: copying so many bytes takes about as
long as a system call, and storage has larger pages."""

_WHOLE_CHUNK_BYTES = 1 << 20
"""Unfiltered chunks up to this size are read as a whole: once for all parts that touch them."""

MAX_WHOLE_BYTES = 64 << 20
"""Maximum bytes of an array that is read as a whole for rows that are scattered over it."""

_PAGE_BYTES = 4 << 10
"""Storage has no smaller pages."""

_WHOLE_ROWS_BYTES = 32 << 20
"""Bytes of whole rows that are read at a time, where no smaller part of them can be read."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Boxes:
    """Parts of rows, all of the same size.

    Attributes
    ----------
    rows : (k,) int64
    starts : (k, axes) int64
        Where each part begins, along the first axes of its row. The other axes are whole.
    lengths : tuple of int
        Of the parts, along the same axes.
    """

    rows: Int64s
    starts: Int64s
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a part of a row of this shape."""
        return (*self.lengths, *sample_shape[len(self.lengths) :])

    def slices(self) -> list[tuple[slice, ...]]:
        """Where each part is in its row."""
        return [
            tuple(slice(start, start + length) for start, length in zip(starts, self.lengths, strict=True))
            for starts in self.starts.tolist()
        ]


def is_cut(segment: Segment) -> bool:
    """Whether less than whole rows of a segment can be read."""
    return not segment.transposed and can_be_sliced(segment)


def _has_positions(array: ArrayLayout) -> bool:
    """Whether the elements of an array are at positions of their own."""
    return not (array.by_h5py or array.inline is not None or array.record is not None or array.padding is not None)


def can_be_sliced(segment: Segment) -> bool:
    """Whether rows along any axis can be read without the rest of the array."""
    return not segment.has_lists and _has_positions(segment.array)


def slices_of(segment: Segment, rows: Int64s) -> Boxes | None:
    """Rows that are slices along an axis other than the first, as parts of `Segment.as_row`; None if it is better to
    read the whole array.

    That is better if most of it would be read anyway.
    """
    if not can_be_sliced(segment):
        return None
    array, axis = segment.as_row, segment.axis
    if segment.array.nbytes <= MAX_WHOLE_BYTES:
        if array.chunk_shape is not None:
            height = array.chunk_shape[1 + axis]
            if 2 * len(np.unique(rows // height)) >= -(-segment.rows // height):
                return None
        elif len(rows) * read_for_box(array, segment.row_lengths) >= segment.array.nbytes:
            return None
    starts = np.zeros((len(rows), len(segment.array.shape)), np.int64)
    starts[:, axis] = rows
    return Boxes(np.zeros(len(rows), np.int64), starts, segment.row_lengths)


def read_for_box(array: ArrayLayout, lengths: tuple[int, ...]) -> int:
    """Bytes that are read for a part of a row: of whole chunks, or of contiguous arrays those between its elements and
    of pages that it shares with others as well."""
    part = (*lengths, *array.sample_shape[len(lengths) :])
    if array.chunk_shape is not None:
        chunk_bytes = math.prod(array.chunk_shape) * np.dtype(array.dtype).itemsize
        return chunk_bytes * math.prod(
            -(-length // width) for length, width in zip(part, array.chunk_shape[1:], strict=True)
        )
    spans = Spans.of(array.sample_shape, part, np.dtype(array.dtype).itemsize)
    return math.prod(length for length, _ in spans.steps) * max(spans.nbytes, _PAGE_BYTES)


def pieces_of_box(array: ArrayLayout, lengths: tuple[int, ...]) -> int:
    """The most chunks, or ranges of a contiguous array, that a part of a row touches."""
    part = (*lengths, *array.sample_shape[len(lengths) :])
    if array.chunk_shape is None:
        spans = Spans.of(array.sample_shape, part, np.dtype(array.dtype).itemsize)
        return math.prod(length for length, _ in spans.steps)
    widths = array.chunk_shape[1:]
    return math.prod(
        min(-(-extent // width), -(-(length - 1) // width) + 1)
        for extent, length, width in zip(array.sample_shape, part, widths, strict=True)
    )


def read_whole_rows(
    boxes: Boxes, out: npt.NDArray[Any], sample_shape: tuple[int, ...], read: Callable[[Int64s, npt.NDArray[Any]], None]
) -> None:
    """Read whole rows, each once and several at a time, and take the parts from them.

    Parameters
    ----------
    out : (k, *part shape)
    sample_shape : tuple of int
    read : callable
        Reads rows, (n,) int64, into an array, (n, *sample_shape).
    """
    distinct, owners = np.unique(boxes.rows, return_inverse=True)
    slices = boxes.slices()
    step = max(1, _WHOLE_ROWS_BYTES // max(1, math.prod(sample_shape) * out.itemsize))
    for first in range(0, len(distinct), step):
        some = distinct[first : first + step]
        rows = np.empty((len(some), *sample_shape), out.dtype)
        read(some, rows)
        for place in np.flatnonzero((owners >= first) & (owners < first + len(some))).tolist():
            out[place] = rows[owners[place] - first][slices[place]]


class CropReader:
    """Reads parts of rows of segments that are `is_cut`.

    Parameters
    ----------
    decoders : Decoders
    chunk_rows : ChunkRows
        Caches decoded chunks.
    """

    def __init__(self, decoders: Decoders, chunk_rows: ChunkRows) -> None:
        self._decoders = decoders
        self._chunk_rows = chunk_rows

    def read(self, segment: Segment, boxes: Boxes, target: Bytes) -> None:
        """Read the parts as they are stored.

        Parameters
        ----------
        segment : Segment
        boxes : Boxes
            Of the rows of this segment.
        target : (k, *part shape, itemsize) uint8, C-contiguous

        Raises
        ------
        DatasetCorrupt, RevisionChanged, ReadTimeout
        """
        array = segment.array
        if array.chunk_shape is not None:
            source = segment.source.ahead(partial(self.ranges, segment, boxes))
            self._read_chunked(source, array, boxes, target)
        elif array.offset is None:
            target[...] = np.frombuffer(array.fill, np.uint8)
        else:
            source = segment.source.ahead(partial(self.ranges, segment, boxes))
            spans = Spans.of(array.sample_shape, target.shape[1:-1], target.shape[-1])
            self._decoders.share(*self._span_jobs(source, _begins(array, boxes), spans, target))

    def ranges(self, segment: Segment, boxes: Boxes) -> Ranges:
        """The ranges of stored bytes that `read` needs."""
        array = segment.array
        itemsize = np.dtype(array.dtype).itemsize
        if array.chunk_shape is None:
            if array.offset is None or not len(boxes):
                return NOTHING
            spans = Spans.of(array.sample_shape, boxes.shape(array.sample_shape), itemsize)
            offsets = spans.offsets(_begins(array, boxes))
            return offsets, np.full(len(offsets), spans.nbytes, np.int64)
        assert array.chunks is not None
        table = array.chunks
        offsets_of, sizes_of = [], []
        for job in _chunk_jobs(array, boxes):
            if job.entry < 0:
                continue
            offset, size = int(table.offsets[job.entry]), int(table.sizes[job.entry])
            if self._is_in_parts(array, job):
                for part in job.parts:
                    spans, begin = part.spans(array.chunk_shape, itemsize)
                    some = spans.offsets(np.array([offset + begin], np.int64))
                    offsets_of += some.tolist()
                    sizes_of += [spans.nbytes] * len(some)
            elif not self._chunk_rows.has_chunk(segment.source, array, job.entry):
                offsets_of.append(offset)
                sizes_of.append(size)
        return np.array(offsets_of, np.int64), np.array(sizes_of, np.int64)

    def _read_chunked(self, source: Source, array: ArrayLayout, boxes: Boxes, target: Bytes) -> None:
        assert array.chunks is not None and array.chunk_shape is not None
        chunk_shape, table, itemsize = array.chunk_shape, array.chunks, target.shape[-1]

        def work(remaining: Iterator[_ChunkJob]) -> None:
            for job in remaining:
                if job.entry < 0:
                    for part in job.parts:
                        target[part.place][part.inside] = np.frombuffer(array.fill, np.uint8)
                elif self._is_in_parts(array, job):
                    for part in job.parts:
                        spans, begin = part.spans(chunk_shape, itemsize)
                        piece = np.empty((1, *part.shape, itemsize), np.uint8)
                        offset = np.array([int(table.offsets[job.entry]) + begin], np.int64)
                        jobs, read = self._span_jobs(source, offset, spans, piece)
                        read(iter(jobs))
                        target[part.place][part.inside] = piece[0]
                else:
                    with self._chunk_rows.chunk(source, array, job.entry) as decoded:
                        chunk = decoded.reshape(*chunk_shape, itemsize)
                        for part in job.parts:
                            target[part.place][part.inside] = chunk[part.inside_chunk]

        self._decoders.share(_chunk_jobs(array, boxes), work)

    def _is_in_parts(self, array: ArrayLayout, job: _ChunkJob) -> bool:
        """Whether parts of a chunk are read: it is unfiltered and large."""
        assert array.chunks is not None and array.chunk_shape is not None
        mask = int(array.chunks.masks[job.entry])
        is_plain = all(mask >> number & 1 for number in range(len(array.filters)))
        return is_plain and math.prod(array.chunk_shape) * np.dtype(array.dtype).itemsize > _WHOLE_CHUNK_BYTES

    def _span_jobs(
        self, source: Source, begins: Int64s, spans: Spans, target: Bytes
    ) -> tuple[range, Callable[[Iterator[int]], None]]:
        """Jobs for `Decoders.share` that read parts of contiguous blocks, and what does them.

        Parameters
        ----------
        begins : (k,) int64
            Positions of the first elements of the parts.
        target : (k, *part shape, itemsize) uint8, C-contiguous
        """
        offsets = spans.offsets(begins)
        # lines: (k * spans of a part, *rest of the part, itemsize)
        lines = target.reshape(len(offsets), *target.shape[1 + spans.axes :])
        step = max(1, SCRATCH_BYTES // spans.nbytes)

        def work(remaining: Iterator[int]) -> None:
            for first in remaining:
                some = offsets[first : first + step]
                sizes = np.full(len(some), spans.nbytes, np.int64)
                places = np.arange(len(some), dtype=np.int64) * spans.nbytes
                if spans.is_dense:
                    own = lines[first : first + len(some)].reshape(-1)
                    source.read_rows(some, sizes, own, places)
                    continue
                nbytes = len(some) * spans.nbytes
                with self._decoders.room_for(nbytes):
                    scratch = self._decoders.scratch("spans", nbytes)
                    source.read_rows(some, sizes, scratch, places)
                    # Without the bytes between the lines. A view: the span of a line ends with its last element.
                    lines[first : first + len(some)] = np.lib.stride_tricks.as_strided(
                        scratch, lines[first : first + len(some)].shape, (spans.nbytes, *spans.strides, 1)
                    )

        return range(0, len(offsets), step), work


class Spans(NamedTuple):
    """How a part of a contiguous block is read: by ranges of equal size, which may have other bytes between.

    Attributes
    ----------
    axes : int
        A range is read for each index of so many first axes of the part.
    steps : tuple of (int, int)
        Length of the part along each of these axes, and the distance of its elements, in bytes.
    strides : tuple of int
        Distance of elements along each of the other axes, in bytes.
    nbytes : int
        Size of a range.
    is_dense : bool
        A range has nothing but elements of the part.
    """

    axes: int
    steps: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    nbytes: int
    is_dense: bool

    @classmethod
    def of(cls, block: tuple[int, ...], part: tuple[int, ...], itemsize: int) -> Spans:
        """How to read a part of a block, both given by their shapes."""
        strides = [itemsize * math.prod(block[axis + 1 :]) for axis in range(len(block))]
        nbytes, axes = itemsize, len(block)
        while axes:
            stride, length = strides[axes - 1], part[axes - 1]
            if length > 1 and stride - nbytes > GAP_BYTES:
                break
            longer = nbytes + (length - 1) * stride
            if longer > SCRATCH_BYTES and axes < len(block):
                break
            nbytes, axes = longer, axes - 1
        steps = tuple(zip(part[:axes], strides[:axes], strict=True))
        return cls(axes, steps, tuple(strides[axes:]), nbytes, nbytes == itemsize * math.prod(part[axes:]))

    def offsets(self, begins: Int64s) -> Int64s:
        """Where the ranges of parts begin, (k * ranges of a part,) int64, by where the parts do, (k,) int64."""
        offsets = begins[:, None]
        for length, stride in self.steps:
            offsets = (offsets[:, :, None] + np.arange(length, dtype=np.int64) * stride).reshape(len(begins), -1)
        return offsets.reshape(-1)


class _Part(NamedTuple):
    """What one chunk has of one part of a row.

    Attributes
    ----------
    place : int
        Number of the part of a row.
    inside : tuple of slice
        Where in it.
    inside_chunk : tuple of int and slices
        Where in the chunk.
    """

    place: int
    inside: tuple[slice, ...]
    inside_chunk: tuple[int | slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(one.stop - one.start for one in self.inside)

    def spans(self, chunk_shape: tuple[int, ...], itemsize: int) -> tuple[Spans, int]:
        """How to read it from the chunk, and how many bytes of the chunk precede it."""
        begin = 0
        for one, width in zip(self.inside_chunk, chunk_shape, strict=True):
            begin = begin * width + (one.start if isinstance(one, slice) else one)
        return Spans.of(chunk_shape[1:], self.shape, itemsize), begin * itemsize


class _ChunkJob(NamedTuple):
    """A chunk and all that is taken from it. `entry` is its index into the chunk table; -1: it was never written."""

    entry: int
    parts: list[_Part]


def _begins(array: ArrayLayout, boxes: Boxes) -> Int64s:
    """Positions of the first elements of parts of a contiguous array, (k,) int64."""
    assert array.offset is not None
    itemsize = np.dtype(array.dtype).itemsize
    strides = [itemsize * math.prod(array.sample_shape[axis + 1 :]) for axis in range(len(boxes.lengths))]
    return array.offset + boxes.rows * array.row_bytes + boxes.starts @ np.array(strides, np.int64)


def _chunk_jobs(array: ArrayLayout, boxes: Boxes) -> list[_ChunkJob]:
    assert array.chunks is not None and array.chunk_shape is not None
    height, *widths = array.chunk_shape
    shape = boxes.shape(array.sample_shape)
    grid = [-(-extent // width) for extent, width in zip(array.sample_shape, widths, strict=True)]
    steps = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    found: dict[int, list[_Part]] = {}
    for place, (row, starts) in enumerate(zip(boxes.rows.tolist(), boxes.starts.tolist(), strict=True)):
        begins = starts + [0] * (len(shape) - len(starts))
        along = [
            [
                _along(cell, width, step, begin, begin + length)
                for cell in range(begin // width, -(-(begin + length) // width))
            ]
            for begin, length, width, step in zip(begins, shape, widths, steps, strict=True)
        ]
        first, within = row // height * array.cells, row % height
        for cells in itertools.product(*along):
            number = first + sum(cell[0] for cell in cells)
            inside = tuple(cell[1] for cell in cells)
            inside_chunk = (within, *(cell[2] for cell in cells))
            found.setdefault(number, []).append(_Part(place, inside, inside_chunk))
    numbers = sorted(found)
    entries = array.chunks.find(np.array(numbers, np.int64)).tolist()
    return [_ChunkJob(entry, found[number]) for number, entry in zip(numbers, entries, strict=True)]


def _along(cell: int, width: int, step: int, begin: int, end: int) -> tuple[int, slice, slice]:
    """Along one axis: what a cell adds to the number of a chunk, and where it is in the part and in the chunk."""
    first, last = max(begin, cell * width), min(end, (cell + 1) * width)
    return cell * step, slice(first - begin, last - begin), slice(first - cell * width, last - cell * width)
