"""Reads what viewers show of a file, in child processes that fork for every request. `browse` runs in the children."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import CLASS_BY_CODE, FeedError, Overloaded, ReaderCrashed, ReadTimeout
from h5feed.stored.local_file import FileSource

from . import piping
from .child import DIED, KIND_BYTES
from .children import Children

MEMORY_BYTES = 2 << 30
"""Address space of a child, including mapped libraries, in addition to its responses."""

_GRACE_SECONDS = 5.0
"""Added to the timeout, which a child enforces itself, before the child counts as hung."""

Bytes = npt.NDArray[np.uint8]


class Browser:
    """Lists the objects in files and reads their values, for all requests of a worker.

    It has child processes of its own, so that it does not delay the readers of batches.

    Parameters
    ----------
    children : int
        Maximum number of child processes.
    timeout : float
        Time limit for one request, and for waiting for a child, in seconds.
    max_bytes : int
        Maximum size of a response.
    """

    def __init__(self, children: int, timeout: float, max_bytes: int) -> None:
        self._timeout = timeout
        self._max_bytes = max_bytes
        arguments = str(MEMORY_BYTES + 4 * max_bytes), str(timeout)
        what = "processes that list what is in files"
        self._children = Children(f"{__package__}.browse", arguments, children, timeout, what, max_bytes + KIND_BYTES)

    @property
    def children(self) -> Children:
        """The processes."""
        return self._children

    def close(self) -> None:
        """End all children, including busy ones, whose requests fail."""
        self._children.close()

    def rest(self) -> None:
        """End the idle children. The next request starts a new one."""
        self._children.rest()

    def ask(self, what: str, files: Sequence[FileSource], lease: Callable[[int], Bytes], **options: Any) -> memoryview:
        """Send one request to a child.

        Parameters
        ----------
        what : str
            ``tree``, or an endpoint of h5grove: ``meta``, ``attr``, ``paths``, ``data``, ``stats``.
        files : sequence of FileSource
            The file, followed by all files that it may refer to.
        lease : callable
            Returns a (nbytes,) uint8 array for the response.
        options
            Options of the request, see `browse`.

        Returns
        -------
        memoryview
            The response. While it is in use, its memory is not reused.

        Raises
        ------
        PageNotFound, BadParameter, UnsupportedField, TooLarge, Unreadable, RevisionChanged
        ReaderCrashed, ReadTimeout, Overloaded, SourceUnavailable
            The request may succeed if it is repeated.
        PoolExhausted
            Raised by `lease`.
        """
        request = {"ask": what, "files": piping.files_for(files), "max_bytes": self._max_bytes, **options}
        answer = self._ask(files, json.dumps(request).encode() + b"\n", lease)
        if bytes(answer[:1]) != b"D":
            raise _problem(answer)
        return answer[KIND_BYTES:]

    def _ask(self, files: Sequence[FileSource], request: bytes, lease: Callable[[int], Bytes]) -> memoryview:
        began = time.monotonic()
        try:
            with self._children.lent() as child:
                began = time.monotonic()
                seconds = self._timeout + _GRACE_SECONDS
                answer = piping.ask(child, request, seconds, files, lambda nbytes: memoryview(lease(nbytes)))
                if answer[:1] == DIED and files[0].remote_bytes is not None:
                    # End the child: blocks that the fork did not wait for may still be in the pipe.
                    raise _problem(answer)
                return answer
        except FeedError:
            # Some are also an OSError.
            raise
        except (OSError, EOFError) as failure:
            if isinstance(failure, TimeoutError) or time.monotonic() - began >= self._timeout:
                raise ReadTimeout(f"reading the file took more than {self._timeout:g} s") from None
            if self._children.are_closed:
                raise Overloaded("the server is stopping", retry_after=1).because_of("stopping") from None
            raise ReaderCrashed("the process that read the file ended; another takes over", retry_after=1) from None


def _problem(answer: memoryview) -> FeedError:
    code, detail = json.loads(bytes(answer[KIND_BYTES:]))
    return CLASS_BY_CODE[code](detail)
