"""Locks of the operating system, which are free the moment that their holder dies: files that are there while held."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


def hold(path: Path) -> int | None:
    """A descriptor that holds the lock; None where another process, or somebody in this one, holds it.

    Raises
    ------
    OSError
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it last may have deleted the file in between: then this lock keeps nobody out.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def release(path: Path, descriptor: int) -> None:
    """Let others hold it."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    os.close(descriptor)
