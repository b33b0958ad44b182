"""The cache folder: results that outlive the process and are shared by all workers. Safe to delete at any time."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ..served_version import SERVED_VERSION
from .locks import hold, release
from .sealed import read_sealed, write_sealed

T = TypeVar("T")

logger = logging.getLogger(__name__)

Name = str | Callable[[], str | None]
"""Name of a file. What cannot be named yet, but perhaps later, is a callable: see `CacheFolder.get`."""

_NOTE_BYTES = 32
"""Maximum length of what `CacheFolder.note` writes."""

_POLL_SECONDS = 0.05

_WRITERS = 4
"""Threads that write in the background. Syncing several files to disk takes little longer than syncing one."""

_SYNC_SECONDS = 0.1
"""Results that took less time to compute are not synced to disk."""

_ATTEMPTS = 5
"""How often to try to create a folder: another process may still be deleting it."""

_PREFIX = "served-"
_OURS = re.compile(rf"{_PREFIX}[0-9]+")

_FORGOTTEN_SECONDS = 7 * 24 * 3600.0
"""Files of other server versions are deleted if they were not used for this long. Until then, such a server finds its
files, whether it is still running or is installed again."""


class CacheFolder:
    """Stores results in files that are named by a digest of their inputs; `sealed` describes the file format.

    Parameters
    ----------
    path : Path
        Created if it is missing. If it is not writable, results are computed each time, and one warning is logged.
    timeout : float
        How long to wait for another process that is computing the same result, in seconds.
    max_bytes : int
        Limit on the total size of the files. It is enforced when this object is created, by deleting the least recently
        used files.

    Attributes
    ----------
    path : Path
        Subfolder for the files of this server version. Files of other versions are never read.
    """

    def __init__(self, path: Path, timeout: float, max_bytes: int) -> None:
        self.path = path / f"{_PREFIX}{SERVED_VERSION}"
        self._timeout = timeout
        self._warned = False
        self._writers = ThreadPoolExecutor(_WRITERS, "h5feed-keep")
        with contextlib.suppress(OSError):
            self._prune(path, max_bytes)

    def close(self) -> None:
        """Finish pending writes."""
        self._writers.shutdown()

    def get(self, name: Name, compute: Callable[[], bytes], *, behind: bool = False) -> bytes:
        """The content of a file. If it is missing, one process computes and stores it, and the others wait.

        Parameters
        ----------
        name : str or callable
            Name of the file, with ``/`` for subfolders. A callable that returns None has no name yet: the content is
            computed, and stored if there is a name after that.
        compute : callable
            Returns the content.
        behind : bool
            Return before the file is on disk, because syncing can take longer than the computation. Other processes
            wait for the file as they do for the computation.
        """
        named = _known(name)
        if named is None:
            data = compute()
            if (named := _known(name)) is not None:
                self.put(named, data)
            return data
        found = self.find(named)
        if found is not None:
            return found
        file = self.path / named
        with contextlib.ExitStack() as lock:
            try:
                _in_folder_of(file, lambda: lock.enter_context(self._locked(file)))
            except OSError as error:
                self._warn(error)
                return compute()
            found = read_sealed(file)
            if found is not None:
                return found
            began = time.monotonic()
            data = compute()
            # After a power failure, it is computed again: that may be quicker than to wait for the disk now.
            is_lasting = time.monotonic() - began >= _SYNC_SECONDS
            held = lock.pop_all()
            if behind:
                with contextlib.suppress(RuntimeError):
                    self._writers.submit(self._keep, file, data, held, is_lasting)
                    return data
            self._keep(file, data, held, is_lasting)
        return data

    def _keep(self, file: Path, data: bytes | memoryview, lock: contextlib.ExitStack, is_lasting: bool) -> None:
        with lock:
            try:
                _in_folder_of(file, lambda: write_sealed(file, data, lasting=is_lasting))
            except OSError as error:
                self._warn(error)

    def get_unless_busy(self, name: str, compute: Callable[[], bytes]) -> bytes | None:
        """Same as `get`, but returns None at once if another process is computing the content."""
        if (data := self.find(name)) is not None:
            return data
        file, lock = self.path / name, self._lock_of(name)
        try:
            holder = _in_folder_of(file, lambda: hold(lock))
        except OSError as error:
            self._warn(error)
            return compute()
        if holder is None:
            return None
        try:
            data = self.find(name)
            if data is None:
                data = compute()
                self._keep(file, data, contextlib.ExitStack(), True)
            return data
        finally:
            release(lock, holder)

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Store the content of a file."""
        self._keep(self.path / name, data, contextlib.ExitStack(), True)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Keep other processes from computing a file until the end of the ``with`` block; waits if one does already."""
        file = self.path / name
        with contextlib.ExitStack() as lock:
            try:
                _in_folder_of(file, lambda: lock.enter_context(self._locked(file)))
            except OSError as error:
                self._warn(error)
            yield

    def note(self, name: str, text: str) -> None:
        """Tell other processes something while this one computes a file in `get_unless_busy`."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self._lock_of(name), os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.pwrite(descriptor, text.encode().ljust(_NOTE_BYTES), 0)
            finally:
                os.close(descriptor)

    def noted(self, name: str) -> str:
        """What the process that computes a file has told with `note`; empty if nothing."""
        try:
            descriptor = os.open(self._lock_of(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                return os.pread(descriptor, _NOTE_BYTES, 0).decode("ascii", "replace").strip()
            finally:
                os.close(descriptor)
        except OSError:
            return ""

    def __contains__(self, name: Name) -> bool:
        return self.find(name) is not None

    def has(self, name: Name) -> bool:
        """Whether there is a file `name`, which may be damaged. It is not read."""
        named = _known(name)
        if named is None:
            return False
        try:
            return stat.S_ISREG(os.stat(self.path / named).st_mode)
        except OSError:
            return False

    def find(self, name: Name) -> bytes | None:
        """The content of the file `name`; None if it is missing or damaged, or has no name yet."""
        named = _known(name)
        return None if named is None else read_sealed(self.path / named, note_use=True)

    def _lock_of(self, name: str) -> Path:
        file = self.path / name
        return file.parent / f".{file.name}.lock"

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            # Not every OSError has a system message.
            reason = error.strerror or str(error) or type(error).__name__
            logger.warning("the cache folder cannot be used (%s): results are lost when the server stops", reason)

    @contextlib.contextmanager
    def _locked(self, file: Path) -> Iterator[None]:
        """Hold the lock of `file` across processes. After the timeout, go on without it: the result is the same."""
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
        """Delete old files of other server versions, then the least recently used files above the limit."""
        # Only touch subfolders with our own names. The folder may contain other files, such as the token, or may not
        # have been made for h5feed at all.
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


def _known(name: Name) -> str | None:
    return name if isinstance(name, str) else name()


def _in_folder_of(file: Path, work: Callable[[], T]) -> T:
    """Run `work`, which needs the folder of `file`. Creates the folder if needed: it may be deleted at any time.

    Raises
    ------
    OSError
    """
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            return work()
        with contextlib.suppress(FileNotFoundError):
            file.parent.mkdir(parents=True, exist_ok=True)
    return work()


def _remove_empty(folder: Path) -> None:
    """Remove a folder and its subfolders, except those that contain files."""
    for inner, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(inner)
