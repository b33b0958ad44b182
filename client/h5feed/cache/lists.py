"""The rows of one field whose rows differ in length, in local files that several processes read and write.

Rows are appended to a file of items, which has no order. For each row, an entry says where its items are, and has their
checksum. Entries are kept like the rows of any other field (`h5feed.cache.store`), and are written after the items. So
whatever a killed process or a power failure left: a row whose entry or whose items do not match counts as missing.
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .store import BLOCK, FieldStore, Int64s, checksum, close_all, write

_ENTRY_BYTES = 24
"""Begin, number of bytes, and checksum of the items of a row: three int64."""


@dataclass(frozen=True)
class Lists:
    """Rows that differ in length, back to back.

    Attributes
    ----------
    items : (n,) array
    offsets : (k + 1,) int64
        Where each row begins.
    """

    items: npt.NDArray[Any]
    offsets: Int64s

    def __getitem__(self, rows: slice) -> Lists:
        offsets = self.offsets[rows.start : rows.stop + 1]
        return Lists(self.items[offsets[0] : offsets[-1]], offsets - offsets[0])

    def row(self, place: int) -> npt.NDArray[Any]:
        """The items of one row."""
        return self.items[self.offsets[place] : self.offsets[place + 1]]


class ListStore:
    """The locally stored rows of one field whose rows differ in length.

    Parameters
    ----------
    path : Path
        File of the items. The files of the entries are next to it, with the suffixes ``.entries`` and ``.sums``.
    rows : int
        Number of rows of the dataset.
    dtype : dtype
        Of the items.

    Raises
    ------
    OSError
        The files can be neither created nor read.
    """

    def __init__(self, path: Path, rows: int, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._entries = FieldStore(path.with_suffix(".entries"), rows, _ENTRY_BYTES)
        # O_NONBLOCK: opening a FIFO of that name would block for ever.
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        access = os.O_RDWR | os.O_CREAT if self._entries.writable else os.O_RDONLY
        self._descriptor = os.open(path, access | flags, 0o666)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise OSError(f"{path} is no file: delete it")
        # As in `FieldStore`: threads that are still reading could hit another file.
        weakref.finalize(self, close_all, [self._descriptor]).atexit = False
        self._known = np.zeros(rows, np.bool_)
        """Rows whose items this process has stored or verified."""
        self._seen = 0
        """Size of the file when it was last looked at."""

    @property
    def fresh(self) -> bool:
        """Whether nothing has been stored yet, as far as this process knows."""
        return self._entries.fresh

    def count(self) -> int:
        """Number of stored rows, by any process; some may turn out to be torn."""
        return self._entries.count()

    def most_for_a_row(self, values: Lists) -> int:
        """Maximum growth of the files for one of these rows, in bytes."""
        longest = int(np.diff(values.offsets).max(initial=0))
        return longest * values.items.dtype.itemsize + 2 * BLOCK + self._entries.most_for_a_row()

    def take(self, rows: Int64s, spans: Int64s | None = None) -> list[npt.NDArray[Any] | None]:
        """Stored rows, (n,) arrays; None for those that are not there.

        Parameters
        ----------
        rows : (k,) int64
            Any rows, duplicates allowed.
        spans : (k, 2) int64, optional
            Which items of each row: the first, and how many. Default: all.
        """
        entries = np.zeros((len(rows), 3), np.int64)
        held = self._entries.take(rows, entries) & (entries >= 0).all(axis=1)
        found: list[npt.NDArray[Any] | None] = []
        for place, (row, is_there) in enumerate(zip(rows.tolist(), held.tolist(), strict=True)):
            begin, nbytes, total = entries[place].tolist()
            span = None if spans is None else spans[place].tolist()
            found.append(self._row(row, begin, nbytes, total, span) if is_there else None)
        return found

    def _row(self, row: int, begin: int, nbytes: int, total: int, span: list[int] | None) -> npt.NDArray[Any] | None:
        size = self.dtype.itemsize
        if span is not None and self._known[row]:
            # Only a part of a row that may be long.
            first, count = span
            part = self._read(begin + first * size, count * size) if (first + count) * size <= nbytes else None
            return None if part is None or not self._known[row] else part.view(self.dtype)
        raw = self._read(begin, nbytes) if nbytes % size == 0 else None
        if raw is None or checksum(raw) >> 1 != total:
            return None
        self._known[row] = True
        items = raw.view(self.dtype)
        if span is None:
            return items
        first, count = span
        return items[first : first + count] if first + count <= len(items) else None

    def _read(self, begin: int, nbytes: int) -> npt.NDArray[np.uint8] | None:
        """Bytes of the file of items; None if it ends before."""
        # Checked before memory is allocated: a damaged entry may have any number.
        if begin + nbytes > self._size():
            return None
        raw = np.empty(nbytes, np.uint8)
        view, done = memoryview(raw), 0
        while done < nbytes:
            got = os.preadv(self._descriptor, [view[done:]], begin + done)
            if not got:
                return None
            done += got
        return raw

    def _size(self) -> int:
        """Bytes of the file of items."""
        size = os.fstat(self._descriptor).st_size
        if size < self._seen:
            # Somebody has cut the file off: what is known of it may not be true any more.
            self._known[...] = False
        self._seen = size
        return size

    def put(self, rows: Int64s, values: Lists) -> int:
        """Store rows that are not stored yet. Only one thread of one process may do so at a time.

        Returns
        -------
        int
            Number of rows stored.

        Raises
        ------
        OSError
            The disk is full or broken; rows stored before are intact.
        """
        if not self._entries.writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        begin = self._size()
        _, firsts = np.unique(rows, return_index=True)
        places = firsts[~self._known[rows[firsts]]]
        # Another process may have stored them meanwhile: their place is not to change.
        places = places[[one is None for one in self.take(rows[places])]]
        entries = np.empty((len(places), 3), np.int64)
        items = [values.row(place) for place in places.tolist()]
        sizes = np.array([one.nbytes for one in items], np.int64)
        if items:
            write(self._descriptor, np.concatenate(items).view(np.uint8), begin)
        entries[:, 0] = begin + np.cumsum(sizes) - sizes
        entries[:, 1] = sizes
        # Without the last bit: an int64 has no more than these.
        entries[:, 2] = [checksum(one.view(np.uint8)) >> 1 for one in items]
        self._entries.forget(rows[places])
        self._entries.put(rows[places], entries)
        self._known[rows[places]] = True
        return len(places)


AnyStore = FieldStore | ListStore
Values = npt.NDArray[Any] | Lists
