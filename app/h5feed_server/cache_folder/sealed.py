"""Files that tell whether they are whole: a line with the length and the digest of what follows, then that.

A disk that was full, a power failure or a worn cell leaves files that are empty, cut off or changed. What lies in the
cache folder can be computed again, so such a file is simply taken for absent, and removed.
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
"""Bytes before the content, which stays aligned for arrays in it."""

_AT_ONCE = 1 << 16
"""Bytes that are read first: most files are shorter."""

USE_SECONDS = 3600.0
"""How exactly it is noted when a file was last used."""

_BUSY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What says nothing of the file, only that this process cannot open any now."""


def read_sealed(path: Path, *, note_use: bool = False) -> bytes | None:
    """The content of a file that `write_sealed` wrote under this name.

    Parameters
    ----------
    note_use : bool
        Let its time of modification be the last use, to within `USE_SECONDS`.

    Returns
    -------
    bytes or None
        None where there is none, or where what is there is not whole, not a file or not to be read: it is removed.
    """
    try:
        # A FIFO of that name would block the open for ever.
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
        logger.warning("%s of the cache folder is damaged: it is removed, and made anew when it is needed", path.name)
        discard(path)
    return data


def write_sealed(path: Path, data: bytes, *, lasting: bool = True) -> None:
    """Write a file whole or not at all.

    Parameters
    ----------
    lasting : bool
        Have the content on the disk before the name leads to it: otherwise, after a power failure, a file may be there
        that is damaged, which `read_sealed` notices.

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
    """Remove whatever has this name in the cache folder, as far as that can be done."""
    try:
        os.unlink(path)
    except IsADirectoryError:
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass


def _header(name: str, data: bytes) -> bytes:
    # The name too: a file that stands under the name of another is not what was computed for it.
    digest = hashlib.blake2b(data, digest_size=16, key=hashlib.blake2b(name.encode()).digest()).hexdigest()
    return f"h5feed {len(data):x} {digest}".encode().ljust(_HEADER - 1) + b"\n"


def _unsealed(name: str, descriptor: int, status: os.stat_result) -> bytes | None:
    if not stat.S_ISREG(status.st_mode):
        return None
    # Without a file object, and mostly by one call: thousands of small files are read when a server starts.
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
