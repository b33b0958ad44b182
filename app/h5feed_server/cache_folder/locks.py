"""Operating system locks on files. They are released when their holder dies. The file exists while the lock is held."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


def hold(path: Path) -> int | None:
    """Try to acquire a lock.

    Returns
    -------
    int or None
        Descriptor that holds the lock. None if it is held already, by another process or by this one.

    Raises
    ------
    OSError
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have deleted or replaced the file after the open, and others lock the new one.
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
    """Release a lock acquired by `hold`, and delete its file."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    os.close(descriptor)
