"""Locks between processes: which folder is in use, whose turn it is. The system ends those of a killed process."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path


def hold(folder: Path) -> int:
    """Make a folder and keep others from deleting it, as long as the descriptor that is returned is open."""
    path = folder / ".in-use"
    for _ in range(100):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Where it cannot be locked, or what is locked is no longer there, somebody is deleting it.
        if _lock(descriptor, exclusive=False, seconds=0.1):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        os.close(descriptor)
    raise OSError(f"{path} stays locked by another process")


@contextlib.contextmanager
def exclusive(path: Path, seconds: float) -> Iterator[bool]:
    """Whether this is now the only process, and the only thread, that holds the lock; the system ends it at a crash."""
    # Opened anew each time: a lock belongs to the opening, which a fork would share.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _lock(descriptor, exclusive=True, seconds=seconds)
    finally:
        # Not only closed: a child that was forked meanwhile has the same opening, and would keep it locked.
        _unlock(descriptor)
        os.close(descriptor)


def _unlock(descriptor: int) -> None:
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_UN)


def _lock(descriptor: int, *, exclusive: bool, seconds: float) -> bool:
    import fcntl  # not on Windows, where there is no cache

    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
