"""Notices when small files have changed, in a thread of its own: a disk that hangs holds up nothing else."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_LOOK_SECONDS = 0.5

_YOUNG_NS = 2 * 10**9
"""A file that was written so lately may be written again without a later time."""

_Seen = tuple[int, int, int, int, int]


class FileWatch:
    """Calls a function soon after one of some files has changed, come or gone.

    Parameters
    ----------
    files : sequence of Path
    changed : callable
        Must raise nothing. Called again for a while after each change.
    """

    def __init__(self, files: Sequence[Path], changed: Callable[[], None]) -> None:
        self._files = files
        self._changed = changed
        self._closed = threading.Event()
        self._seen = [_look(file) for file in files]

    def begin(self, name: str) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def close(self) -> None:
        """Stop it; it does not wait for one that hangs."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            seen = [_look(file) for file in self._files]
            young = time.time_ns() - _YOUNG_NS
            if seen != self._seen or any(one is not None and max(one[3:]) > young for one in seen):
                self._seen = seen
                self._changed()


def _look(file: Path) -> _Seen | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
