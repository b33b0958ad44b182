"""Local files: open descriptors, reads, and checks that a file has not changed."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from ..errors import DatasetCorrupt, FeedError, Overloaded, RevisionChanged, SourceUnavailable
from .range_reads import RangeReads
from .scratch import Bytes
from .source import Int64s, Ranges, Scratch, Source

if TYPE_CHECKING:
    from typing import Self

AWAY_ERRNOS = frozenset(
    (
        *(errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN),
        *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH),
    )
)
"""Errors that the system returns if a disk or file server is unavailable."""

YOUNG_SECONDS = 2.0
"""Resolution of the coarsest file system clock (FAT). A file that changed within this time can change again without a
new timestamp, so its identity does not show it. (Git calls such index entries racy, and also checks them again.)"""


class Identity(NamedTuple):
    """Identifies the state of a file. Used in cache keys; never leaves this machine.

    The modification time can be copied from another file, so the identity includes the change time, which the system
    maintains. The change time also changes with names, owner and permissions.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def key(self) -> str:
        return "-".join(f"{part:x}" for part in self)

    def is_young(self, at: float) -> bool:
        """Whether the file could have changed again at this time without a different timestamp."""
        return at - self.ctime_ns / 1e9 < YOUNG_SECONDS

    def is_touched(self, before: Identity) -> bool:
        """Whether the content may be unchanged although names, owner, permissions or mount differ."""
        return self != before and self[2:4] == before[2:4]


