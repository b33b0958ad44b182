"""Memory that a worker needs no more goes back to the system.

What is freed stays with the C library: in pieces between others, in as many arenas as threads have asked at the same
time. A worker that had 401 MiB after many large answers kept all of it, and had 360 after ``malloc_trim``; with large
arrays in mappings of their own it had 324, and 200 a second later.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often it is looked how much memory the process has."""

GROWTH_BYTES = 64 << 20
"""Growth since memory was given back last that is worth another time."""

PAUSE_SECONDS = 5.0
"""Between two times while requests are answered."""

IDLE_LOOKS = 10
"""Times that an idle worker gives memory back, unless it grows anew."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Options of glibc's ``mallopt``."""

_OWN_MAPPING_BYTES = 4 << 20
"""Memory of this size and more is a mapping of its own, which goes back when it is freed. glibc would raise the bound
to 32 MiB. And numpy asks for huge pages for arrays from 4 MiB on: where these lie in a heap, the kernel makes whole
huge pages of what is in use there and what is free."""

_TOP_BYTES = 1 << 20
"""Free memory at the end of a heap that is kept; glibc would move it along with the other bound. Each thread may have a
heap of its own, and ``malloc_trim`` looks at the end of the main one alone: with 32 MiB a worker kept 100."""

_PAGE = os.sysconf("SC_PAGE_SIZE")


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


def resident_bytes() -> int:
    """Resident memory of this process; 0 if unknown."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


class GivesBack:
    """A thread that returns unused memory to the system; ended by `close`.

    Parameters
    ----------
    patience : float
        Seconds after which a worker that nobody asks for rows lets go of what it can read again.
    idle_seconds : callable
        Since when nobody has.
    let_go : callable
        Lets go of what was not used for so many seconds, and can be read again.
    """

    def __init__(self, patience: float, idle_seconds: Callable[[], float], let_go: Callable[[float], None]) -> None:
        self._patience = patience
        self._idle_seconds = idle_seconds
        self._let_go = let_go
        self._trim = _find_trim()
        self._closed = threading.Event()
        self._least = resident_bytes()
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
                logger.exception("memory could not be given back")

    def look(self) -> None:
        """Return memory if it is worth it."""
        idle = self._idle_seconds() >= self._patience
        if time.monotonic() - self._given_back < PAUSE_SECONDS:
            return
        now = resident_bytes()
        self._least = min(self._least, now)
        # A job may use what nobody asks for any more: it is old some time after.
        if idle and self._idle_looks < IDLE_LOOKS:
            self._idle_looks += 1
            self._let_go(self._patience)
            # What holds itself is found in time only where much is made anew.
            gc.collect()
        elif now - self._least < GROWTH_BYTES:
            self._idle_looks = self._idle_looks if idle else 0
            return
        else:
            self._idle_looks = 0
        if self._trim is not None:
            # Without the interpreter's lock: requests go on meanwhile.
            self._trim(0)
            self._least, self._given_back = resident_bytes(), time.monotonic()
