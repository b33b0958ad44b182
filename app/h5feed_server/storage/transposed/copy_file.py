"""The copy by rows of a matrix, as a source of bytes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from h5feed.errors import Overloaded
from h5feed.runs import consecutive, equal_runs
from h5feed.stored.array_file import load_arrays
from h5feed.stored.column import Segment
from h5feed.stored.layout import ArrayLayout
from h5feed.stored.local_file import FileSource
from h5feed.stored.range_reads import RangeReads
from h5feed.stored.scratch import Bytes
from h5feed.stored.source import Int64s, Ranges, Scratch, Source

from ...cache_folder.sealed import discard, read_sealed
from .by_columns import BLOCK, ByColumns

logger = logging.getLogger(__name__)

_VERSION = 1
"""Part of the names of copies. Raised when earlier ones must not be read any more."""

_BLOCKS_AT_ONCE = 1 << 12
"""Blocks that are read at a time."""

_NOTE_SECONDS = 60.0
"""Interval at which the use of a copy is noted, and a copy that was removed is let go of."""


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
        columns = ArrayLayout(
            indices.path,
            dtype=matrix.index_dtype.str,
            stored_bytes=indices.stored_bytes,
            offset=matrix.indices_begin,
            **bare,
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
        for start, stop in zip(*equal_runs(group), strict=True):
            own = slice(start, stop)
            blocks = np.unique(consecutive(first[own], last[own] - first[own] + 1))
            content = memoryview(self._checked(blocks))
            places = np.searchsorted(blocks, first[own]) * BLOCK + offsets[own] % BLOCK
            view = memoryview(target)
            for place, size, begin in zip(places.tolist(), sizes[own].tolist(), begins[own].tolist(), strict=True):
                view[begin : begin + size] = content[place : place + size]

    def _checked(self, blocks: Int64s) -> Bytes:
        """Ascending blocks, back to back."""
        opened = self.opened()
        content = np.empty(len(blocks) * BLOCK, np.uint8)
        starts, stops = equal_runs(blocks - np.arange(len(blocks)))
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
