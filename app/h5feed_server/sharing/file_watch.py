"""Watches small files for changes, in a separate thread, so that a disk that hangs blocks nothing else."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

_LOOK_SECONDS = 0.4

_Seen = tuple[int, int, int, int, int]


class FileWatch:
    """Calls a function soon after one of the files was changed, created or deleted.

    A file that is written in place is empty for a moment, and a certificate may be written before its key. So the
    function is called only when two consecutive checks find the same.

    Parameters
    ----------
    files : sequence of Path
    changed : callable
        Must raise nothing.
    """

    def __init__(self, files: Sequence[Path], changed: Callable[[], None]) -> None:
        self._files = files
        self._changed = changed
        self._closed = threading.Event()
        self._known = self._latest = [_look(file) for file in files]

    def begin(self, name: str) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def close(self) -> None:
        """Stop the thread, without waiting for it."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            before, self._latest = self._latest, [_look(file) for file in self._files]
            if self._latest == before != self._known:
                self._known = self._latest
                self._changed()


def _look(file: Path) -> _Seen | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
