"""Finds the layout of a file whose metadata is byte for byte that of a file that was inspected before.

Shards are often alike: only their values differ. An inspection depends on nothing but the size of the file and the
bytes that libhdf5 reads of it. So once these bytes are known, a file of the same size with the same bytes in the same
places has the same layout, and needs no inspection.

This holds for crafted files as well. The bytes are not what the inspection says it has read: this process hands them
over itself, and the inspection can get no others. If they corrupt libhdf5, they do so in every file that has them, and
a file without them is inspected by itself.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

_MOST_OF_A_SIZE = 4
"""Records of files of the same size. If these do not fit, the files differ in their metadata, and no more are made."""

_MOST_LAYOUTS = 16
"""Layouts of files of the same size that are remembered, by their hash."""

_MOST_SIZES = 256
"""Sizes of files that are remembered; those used last."""

_MOST_BYTES = 1 << 20
"""Bytes of one record. Above this, comparing them may take longer than an inspection."""

_MOST_READS = 1000
"""Reads of one record."""


class Recorder:
    """Hands over the parts of an open file, and records them.

    Parameters
    ----------
    fd : int
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._left = _MOST_BYTES
        self._parts: list[tuple[int, bytes]] = []
        self._is_void = False

    def read(self, offset: int, nbytes: int) -> bytes:
        """A part of the file."""
        data = os.pread(self._fd, nbytes, offset)
        if not self._is_void and (offset, data) not in self._parts:
            self._left -= nbytes
            self._is_void = self._left < 0 or len(self._parts) == _MOST_READS or self._contradicts(offset, data)
            self._parts.append((offset, data))
        return data

    def _contradicts(self, offset: int, data: bytes) -> bool:
        """Whether some of these bytes were others before: somebody writes to the file."""
        for begin, part in self._parts:
            first, last = max(begin, offset), min(begin + len(part), offset + len(data))
            if first < last and part[first - begin : last - begin] != data[first - offset : last - offset]:
                return True
        return False

    def parts(self) -> tuple[tuple[int, bytes], ...] | None:
        """What was read: the position and the bytes of each part, joined where they touch.

        None if it was too much, or if the file was written to.
        """
        if self._is_void:
            return None
        joined: list[tuple[int, bytes]] = []
        for offset, data in sorted(self._parts):
            if joined and offset <= (end := joined[-1][0] + len(joined[-1][1])):
                joined[-1] = (joined[-1][0], joined[-1][1] + data[end - offset :])
            else:
                joined.append((offset, data))
        return tuple(joined)


@dataclass(frozen=True)
class _Record:
    """What an inspection has read, and its result."""

    parts: tuple[tuple[int, bytes], ...]
    layout: bytes

    def fits(self, fd: int) -> bool:
        return all(os.pread(fd, len(data), offset) == data for offset, data in self.parts)


@dataclass
class _OfSize:
    """The records of files of one size."""

    records: list[_Record] = field(default_factory=list)
    tried: int = 0
    """Inspections that were to be recorded."""
    layouts: deque[int] = field(default_factory=lambda: deque(maxlen=_MOST_LAYOUTS))
    """Hashes of the layouts that were found last."""


class SameMetadata:
    """Records of inspections; shared by the threads of a process."""

    def __init__(self) -> None:
        self._by_size: OrderedDict[int, _OfSize] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, fd: int, size: int) -> bytes | None:
        """The layout of an open file of this size; None if it must be inspected."""
        with self._lock:
            known = self._by_size.get(size)
            records = [] if known is None else list(known.records)
        return next((record.layout for record in records if record.fits(fd)), None)

    def learn(self, fd: int, size: int, layout: bytes, inspect: Callable[[Recorder], bytes | None]) -> None:
        """Record a file that was inspected, if another one of its size had the same layout.

        Parameters
        ----------
        fd : int
        size : int
        layout : bytes
            The result of its inspection.
        inspect : callable
            Inspects the file again, with what a recorder hands over. Returns the layout, or None if that is impossible.
        """
        with self._lock:
            known = self._by_size.setdefault(size, _OfSize())
            self._by_size.move_to_end(size)
            while len(self._by_size) > _MOST_SIZES:
                self._by_size.popitem(last=False)
            # Most files are the only one of their size. Others differ in their metadata if they do in their layouts.
            found = hash(layout)
            if found not in known.layouts:
                known.layouts.append(found)
                return
            if known.tried >= _MOST_OF_A_SIZE:
                return
            known.tried += 1
        recorder = Recorder(fd)
        # Another result than that of the file itself depends on more than what was recorded.
        if inspect(recorder) == layout and (parts := recorder.parts()) is not None:
            with self._lock:
                known.records.append(_Record(parts, layout))
