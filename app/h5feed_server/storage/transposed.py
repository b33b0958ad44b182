"""Sparse matrices that are stored by columns (CSC), and their copies by rows (CSR) in the cache folder.

A copy has the values of all rows, then their column indices. Both begin at a multiple of `BLOCK` bytes. A table beside
it has the offsets of the rows and a checksum of each block, so nothing that is damaged is used.

A copy is made in bounded memory, in two passes over the matrix: the first counts the values of each row. The second
divides them into groups of consecutive rows, in a temporary file. Then each group is sorted by row. The order of the
values of a row is that of the columns, as scipy's ``tocsr`` gives it, also where rows of a column are in no order or
occur several times.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import DatasetCorrupt, InternalError, Overloaded, TooLarge
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.stored.column import Column, Segment
from h5feed.stored.layout import ArrayLayout
from h5feed.stored.local_file import FileSource
from h5feed.stored.range_reads import RangeReads
from h5feed.stored.scratch import Bytes
from h5feed.stored.source import Int64s, Ranges, Scratch, Source

from ..cache_folder.locks import hold, release
from ..cache_folder.sealed import discard, read_sealed, write_sealed
from .reader import Reader

logger = logging.getLogger(__name__)

_VERSION = 1
"""Part of the names of copies. Raised when earlier ones must not be read any more."""

BLOCK = 4096
"""Bytes that are read and checked together."""

_BLOCKS_AT_ONCE = 1 << 12
"""Blocks that are read at a time."""

_ENTRIES = 1 << 20
"""Values that are divided, or sorted, at a time."""

_POLL_SECONDS = 0.1

_NOTE_SECONDS = 60.0
"""Interval at which the use of a copy is noted, and a copy that was removed is let go of."""


@dataclass(frozen=True)
class ByColumns:
    """A matrix that is stored by columns.

    Attributes
    ----------
    data : Segment
        The values. Its offsets say where those of each column begin.
    indices : Segment
        The row of each value.
    rows, columns : int
    """

    data: Segment
    indices: Segment
    rows: int
    columns: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values of the copy."""
        return np.dtype(self.data.array.dtype).newbyteorder("<")

    @property
    def index_dtype(self) -> np.dtype[Any]:
        """Of the column indices of the copy."""
        return np.dtype("<i4" if self.columns <= np.iinfo(np.int32).max else "<i8")

    @property
    def values(self) -> int:
        """Number of stored values."""
        return self.data.array.rows

    @property
    def nbytes(self) -> int:
        """Size of the copy."""
        return sum(-(-self.values * dtype.itemsize // BLOCK) * BLOCK for dtype in (self.dtype, self.index_dtype))

    @property
    def table_nbytes(self) -> int:
        """Size of the table, most of which is in memory while rows are read."""
        return 8 * (self.rows + 1) + 4 * (self.nbytes // BLOCK)


class _Opened:
    """An open copy. It is closed when the last reader lets go of it."""

    def __init__(self, descriptor: int, offsets: Int64s, sums: list[int]) -> None:
        self.fd = descriptor
        self.offsets = offsets
        self.sums = sums

    def __del__(self) -> None:
        os.close(self.fd)


class RowOffsets:
    """Where the values of each row begin, once there is a copy by rows: see `Segment.offsets`."""

    def __init__(self, file: TransposedFile) -> None:
        self._file = file

    def __len__(self) -> int:
        return self._file.matrix.rows + 1

    def __getitem__(self, rows: Any) -> Any:
        """Raises `Overloaded` if there is no copy."""
        return self._file.opened().offsets[rows]


class TransposedFile(FileSource):
    """The copy by rows of a matrix, as a source of bytes. There may be none yet.

    Parameters
    ----------
    matrix : ByColumns
        Just inspected.
    folder : Path
        Folder of all copies, shared by all workers.

    Attributes
    ----------
    name : str
        Name of the copy: equal for the same matrix in the same state of its files.
    """

    def __init__(self, matrix: ByColumns, folder: Path) -> None:
        stored = matrix.data.file
        super().__init__(stored.path, stored.identity, stored.digest + b" by rows")
        self.companions = (*stored.companions, matrix.indices.file, *matrix.indices.file.companions)
        self.matrix = matrix
        self.name = _name(matrix)
        self._folder = folder
        self._reads = RangeReads()
        self._opened: _Opened | None = None
        self._noted = 0.0
        self._lock = threading.Lock()

    @property
    def copy(self) -> Path:
        return self._folder / f"{self.name}.rows"

    @property
    def table(self) -> Path:
        return self._folder / f"{self.name}.table"

    def segment(self) -> Segment:
        """The matrix as sparse rows."""
        matrix, offsets = self.matrix, RowOffsets(self)
        data, indices = matrix.data.array, matrix.indices.array
        bare: dict[str, Any] = {"shape": (matrix.values,), "attributes": {}}
        values = ArrayLayout(data.path, dtype=matrix.dtype.str, stored_bytes=data.stored_bytes, offset=0, **bare)
        begin = -(-matrix.values * matrix.dtype.itemsize // BLOCK) * BLOCK
        columns = ArrayLayout(
            indices.path, dtype=matrix.index_dtype.str, stored_bytes=indices.stored_bytes, offset=begin, **bare
        )
        return Segment(
            self,
            values,
            offsets=offsets,
            indices=Segment(self, columns, offsets=offsets, below=matrix.columns),
        )

    def is_there(self) -> bool:
        """Whether there is a copy, as far as that is known without reading it. Notes its use."""
        with self._lock:
            if self._opened is None:
                self._opened = self._open()
            now = time.monotonic()
            if self._opened is not None and now - self._noted > _NOTE_SECONDS:
                try:
                    # The least recently used are removed first. One that is removed is let go of.
                    os.utime(self.copy)
                    self._noted = now
                except OSError:
                    self._opened = None
            return self._opened is not None

    def opened(self) -> _Opened:
        """The open copy.

        Raises
        ------
        Overloaded
            There is none.
        """
        opened = self._opened
        if opened is None and self.is_there():
            opened = self._opened
        if opened is None:
            raise Overloaded(
                f"the matrix of {self.matrix.data.array.path!r} is stored by columns, and its copy by rows is not "
                "there: a request for batches or rows of it makes one",
                retry_after=1,
            )
        return opened

    def _open(self) -> _Opened | None:
        data = read_sealed(self.table, note_use=True)
        if data is None:
            return None
        try:
            descriptor = os.open(self.copy, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        _, arrays = load_arrays(data)
        opened = _Opened(descriptor, arrays["offsets"], arrays["sums"].tolist())
        if os.fstat(descriptor).st_size != self.matrix.nbytes:
            self.forget()
            return None
        return opened

    def forget(self) -> None:
        """Remove the copy, to make it again."""
        logger.warning("%s in the cache folder is damaged: it is removed, and made again when needed", self.copy.name)
        self._opened = None
        discard(self.table)
        discard(self.copy)

    def ahead(self, ranges: Callable[[], Ranges]) -> TransposedFile:
        """The system reads ahead itself."""
        return self

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        """The open copy, which does not change. Raises `Overloaded` if there is none."""
        opened = self.opened()
        yield opened.fd

    def fill(self, handle: int, offset: int, target: memoryview) -> None:
        """See `read_rows`."""
        whole = np.frombuffer(target, np.uint8)
        self.read_rows(np.array([offset]), np.array([len(whole)]), whole, np.zeros(1, np.int64))

    def stored(self, handle: int, offset: int, nbytes: int, scratch: Scratch) -> Bytes:
        """See `read_rows`."""
        target = scratch("stored", nbytes)
        self.fill(handle, offset, memoryview(target))
        return target

    def read_rows(self, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> None:
        """Fill ``target[begins[i]:]`` with the ``sizes[i]`` bytes from ``offsets[i]``, for all i. Every block that is
        read is checked.

        Raises
        ------
        Overloaded
            There is no copy, or it was damaged, and is made again.
        """
        some = np.flatnonzero(sizes)
        offsets, sizes, begins = offsets[some], sizes[some], begins[some]
        first, last = offsets // BLOCK, (offsets + sizes - 1) // BLOCK
        # Ranges that together have not too many blocks; a single one may have more.
        group = np.cumsum(last - first + 1) // _BLOCKS_AT_ONCE
        for start, stop in zip(*_runs(group), strict=True):
            own = slice(start, stop)
            blocks = np.unique(_expanded(first[own], last[own] - first[own] + 1))
            content = memoryview(self._checked(blocks))
            places = np.searchsorted(blocks, first[own]) * BLOCK + offsets[own] % BLOCK
            view = memoryview(target)
            for place, size, begin in zip(places.tolist(), sizes[own].tolist(), begins[own].tolist(), strict=True):
                view[begin : begin + size] = content[place : place + size]

    def _checked(self, blocks: Int64s) -> Bytes:
        """Ascending blocks, back to back."""
        opened = self.opened()
        content = np.empty(len(blocks) * BLOCK, np.uint8)
        starts, stops = _runs(blocks - np.arange(len(blocks)))
        sizes = (stops - starts) * BLOCK
        try:
            done = self._reads.read(opened.fd, blocks[starts] * BLOCK, sizes, content, starts * BLOCK)
        except OSError:
            done = np.zeros(0, np.int64)
        view, sums, crc32 = memoryview(content), opened.sums, zlib.crc32
        if not np.array_equal(done, sizes) or any(
            crc32(view[at : at + BLOCK]) != sums[block]
            for at, block in zip(range(0, len(content), BLOCK), blocks.tolist(), strict=True)
        ):
            self.forget()
            raise Overloaded("a copy in the server's cache folder was damaged, and is made again", retry_after=1)
        return content


def _name(matrix: ByColumns) -> str:
    now = time.time()
    parts: list[Any] = [_VERSION, matrix.rows, matrix.columns, matrix.data.array.path, matrix.indices.array.path]
    for file in (matrix.data.file, *matrix.data.file.companions, matrix.indices.file, *matrix.indices.file.companions):
        if file.remote_bytes is not None:
            # The digest tells the version of an object; the identity is that of the file that stands for it.
            parts.append(file.digest.hex())
        else:
            # The digest of others may not be known yet, and would give the copy another name later.
            parts += [file.identity.key, file.digest.hex() if file.identity.is_young(now) else ""]
    return hashlib.blake2b(repr(parts).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def stored_in(segment: Segment) -> Source:
    """Where the rows of a segment are stored; not the copy that they are read from."""
    source = segment.source
    return source.matrix.data.source if isinstance(source, TransposedFile) else source


def transpose(file: TransposedFile, reader: Reader, max_bytes: int, advance: Callable[[int], None]) -> None:
    """Make the copy of a matrix, unless it is there.

    Parameters
    ----------
    file : TransposedFile
    reader : Reader
    max_bytes : int
        Maximum size of all copies. Those that were used least recently are removed.
    advance : callable
        Called with bytes that are done, of `work_bytes`.

    Raises
    ------
    DatasetCorrupt
        A row index is negative, or beyond the rows.
    InternalError
        The cache folder has no room.
    TooLarge
        The copy is larger than `max_bytes`.
    """
    lock = file.copy.with_suffix(".lock")
    try:
        file.copy.parent.mkdir(parents=True, exist_ok=True)
        while (held := hold(lock)) is None:
            # Another process makes the same copy, for a dataset of another name.
            advance(0)
            time.sleep(_POLL_SECONDS)
        try:
            if file.is_there():
                advance(work_bytes(file.matrix))
                return
            _make_room(file, max_bytes)
            _write(file, reader, advance)
        finally:
            release(lock, held)
    except OSError as error:
        raise InternalError(
            f"the server's cache folder cannot keep a copy of {file.matrix.nbytes} bytes by rows, which takes up to "
            f"{file.matrix.nbytes + _scratch_bytes(file.matrix)} bytes more while it is made: {error.strerror or error}"
        ) from None


def work_bytes(matrix: ByColumns) -> int:
    """Bytes that are read and written to transpose a matrix."""
    return matrix.values * (2 * matrix.indices.array.row_bytes + 2 * matrix.data.array.row_bytes)


def _scratch_bytes(matrix: ByColumns) -> int:
    return matrix.values * _entry(matrix).itemsize


def _entry(matrix: ByColumns) -> np.dtype[Any]:
    return np.dtype([("row", "<i8"), ("column", matrix.index_dtype), ("value", matrix.dtype)])


def _make_room(file: TransposedFile, max_bytes: int) -> None:
    """Remove what was left over by a process that was killed, and the copies that were used least recently."""
    matrix = file.matrix
    if matrix.nbytes > max_bytes:
        raise TooLarge(too_large(matrix, max_bytes))
    found = []
    for path in file.copy.parent.iterdir():
        with contextlib.suppress(OSError):
            status = path.stat()
            if path.suffix == ".part":
                # Each worker that writes one holds the lock of its copy.
                lock = path.with_suffix(".lock")
                if (held := hold(lock) if path.stem != file.name else None) is not None:
                    discard(path)
                    release(lock, held)
            elif path.suffix == ".rows":
                found.append((status.st_mtime, status.st_size, path))
    total = matrix.nbytes + sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes:
            break
        logger.info("%s is removed from the cache folder, to make room for another copy", path.name)
        discard(path.with_suffix(".table"))
        discard(path)
        total -= size


def too_large(matrix: ByColumns, max_bytes: int) -> str:
    """Why a matrix is not transposed."""
    return (
        f"it is stored by columns, and its copy by rows, of {matrix.nbytes} bytes, would be larger than the "
        f"{max_bytes} bytes for such copies (H5FEED_TRANSPOSED_BYTES)"
    )


def _write(file: TransposedFile, reader: Reader, advance: Callable[[int], None]) -> None:
    matrix, part = file.matrix, file.copy.with_suffix(".part")
    offsets = _row_offsets(matrix, reader, advance)
    groups = _groups(offsets)
    try:
        with tempfile.TemporaryFile(dir=part.parent, buffering=0) as scratch, open(part, "wb+") as out:
            # Fails now if the disk is too full.
            if matrix.nbytes:
                os.posix_fallocate(out.fileno(), 0, matrix.nbytes)
                os.posix_fallocate(scratch.fileno(), 0, _scratch_bytes(matrix))
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
        for first, stop in zip(*_runs(owners), strict=True):
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
    columns = _Section(out.fileno(), -(-matrix.values * matrix.dtype.itemsize // BLOCK) * BLOCK)
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


def _runs(values: Int64s) -> tuple[Int64s, Int64s]:
    """Begin and end of each run of equal values."""
    if not len(values):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    return starts, np.append(starts[1:], len(values))


def _expanded(firsts: Int64s, counts: Int64s) -> Int64s:
    """``counts[i]`` numbers from ``firsts[i]``, for all i."""
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(firsts, counts) + within


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
