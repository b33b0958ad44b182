"""Stored bytes of objects on the local disk: rows and chunks that were fetched once need not be fetched again.

For each version of an object there are two files: one that is as long as the object, but has only the ranges that were
fetched (a sparse file), and an index, which is appended to after a range has been written. An entry of the index has a
checksum of the range and one of itself. So nothing has to be synced to the disk, and the processes of a server, which
share the files, need no locks: what was lost in a crash does not match its checksum, and is fetched again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from h5feed.stored.range_reads import RangeReads
from h5feed.stored.scratch import Bytes
from h5feed.stored.source import Int64s

from .range_index import RangeIndex

logger = logging.getLogger(__name__)

_ENTRY = struct.Struct("<QQII")
"""Offset and size of a range, its checksum, and the checksum of the three."""

_MOST_OPEN = 64
"""Versions of objects whose files are open, per process."""

MOST_RANGES = 1 << 22
"""Ranges that a process knows, of 16 bytes each. If there are more, the versions that were used last are known."""

_RUN_BYTES = 512 << 10
"""Bytes that are read before their checksums are computed."""

_LOOK_SECONDS = 10.0
_LOOK_BYTES = 64 << 20
"""The size of the cache is measured again after this time, or after this process has added so much."""

_UNUSED_SECONDS = 3600.0
"""Versions that were not used for this long are deleted if there is no room. If that is not enough, nothing is added:
to delete what an epoch still needs would make every epoch fetch everything."""

_FREE_SHARE = 0.1
"""The cache leaves this share of the disk free."""

_PAUSE_SECONDS = 60.0
"""After the disk has refused a write, it is tried again after this long."""


@dataclass
class _Version:
    """The files of one version of an object, and what the index says."""

    data: int
    index: int
    read: int = 0
    ranges: RangeIndex = field(default_factory=RangeIndex)
    reads: RangeReads = field(default_factory=RangeReads)
    used: float = 0.0

    def __del__(self) -> None:
        os.close(self.data)
        os.close(self.index)


class RangeCache:
    """Ranges of objects on the local disk.

    Parameters
    ----------
    folder : Path
        Shared by all processes of a server. Safe to delete at any time.
    max_bytes : int
        Bound on the disk space of the files.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._open: OrderedDict[bytes, _Version] = OrderedDict()
        self._lock = threading.Lock()
        self._room = 0
        self._looked = float("-inf")
        self._paused_until = float("-inf")
        self._told: set[str] = set()
        self.has_room = True
        """Whether the last range that was to be stored has found room."""
        self.hits = 0
        """Ranges that were found so far."""
        self.hit_bytes = 0
        """Their size."""

    def held(self, version: bytes, pieces: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
        """Those of some ranges, given as offset and size, that are there, most likely.

        Parameters
        ----------
        version : bytes
            Digest that names the version of the object.
        """
        with self._lock:
            known = self._version(version)
            if known is None:
                return set()
            listed = list(pieces)
            checksums = known.ranges.checksums(listed)
        return {piece for piece, checksum in zip(listed, checksums, strict=True) if checksum is not None}

    def holds(self, version: bytes, offsets: Int64s, sizes: Int64s) -> bool:
        """Whether all of some ranges, (k,) int64, are there, most likely."""
        with self._lock:
            known = self._version(version)
            return known is not None and None not in known.ranges.checksums(_pairs(offsets, sizes))

    def find(self, version: bytes, offset: int, nbytes: int) -> Bytes | None:
        """A range, (nbytes,) uint8; None if it is not there or damaged."""
        data = np.empty(nbytes, np.uint8)
        return data if self.find_rows(version, np.array([offset]), np.array([nbytes]), data, np.array([0]))[0] else None

    def find_rows(
        self, version: bytes, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s
    ) -> npt.NDArray[np.bool_]:
        """Fill ``target[begins[i]:]`` with the ``sizes[i]`` bytes from ``offsets[i]``, for all i.

        Returns
        -------
        (k,) bool
            False where a range is not there or damaged: its part of the target may have changed.
        """
        ranges = _pairs(offsets, sizes)
        found = np.zeros(len(ranges), np.bool_)
        with self._lock:
            # As a rule, `held` has just looked for what other processes have added.
            held = self._open.get(version)
            if held is None or None in (checksums := held.ranges.checksums(ranges)):
                if (held := self._version(version)) is None:
                    return found
                checksums = held.ranges.checksums(ranges)
        known = [number for number, checksum in enumerate(checksums) if checksum is not None]
        if len(known) < len(ranges):
            offsets, sizes, begins = offsets[known], sizes[known], begins[known]
        good: list[int] = []
        # Checksums are computed while the bytes are in the processor's cache.
        for first, stop in pairwise([0, *_begins_of_runs(sizes), len(known)]):
            some = slice(first, stop)
            try:
                received = held.reads.read(held.data, offsets[some], sizes[some], target, begins[some])
            except OSError:
                break
            for number, begin, nbytes in zip(known[some], begins[some].tolist(), received.tolist(), strict=True):
                if nbytes == ranges[number][1] and _checksum(target[begin : begin + nbytes]) == checksums[number]:
                    good.append(number)
                else:
                    with self._lock:
                        held.ranges.remove(ranges[number])
        found[good] = True
        self.hits += len(good)
        self.hit_bytes += sum(ranges[number][1] for number in good)
        return found

    def keep(self, version: bytes, offset: int, data: Bytes) -> None:
        """Store a range if there is room for it."""
        if time.monotonic() < self._paused_until or not self._takes(len(data)):
            self.has_room = False
            return
        with self._lock:
            held = self._version(version, create=True)
            if held is None or held.ranges.get((offset, len(data))) is not None:
                return
            if len(held.ranges) >= MOST_RANGES:
                self.has_room = False
                self._tell(f"an object has more than {MOST_RANGES:,} ranges: others are fetched in every epoch")
                return
        checksum = _checksum(data)
        entry = struct.pack("<QQI", offset, len(data), checksum)
        try:
            if os.pwritev(held.data, (memoryview(data),), offset) != len(data):
                raise OSError("the disk is full")
            if os.write(held.index, entry + struct.pack("<I", zlib.crc32(entry))) != _ENTRY.size:
                raise OSError("the disk is full")
        except OSError as error:
            self._pause(error)
            return
        self.has_room = True
        with self._lock:
            held.ranges.add((offset, len(data)), checksum)

    def used_bytes(self) -> int:
        """Disk space of the files, whichever process wrote them."""
        used = 0
        with contextlib.suppress(FileNotFoundError):
            for item in os.scandir(self._folder):
                with contextlib.suppress(FileNotFoundError):
                    used += item.stat().st_blocks * 512
        return used

    def _version(self, name: bytes, *, create: bool = False) -> _Version | None:
        """The files of a version, with what other processes have added; None if there are none. Call with the lock."""
        held = self._open.get(name)
        try:
            if held is not None and os.fstat(held.index).st_nlink == 0:
                # It was deleted to make room, or with the whole folder.
                del self._open[name]
                held = None
            if held is None:
                held = self._opened(name, create)
                if held is None:
                    return None
                self._open[name] = held
            self._open.move_to_end(name)
            self._catch_up(held)
            while len(self._open) > 1 and (len(self._open) > _MOST_OPEN or self._ranges() > MOST_RANGES):
                self._open.popitem(last=False)
        except OSError as error:
            self._pause(error)
            return None
        return held

    def _ranges(self) -> int:
        return sum(len(held.ranges) for held in self._open.values())

    def _opened(self, name: bytes, create: bool) -> _Version | None:
        path = self._folder / name.hex()[:40]
        flags = os.O_RDWR | os.O_CLOEXEC
        if create:
            self._folder.mkdir(parents=True, exist_ok=True)
            flags |= os.O_CREAT
        try:
            data = os.open(path.with_suffix(".data"), flags, 0o600)
        except FileNotFoundError:
            return None
        try:
            index = os.open(path.with_suffix(".index"), flags | os.O_APPEND, 0o600)
        except OSError as error:
            os.close(data)
            if isinstance(error, FileNotFoundError):
                return None
            raise
        held = _Version(data, index)
        if torn := os.fstat(index).st_size % _ENTRY.size:
            # A write was cut off, and what is appended to it would be out of step.
            os.ftruncate(index, os.fstat(index).st_size - torn)
        return held

    def _catch_up(self, held: _Version) -> None:
        status = os.fstat(held.index)
        now = time.time()
        if now - held.used > 60:
            # Its modification time tells other processes that it is used.
            held.used = now
            os.utime(held.index)
        size = status.st_size - status.st_size % _ENTRY.size
        if size <= held.read:
            return
        added = os.pread(held.index, size - held.read, held.read)
        held.read += len(added) - len(added) % _ENTRY.size
        for begin in range(0, len(added) - _ENTRY.size + 1, _ENTRY.size):
            offset, nbytes, checksum, own = _ENTRY.unpack_from(added, begin)
            if zlib.crc32(added[begin : begin + _ENTRY.size - 4]) == own and len(held.ranges) < MOST_RANGES:
                held.ranges.add((offset, nbytes), checksum)

    def _takes(self, nbytes: int) -> bool:
        with self._lock:
            if time.monotonic() - self._looked >= _LOOK_SECONDS or nbytes > self._room:
                if time.monotonic() - self._looked < 1 and self._room <= 0:
                    return False
                self._look()
            if nbytes > self._room:
                self._tell("it is full: other ranges are fetched in every epoch")
                return False
            self._room -= nbytes
            return True

    def _look(self) -> None:
        """Measure what is there, delete what nobody uses if there is no room, and allow some to be added."""
        self._looked = time.monotonic()
        files: dict[str, tuple[float, int]] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for item in os.scandir(self._folder):
                with contextlib.suppress(FileNotFoundError):
                    status = item.stat()
                    used, nbytes = files.get(name := item.name.partition(".")[0], (0.0, 0))
                    files[name] = (max(used, status.st_mtime), nbytes + status.st_blocks * 512)
            disk = os.statvfs(self._folder)
        except OSError as error:
            self._room = 0
            self._pause(error)
            return
        free = disk.f_bavail * disk.f_frsize - int(_FREE_SHARE * disk.f_blocks * disk.f_frsize)
        room = min(free, self._max_bytes - sum(nbytes for _, nbytes in files.values()))
        for name, (used, nbytes) in sorted(files.items(), key=lambda one: one[1]):
            if room >= _LOOK_BYTES or time.time() - used < _UNUSED_SECONDS:
                break
            for suffix in (".index", ".data"):
                with contextlib.suppress(OSError):
                    os.unlink(self._folder / f"{name}{suffix}")
            room += nbytes
        # Other processes add as well, until they look again.
        self._room = min(room, _LOOK_BYTES)

    def _pause(self, error: OSError) -> None:
        self._paused_until = time.monotonic() + _PAUSE_SECONDS
        self._tell(f"it cannot be used ({error.strerror or error}): ranges are fetched in every epoch")

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning("the cache of ranges on the local disk: %s", what)


def _pairs(offsets: Int64s, sizes: Int64s) -> list[tuple[int, int]]:
    return list(zip(offsets.tolist(), sizes.tolist(), strict=True))


def _begins_of_runs(sizes: Int64s) -> list[int]:
    """Where runs begin, but for the first one, each of which has about `_RUN_BYTES`."""
    begins: list[int] = (np.flatnonzero(np.diff(np.cumsum(sizes) // _RUN_BYTES)) + 1).tolist()
    return begins


def _checksum(data: Any) -> int:
    # CRC-32 in a tenth of the time that zlib takes.
    return imagecodecs.deflate_crc32(data)
