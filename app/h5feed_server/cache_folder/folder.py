"""The cache folder: results that outlive the process and are shared by all workers. Safe to delete at any time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..served_version import SERVED_VERSION
from .sealed import read_sealed, write_sealed

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05

_WRITERS = 4
"""Threads that write behind: a disk makes several files lasting in little more time than one."""

_ATTEMPTS = 5
"""Times that a folder is made: whoever deletes it may be at it still."""

_PREFIX = "served-"
_OURS = re.compile(rf"{_PREFIX}[0-9]+")

_FORGOTTEN_SECONDS = 7 * 24 * 3600.0
"""What servers of other versions have left is deleted when nobody has used it for so long; one that is still running,
or is gone back to, finds its own until then."""


class CacheFolder:
    """Files named by a digest of what they were computed from; see `sealed` for how they lie there.

    Parameters
    ----------
    path : Path
        Made when it is missing. Where it cannot be written, results are computed anew and a warning is logged once.
    timeout : float
        Seconds to wait for another process that is computing the same.
    max_bytes : int
        Bound on the files; those not used for longest are deleted when this object is made.

    Attributes
    ----------
    path : Path
        Where the files lie: in a folder for what servers of this version serve, so that those of others are never read.
    """

    def __init__(self, path: Path, timeout: float, max_bytes: int) -> None:
        self.path = path / f"{_PREFIX}{SERVED_VERSION}"
        self._timeout = timeout
        self._warned = False
        self._writers = ThreadPoolExecutor(_WRITERS, "h5feed-keep")
        with contextlib.suppress(OSError):
            self._prune(path, max_bytes)

    def close(self) -> None:
        """Write what is still to be written."""
        self._writers.shutdown()

    def get(self, name: str, compute: Callable[[], bytes], *, behind: bool = False) -> bytes:
        """The content of the file `name` (with ``/`` for subfolders), computed by one process if it is not there.

        Parameters
        ----------
        behind : bool
            Answer before the disk has it, which takes longer than computing some of what is kept. Other processes wait
            for the file as they would for its computation.
        """
        data = self.find(name)
        if data is not None:
            return data
        file = self.path / name
        with contextlib.ExitStack() as lock:
            try:
                _in_folder_of(file, lambda: lock.enter_context(self._locked(file)))
            except OSError as error:
                self._warn(error)
                return compute()
            data = read_sealed(file)
            if data is None:
                data = compute()
                held = lock.pop_all()
                if behind:
                    with contextlib.suppress(RuntimeError):
                        self._writers.submit(self._keep, file, data, held)
                        return data
                self._keep(file, data, held)
            return data

    def _keep(self, file: Path, data: bytes, lock: contextlib.ExitStack) -> None:
        with lock:
            try:
                _in_folder_of(file, lambda: write_sealed(file, data))
            except OSError as error:
                self._warn(error)

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None

    def find(self, name: str) -> bytes | None:
        """The content of the file `name`; None where it is not there, or damaged."""
        return read_sealed(self.path / name, note_use=True)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            # Not all of them have the system's words.
            reason = error.strerror or str(error) or type(error).__name__
            logger.warning("the cache folder cannot be used (%s): nothing is kept across restarts", reason)

    @contextlib.contextmanager
    def _locked(self, file: Path) -> Iterator[None]:
        """Hold the lock of `file` across processes; after `timeout` go on without it, the result is the same."""
        deadline = time.monotonic() + self._timeout
        path = file.parent / f".{file.name}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        break
                    time.sleep(_POLL_SECONDS)
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(descriptor)

    def _prune(self, path: Path, max_bytes: int) -> None:
        """Delete what servers of other versions have left for long, and what was not used for longest."""
        # By names that nobody else would give: other files may lie in the folder, as the token does, or it is one of
        # other things altogether.
        ours = [folder for folder in path.glob(f"{_PREFIX}*") if _OURS.fullmatch(folder.name)]
        forgotten = time.time() - _FORGOTTEN_SECONDS
        kept = []
        for folder in ours:
            for file in folder.rglob("*"):
                with contextlib.suppress(OSError):
                    if not file.is_file() or file.is_symlink():
                        continue
                    status = file.stat()
                    if folder != self.path and status.st_mtime < forgotten:
                        file.unlink(missing_ok=True)
                    else:
                        kept.append((status.st_mtime, status.st_size, file))
            if folder != self.path:
                _remove_empty(folder)
        total = sum(size for _, size, _ in kept)
        for _, size, file in sorted(kept):
            if total <= max_bytes:
                break
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
                total -= size


def _in_folder_of(file: Path, work: Callable[[], None]) -> None:
    """Do what needs a file's folder, which is made when it is not there: it may be deleted at any time.

    Raises
    ------
    OSError
    """
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            return work()
        with contextlib.suppress(FileNotFoundError):
            file.parent.mkdir(parents=True, exist_ok=True)
    work()


def _remove_empty(folder: Path) -> None:
    """Remove a folder, and those in it, as far as no file is in them."""
    for inner, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(inner)