class _OpenFile:
    """A descriptor that is closed when the last reader releases it."""

    def __init__(self, path: str) -> None:
        # O_NONBLOCK: opening a FIFO would block forever.
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.identity = Identity.of(os.fstat(self.fd))
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            raise RevisionChanged("a file of this dataset is not a regular file any more")

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class OpenFiles:
    """Open files; the least recently used are closed.

    Parameters
    ----------
    limit : int
        Maximum number of descriptors held. If one is evicted during a read, it is closed when the read ends.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str, identity: Identity) -> _OpenFile:
        """The open file at `path`.

        Raises
        ------
        RevisionChanged, Overloaded
            Its identity is not `identity` any more.
        OSError
            It cannot be opened.
        """
        with self._lock:
            held = self._files.get(path)
            if held is not None and held.identity == identity:
                self._files.move_to_end(path)
                return held
        # Without the lock: opening a file waits for ever where its disk hangs, and others are on other disks.
        held = _OpenFile(path)
        with self._lock:
            self._files[path] = held
            self._files.move_to_end(path)
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
        if held.identity != identity:
            raise changed(identity, held.identity)
        return held

    def close(self) -> None:
        with self._lock:
            self._files.clear()


class Held(Protocol):
    """An open file.

    Attributes
    ----------
    fd : int
    """

    fd: int


class Opener(Protocol):
    """What opens files, and keeps them open."""

    def get(self, path: str, identity: Identity) -> Held:
        """The open file at `path`. See `OpenFiles.get`."""


class FileSource(Source):
    """A file of the data folder as a source of bytes.

    Parameters
    ----------
    path : str
    identity : Identity
    digest : bytes
        Digest of the content: a recently changed file may get new content under the same identity.

    Attributes
    ----------
    companions : tuple of FileSource
        Other files that h5py may read the arrays of this file from, or that hold the layout of its arrays.
    remote_bytes : int or None
        Size of a file that other processes cannot open by its path, but only read through this source; None if they
        can.
    is_lent : bool
        Whether clients on this machine may read the file themselves.
    """

    remote_bytes: int | None = None
    is_lent: bool = False

    def __init__(self, path: str, identity: Identity, digest: bytes = b"") -> None:
        self.path = path
        self.identity = identity
        self.digest = digest
        self.companions: tuple[FileSource, ...] = ()

    @property
    def key(self) -> tuple[tuple[Identity, bytes], ...]:
        """Identifies the content, for caches."""
        return tuple((file.identity, file.digest) for file in (self, *self.companions))

    def with_companions(self, files: Sequence[FileSource]) -> Self:
        """The same file with others that are read together with it."""
        joined = copy.copy(self)
        joined.companions = tuple(files)
        return joined


class LocalFile(FileSource):
    """A local file, read with `preadv`. Never with mmap: truncating the file would cause SIGBUS.

    Parameters
    ----------
    files : Opener
    path, identity, digest
        See `FileSource`.
    """

    is_lent = True

    def __init__(self, files: Opener, path: str, identity: Identity, digest: bytes = b"") -> None:
        super().__init__(path, identity, digest)
        self._files = files
        self._reads = RangeReads()

    def ahead(self, ranges: Callable[[], Ranges]) -> LocalFile:
        """The system reads ahead itself."""
        return self

    def read_rows(self, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> None:
        """Fill ``target[begins[i]:]`` with the ``sizes[i]`` bytes from ``offsets[i]``, for all i: with one system call
        where io_uring is available.

        Parameters
        ----------
        offsets, sizes, begins : (k,) int64
        target : (n,) uint8, C-contiguous

        Raises
        ------
        DatasetCorrupt
            The file ends before a range does.
        RevisionChanged, SourceUnavailable, Overloaded
            See `reading`.
        """
        view = memoryview(target)
        with self.reading() as fd:
            done = self._reads.read(fd, offsets, sizes, target, begins)
            if np.array_equal(done, sizes):
                return
            # Also after an error: here the read succeeds, or raises it.
            for short in np.flatnonzero(done != sizes).tolist():
                begin = int(begins[short])
                rest = view[begin : begin + int(sizes[short])]
                self.read_rest(fd, int(offsets[short]), rest, max(0, int(done[short])))

    def fill(self, handle: int, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset`.

        Raises
        ------
        DatasetCorrupt, RevisionChanged, Overloaded
            See `read_rest`.
        """
        received = os.preadv(handle, (target,), offset)
        if received != len(target):
            self.read_rest(handle, offset, target, received)

    def stored(self, handle: int, offset: int, nbytes: int, scratch: Scratch) -> Bytes:
        """(nbytes,) uint8 from `offset`, in scratch memory for the purpose "stored".

        Raises
        ------
        DatasetCorrupt, RevisionChanged, Overloaded
            See `read_rest`.
        """
        target = scratch("stored", nbytes)
        self.fill(handle, offset, memoryview(target))
        return target

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        """A descriptor for several reads. At the end of the ``with`` block, the file is checked for changes.

        Raises
        ------
        RevisionChanged
            The file was changed since it was inspected.
        SourceUnavailable
            It cannot be read, for instance because its disk or file server is unavailable.
        Overloaded
            It was touched and may have changed, which the next request finds out; or too many files are open.
        """
        try:
            held = self._files.get(self.path, self.identity)
            yield held.fd
            # The bytes may have been overwritten in place while they were read.
            status = os.fstat(held.fd)
        except FeedError:
            # A FeedError may also be an OSError, so this clause must come first.
            raise
        except OSError as error:
            raise refused(error) from None
        known = self.identity
        if (status.st_ctime_ns, status.st_mtime_ns, status.st_size) != (known.ctime_ns, known.mtime_ns, known.size):
            raise changed(known, Identity.of(status))

    def read_rest(self, fd: int, offset: int, target: memoryview, done: int) -> None:
        """Read the rest of `target` after `done` bytes: Linux reads at most 2 GiB at a time, some file systems less.

        Raises
        ------
        DatasetCorrupt
            The file ends before `target` is filled.
        RevisionChanged, Overloaded
            It does, because the file has changed.
        """
        while done < len(target):
            received = os.preadv(fd, (target[done:],), offset + done)
            if not received:
                if (now := Identity.of(os.fstat(fd))) != self.identity:
                    raise changed(self.identity, now)
                raise DatasetCorrupt(
                    f"the file ends at byte {os.fstat(fd).st_size}, but an array in it ends at {offset + len(target)}"
                )
            done += received


def refused(error: OSError) -> FeedError:
    """The error to raise for an OSError."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        many = Overloaded("the server has too many files open; try again in a moment", retry_after=1)
        return many.because_of("files")
    # The file was deleted, or its disk is unavailable. The next request finds out which.
    return SourceUnavailable(f"a file of this dataset cannot be read: {error.strerror}", retry_after=1)


def is_away(error: OSError) -> bool:
    """Whether the error is a temporary one of the disk or network."""
    return error.errno in AWAY_ERRNOS


def changed(known: Identity | None = None, now: Identity | None = None) -> FeedError:
    """The error to raise if a file has changed."""
    if known is not None and now is not None and now.is_touched(known):
        # A new link, name or mode is no reason to end an epoch. A retry gets the same rows or learns of the change.
        return Overloaded(
            "a file of this dataset was touched while it was read, and is inspected again: try again in a moment",
            retry_after=1,
        )
    return RevisionChanged("a file of this dataset has changed: request the dataset again to get its new revision")
