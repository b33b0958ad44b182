"""Reads rows of arrays from where their bytes are stored, with parallel decoding.

The server reads files with it. A client that receives stored bytes reads those with it, so both get the same arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DatasetCorrupt
from .chunk_reader import ChunkReader, fill_row
from .chunk_rows import ChunkRows
from .column import Column, Segment
from .crop_reader import Boxes, CropReader, is_cut, read_whole_rows, slices_of
from .decoder_pool import Decoders
from .layout import ArrayLayout
from .padding import cut_padding
from .ranges import parts_of_lists, ranges_of_items, ranges_of_rows, stored_parts
from .scratch import Bytes
from .source import Ranges, Source

_PIECE_BYTES = 16 << 20
"""Stored bytes that are converted at a time."""

Int64s = npt.NDArray[np.int64]
_Divided = tuple[Segment, Int64s | None, Int64s]
"""See `Column.divide`."""
ReadByH5py = Callable[[Source, ArrayLayout, Int64s, Int64s | None, Bytes], None]
"""Reads rows of an array without positions, with the parameters of `ArrayReader._read_stored`."""


def _never_by_h5py(source: Source, array: ArrayLayout, rows: Int64s, places: Int64s | None, target: Bytes) -> None:
    raise ValueError(f"the positions of the rows of {array.path!r} are not known")


class ArrayReader:
    """Reads rows of columns; one for each process.

    Parameters
    ----------
    decoders : Decoders
    chunk_rows : ChunkRows
        Caches decoded chunks of many rows.
    read_by_h5py : callable
        Reads arrays whose layout has no positions.
    """

    def __init__(self, decoders: Decoders, chunk_rows: ChunkRows, read_by_h5py: ReadByH5py = _never_by_h5py) -> None:
        self._chunk_rows = chunk_rows
        self._chunks = ChunkReader(decoders, chunk_rows)
        self._crops = CropReader(decoders, chunk_rows)
        self._read_by_h5py = read_by_h5py

    def read(self, column: Column, rows: Int64s, out: npt.NDArray[Any]) -> None:
        """Read rows in the given order, which may contain duplicates. Not of images, and not of lists.

        Parameters
        ----------
        column : Column
        rows : (k,) int64
            Each below ``column.rows``.
        out : (k, *sample) of the column's dtype, C-contiguous

        Raises
        ------
        DatasetCorrupt, RevisionChanged, ReadTimeout
        """
        if out.size == 0:
            return
        # target: (k, row bytes)
        target = out.reshape(-1).view(np.uint8).reshape(len(rows), column.row_bytes)
        for segment, places, local in self._divided(column, rows):
            if segment.as_stored:
                self._read_stored(segment.source, segment.array, local, places, target)
            else:
                self._read_by_pieces(segment, local, places, out)

    def read_crops(self, column: Column, boxes: Boxes, out: npt.NDArray[Any]) -> None:
        """Read parts of rows. Not of images, and not of lists.

        Parameters
        ----------
        column : Column
        boxes : Boxes
        out : (k, *part of a sample) of the column's dtype, C-contiguous

        Raises
        ------
        DatasetCorrupt, RevisionChanged, ReadTimeout
        """
        if out.size == 0:
            return
        for segment, places, own in _divided_boxes(column, boxes):
            if not is_cut(segment):
                part = out if places is None else np.empty((len(own), *out.shape[1:]), out.dtype)
                read_whole_rows(
                    own, part, column.sample_shape, partial(self.read, replace(column, segments=(segment,)))
                )
            else:
                part = self._read_crops(segment, own, out if places is None else None)
            if places is not None:
                out[places] = part

    def _read_crops(self, segment: Segment, boxes: Boxes, out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        """Parts of rows of a segment, in `out` if given."""
        dtype, shape = np.dtype(segment.array.dtype), boxes.shape(segment.array.sample_shape)
        if out is not None and segment.as_stored:
            self._crops.read(segment, boxes, out.reshape(-1).view(np.uint8).reshape(len(boxes), *shape, dtype.itemsize))
            return out
        raw = np.empty((len(boxes), *shape), dtype)
        self._crops.read(segment, boxes, raw.reshape(-1).view(np.uint8).reshape(len(boxes), *shape, dtype.itemsize))
        served = _as_served(segment, raw, boxes.shape(segment.wire[1]))
        if out is None:
            return served
        out[...] = served
        return out

    def crop_ranges(self, column: Column, boxes: Boxes) -> Iterator[tuple[Source, Ranges]]:
        """The ranges of stored bytes that `read_crops` needs, by source, as far as sources answer late."""
        for segment, _, own in _divided_boxes(column, boxes):
            if not segment.source.answers_late:
                continue
            whole = not is_cut(segment)
            yield (
                segment.source,
                (self.ranges(segment, np.unique(own.rows)) if whole else self._crops.ranges(segment, own)),
            )

    def list_offsets(self, column: Column, rows: Int64s) -> Int64s | None:
        """Where the items of each row will begin, (k + 1,) int64; None if that is known only after reading."""
        if column.segments[0].offsets is None:
            return None
        offsets = np.zeros(len(rows) + 1, np.int64)
        for segment, places, local in column.divide(rows):
            assert segment.offsets is not None
            everywhere: Any = slice(None) if places is None else places
            offsets[1:][everywhere] = segment.offsets[local + 1] - segment.offsets[local]
        return np.cumsum(offsets, out=offsets)

    def read_lists(
        self, column: Column, rows: Int64s, offsets: Int64s, out: npt.NDArray[Any], skipped: Int64s | None = None
    ) -> None:
        """Read lists at the positions that `list_offsets` returned.

        Parameters
        ----------
        column : Column
        rows : (k,) int64
        offsets : (k + 1,) int64
            From `list_offsets`, for the same rows; or of shorter lists, to read only a part of each.
        out : (offsets[k],) of the column's dtype
        skipped : (k,) int64, optional
            Number of items at the start of each list that are not wanted; default: none.

        Raises
        ------
        DatasetCorrupt
            Also if items are not below the `Segment.below` of the column.
        """
        lengths = np.diff(offsets)
        spans = []
        for segment, places, local in column.divide(rows):
            everywhere: Any = slice(None) if places is None else places
            spans.append((segment, places, *self._span(segment, local, lengths, skipped, everywhere)))
        if column.answers_late:
            # All segments begin before the first is waited for.
            spans = [(self._ahead_of_items(one[0], *one[2:]), *one[1:]) for one in spans]
        for segment, places, begins, ends in spans:
            firsts = offsets[:-1] if places is None else offsets[places]
            if segment.as_stored:
                self._read_spans(segment, begins, ends, firsts, out.view(np.uint8))
                continue
            own = np.concatenate([[0], np.cumsum(ends - begins)])
            stored = np.empty(own[-1], segment.array.dtype)
            self._read_spans(segment, begins, ends, own[:-1], stored.view(np.uint8))
            values = cut_padding(stored, segment.array.padding)
            if places is None:
                out[...] = values
                continue
            for first, (begin, end) in zip(firsts.tolist(), pairwise(own.tolist()), strict=True):
                out[first : first + end - begin] = values[begin:end]
        check_below(column, rows, offsets, out)

    def _read_spans(self, segment: Segment, begins: Int64s, ends: Int64s, firsts: Int64s, target: Bytes) -> None:
        """Read lists of items of a flat array as they are stored.

        Parameters
        ----------
        begins, ends : (k,) int64
            The first item of each list, and the one after the last.
        firsts : (k,) int64
            Where each list begins in `target`, in items.
        target : (n,) uint8
        """
        source, array, itemsize = segment.source, segment.array, segment.array.row_bytes
        if array.chunk_shape is not None:
            parts = parts_of_lists(begins, ends, array.chunk_shape[0])
            places = firsts[parts.owners] + parts.begins - begins[parts.owners]
            if array.filters:
                self._chunks.read_lists(source, array, parts, places, target)
                return
            offsets, sizes, written = stored_parts(array, parts)
            if len(written) < len(parts.owners):
                fill = np.frombuffer(array.fill, np.uint8)
                for part in np.setdiff1d(np.arange(len(places)), written).tolist():
                    place, count = int(places[part]), int(parts.ends[part] - parts.begins[part])
                    target[place * itemsize : (place + count) * itemsize] = np.tile(fill, count)
            offsets, sizes, places = _joined(offsets, sizes, places[written] * itemsize)
            source.read_rows(offsets, sizes, target, places)
        elif array.inline is not None or array.offset is None:
            with source.reading() as handle:
                for begin, end, first in zip(begins.tolist(), ends.tolist(), firsts.tolist(), strict=True):
                    part = target[first * itemsize : (first + end - begin) * itemsize]
                    self.read_items(segment, handle, begin, end, part)
        else:
            filled = np.flatnonzero(ends > begins)
            begins, ends, firsts = begins[filled], ends[filled], firsts[filled]
            offsets, sizes = array.offset + begins * itemsize, (ends - begins) * itemsize
            offsets, sizes, places = _joined(offsets, sizes, firsts * itemsize)
            source.read_rows(offsets, sizes, target, places)

    def _span(
        self, segment: Segment, rows: Int64s, lengths: Int64s, skipped: Int64s | None, places: Any
    ) -> tuple[Int64s, Int64s]:
        """The first item, and the one after the last, of parts of lists."""
        assert segment.offsets is not None
        begins = segment.offsets[rows] if skipped is None else segment.offsets[rows] + skipped[places]
        return begins, begins + lengths[places]

    def _ahead_of_items(self, segment: Segment, begins: Int64s, ends: Int64s) -> Segment:
        source = segment.source.ahead(partial(self.item_ranges, segment, begins, ends))
        return segment if source is segment.source else replace(segment, source=source)

    def item_ranges(self, segment: Segment, begins: Int64s, ends: Int64s) -> Ranges:
        """The ranges of stored bytes that a read of items of a flat array needs, from `begins[i]` to `ends[i]` - 1."""
        array = segment.array.records if segment.array.record else segment.array
        is_needed = partial(self._chunk_rows.missing, segment.source, array)
        return ranges_of_items(array, begins, ends, is_needed)

    def ahead(
        self, segment: Segment, rows: Int64s, wanted: Callable[[], npt.NDArray[np.bool_]] | None = None
    ) -> Segment:
        """The segment for a read of these rows, or of those that are `wanted`: see `Source.ahead`."""
        source = segment.source.ahead(partial(self.ranges, segment, rows, wanted))
        return segment if source is segment.source else replace(segment, source=source)

    def _divided(self, column: Column, rows: Int64s) -> Iterable[_Divided]:
        """What `Column.divide` yields, for a read of all of it: all segments begin before the first is waited for."""
        divided = column.divide(rows)
        if not column.answers_late:
            return divided
        return [(self.ahead(segment, local), places, local) for segment, places, local in divided]

    def ranges(
        self, segment: Segment, rows: Int64s, wanted: Callable[[], npt.NDArray[np.bool_]] | None = None
    ) -> Ranges:
        """The ranges of stored bytes that a read of these rows needs, or of those that are `wanted`."""
        if wanted is not None:
            rows = rows[wanted()]
        if segment.offsets is not None:
            return self.item_ranges(segment, segment.offsets[rows], segment.offsets[rows + 1])
        array = segment.array.records if segment.array.record else segment.array
        is_needed = partial(self._chunk_rows.missing, segment.source, array)
        if segment.transposed:
            if (slices := slices_of(segment, rows)) is not None:
                return self._crops.ranges(replace(segment, array=segment.as_row, axis=0), slices)
            rows = np.arange(array.rows, dtype=np.int64)
        return ranges_of_rows(array, rows, is_needed)

    def read_items(self, segment: Segment, handle: int, begin: int, end: int, out: Bytes) -> None:
        """Read items begin … end-1 of a flat array as they are stored. `handle` is from `Source.reading`."""
        source, array = segment.source, segment.array
        itemsize = array.row_bytes
        if array.inline is not None:
            out[...] = np.frombuffer(array.inline, np.uint8)[begin * itemsize : end * itemsize]
        elif array.chunk_shape is not None and begin < end:
            height = array.chunk_shape[0]
            for number in range(begin // height, -(-end // height)):
                first, last = max(begin, number * height), min(end, (number + 1) * height)
                chunk_row = self._chunk_rows.chunk_row(source, array, number)
                within = chunk_row[(first - number * height) * itemsize : (last - number * height) * itemsize]
                out[(first - begin) * itemsize : (last - begin) * itemsize] = within
        elif array.offset is None:
            out[...] = np.tile(np.frombuffer(array.fill, np.uint8), end - begin)
        else:
            source.fill(handle, array.offset + begin * itemsize, memoryview(out))

    def _read_by_pieces(self, segment: Segment, rows: Int64s, places: Int64s | None, out: npt.NDArray[Any]) -> None:
        """Same as `_read_converted`, into ``out[places]``, or into all of `out` in order if `places` is None.

        Reads a piece at a time, because the stored bytes may be many times those of the result: one member of wide
        records, for instance.
        """
        step = max(1, _PIECE_BYTES // max(1, segment.array.stored_row_bytes))
        if len(rows) <= step or segment.transposed:
            out[slice(None) if places is None else places] = self._read_converted(segment, rows)
            return
        # In ascending order, so that no chunk is decoded for more than two pieces.
        order = np.argsort(rows, kind="stable")
        for first in range(0, len(rows), step):
            piece = order[first : first + step]
            out[piece if places is None else places[piece]] = self._read_converted(segment, rows[piece])

    def _read_converted(self, segment: Segment, rows: Int64s) -> npt.NDArray[Any]:
        """Rows that are not served as they are stored: members of records, big-endian numbers, columns of a matrix."""
        if segment.transposed and (slices := slices_of(segment, rows)) is not None:
            # raw: (k, *sample shape)
            raw_rows = np.empty((len(rows), *_without(segment.array.shape, segment.axis)), segment.array.dtype)
            as_bytes = raw_rows.reshape(-1).view(np.uint8).reshape(len(rows), *slices.lengths, raw_rows.itemsize)
            self._crops.read(replace(segment, array=segment.as_row, axis=0), slices, as_bytes)
            return _as_served(segment, raw_rows, segment.wire[1])
        source, array = segment.source, segment.array
        stored = array.records if array.record else array
        wanted = np.arange(stored.rows, dtype=np.int64) if segment.transposed else rows
        # raw: (k, stored row bytes)
        raw = np.empty((len(wanted), stored.row_bytes), np.uint8)
        self._read_stored(source, stored, wanted, None, raw)
        if array.record is not None:
            begin = array.record[1]
            raw = np.ascontiguousarray(raw[:, begin : begin + array.row_bytes])
        values = raw.reshape(-1).view(array.dtype).reshape(len(wanted), *array.sample_shape)
        values = cut_padding(values, array.padding)
        if segment.transposed:
            values = np.moveaxis(values, segment.axis, 0)[rows]
        return _as_served(segment, values, segment.wire[1])

    def _read_stored(
        self, source: Source, array: ArrayLayout, rows: Int64s, places: Int64s | None, target: Bytes
    ) -> None:
        """Read rows as they are stored into ``target[places]``, or into all of `target` in order if `places` is None.

        Parameters
        ----------
        source : Source
        array : ArrayLayout
        rows, places : (k,) int64
        target : (n, row bytes) uint8
        """
        everywhere: Any = slice(None) if places is None else places
        if array.by_h5py:
            self._read_by_h5py(source, array, rows, places, target)
        elif array.inline is not None:
            stored = np.frombuffer(array.inline, np.uint8).reshape(array.rows, array.row_bytes)
            target[everywhere] = stored[rows]
        elif array.chunks is not None:
            self._chunks.read(source, array, rows, places, target)
        elif array.offset is None:
            target[everywhere] = fill_row(array)
        else:
            offsets, sizes, begins = _ranges_of_rows(array.offset, array.row_bytes, rows, places, len(target))
            source.read_rows(offsets, sizes, target.reshape(-1), begins)


def _as_served(segment: Segment, values: npt.NDArray[Any], sample_shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Values of the stored type as they are served, except for the byte order, which assignments change."""
    packing = segment.array.packing
    if packing is not None and segment.served_as is not None:
        return packing.unpack(values)
    if values.dtype.kind == "c":
        little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"))
        return little.view(segment.wire[0]).reshape(len(values), *sample_shape)
    return values.reshape(len(values), *sample_shape)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _divided_boxes(column: Column, boxes: Boxes) -> Iterator[tuple[Segment, Int64s | None, Boxes]]:
    """What `Column.divide` yields, for parts of rows."""
    for segment, places, local in column.divide(boxes.rows):
        starts = boxes.starts if places is None else boxes.starts[places]
        yield segment, places, Boxes(local, starts, boxes.lengths)


