"""The server's side of reading with h5py: a few child processes, started when needed and replaced when they die."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from h5feed.errors import CLASS_BY_CODE, DatasetCorrupt, FeedError, Overloaded, ReaderCrashed, ReadTimeout, TooLarge
from h5feed.stored.layout import ArrayLayout
from h5feed.stored.local_file import FileSource, Identity, changed, refused

from . import piping
from .child import KIND_BYTES, LENGTH
from .children import Children

MEMORY_BYTES = 2 << 30
"""Address space of a reader, including mapped libraries, in addition to its responses."""

CRASHES = 2
"""A request that has crashed this many readers is not tried again."""

_GRACE_SECONDS = 5.0
"""Added to the timeout, which a reader enforces itself, before the reader counts as hung."""

_REQUESTS_KEPT = 1024
"""Upper bound on the number of crashing requests that are remembered."""

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class ReaderPool:
    """Reads rows of arrays whose layout is not known; shared by all requests of a process.

    Parameters
    ----------
    readers : int
        Maximum number of processes.
    timeout : float
        Seconds that one read may take, and that a request waits for a reader.
    max_bytes : int
        Upper bound on the bytes that one read returns.
    """

    def __init__(self, readers: int, timeout: float, max_bytes: int) -> None:
        self._timeout = timeout
        self._max_bytes = max_bytes
        # Offsets are sent in addition to the items.
        self._answer_bytes = 2 * max_bytes + (64 << 20)
        arguments = str(MEMORY_BYTES + 4 * max_bytes), str(timeout)
        module = f"{__package__}.h5py_reader"
        self._children = Children(module, arguments, readers, timeout, "readers", self._answer_bytes)
        self._lock = threading.Lock()
        self._crashes: OrderedDict[bytes, int] = OrderedDict()

    @property
    def children(self) -> Children:
        """The processes."""
        return self._children

    def close(self) -> None:
        """End all readers, including busy ones, whose reads fail."""
        self._children.close()

    def read(self, files: Sequence[FileSource], array: ArrayLayout, rows: Int64s) -> Bytes:
        """Read rows as they are stored, in the given order.

        Parameters
        ----------
        files : sequence of FileSource
            The file of the array, then all others that it may be read from.
        array : ArrayLayout
            With `by_h5py` set.
        rows : (k,) int64

        Returns
        -------
        (k * array.row_bytes,) uint8

        Raises
        ------
        ReaderCrashed, ReadTimeout, Overloaded, SourceUnavailable
            A later attempt may succeed.
        DatasetCorrupt, Unreadable, RevisionChanged, TooLarge
        """
        if len(rows) * array.row_bytes > self._answer_bytes - KIND_BYTES:
            raise TooLarge(f"{len(rows)} rows of {array.row_bytes} bytes are more than one read may return")
        content = self._answer(files, array, rows)
        if content.nbytes != len(rows) * array.row_bytes:
            raise DatasetCorrupt(f"the array {array.path!r} has changed since it was inspected")
        return content

    def read_ragged(self, files: Sequence[FileSource], array: ArrayLayout, rows: Int64s) -> tuple[Bytes, Int64s]:
        """Same as `read`, for ragged rows.

        Returns
        -------
        items : (n bytes,) uint8
            The items of all rows, one row after the other.
        offsets : (k + 1,) int64
            Where the items of each row begin, in items.
        """
        content = self._answer(files, array, rows)
        offsets = content[: 8 * (len(rows) + 1)].view(np.int64)
        items = content[8 * (len(rows) + 1) :]
        itemsize = np.dtype(array.dtype).itemsize
        if offsets[0] or (np.diff(offsets) < 0).any() or offsets[-1] * itemsize != items.nbytes:
            raise DatasetCorrupt(f"the array {array.path!r} has changed since it was inspected")
        return items, offsets

    def _answer(self, files: Sequence[FileSource], array: ArrayLayout, rows: Int64s) -> Bytes:
        about = {
            "files": piping.files_for(files),
            "path": array.table,
            "member": array.member,
            "dtype": array.dtype,
            "ragged": array.ragged,
            "limit": self._max_bytes,
            "rows": len(rows),
        }
        text = json.dumps(about).encode()
        request = LENGTH.pack(len(text)) + text + rows.astype("<i8", copy=False).tobytes()
        name = hashlib.blake2b(request, digest_size=16).digest()
        with self._lock:
            if self._crashes.get(name, 0) >= CRASHES:
                raise DatasetCorrupt(f"reading these rows of {array.path!r} has crashed HDF5 {CRASHES} times")
        _check_unchanged(files)
        answer = self._ask(files, request, name, array.path)
        content: Bytes = np.frombuffer(answer, np.uint8)
        return content[KIND_BYTES:]

    def _ask(self, files: Sequence[FileSource], request: bytes, name: bytes, path: str) -> memoryview:
        began = time.monotonic()
        try:
            with self._children.lent() as child:
                began = time.monotonic()
                answer = piping.ask(child, request, self._timeout + _GRACE_SECONDS, files)
                error = _refusal(answer, path)
                if isinstance(error, DatasetCorrupt):
                    # End the reader: libhdf5 may have corrupted its memory before it reported the error.
                    raise error
        except FeedError:
            # Some are also an OSError.
            raise
        except (OSError, EOFError) as failure:
            if isinstance(failure, TimeoutError) or time.monotonic() - began >= self._timeout:
                raise ReadTimeout(f"reading {path!r} took more than {self._timeout:g} s") from None
            if self._children.are_closed:
                raise Overloaded("the server is stopping", retry_after=1).because_of("stopping") from None
            with self._lock:
                self._crashes[name] = self._crashes.pop(name, 0) + 1
                if len(self._crashes) > _REQUESTS_KEPT:
                    self._crashes.popitem(last=False)
            raise ReaderCrashed(f"reading {path!r} crashed HDF5; another reader takes over", retry_after=1) from None
        if error is not None:
            raise error
        return answer


def _refusal(answer: memoryview, path: str) -> FeedError | None:
    if bytes(answer[:1]) != b"E":
        return None
    code, detail = json.loads(bytes(answer[KIND_BYTES:]))
    return CLASS_BY_CODE[code](f"{path!r}: {detail}")


def _check_unchanged(files: Sequence[FileSource]) -> None:
    """Raise if a file has changed. By path, because the reader opens files itself; it checks again after reading."""
    for file in files:
        if file.remote_bytes is not None:
            # Each of its blocks is checked.
            continue
        try:
            now = Identity.of(os.stat(file.path))
        except OSError as error:
            raise refused(error) from None
        if now != file.identity:
            raise changed(file.identity, now)
