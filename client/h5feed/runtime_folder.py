"""The folder for Unix sockets and locks of one user, which no other user can enter."""

from __future__ import annotations

import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .handshake import MAX_SOCKET_PATH

_ROOM = 40
"""Bytes of the path of a socket below the folder."""


def runtime_folder() -> Path:
    """Create the folder if it is missing, with mode 0700: in ``$XDG_RUNTIME_DIR``, else in the user's cache folder.

    If its path is too long for that of a Unix socket, or cannot be written to, it is in the folder for temporary files.

    Raises
    ------
    OSError
        None of these can be used.
    """
    failure = OSError("there is no folder for Unix sockets")
    for folder in _candidates():
        if len(os.fsencode(folder)) + _ROOM > MAX_SOCKET_PATH:
            failure = OSError(f"{folder} is too long for the path of a Unix socket")
            continue
        try:
            make_private(folder)
            _check_locks(folder)
            return folder
        except OSError as error:
            failure = error
    raise failure


def make_private(folder: Path) -> None:
    """Create a folder with mode 0700, or check that it is one.

    Raises
    ------
    OSError
        It cannot be created or written to, or belongs to another user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A link in a folder for temporary files may be somebody else's.
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{folder} is not a folder")
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user ({status.st_uid})")
    if status.st_mode & 0o077:
        os.chmod(folder, 0o700)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to")


def _check_locks(folder: Path) -> None:
    """Raise `OSError` if files in a folder cannot be locked, as on some network file systems."""
    import fcntl  # missing on Windows

    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _candidates() -> Iterator[Path]:
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given and os.path.isabs(given) and os.path.isdir(given):
        yield Path(given) / "h5feed"
    # Several machines may share a home directory, but no Unix sockets.
    machine = re.sub(r"[^\w.-]", "_", socket.gethostname())[:32]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):
        yield Path(cache) / "h5feed" / f"run-{machine}"
    yield Path(tempfile.gettempdir()) / f"h5feed-{os.geteuid()}"
