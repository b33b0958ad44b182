"""The cache folder: results that outlive the process and are shared by all workers. Safe to delete at any time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05


class CacheFolder:
    """Files named by a digest of what they were computed from, written to a temporary name and renamed.

    Parameters
    ----------
    path : Path
        Made when it is missing. Where it cannot be written, results are computed anew and a warning is logged once.
    timeout : float
        Seconds to wait for another process that is computing the same.
    max_bytes : int
        Bound on the files; those not used for longest are deleted when this object is made.
    """

    def __init__(self, path: Path, timeout: float, max_bytes: int) -> None:
        self._path = path
        self._timeout = timeout
        self._warned = False
        with contextlib.suppress(OSError):
            self._prune(max_bytes)

    def get(self, name: str, compute: Callable[[], bytes]) -> bytes:
        """The content of the file `name` (with ``/`` for subfolders), computed by one process if it is not there."""
        file = self._path / name
        with contextlib.suppress(OSError):
            data = file.read_bytes()
            os.utime(file)
            return data
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(file):
                with contextlib.suppress(OSError):
                    return file.read_bytes()
                data = compute()
                self._write(file, data)
                return data
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning("the cache folder cannot be used (%s): nothing is kept across restarts", error.strerror)
            return compute()

    def __contains__(self, name: str) -> bool:
        return (self._path / name).is_file()

    def find(self, name: str) -> bytes | None:
        """The content of the file `name`; None where it is not there."""
        with contextlib.suppress(OSError):
            file = self._path / name
            data = file.read_bytes()
            os.utime(file)
            return data
        return None

    def discard(self, name: str) -> None:
        """Forget the file `name`."""
        with contextlib.suppress(OSError):
            (self._path / name).unlink()

    def _write(self, file: Path, data: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".part")
        try:
            with open(descriptor, "wb") as stream:
                stream.write(data)
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    @contextlib.contextmanager
    def _locked(self, file: Path) -> Iterator[None]:
        """Hold the lock of `file` across processes; after `timeout` go on without it, the result is the same."""
        deadline = time.monotonic() + self._timeout
        with open(file.parent / f".{file.name}.lock", "wb") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        break
                    time.sleep(_POLL_SECONDS)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(lock.name)

    def _prune(self, max_bytes: int) -> None:
        found = []
        for file in self._path.rglob("*"):
            with contextlib.suppress(OSError):
                if file.is_file():
                    status = file.stat()
                    found.append((status.st_mtime, status.st_size, file))
        total = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if total <= max_bytes:
                break
            file.unlink(missing_ok=True)
            total -= size
