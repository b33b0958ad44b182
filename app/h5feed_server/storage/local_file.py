"""Local files: open descriptors, reads, and checks that a file has not changed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from h5feed.errors import DatasetCorrupt, FeedError, Overloaded, RevisionChanged, SourceUnavailable

AWAY_ERRNOS = frozenset(
    (
        *(errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN),
        *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH),
    )
)
"""What the system answers where a disk or a file server is away."""

Range = tuple[int, memoryview]
"""Offset in the file, and the writeable bytes to be filled from there."""


YOUNG_SECONDS = 2.0
"""A file system's clock may stand still for so long (FAT's does): a file that has changed within it may do so once more
without its identity telling. (Git looks at such files again, too, and calls its index of them racy.)"""


class Identity(NamedTuple):
    """Identifies the state of a file. Used in cache keys; never leaves this machine.

    The modification time can be copied from another file, so the change time, which the system maintains, is part of
    it. That also changes with names, owner and permissions.
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
    """A descriptor that is closed when the last reader has let go of it."""

    def __init__(self, path: str) -> None:
        # A FIFO of that name would block the open for ever.
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.identity = Identity.of(os.fstat(self.fd))
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            raise RevisionChanged("a file of this dataset is no regular file any more")

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class OpenFiles:
    """Open files; the least recently used are closed.

    Parameters
    ----------
    limit : int
        Descriptors held at most; one that is being read is closed when that read ends.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str, identity: Identity) -> _OpenFile:
        """The open file at `path`; it must still be `identity`."""
        with self._lock:
            held = self._files.get(path)
            if held is None or held.identity != identity:
                held = self._files[path] = _OpenFile(path)
                while len(self._files) > self._limit:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
        if held.identity != identity:
            raise changed(identity, held.identity)
        return held

    def close(self) -> None:
        with self._lock:
            self._files.clear()


class LocalFile:
    """A local file, read by `preadv`. Never mmap: truncating the file would cause SIGBUS.

    Parameters
    ----------
    digest : bytes
        Of its content: a file that is young may get another under the same identity.
    companions : tuple of LocalFile
        Other files that an array of this one may be read from by h5py, or that say where in this one it lies.
    """

    def __init__(
        self,
        files: OpenFiles,
        path: str,
        identity: Identity,
        digest: bytes = b"",
        companions: tuple[LocalFile, ...] = (),
    ) -> None:
        self._files = files
        self.path = path
        self.identity = identity
        self.digest = digest
        self.companions = companions

    @property
    def key(self) -> tuple[tuple[Identity, bytes], ...]:
        """Identifies the content, for caches."""
        return tuple((file.identity, file.digest) for file in (self, *self.companions))

    def with_companions(self, files: Sequence[LocalFile]) -> LocalFile:
        """The same file with others that are read together with it."""
        return LocalFile(self._files, self.path, self.identity, self.digest, tuple(files))

    def read_ranges(self, ranges: Sequence[Range]) -> None:
        """Fill all ranges.

        Raises
        ------
        DatasetCorrupt
            The file ends before a range does.
        RevisionChanged, SourceUnavailable, Overloaded
            As `reading` says.
        """
        with self.reading() as fd:
            # One call for each range and nothing else between them: this loop is most of what reading costs in Python.
            received = [os.preadv(fd, (target,), offset) for offset, target in ranges]
            for (offset, target), count in zip(ranges, received, strict=True):
                if count != len(target):
                    self.read_rest(fd, offset, target, count)

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        """A descriptor for several reads; afterwards the file must be unchanged.

        Raises
        ------
        RevisionChanged
            The file was changed since it was inspected.
        SourceUnavailable
            It cannot be read, its disk or file server being away for instance.
        Overloaded
            It was touched, and may have been changed: that is found out when it is asked for again.
        """
        try:
            held = self._files.get(self.path, self.identity)
            yield held.fd
            # Bytes that were overwritten in place while they were read must not be taken for the old ones.
            status = os.fstat(held.fd)
        except FeedError:
            # One of them is an OSError too.
            raise
        except OSError as error:
            raise refused(error) from None
        known = self.identity
        if (status.st_ctime_ns, status.st_mtime_ns, status.st_size) != (known.ctime_ns, known.mtime_ns, known.size):
            raise changed(known, Identity.of(status))

    def read_rest(self, fd: int, offset: int, target: memoryview, done: int) -> None:
        """What a read has left of `target`: Linux reads at most 2 GiB at a time, and some file systems less."""
        while done < len(target):
            received = os.preadv(fd, (target[done:],), offset + done)
            if not received:
                if (now := Identity.of(os.fstat(fd))) != self.identity:
                    raise changed(self.identity, now)
                raise DatasetCorrupt(
                    f"the file ends at byte {os.fstat(fd).st_size}, an array in it at {offset + len(target)}"
                )
            done += received


def refused(error: OSError) -> FeedError:
    """The error to raise for an OSError."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return Overloaded("the server has too many files open; come again in a moment", retry_after=1)
    # A file that is missing was deleted, or its disk is away: who asks again hears which.
    return SourceUnavailable(f"a file of this dataset cannot be read: {error.strerror}", retry_after=1)


def is_away(error: OSError) -> bool:
    """Whether the error is a temporary one of the disk or network."""
    return error.errno in AWAY_ERRNOS


def changed(known: Identity | None = None, now: Identity | None = None) -> FeedError:
    """The error to raise if a file has changed."""
    if known is not None and now is not None and now.is_touched(known):
        # A link, a move or another mode is no reason to end an epoch. Who asks again gets the same or hears the truth.
        return Overloaded(
            "a file of this dataset was touched while it was read, and is looked at again: come again in a moment",
            retry_after=1,
        )
    return RevisionChanged("a file of this dataset has changed: ask for the dataset again to get its new revision")
