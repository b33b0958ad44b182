"""Reads rows of arrays into buffers, with `preadv` and parallel decoding. Each chunk of a batch is decoded once."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from h5feed.csr import SparseRows
from h5feed.errors import DatasetCorrupt, TooLarge
from h5feed.runs import consecutive
from h5feed.stored.array_reader import ArrayReader, check_below
from h5feed.stored.byte_cache import ByteCache, CacheUsage
from h5feed.stored.chunk_rows import ChunkRows
from h5feed.stored.column import Column, Segment
from h5feed.stored.crop_reader import Boxes, read_whole_rows
from h5feed.stored.decoder_pool import Decoders
from h5feed.stored.layout import ArrayLayout
from h5feed.stored.local_file import FileSource
from h5feed.stored.no_store import may_keep
from h5feed.stored.padding import padded
from h5feed.stored.scratch import Bytes
from h5feed.stored.source import Source

from .hdf5.reader_pool import ReaderPool
from .images.row_cache import RowCache

if TYPE_CHECKING:
    from .images.decoding import ImageDecoders

SMALL_ROW_BYTES = 64 << 10
"""Bytes. Arrays with rows up to this size are cached decoded if they fit. For larger rows, a system call for each row
costs little compared with the copy."""

_MAX_PIECES_KEPT = 1 << 20
"""Columns with more parts of chunks than this take too long to read as a whole."""

_FEW_SEGMENTS = 64
"""Columns of at most this many segments are always read as a whole."""

_MOST_ASKED = 1000
"""Columns of which it is known how many rows were asked for."""

_SAMPLES = (32, 8, 2)
"""Sample sizes for the mean length of rows. Smaller ones are tried if the rows are too long to read at once."""

_LONG_LIST = 32
"""Lists with more items than this, on average, are copied one by one: indexing each item would take longer."""

_H5PY_BYTES = 32 << 20
"""Bytes that h5py reads at a time. Two copies of them exist during the transfer."""

MAX_IMAGE_BYTES = 64 << 20
"""Maximum stored bytes of one image."""

Int64s = npt.NDArray[np.int64]


class Reader:
    """Reads rows; shared by all requests of a process.

    Parameters
    ----------
    threads : int
        Threads that decode chunks.
    cache : ByteCache
        Caches small columns as a whole.
    chunk_bytes : int
        Size of the cache of decoded chunks, and of the cache of decoded images.
    timeout : float
        Seconds that decoding the chunks of one batch may take.
    hdf5 : ReaderPool
        Reads arrays whose layout is not known.
    max_chunk_bytes : int
        Maximum decoded bytes of a chunk that is read only in part.
    """

    def __init__(
        self,
        threads: int,
        cache: ByteCache[npt.NDArray[Any]],
        chunk_bytes: int,
        timeout: float,
        hdf5: ReaderPool,
        max_chunk_bytes: int = 256 << 20,
    ) -> None:
        self._hdf5 = hdf5
        self._cache = cache
        self._images = RowCache(chunk_bytes)
        self._timeout = timeout
        self._decoders = Decoders(threads, timeout, max_chunk_bytes)
        self._decode_images: ImageDecoders | None = None
        self._asked: OrderedDict[Hashable, int] = OrderedDict()
        """Rows that were asked for, of columns of many segments."""
        self._lock = threading.Lock()
        self._chunk_rows = ChunkRows(self._decoders, chunk_bytes, timeout)
        self._arrays = ArrayReader(self._decoders, self._chunk_rows, self._read_by_h5py)
        self.share, self.scratch = self._decoders.share, self._decoders.scratch
        self.list_offsets = self._arrays.list_offsets

    def close(self) -> None:
        """Stop threads and processes."""
        self._decoders.close()
        self._chunk_rows.close()
        with self._lock:
            if self._decode_images is not None:
                self._decode_images.close()

    def drop_old(self, seconds: float) -> None:
        """Free decoded data that was not used for this many seconds."""
        self._cache.drop_old(seconds)
        self._chunk_rows.drop_old(seconds)
        self._images.drop_old(seconds)

    @property
    def decoded_bytes(self) -> int:
        """Total bytes of chunks decoded so far."""
        return self._decoders.decoded_bytes

    @property
    def decoded_chunks(self) -> int:
        """Number of these chunks."""
        return self._decoders.decoded_chunks

    def cache_usage(self) -> dict[str, CacheUsage]:
        """Of the caches of decoded data, by name."""
        return {"fields": self._cache.usage, "chunks": self._chunk_rows.usage, "images": self._images.usage}

    def read_ahead(self, column: Column, rows: Int64s) -> None:
        """Start decoding the chunks of these rows, if decoded chunks are cached; does not wait."""
        self._chunk_rows.read_ahead(column, rows)

    def late_ranges(
        self, column: Column, rows: Int64s, spans: tuple[Int64s, Int64s] | None = None
    ) -> Iterator[tuple[Source, Int64s, Int64s]]:
        """Which ranges of sources that answer late a read of these rows needs.

        Parameters
        ----------
        spans : ((k,) int64, (k,) int64), optional
            Of each list, how many items are left out at its start, and how many are read; default: all are read.

        Yields
        ------
        source : Source
        offsets, sizes : (k,) int64
        """
        if not column.answers_late or self._is_read_whole(column):
            return
        for segment, places, local in column.divide(rows):
            if not segment.source.answers_late or (column.images is not None and segment.offsets is None):
                continue
            wanted = None
            if column.images is not None:
                wanted = partial(self._undecoded, column, rows if places is None else rows[places])
            elif spans is not None and segment.offsets is not None:
                skipped, lengths = spans if places is None else (spans[0][places], spans[1][places])
                begins = segment.offsets[local] + skipped
                yield segment.source, *self._arrays.item_ranges(segment, begins, begins + lengths)
                continue
            yield segment.source, *self._arrays.ranges(segment, local, wanted)

    def late_crop_ranges(self, column: Column, boxes: Boxes) -> Iterator[tuple[Source, Int64s, Int64s]]:
        """Same as `late_ranges`, for a read of parts of rows."""
        if not column.answers_late or self._is_read_whole(column):
            return
        if column.images is not None:
            yield from self.late_ranges(column, np.unique(boxes.rows))
            return
        for source, ranges in self._arrays.crop_ranges(column, boxes):
            yield source, *ranges

    def whole(self, column: Column, asked: int) -> npt.NDArray[Any] | None:
        """All rows of a small column, cached; None if it is too large to cache, or may not be cached now.

        Also None for a column in many files of which few rows were asked for: the first batches do not wait until
        thousands of files have been read.

        Parameters
        ----------
        asked : int
            Rows that are needed now.
        """
        if not self._fits_whole(column) or not self._pays(column, asked):
            return None
        return self._cache.get(column.key, lambda: self.read_all(column), lambda value: value.nbytes)

    def _fits_whole(self, column: Column) -> bool:
        if not 0 < column.row_bytes <= SMALL_ROW_BYTES or column.pieces > _MAX_PIECES_KEPT:
            return False
        # Not images: a single broken one would make all rows fail.
        if column.has_lists or column.images is not None:
            return False
        # A narrow column of wide records would fit, but all the records would have to be read for it.
        if column.stored_nbytes > 2 * self._cache.max_bytes:
            return False
        if not may_keep() and column.key not in self._cache:
            return False
        return self._cache.admits(column.key, column.nbytes)

    def _is_read_whole(self, column: Column) -> bool:
        """Whether `whole` probably returns the column for the next batches."""
        is_cheap = len(column.segments) <= _FEW_SEGMENTS or column.key in self._cache
        return is_cheap and self._fits_whole(column)

    def _pays(self, column: Column, asked: int) -> bool:
        """Whether at least as many rows of a column were asked for as it has segments, if it has many.

        So reading single rows first takes at most about as long again as reading all at once.
        """
        segments = len(column.segments)
        if segments <= _FEW_SEGMENTS or column.key in self._cache:
            return True
        with self._lock:
            total = self._asked[column.key] = self._asked.pop(column.key, 0) + min(asked, segments)
            while len(self._asked) > _MOST_ASKED:
                self._asked.popitem(last=False)
        return total >= segments

    def read_all(self, column: Column) -> npt.NDArray[Any]:
        """All rows of a column, read-only; text of different lengths is padded."""
        return self.read_block(column, 0, column.rows)

    def read_block(self, column: Column, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows start … stop-1, like `read_all`. Bypasses the cache of small columns."""
        parts = column.parts(start, stop)
        at_once = len(parts) == 1 or not column.answers_late
        if not column.has_lists and at_once and all(segment.begin is not None for segment, _, _ in parts):
            # A single range of each file. Finding it from row numbers would take longer than reading it.
            out = np.empty((stop - start, *column.sample_shape), column.dtype)
            flat, done = memoryview(out.reshape(-1).view(np.uint8)), 0
            for segment, first, last in parts:
                assert segment.begin is not None
                nbytes = (last - first) * column.row_bytes
                with segment.source.reading() as fd:
                    segment.source.fill(fd, segment.begin + first * column.row_bytes, flat[done : done + nbytes])
                done += nbytes
            out.flags.writeable = False
            return out
        rows = np.arange(start, stop, dtype=np.int64)
        if column.has_lists:
            return padded(*self.read_ragged(column, rows))
        out = np.empty((len(rows), *column.sample_shape), column.dtype)
        self.read_from_source(column, rows, out)
        out.flags.writeable = False
        return out

    def read(self, column: Column, rows: Int64s, out: npt.NDArray[Any]) -> None:
        """Read rows in the given order, which may contain duplicates.

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
        kept = self.whole(column, len(rows))
        if kept is not None:
            # The rows were checked. mode="raise" would copy through a buffer, "clip" does not.
            np.take(kept, rows, axis=0, out=out, mode="clip")
        else:
            self.read_from_source(column, rows, out)

    def read_from_source(self, column: Column, rows: Int64s, out: npt.NDArray[Any]) -> None:
        """Same as `read`, bypassing the cache of small columns."""
        if out.size == 0:
            return
        if column.images is not None:
            self._read_images(column, rows, out)
            return
        self._arrays.read(column, rows, out)

    def read_crops(self, column: Column, boxes: Boxes, out: npt.NDArray[Any]) -> None:
        """Read parts of rows, in the given order, which may contain duplicates.

        Images in files, members of records and what only h5py can read are read as whole rows.

        Parameters
        ----------
        column : Column
            Not of lists.
        boxes : Boxes
        out : (k, *part of a sample) of the column's dtype, C-contiguous

        Raises
        ------
        DatasetCorrupt, RevisionChanged, ReadTimeout
        """
        if out.size == 0:
            return
        kept = self.whole(column, len(boxes))
        if kept is not None:
            for place, (row, part) in enumerate(zip(boxes.rows.tolist(), boxes.slices(), strict=True)):
                out[place] = kept[row][part]
        elif column.images is not None:
            read_whole_rows(boxes, out, column.sample_shape, partial(self.read_from_source, column))
        else:
            self._arrays.read_crops(column, boxes, out)

    def typical_items(self, column: Column) -> int:
        """Mean number of items of a ragged row, from a sample."""
        if not column.has_lists:
            return column.dtype.itemsize
        if column.segments[0].offsets is not None:
            return -(-sum(segment.array.rows for segment in column.segments) // max(1, column.rows))

        def measure() -> npt.NDArray[Any]:
            for count in _SAMPLES:
                rows = np.unique(np.linspace(0, column.rows - 1, min(column.rows, count)).astype(np.int64))
                with contextlib.suppress(TooLarge):
                    return np.array(-(-int(self.read_ragged(column, rows)[1][-1]) // max(1, len(rows))))
            return np.array(1)

        return int(self._cache.get(("typical", column.key), measure, lambda value: value.nbytes))

    def read_lists(
        self, column: Column, rows: Int64s, offsets: Int64s, out: npt.NDArray[Any], skipped: Int64s | None = None
    ) -> None:
        """Same as `ArrayReader.read_lists`, from memory if the items of all rows are cached."""
        kept = self._whole_items(column)
        if kept is None:
            self._arrays.read_lists(column, rows, offsets, out, skipped)
            return
        is_narrowed = kept.dtype != out.dtype
        known = column.segments[0].offsets
        assert known is not None
        begins = known[rows] if skipped is None else known[rows] + skipped
        if len(out) > _LONG_LIST * len(rows):
            ends = begins + np.diff(offsets)
            for begin, end, (first, last) in zip(
                begins.tolist(), ends.tolist(), pairwise(offsets.tolist()), strict=True
            ):
                out[first:last] = kept[begin:end]
        else:
            places = consecutive(begins, np.diff(offsets))
            if is_narrowed:
                out[...] = kept[places]
            else:
                np.take(kept, places, out=out, mode="clip")
        if not is_narrowed:
            check_below(column, rows, offsets, out)

    def read_lists_from_source(self, column: Column, rows: Int64s, offsets: Int64s, out: npt.NDArray[Any]) -> None:
        """Same as `read_lists`, bypassing the cache of items."""
        self._arrays.read_lists(column, rows, offsets, out)

    def _whole_items(self, column: Column) -> npt.NDArray[Any] | None:
        """The items of all rows of a column of lists, cached; None if they are too many to cache, or are read late.

        Column indices are narrowed to the type that their number of columns needs, if all are below it.
        """
        segment = column.segments[0]
        # Items of one byte are mostly those of image files, whose decoding takes far longer.
        if len(column.segments) > 1 or segment.offsets is None or column.answers_late or column.dtype.itemsize == 1:
            return None
        key, count = ("items", column.key), int(segment.offsets[-1])
        narrow = column.dtype if segment.below is None else np.min_scalar_type(max(0, segment.below - 1))
        is_kept = key in self._cache
        nbytes = count * min(narrow.itemsize, column.dtype.itemsize)
        if not is_kept and not (may_keep() and self._cache.admits(key, nbytes)):
            return None

        def read() -> npt.NDArray[Any]:
            bounds = np.array([0, count])
            items = np.empty(count, column.dtype)
            whole = Column((replace(segment, offsets=bounds, indices=None, below=None),))
            self._arrays.read_lists(whole, np.zeros(1, np.int64), bounds, items)
            if narrow.itemsize < items.itemsize and (not count or (items.min() >= 0 and items.max() < segment.below)):
                return items.astype(narrow)
            return items

        return self._cache.get(key, read, lambda value: value.nbytes)

    def read_ragged(self, column: Column, rows: Int64s) -> tuple[npt.NDArray[Any], Int64s]:
        """Read lists or text in the given order, which may contain duplicates.

        Returns
        -------
        items : (n,) of the column's dtype; text as uint8
        offsets : (k + 1,) int64
            Where the items of each row begin in `items`.

        Raises
        ------
        DatasetCorrupt, RevisionChanged, ReadTimeout, ReaderCrashed, TooLarge
        """
        if not column.has_lists:
            return self._read_text(column, rows)
        known = self.list_offsets(column, rows)
        if known is not None:
            flat = np.empty(known[-1], column.dtype)
            self.read_lists(column, rows, known, flat)
            return flat, known
        dtype = np.dtype(np.uint8) if column.dtype.kind == "S" else column.dtype
        pieces = []
        lengths = np.zeros(len(rows), np.int64)
        for segment, places, local in column.divide(rows):
            items, begins = self._hdf5.read_ragged((segment.file, *segment.file.companions), segment.array, local)
            stored = items if dtype == np.uint8 else items.view(segment.array.dtype).astype(dtype, copy=False)
            where = np.arange(len(rows)) if places is None else places
            lengths[where] = np.diff(begins)
            pieces.append((stored, begins, where))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        if len(pieces) == 1:
            return pieces[0][0], offsets
        flat = np.empty(offsets[-1], dtype)
        for stored, begins, where in pieces:
            for place, begin, end in zip(where.tolist(), begins[:-1].tolist(), begins[1:].tolist(), strict=True):
                flat[offsets[place] : offsets[place + 1]] = stored[begin:end]
        return flat, offsets

    def read_sparse(self, column: Column, rows: Int64s) -> SparseRows:
        """Read sparse rows in the given order, which may contain duplicates.

        Raises
        ------
        DatasetCorrupt, RevisionChanged, ReadTimeout
        """
        offsets, indices = self.list_offsets(column, rows), column.indices
        assert offsets is not None and indices is not None
        values, places = np.empty(offsets[-1], column.dtype), np.empty(offsets[-1], indices.dtype)
        self.read_lists(column, rows, offsets, values)
        self.read_lists(indices, rows, offsets, places)
        return SparseRows(values, places, offsets, column.sample_shape[0])

    def _read_images(self, column: Column, rows: Int64s, out: npt.NDArray[Any]) -> None:
        """Read images and decode them into `out`, (k, height, width, channels) of the column's dtype."""
        for segment, places, local in column.divide(rows):
            where = np.arange(len(rows)) if places is None else places
            if segment.offsets is not None:
                segment = self._arrays.ahead(segment, local, partial(self._undecoded, column, rows[where]))
                self._decoders.share(
                    zip(local.tolist(), where.tolist(), strict=True), self._decoding(column, segment, rows, out)
                )
                continue
            files = (segment.file, *segment.file.companions)
            step = max(1, _H5PY_BYTES // max(1, self.typical_items(column.encoded)))
            for first in range(0, len(local), step):
                items, begins = self._hdf5.read_ragged(files, segment.array, local[first : first + step])
                encoded = [items[begin:end] for begin, end in pairwise(begins.tolist())]
                jobs = zip(range(len(encoded)), where[first : first + step].tolist(), strict=True)
                self._decoders.share(jobs, self._decoding(column, segment, rows, out, encoded))

    def _undecoded(self, column: Column, rows: Int64s) -> npt.NDArray[np.bool_]:
        """Which of these rows are not in the cache of decoded images."""
        kept = self._images.of(column.key)
        return np.array([row not in kept for row in rows.tolist()], bool)

    def _image_decoders(self) -> ImageDecoders:
        # Imported late, because it loads OpenCV, which many servers do not need.
        from h5feed.decode import MAX_SERVED_PIXELS

        from .images.decoding import SERVED_MEMORY_BYTES, ImageDecoders

        with self._lock:
            if self._decode_images is None:
                self._decode_images = ImageDecoders(4 * MAX_SERVED_PIXELS, SERVED_MEMORY_BYTES)
            return self._decode_images

    def _decoding(
        self,
        column: Column,
        segment: Segment,
        rows: Int64s,
        out: npt.NDArray[Any],
        encoded: Sequence[Bytes] | None = None,
    ) -> Callable[[Iterator[tuple[int, int]]], None]:
        """Return work for `Decoders.share` that decodes images.

        Each job is a pair: the number of the image, in `encoded` if given and else in the segment, and its place in
        `out`.
        """
        from h5feed.decode import BrokenImage, put_pixels

        from .images.decoding import served

        spec, offsets = column.images, segment.offsets
        assert spec is not None
        wanted, decoders = served(spec, self._timeout), self._image_decoders()
        kept = self._images.of(column.key)

        def stored(number: int, fd: int) -> Bytes:
            if encoded is not None:
                return encoded[number]
            assert offsets is not None
            begin, end = int(offsets[number]), int(offsets[number + 1])
            if end - begin > MAX_IMAGE_BYTES:
                raise BrokenImage(f"it has {end - begin} bytes, more than the {MAX_IMAGE_BYTES} that are read")
            data = self._decoders.scratch("image", end - begin)
            self._arrays.read_items(segment, fd, begin, end, data)
            return data

        def work(remaining: Iterator[tuple[int, int]]) -> None:
            with segment.source.reading() as fd:
                for number, place in remaining:
                    row = int(rows[place])
                    pixels = kept.get(row)
                    if pixels is not None:
                        out[place] = pixels
                        continue
                    try:
                        put_pixels(decoders.decode(bytes(stored(number, fd)), wanted).pixels, out[place])
                    except BrokenImage as error:
                        raise DatasetCorrupt(
                            f"row {row} of {segment.array.path!r} is a broken image: {error}"
                        ) from None
                    kept.put(row, out[place])

        return work

    def _read_text(self, column: Column, rows: Int64s) -> tuple[Bytes, Int64s]:
        """Read text of a fixed length without its padding."""
        strings = np.empty(len(rows), column.dtype)
        self.read(column, rows, strings)
        # padded: (rows, fixed length)
        padded = strings.view(np.uint8).reshape(len(rows), column.dtype.itemsize)
        lengths = np.char.str_len(strings)
        flat = padded[np.arange(column.dtype.itemsize) < lengths[:, None]]
        return flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def _read_by_h5py(
        self, source: Source, array: ArrayLayout, rows: Int64s, places: Int64s | None, target: Bytes
    ) -> None:
        assert isinstance(source, FileSource)
        files = (source, *source.companions)
        where = np.arange(len(rows)) if places is None else places
        step = max(1, _H5PY_BYTES // max(1, array.row_bytes))
        for first in range(0, len(rows), step):
            raw = self._hdf5.read(files, array, rows[first : first + step])
            target[where[first : first + step]] = raw.reshape(-1, array.row_bytes)
