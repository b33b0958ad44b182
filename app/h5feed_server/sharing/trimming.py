"""Returns memory that a worker no longer needs to the system.

The C library keeps freed memory: in fragments between used blocks, and in as many arenas as threads have allocated at
the same time. A worker that had 401 MiB after many large responses kept all of it, and still had 360 MiB after
``malloc_trim``. With large arrays in mappings of their own, it had 324 MiB, and 200 MiB a second later.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Interval between checks of the process's memory."""

GROWTH_BYTES = 64 << 20
"""Growth, since memory was last returned, that makes it worth returning memory again."""

PAUSE_SECONDS = 5.0
"""Minimum interval between two attempts to return memory."""

IDLE_LOOKS = 10
"""How often an idle worker returns memory before it stops trying. It starts again when its memory has grown."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Options of glibc's ``mallopt``."""

_OWN_MAPPING_BYTES = 4 << 20
"""Blocks of at least this size get a mapping of their own, which returns to the system when it is freed. By default,
glibc raises this threshold to up to 32 MiB. In addition, numpy requests huge pages for arrays of 4 MiB or more: within
a heap, the kernel would make huge pages that contain both used and free memory."""

_TOP_BYTES = 4 << 20
"""Free memory that is kept at the end of a heap. By default, glibc raises it together with the other threshold. Each
thread may have its own heap, and ``malloc_trim`` shortens only the main one: with 32 MiB, a worker kept 100 MiB. With
2 MiB, statistics took a seventh more CPU, because the temporary arrays of each block returned their pages."""


def _find_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None with other C libraries, which keep less memory."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim


def settle() -> None:
    """Make large arrays return their memory to the system when freed; call before starting threads."""
    try:
        option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    option(_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
    option(_TRIM_THRESHOLD, _TOP_BYTES)


def resident_bytes(pid: int) -> int | None:
    """Memory of a process that is not swapped out; None if it has ended, or the system does not tell."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return None


def _own_bytes() -> int:
    return resident_bytes(os.getpid()) or 0


class GivesBack:
    """A thread that returns unused memory to the system; ended by `close`.

    Parameters
    ----------
    patience : float
        Seconds without requests for rows after which a worker drops cached data that it can read again.
    idle_seconds : callable
        Returns the seconds since the last request for rows.
    let_go : callable
        Drops cached data that was not used for the given number of seconds.
    """

    def __init__(self, patience: float, idle_seconds: Callable[[], float], let_go: Callable[[float], None]) -> None:
        self._patience = patience
        self._idle_seconds = idle_seconds
        self._let_go = let_go
        self._trim = _find_trim()
        self._closed = threading.Event()
        self._least = _own_bytes()
        self._given_back = 0.0
        self._idle_looks = 0
        self.thread = threading.Thread(target=self._run, name="h5feed-memory", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            try:
                self.look()
            except Exception:
                logger.exception("memory could not be returned to the system")

    def look(self) -> None:
        """Return memory if it is worth it."""
        idle = self._idle_seconds() >= self._patience
        if time.monotonic() - self._given_back < PAUSE_SECONDS:
            return
        now = _own_bytes()
        self._least = min(self._least, now)
        # Several times, because a job may still use cached data, which is then old enough only some time later.
        if idle and self._idle_looks < IDLE_LOOKS:
            self._idle_looks += 1
            self._let_go(self._patience)
            # An idle process creates few objects, so the collector rarely runs automatically to free cycles.
            gc.collect()
        elif now - self._least < GROWTH_BYTES:
            self._idle_looks = self._idle_looks if idle else 0
            return
        else:
            self._idle_looks = 0
        if self._trim is not None:
            # ctypes releases the GIL, so requests continue meanwhile.
            self._trim(0)
            self._least, self._given_back = _own_bytes(), time.monotonic()
