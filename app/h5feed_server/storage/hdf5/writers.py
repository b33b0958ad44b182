"""Tells whether a program has an HDF5 file open for writing.

Version 3 of the superblock has flags for that (HDF5 File Format Specification, III.A: "File Consistency Flags"), which
a writer sets when it opens the file and clears when it closes it. If it is killed, they stay. Earlier versions have
none: there, only the lock of a writer on this machine shows it.
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from ..signatures import superblock

_WRITE, _SWMR = 1, 4
"""Bits of the flags: open for writing, and for writing while others read (single writer, multiple readers)."""

_VERSION, _FLAGS = 8, 11
"""Positions in the superblock."""

_LOCKS = Path("/proc/locks")


class Writer(Enum):
    """Who has a file open for writing."""

    NONE = "nobody, as its superblock says"
    SWMR = "a SWMR writer, which keeps it readable"
    OTHER = "a writer without SWMR: what is in the file may be half written"
    UNKNOWN = "its superblock does not say, and nobody has locked it"


def writer_of(fd: int) -> Writer:
    """Who has an open HDF5 file open for writing."""
    head = os.pread(fd, _FLAGS + 1, superblock(fd) or 0)
    if len(head) > _FLAGS and head[_VERSION] >= 3:
        flags = head[_FLAGS]
        return Writer.SWMR if flags & _SWMR else Writer.OTHER if flags & _WRITE else Writer.NONE
    return Writer.OTHER if _is_locked(os.fstat(fd).st_ino) else Writer.UNKNOWN


def _is_locked(inode: int) -> bool:
    """Whether a process of this machine holds an exclusive lock on a file.

    This only looks: a lock of our own, however short, could make a writer fail that opens the file at this moment.
    """
    try:
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return False
    # 1: FLOCK  ADVISORY  WRITE 1234 08:01:567890 0 EOF. The device is not compared: some file systems have several.
    locks = (line.split() for line in lines)
    return any(lock[1:2] == ["FLOCK"] and "WRITE" in lock and lock[-3].endswith(f":{inode}") for lock in locks)
