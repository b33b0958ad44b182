"""The server's side of file inspection: sends paths to child processes, enforces timeouts, replaces dead children."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

from h5feed.errors import FeedError, Overloaded, SourceUnavailable, Unreadable
from h5feed.stored.layout import load_layout
from h5feed.stored.local_file import FileSource, is_away, refused

from ..signatures import why_no_hdf5
from . import piping
from .child import Child, IdleChildren
from .drivers import members_of
from .same_metadata import Recorder, SameMetadata
from .text import says_away

MEMORY_BYTES = 2 << 30
"""Address space of a child, including mapped libraries."""

MAX_ANSWER_BYTES = 512 << 20
"""Bound on a layout: 32 bytes for each chunk, and the text, which takes up to six bytes a character, twice."""

GRACE_SECONDS = 10.0
"""Added to the timeout, which the child enforces itself, before the child counts as hung."""

_Request = str | int | list[int]
"""A path, the size of a file that the child asks for in blocks, or a list of the size of a file that it asks for
exactly what libhdf5 reads of."""


class Inspector:
    """Inspects files in child processes: one for each calling thread, ended at the end of the ``with`` block.

    Parameters
    ----------
    timeout : float
        Seconds that one file may take.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._children = IdleChildren()
        self._same = SameMetadata()

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rest()

    def rest(self) -> None:
        """End all children; busy ones end after their current file. The next call of `inspect` starts a new one."""
        self._children.rest()

    def inspect(self, path: str) -> bytes:
        """Return the layout of the file at `path`, serialised for `load_layout`.

        Raises
        ------
        Unreadable
            The file is not HDF5 or holds no arrays; its inspection crashed, timed out or needed too much memory; or the
            operating system does not let us open it (then the cause is an OSError).
        Overloaded
            No child can be started or no file opened at the moment.
        SourceUnavailable
            The disk or file server is not available at the moment.
        """
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise Unreadable("it is not a regular file")
            # Open it here first: the child cannot tell an error of the system from a fault of the file.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                if (problem := why_no_hdf5(file.fileno())) is not None:
                    raise Unreadable(problem)
                # The other parts of a file are not among what is compared.
                if members_of(path)[0] is not None:
                    return self._layout(path)
                return self._layout_of_one(path, file.fileno())
        except OSError as error:
            if is_away(error) or isinstance(refused(error), Overloaded):
                raise refused(error) from None
            raise Unreadable(f"it cannot be opened: {error.strerror}") from error

    def _layout_of_one(self, path: str, fd: int) -> bytes:
        size = os.fstat(fd).st_size
        layout = self._same.find(fd, size)
        if layout is None:
            layout = self._layout(path)
            self._same.learn(fd, size, layout, partial(self._recorded, size))
        return layout

    def _recorded(self, size: int, recorder: Recorder) -> bytes | None:
        """The layout of a file of which all that is read is recorded; None if it cannot be inspected like that."""
        try:
            return self._layout([size], read=recorder.read)
        except FeedError:
            return None

    def inspect_remote(self, file: FileSource) -> bytes:
        """Same as `inspect`, for a file of a store. Errors that reading it raises end the inspection."""
        assert file.remote_bytes is not None
        return self._layout(file.remote_bytes, (file,))

    def _layout(
        self,
        file: _Request,
        sources: Sequence[FileSource] = (),
        read: Callable[[int, int], bytes] | None = None,
    ) -> bytes:
        try:
            answer = self._ask(file, sources, read)
        except TimeoutError:
            raise Unreadable(f"inspecting it took more than {self._timeout:g} s (H5FEED_INSPECT_TIMEOUT)") from None
        except (OSError, EOFError):
            raise Unreadable("inspecting it crashed the inspector") from None
        kind, content = bytes(answer[:1]), bytes(answer[1:])
        if kind == b"E":
            reason = content.decode("utf-8", "replace")
            raise SourceUnavailable(reason, retry_after=1) if says_away(reason) else Unreadable(reason)
        try:
            layout = load_layout(content)
        except ValueError:
            raise Unreadable("the inspector sent an invalid response") from None
        if not layout.arrays and not layout.links:
            raise Unreadable("; ".join(("it holds no arrays", *layout.notes[:5])))
        return content

    def _start(self) -> Child:
        try:
            return Child(f"{__package__}.inspect", (str(MEMORY_BYTES), str(self._timeout)), MAX_ANSWER_BYTES)
        except OSError as error:
            raise Overloaded(f"cannot start an inspector: {error.strerror}", retry_after=1) from None

    def _ask(
        self, file: _Request, sources: Sequence[FileSource], read: Callable[[int, int], bytes] | None
    ) -> memoryview:
        """Return a child's response. A child that has died is replaced once."""
        for attempt in (1, 2):
            child, rests = self._children.take()
            try:
                child = child or self._start()
                request = json.dumps(file).encode() + b"\n"
                answer = piping.ask(child, request, self._timeout + GRACE_SECONDS, sources, read=read)
            except FeedError:
                if child is not None:
                    child.end()
                raise
            except (OSError, EOFError) as error:
                if child is not None:
                    child.end()
                # A timeout is due to the file. A dead child may have been killed for another reason, so try once more.
                if isinstance(error, TimeoutError) or attempt == 2:
                    raise
                continue
            if not isinstance(file, str) and bytes(answer[:1]) != b"L":
                # A reply that it did not wait for may still be in the pipe.
                child.end()
            else:
                self._children.put_back(child, rests)
            return answer
        raise EOFError
