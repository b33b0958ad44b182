"""Records which clients requested a job and when, as modification times of small files that all workers share."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

_TOUCH_SECONDS = 1.0
"""Minimum interval between two writes of the same record, in seconds."""

_MOST_KEPT = 4096
"""Maximum number of records in memory."""


class Askers:
    """Records of the clients that requested each job.

    Parameters
    ----------
    folder_of : callable
        Returns the folder for the records of a job, which all workers share. If it is not writable, each worker knows
        only the requests that it received itself.
    """

    def __init__(self, folder_of: Callable[[str], Path]) -> None:
        self._folder_of = folder_of
        self._touched: dict[str, float] = {}

    def note(self, job: str, asker: str) -> None:
        """Record that `asker` requests `job` now."""
        name, now = _name(job, asker), time.monotonic()
        if now - self._touched.get(name, float("-inf")) < _TOUCH_SECONDS:
            return
        if len(self._touched) >= _MOST_KEPT:
            self._touched.clear()
        self._touched[name] = now
        with contextlib.suppress(OSError):
            # Without O_NONBLOCK, opening a FIFO would block forever.
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(self._folder_of(job) / name, flags, 0o600)
            try:
                os.pwrite(descriptor, b"\n", 0)
            finally:
                os.close(descriptor)

    def others(self, job: str, but: str) -> float:
        """Seconds since the last request for a job by anybody `but` this client; infinite if there was none."""
        own, now = _name(job, but), time.monotonic()
        ago = [now - when for name, when in self._touched.copy().items() if _is_of(name, job) and name != own]
        # The clock may have been set back.
        ago += [abs(time.time() - when) for name, when in self.marks(job).items() if name != own]
        return min(ago, default=math.inf)

    def marks(self, job: str) -> dict[str, float]:
        """When each client requested a job, by the clock of the folder. They change with each request, but do not tell
        how long ago it was: somebody may have set the clock.
        """
        found = {}
        with contextlib.suppress(OSError), os.scandir(self._folder_of(job)) as entries:
            for entry in entries:
                if _is_of(entry.name, job):
                    with contextlib.suppress(OSError):
                        found[entry.name] = entry.stat().st_mtime
        # Where the folder is not writable.
        return found or {name: when for name, when in self._touched.copy().items() if _is_of(name, job)}

    def forget(self, job: str) -> None:
        """Delete the records of a job."""
        for name in [name for name in self._touched.copy() if _is_of(name, job)]:
            self._touched.pop(name, None)
        with contextlib.suppress(OSError), os.scandir(self._folder_of(job)) as entries:
            for entry in entries:
                if _is_of(entry.name, job):
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)


def _name(job: str, asker: str) -> str:
    # Hashed, because clients are named by address and program, which should not appear in the folder.
    return f"{job}.{hashlib.blake2b(asker.encode(), digest_size=8).hexdigest()}.asked"


def _is_of(name: str, job: str) -> bool:
    return name.startswith(job) and name.endswith(".asked")
