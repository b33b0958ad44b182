"""Rows of one field in a local file, which several processes fill and read at the same time.

A field of one revision has one content, so whoever writes a row writes the same bytes to the same place: writers need
not agree on anything, and a row that was written in part is simply written again. Beside the data lies a file of
checksums, one for each row, zero where there is none. A checksum is written after its row, and a row is handed out only
if this process has stored it or has found that it matches: what a killed process, a lost write or a power failure has
left half done is taken for absent, whatever part of it reached the disk in which order. (LevelDB's log and ZFS's block
pointers tell torn writes in the same way.)

Both files are sparse. Writing is by ``pwrite``, which says when the disk is full; reading is from a mapping, because
one ``np.take`` from it gathers a batch as fast as from memory.
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

_BLOCK = 4096
"""Bytes: what a file system gives out at a time."""


class FieldStore:
    """The rows of one field that lie on this machine.

    Parameters
    ----------
    path : Path
        The data; the checksums lie beside it, ending in ``.sums``.
    rows : int
        Of the dataset: rows are numbered 0 … rows-1.
    row_bytes : int
        Bytes of one row, 1 or more.

    Raises
    ------
    OSError
        The files can neither be made nor be read. Where they are not those of so many rows, they are made anew; on a
        disk that cannot be written, that is an error, too.
    """

    def __init__(self, path: Path, rows: int, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.writable = True
        self.fresh = True
        """Nothing has been stored yet, as far as this process knows."""
        self._size = rows * row_bytes
        self._descriptors: list[int] = []
        # No `close`: a thread that is about to write would do so into whatever file has the descriptor by then.
        # Nor at the interpreter's end, for the same reason: the system closes them.
        weakref.finalize(self, _close_all, self._descriptors).atexit = False
        self._data = self._open(path, self._size).reshape(rows, row_bytes)
        self._sums = self._open(path.with_suffix(".sums"), 8 * rows).view(np.uint64)
        self._known = np.zeros(rows, np.bool_)
        """Rows that this process has stored itself or has seen to match their checksum."""

    def _open(self, path: Path, size: int) -> npt.NDArray[np.uint8]:
        """A file of that size, made where there is none, as a mapped (size,) uint8 array."""
        # A FIFO of that name would block the open for ever.
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size not in (0, size):
                # Whoever else has it open goes on with what has no name any more.
                os.close(descriptor)
                os.unlink(path)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError:
            # A folder that others have filled may be on a disk that is read-only here.
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
            raise OSError(f"{path} has {held} bytes instead of {size}: delete it")
        return np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), np.uint8)

    @property
    def most_for_a_row(self) -> int:
        """Bytes that the files may grow by for one row more."""
        return -(-self.row_bytes // _BLOCK) * _BLOCK + 2 * _BLOCK

    def count(self) -> int:
        """Rows that are there, whoever stored them; some may turn out to be torn."""
        return int(np.count_nonzero(self._sums))

    def take(self, rows: Int64s, out: npt.NDArray[Any]) -> Bools:
        """Copy rows that are there into `out`.

        Parameters
        ----------
        rows : (k,) int64
            Any rows, also repeatedly.
        out : (k, …) array, C order
            ``out[i]`` is only meant where the answer is true; elsewhere it is overwritten with anything.

        Returns
        -------
        held : (k,) bool
        """
        # A mapping of a file that somebody has cut off would end the process with a bus error.
        if os.fstat(self._descriptors[0]).st_size != self._size:
            return np.zeros(len(rows), np.bool_)
        raw = out.view(np.uint8).reshape(len(rows), self.row_bytes)
        held = self._known[rows]
        if held.all():
            # Not mode="raise": that gathers into a buffer of its own first.
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
        for place in there[~held[there]].tolist():
            if _checksum(raw[place]) == sums[place]:
                held[place] = self._known[rows[place]] = True
        return held

    def put(self, rows: Int64s, values: npt.NDArray[Any]) -> int:
        """Store rows that are not there yet.

        Parameters
        ----------
        rows : (k,) int64
        values : (k, …) array, C order

        Returns
        -------
        int
            How many were stored.

        Raises
        ------
        OSError
            The disk is full or broken; what was stored before is whole.
        """
        if not self.writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        data, sums = self._descriptors
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(rows), self.row_bytes)
        self.fresh = False
        # Whether there is a sum does not tell: that of a row which was torn is there.
        fresh = np.flatnonzero(~self._known[rows])
        checksums = np.array([_checksum(raw[place]) for place in fresh.tolist()], np.uint64)
        for begin, end in _runs(rows[fresh]):
            first = fresh[begin]
            if fresh[end - 1] - first == end - begin - 1:
                _write(data, raw[first : first + end - begin], int(rows[first]) * self.row_bytes)
            else:
                _write(data, raw[fresh[begin:end]], int(rows[first]) * self.row_bytes)
        for begin, end in _runs(rows[fresh]):
            _write(sums, checksums[begin:end], int(rows[fresh[begin]]) * 8)
        self._known[rows[fresh]] = True
        return len(fresh)


def _checksum(row: npt.NDArray[np.uint8]) -> int:
    """64 bits of which none is set by chance: two sums of different kinds, and never zero."""
    return (zlib.crc32(row) << 32 | zlib.adler32(row)) or 1


def _runs(rows: Int64s) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch in which every row is followed by the next."""
    ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)] if len(rows) else []
    begin = 0
    for end in ends:
        yield begin, end
        begin = end


def _write(descriptor: int, values: npt.NDArray[Any], offset: int) -> None:
    rest = memoryview(values).cast("B")
    while len(rest):
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
