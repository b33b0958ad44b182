"""Makes copies by rows, within the size that all of them may have."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from h5feed.errors import InternalError, TooLarge

from ...cache_folder.locks import hold, release
from ...cache_folder.sealed import discard
from ..reader import Reader
from .by_columns import ByColumns
from .copy_file import TransposedFile
from .sorting import scratch_bytes, work_bytes, write_copy

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1


def transpose(file: TransposedFile, reader: Reader, max_bytes: int, advance: Callable[[int], None]) -> None:
    """Make the copy of a matrix, unless it is there.

    Parameters
    ----------
    file : TransposedFile
    reader : Reader
    max_bytes : int
        Maximum size of all copies. Those that were used least recently are removed.
    advance : callable
        Called with bytes that are done, of `work_bytes`.

    Raises
    ------
    DatasetCorrupt
        A row index is negative, or beyond the rows.
    InternalError
        The cache folder has no room.
    TooLarge
        The copy is larger than `max_bytes`.
    """
    lock = file.copy.with_suffix(".lock")
    try:
        file.copy.parent.mkdir(parents=True, exist_ok=True)
        while (held := hold(lock)) is None:
            # Another process makes the same copy, for a dataset of another name.
            advance(0)
            time.sleep(_POLL_SECONDS)
        try:
            if file.is_there():
                advance(work_bytes(file.matrix))
                return
            _make_room(file, max_bytes)
            write_copy(file, reader, advance)
        finally:
            release(lock, held)
    except OSError as error:
        raise InternalError(
            f"the server's cache folder cannot keep a copy of {file.matrix.nbytes} bytes by rows, which takes up to "
            f"{file.matrix.nbytes + scratch_bytes(file.matrix)} bytes more while it is made: {error.strerror or error}"
        ) from None


def _make_room(file: TransposedFile, max_bytes: int) -> None:
    """Remove what was left over by a process that was killed, and the copies that were used least recently."""
    matrix = file.matrix
    if matrix.nbytes > max_bytes:
        raise TooLarge(too_large(matrix, max_bytes))
    found = []
    for path in file.copy.parent.iterdir():
        with contextlib.suppress(OSError):
            status = path.stat()
            if path.suffix == ".part":
                # Each worker that writes one holds the lock of its copy.
                lock = path.with_suffix(".lock")
                if (held := hold(lock) if path.stem != file.name else None) is not None:
                    discard(path)
                    release(lock, held)
            elif path.suffix == ".rows":
                found.append((status.st_mtime, status.st_size, path))
    total = matrix.nbytes + sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes:
            break
        logger.info("%s is removed from the cache folder, to make room for another copy", path.name)
        discard(path.with_suffix(".table"))
        discard(path)
        total -= size


def too_large(matrix: ByColumns, max_bytes: int) -> str:
    """Why a matrix is not transposed."""
    return (
        f"it is stored by columns, and its copy by rows, of {matrix.nbytes} bytes, would be larger than the "
        f"{max_bytes} bytes for such copies (H5FEED_TRANSPOSED_BYTES)"
    )
