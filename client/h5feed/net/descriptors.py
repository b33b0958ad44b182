"""Descriptors of data files that the server has passed: a bounded number of them is kept open."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import SourceUnavailable

if TYPE_CHECKING:
    from ..stored.local_file import Identity

MAX_DESCRIPTORS = 64
"""Descriptors kept, per client. The least recently used are closed, when nothing reads from them any more."""


REPORT_SECONDS = 10.0
"""Time after which the server is told what was read from files."""

PAUSE_SECONDS = 60.0
"""Time after which it is told again, if it did not answer."""


class NoDescriptor(SourceUnavailable):
    """The server passes no descriptor of a file, or one that is not of this file in this state."""


class BytesRead:
    """Bytes of rows that were read from files, and that the server has not been told of yet."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._told_at = time.monotonic()
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In the child: the parent tells of what it has read, and a lock held by its threads is never released."""
        self._lock = threading.Lock()
        self._nbytes = 0

    def is_due(self) -> bool:
        """Whether it is time for a request that tells the server, even if nothing else needs one: to one caller."""
        with self._lock:
            now = time.monotonic()
            due = self._nbytes > 0 and now - self._told_at > REPORT_SECONDS
            if due:
                self._told_at = now
            return due

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._nbytes += nbytes

    def take(self) -> int:
        """All of them, once."""
        with self._lock:
            nbytes, self._nbytes = self._nbytes, 0
            if nbytes:
                self._told_at = time.monotonic()
        return nbytes

    def pause(self) -> None:
        """Let some time pass before the next report is due: the server is away."""
        with self._lock:
            self._told_at = time.monotonic() + PAUSE_SECONDS - REPORT_SECONDS


class PassedFile:
    """A descriptor, closed when the last reader releases it."""

    def __init__(self, fd: int, identity: Identity) -> None:
        self.fd = fd
        self.identity = identity

    def __del__(self) -> None:
        os.close(self.fd)


class PassedFiles:
    """The descriptors of one client."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[str, Identity], PassedFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def clear(self) -> None:
        """Close all descriptors that nothing reads from."""
        with self._lock:
            self._files.clear()

    def after_fork(self) -> None:
        """In the child: a lock held by a thread of the parent would never be released. Descriptors stay usable."""
        self._lock = threading.Lock()

    def opener(self, ask: Callable[[], int]) -> _Opener:
        """What `h5feed.stored.local_file.LocalFile` opens files with. `ask` returns a new descriptor."""
        return _Opener(self, ask)

    def get(self, name: str, identity: Identity, ask: Callable[[], int]) -> PassedFile:
        """The descriptor of a file, asked for if there is none.

        Raises
        ------
        NoDescriptor
            The descriptor does not belong to a regular file in this state.
        FeedError
            What `ask` raises.
        """
        key = name, identity
        with self._lock:
            found = self._files.get(key)
            if found is not None:
                self._files.move_to_end(key)
                return found
            fd = ask()
            found = PassedFile(fd, identity)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or type(identity).of(status) != identity:
                raise NoDescriptor(f"the descriptor of {name!r} belongs to another file", retry_after=1)
            self._files[key] = found
            while len(self._files) > MAX_DESCRIPTORS:
                self._files.popitem(last=False)
            return found


class _Opener:
    def __init__(self, files: PassedFiles, ask: Callable[[], int]) -> None:
        self._files = files
        self._ask = ask

    def get(self, path: str, identity: Identity) -> PassedFile:
        """See `PassedFiles.get`."""
        return self._files.get(path, identity, self._ask)
