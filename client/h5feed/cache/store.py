"""The rows of one field in a local file, which several processes read and write at the same time.

The content of a field is fixed for a revision, so all writers write the same bytes to the same place. They need no
coordination, and a partly written row is simply written again. A second file holds a checksum per row, zero for a
missing row. A checksum is written after its row, and a row is used only if this process has stored it or has verified
its checksum. So a row that a killed process, a lost write or a power failure left incomplete counts as missing,
whichever parts of it reached the disk. (LevelDB's log and ZFS's block pointers detect torn writes in the same way.)

Both files are sparse. They are written with ``pwrite``, which reports a full disk, and read from a memory map, because
one ``np.take`` gathers a batch from it as fast as from memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

BLOCK = 4096
"""Block size of a typical file system, in bytes."""


class FieldStore:
    """The locally stored rows of one field.

    Parameters
    ----------
    path : Path
        File of the data. The checksums are in a file next to it with the suffix ``.sums``.
    rows : int
        Number of rows of the dataset: rows are numbered 0 … rows-1.
    row_bytes : int
        Bytes of one row, 1 or more.

    Raises
    ------
    OSError
        The files can be neither created nor read. Files of the wrong size are replaced; on a read-only disk they are
        an error.
    """

    def __init__(self, path: Path, rows: int, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.writable = True
        self.fresh = True
        """Whether nothing has been stored yet, as far as this process knows."""
        self._size = rows * row_bytes
        self._descriptors: list[int] = []
        # No `close`, not even at exit: a thread that is still writing could hit another file with the same descriptor.
        weakref.finalize(self, close_all, self._descriptors).atexit = False
        self._data = self._open(path, self._size).reshape(rows, row_bytes)
        self._sums = self._open(path.with_suffix(".sums"), 8 * rows).view(np.uint64)
        self._known = np.zeros(rows, np.bool_)
        """Rows that this process has stored or verified by their checksum."""

    def _open(self, path: Path, size: int) -> npt.NDArray[np.uint8]:
        """A file of the given size, created if missing, as a memory-mapped (size,) uint8 array."""
        # O_NONBLOCK: opening a FIFO of that name would block for ever.
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size not in (0, size):
                # Processes that have it open keep using the unlinked file.
                os.close(descriptor)
                os.unlink(path)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError:
            # A shared folder may be mounted read-only here.
            descriptor = os.open(path, os.O_RDONLY | flags)
            self.writable = False
        self._descriptors.append(descriptor)
        held = os.fstat(descriptor).st_size
        if held:
            self.fresh = False
        elif self.writable:
            os.ftruncate(descriptor, size)
            held = size
        if held != size:
            raise OSError(f"{path} has {held} bytes, expected {size}: delete it")
        return np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), np.uint8)

    def most_for_a_row(self, values: object = None) -> int:
        """Maximum growth of the files per row, in bytes."""
        return -(-self.row_bytes // BLOCK) * BLOCK + 2 * BLOCK

    def count(self) -> int:
        """Number of stored rows, by any process; some may turn out to be torn."""
        return int(np.count_nonzero(self._sums))

    def take(self, rows: Int64s, out: npt.NDArray[Any]) -> Bools:
        """Copy stored rows into `out`.

        Parameters
        ----------
        rows : (k,) int64
            Any rows, duplicates allowed.
        out : (k, …) array, C order
            ``out[i]`` is valid only if ``held[i]``; otherwise its content is undefined.

        Returns
        -------
        held : (k,) bool
        """
        # Reading a memory map beyond the end of a truncated file would kill the process with SIGBUS.
        if os.fstat(self._descriptors[0]).st_size != self._size:
            return np.zeros(len(rows), np.bool_)
        raw = out.view(np.uint8).reshape(len(rows), self.row_bytes)
        held = self._known[rows]
        if held.all():
            # Not mode="raise", which gathers into a temporary buffer first.
            np.take(self._data, rows, axis=0, out=raw, mode="clip")
            return held
        if os.fstat(self._descriptors[1]).st_size != self._sums.nbytes:
            return np.zeros(len(rows), np.bool_)
        sums = self._sums[rows]
        there = np.flatnonzero(held | (sums != 0))
        if len(there) == len(rows):
            np.take(self._data, rows, axis=0, out=raw, mode="clip")
        else:
            raw[there] = self._data[rows[there]]
        unsure = there[~held[there]]
        # Of a row that is taken several times, the first copy is the oldest: if that is whole, all are.
        distinct, firsts, of_row = np.unique(rows[unsure], return_index=True, return_inverse=True)
        are_whole = np.array([checksum(raw[place]) == sums[place] for place in unsure[firsts].tolist()], np.bool_)
        self._known[distinct[are_whole]] = True
        held[unsure] = are_whole[of_row]
        return held

    def has(self, rows: Int64s) -> Bools:
        """Which rows are stored, (k,) bool. Those that this process has not seen yet are read and verified."""
        if not self._is_whole:
            return np.zeros(len(rows), np.bool_)
        for row in np.unique(rows[~self._known[rows] & (self._sums[rows] != 0)]).tolist():
            total = self._sums[row]
            if checksum(self._data[row]) == total:
                self._known[row] = True
        return self._known[rows]

    def mapped(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """All rows in the file, (rows, *shape), read-only: only those that are there by `has` may be touched."""
        return self._data.view(dtype).reshape(len(self._data), *shape)

    @property
    def _is_whole(self) -> bool:
        """Whether the files have their size: reading a memory map beyond the end would kill the process with SIGBUS."""
        data, sums = (os.fstat(descriptor).st_size for descriptor in self._descriptors)
        return data == self._size and sums == self._sums.nbytes

    def forget(self, rows: Int64s) -> None:
        """Let these rows be written again."""
        self._known[rows] = False

    def put(self, rows: Int64s, values: npt.NDArray[Any]) -> int:
        """Store rows that are not stored yet.

        Parameters
        ----------
        rows : (k,) int64
        values : (k, …) array, C order

        Returns
        -------
        int
            Number of rows stored.

        Raises
        ------
        OSError
            The disk is full or broken; rows stored before are intact.
        """
        if not self.writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        data, sums = self._descriptors
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(rows), self.row_bytes)
        self.fresh = False
        # The checksum alone does not show that a row is stored: the row may be torn.
        fresh = np.flatnonzero(~self._known[rows])
        checksums = np.array([checksum(raw[place]) for place in fresh.tolist()], np.uint64)
        for begin, end in _runs(rows[fresh]):
            first = fresh[begin]
            if fresh[end - 1] - first == end - begin - 1:
                write(data, raw[first : first + end - begin], int(rows[first]) * self.row_bytes)
            else:
                write(data, raw[fresh[begin:end]], int(rows[first]) * self.row_bytes)
        for begin, end in _runs(rows[fresh]):
            write(sums, checksums[begin:end], int(rows[fresh[begin]]) * 8)
        self._known[rows[fresh]] = True
        return len(fresh)


def checksum(row: npt.NDArray[np.uint8]) -> int:
    """A 64-bit checksum of two different kinds, never zero."""
    return (zlib.crc32(row) << 32 | zlib.adler32(row)) or 1


def _runs(rows: Int64s) -> Iterator[tuple[int, int]]:
    """Start and end of each run of consecutive row numbers."""
    ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)] if len(rows) else []
    begin = 0
    for end in ends:
        yield begin, end
        begin = end


def write(descriptor: int, values: npt.NDArray[Any], offset: int) -> None:
    rest = memoryview(values).cast("B")
    while len(rest):
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
