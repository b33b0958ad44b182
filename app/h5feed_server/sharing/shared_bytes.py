"""A few bytes that all processes forked after their creation share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import weakref
from collections.abc import Iterator

_PATIENCE_SECONDS = 1.0
"""For a process that hangs while it holds the lock."""


class SharedBytes:
    """A file in memory, without a name, with a lock."""

    def __init__(self, name: str) -> None:
        self._descriptor = os.memfd_create(name)
        # Each reload may bring others.
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        # Locks on a file hold between processes only.
        self._threads = threading.Lock()

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Have it for oneself; False: another process has held it for too long."""
        with self._threads:
            held = self._hold()
            try:
                yield held
            finally:
                if held:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def read(self) -> bytes:
        """All of it."""
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def append(self, more: bytes) -> None:
        """Add to its end."""
        os.pwrite(self._descriptor, more, os.fstat(self._descriptor).st_size)

    def replace(self, content: bytes) -> None:
        """Write all of it anew."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)

    def _hold(self) -> bool:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.001)