def _ranges_of_rows(
    offset: int, row_bytes: int, rows: Int64s, places: Int64s | None, count: int
) -> tuple[Int64s, Int64s, Int64s]:
    """The ranges to read: offsets, sizes, and where they begin among `count` rows, in bytes. Consecutive rows of
    consecutive places share one."""
    offsets = rows * row_bytes + offset
    begins = np.arange(0, count * row_bytes, row_bytes) if places is None else places * row_bytes
    if len(rows) > 1 and rows[1] == rows[0] + 1:
        follows = np.diff(rows) == 1
        if places is not None:
            follows &= np.diff(places) == 1
        starts = np.concatenate([[0], np.flatnonzero(~follows) + 1])
        return offsets[starts], np.diff(starts, append=len(rows)) * row_bytes, begins[starts]
    # Assume a shuffled order: finding the few consecutive rows would cost more than it saves.
    return offsets, np.full(len(rows), row_bytes, np.int64), begins


def _joined(offsets: Int64s, sizes: Int64s, begins: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """The same ranges, of which those that follow each other in the file and in the target are joined."""
    if len(offsets) < 2:
        return offsets, sizes, begins
    follows = (offsets[1:] == offsets[:-1] + sizes[:-1]) & (begins[1:] == begins[:-1] + sizes[:-1])
    if not follows.any():
        return offsets, sizes, begins
    starts = np.flatnonzero(np.concatenate([[True], ~follows]))
    return offsets[starts], np.add.reduceat(sizes, starts), begins[starts]


def check_below(column: Column, rows: Int64s, offsets: Int64s, items: npt.NDArray[Any]) -> None:
    """Raise `DatasetCorrupt` if an item of lists is negative, or not below the `Segment.below` of the column."""
    below = column.segments[0].below
    if below is None or not items.size or (items.min() >= 0 and items.max() < below):
        return
    place = int(np.flatnonzero((items < 0) | (items >= below))[0])
    row = int(rows[np.searchsorted(offsets, place, side="right") - 1])
    raise DatasetCorrupt(
        f"row {row} of {column.segments[0].array.path!r} has the column index {items[place]}, but the matrix has "
        f"{below} columns"
    )
