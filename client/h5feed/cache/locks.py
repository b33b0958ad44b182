"""Locks between processes. The system releases the locks of a killed process."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path


def hold(folder: Path) -> int:
    """Create a folder and keep other processes from deleting it as long as the returned descriptor is open."""
    path = folder / ".in-use"
    for _ in range(100):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # If it cannot be locked, or the locked file is gone, another process is deleting the folder.
        if _lock(descriptor, exclusive=False, seconds=0.1):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        os.close(descriptor)
    raise OSError(f"{path} stays locked by another process")


@contextlib.contextmanager
def exclusive(path: Path, seconds: float) -> Iterator[bool]:
    """Try to lock for this thread of this process; yields whether it succeeded. A crash releases the lock."""
    # Opened each time: a lock belongs to the open file, which a forked child would share.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _lock(descriptor, exclusive=True, seconds=seconds)
    finally:
        # Not only closed: a child forked meanwhile shares the open file and would keep it locked.
        _unlock(descriptor)
        os.close(descriptor)


def _unlock(descriptor: int) -> None:
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_UN)


def _lock(descriptor: int, *, exclusive: bool, seconds: float) -> bool:
    import fcntl  # missing on Windows, which has no cache

    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
