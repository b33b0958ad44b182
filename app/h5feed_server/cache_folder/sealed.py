"""Files whose integrity is checked when they are read: a header line with length and digest, then the content.

After a full disk, a power failure or a defect of the disk, files can be empty, truncated or changed. Everything in the
cache folder can be computed again, so a damaged file counts as missing, and is removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

logger = logging.getLogger(__name__)

_HEADER = 64
"""Size of the header in bytes. It keeps arrays in the content aligned."""

_AT_ONCE = 1 << 16
"""Size of the first read, in bytes. Most files are smaller."""

USE_SECONDS = 3600.0
"""Resolution of the recorded time of last use, in seconds."""

_BUSY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that do not mean that the file is damaged: the process cannot open any file now."""


def read_sealed(path: Path, *, note_use: bool = False) -> bytes | None:
    """The content of a file that `write_sealed` wrote under this name.

    Parameters
    ----------
    note_use : bool
        Record the use in the file's modification time, to within `USE_SECONDS`.

    Returns
    -------
    bytes or None
        None if the file does not exist or cannot be opened now. Also None if it is damaged, unreadable or not a regular
        file; it is then removed.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would block forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            data = _unsealed(path.name, descriptor, status)
        finally:
            os.close(descriptor)
        if note_use and data is not None and abs(time.time() - status.st_mtime) > USE_SECONDS:
            with contextlib.suppress(OSError):
                os.utime(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in _BUSY:
            return None
        data = None
    if data is None:
        logger.warning("%s in the cache folder is damaged: it is removed, and computed again when needed", path.name)
        discard(path)
    return data


def write_sealed(path: Path, data: bytes | memoryview, *, lasting: bool = True) -> None:
    """Write a file atomically.

    Parameters
    ----------
    data : bytes or memoryview of bytes
    lasting : bool
        Sync the content to disk before renaming the file. Otherwise, the file may be damaged after a power failure,
        which `read_sealed` detects.

    Raises
    ------
    OSError
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with open(descriptor, "wb") as stream:
            stream.write(_header(path.name, data))
            stream.write(data)
            stream.flush()
            if lasting:
                os.fdatasync(stream.fileno())
        try:
            os.replace(temporary, path)
        except IsADirectoryError:
            discard(path)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def discard(path: Path) -> None:
    """Remove the file or folder `path`. Errors are ignored."""
    try:
        os.unlink(path)
    except IsADirectoryError:
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass


def _header(name: str, data: bytes | memoryview) -> bytes:
    # The name is part of the digest, so that a file under the name of another file counts as damaged.
    digest = hashlib.blake2b(data, digest_size=16, key=hashlib.blake2b(name.encode()).digest()).hexdigest()
    return f"h5feed {len(data):x} {digest}".encode().ljust(_HEADER - 1) + b"\n"


def _unsealed(name: str, descriptor: int, status: os.stat_result) -> bytes | None:
    if not stat.S_ISREG(status.st_mode):
        return None
    # No file object, and mostly a single read: a server reads thousands of small files when it starts.
    first = os.read(descriptor, _AT_ONCE)
    header, data = first[:_HEADER], first[_HEADER:]
    try:
        length = int(header.split()[1], 16)
    except (IndexError, ValueError):
        return None
    if len(header) != _HEADER or length != status.st_size - _HEADER:
        return None
    parts, left = [data], length - len(data)
    while left > 0 and (part := os.read(descriptor, left)):
        parts.append(part)
        left -= len(part)
    data = b"".join(parts)
    return data if _header(name, data) == header else None
