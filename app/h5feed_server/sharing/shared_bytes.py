"""A few bytes that are shared by all processes forked after their creation."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import weakref
from collections.abc import Iterator

_PATIENCE_SECONDS = 1.0
"""How long to wait for the lock, whose holder may hang."""


class SharedBytes:
    """An anonymous file in memory, with a lock."""

    def __init__(self, name: str) -> None:
        self._descriptor = os.memfd_create(name)
        # Each reload may create others.
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        # File locks work only between processes, so threads need another lock.
        self._threads = threading.Lock()

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the lock. Yields False if another process has held it for too long."""
        with self._threads:
            held = self._hold()
            try:
                yield held
            finally:
                if held:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def read(self) -> bytes:
        """The content."""
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def append(self, more: bytes) -> None:
        """Append to the content."""
        os.pwrite(self._descriptor, more, os.fstat(self._descriptor).st_size)

    def replace(self, content: bytes) -> None:
        """Replace the content."""
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
