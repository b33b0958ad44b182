"""A file that grows while it is read: not its times are compared, but its chunks with their digests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from h5feed.errors import FeedError
from h5feed.stored.local_file import Identity, LocalFile, OpenFiles, changed, refused
from h5feed.stored.scratch import Bytes

DIGEST_BYTES = 16
"""Of the digest of a chunk."""

_BLOCK = 4 << 20
"""Bytes of a chunk that are hashed at a time."""

Int64s = npt.NDArray[np.int64]


class OpenFile:
    """A descriptor that is closed with its last user.

    Raises
    ------
    OSError
    """

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def state(self) -> Identity:
        """The identity of the file now."""
        return Identity.of(os.fstat(self.fd))


def chunk_digest(fd: int, offset: int, size: int) -> bytes:
    """Digest of the stored bytes of a chunk; empty if the file ends before the chunk does."""
    digest, end = hashlib.blake2b(digest_size=DIGEST_BYTES), offset + size
    while offset < end:
        block = os.pread(fd, min(_BLOCK, end - offset), offset)
        if not block:
            return b""
        digest.update(block)
        offset += len(block)
    return digest.digest()


class HashedChunks:
    """Chunks of one file, and the digests that their stored bytes had. Used by any thread.

    Each chunk is compared with its digest when it is read for the first time since the file was written to, so nothing
    else is read from it than what was hashed.

    Parameters
    ----------
    file : OpenFile
    offsets, sizes : (n,) int64
        Where the chunks are. They do not overlap.
    digests : (n, DIGEST_BYTES) uint8
    rewritten : Event
        Set when a chunk is found to have other bytes.
    """

    def __init__(
        self,
        file: OpenFile,
        offsets: Int64s,
        sizes: Int64s,
        digests: npt.NDArray[np.uint8],
        rewritten: threading.Event,
    ) -> None:
        order = np.argsort(offsets, kind="stable")
        self.file = file
        self._rewritten = rewritten
        self._begins, self._ends, self._digests = offsets[order], (offsets + sizes)[order], digests[order]
        self._compared = np.zeros(len(order), np.bool_)
        self._state: Identity | None = None
        """State of the file that `_compared` is about."""
        self._lock = threading.Lock()

    def check(self, offsets: Int64s, sizes: Int64s) -> None:
        """Compare the chunks that these ranges are in, which have just been read.

        Parameters
        ----------
        offsets, sizes : (k,) int64

        Raises
        ------
        RevisionChanged
            They have other bytes now.
        OSError
        """
        state = self.file.state()
        with self._lock:
            if state != self._state:
                self._state, self._compared = state, np.zeros(len(self._begins), np.bool_)
            compared = self._compared
        first = np.searchsorted(self._begins, offsets, side="right") - 1
        last = np.searchsorted(self._begins, offsets + sizes, side="left") - 1
        if (first < 0).any() or (offsets + sizes > self._ends[last]).any():
            raise changed()
        touched = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
        for number in touched[~compared[touched]].tolist():
            begin, end = int(self._begins[number]), int(self._ends[number])
            if chunk_digest(self.file.fd, begin, end - begin) != self._digests[number].tobytes():
                self._rewritten.set()
                raise changed()
            # Written to a moment ago, it could be written to again without another time.
            if not state.is_young(time.time()):
                compared[number] = True


class GrowingFile(LocalFile):
    """The first rows of a growing file. Chunks that are not among `chunks` cannot be read.

    Parameters
    ----------
    path : str
    identity : Identity
        Of the file, without its size and times.
    digest : bytes
        Of the rows.
    chunks : HashedChunks
    """

    is_lent = False

    def __init__(self, path: str, identity: Identity, digest: bytes, chunks: HashedChunks) -> None:
        super().__init__(OpenFiles(0), path, identity, digest)
        self._chunks = chunks

    @contextlib.contextmanager
    def reading(self) -> Iterator[int]:
        """A descriptor for several reads, each of which is checked by itself.

        Raises
        ------
        SourceUnavailable, Overloaded
            See `LocalFile.reading`.
        """
        try:
            yield self._chunks.file.fd
        except FeedError:
            # A FeedError may also be an OSError.
            raise
        except OSError as error:
            raise refused(error) from None

    def read_rows(self, offsets: Int64s, sizes: Int64s, target: Bytes, begins: Int64s) -> None:
        """See `LocalFile.read_rows`."""
        super().read_rows(offsets, sizes, target, begins)
        self._check(offsets, sizes)

    def fill(self, handle: int, offset: int, target: memoryview) -> None:
        """See `LocalFile.fill`."""
        super().fill(handle, offset, target)
        self._check(np.array([offset], np.int64), np.array([len(target)], np.int64))

    def _check(self, offsets: Int64s, sizes: Int64s) -> None:
        if len(offsets):
            with self.reading():
                self._chunks.check(offsets, sizes)
