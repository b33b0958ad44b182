"""The server's side of file inspection: sends paths to child processes, enforces timeouts, replaces dead children."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from h5feed.errors import FeedError, Overloaded, SourceUnavailable, Unreadable
from h5feed.stored.layout import FileLayout, load_layout
from h5feed.stored.local_file import FileSource, is_away, refused

from ..signatures import why_no_hdf5
from . import piping
from .child import LENGTH, Child, IdleChildren
from .drivers import members_of
from .same_metadata import Recorder, SameMetadata
from .text import says_away

MEMORY_BYTES = 2 << 30
"""Address space of a child, including mapped libraries."""

MAX_ANSWER_BYTES = 512 << 20
"""Bound on a layout: 32 bytes for each chunk, and the text, which takes up to six bytes a character, twice."""

MOST_TOGETHER = 32
"""Files that are inspected together at most: by then, starting a process for them is a small part of the work."""

GRACE_SECONDS = 10.0
"""Added to the timeout, which the child enforces itself, before the child counts as hung. Before the last of several
files, it has been at work for `inspect.TOGETHER_SECONDS` at most."""

_Request = str | int | list[int] | dict[str, list[str]]
"""A path, the size of a file that the child asks for in blocks, a list of the size of a file that it asks for exactly
what libhdf5 reads of, the paths of files to inspect together, or that of a file that another process is writing to."""


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

    def __enter__(self) -> Self:
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
            with _opened(path) as fd:
                # The other parts of a file are not among what is compared.
                if members_of(path)[0] is not None:
                    return self._layout(path)
                size = os.fstat(fd).st_size
                layout = self._same.find(fd, size)
                if layout is None:
                    layout = self._layout(path)
                    self._same.learn(fd, size, layout, partial(self._recorded, size))
                return layout
        except OSError as error:
            if is_away(error) or isinstance(refused(error), Overloaded):
                raise refused(error) from None
            raise Unreadable(f"it cannot be opened: {error.strerror}") from error

    def inspect_together(
        self, paths: Sequence[str], load: Callable[[bytes], FileLayout] = load_layout
    ) -> dict[str, bytes] | None:
        """Inspect files of one dataset in one process, which takes a fraction of the time of `inspect` for each.

        A crafted file may corrupt the results for the others. So these must not be used for other datasets.

        Parameters
        ----------
        paths : sequence of str
            At most `MOST_TOGETHER`.
        load : callable
            Same as `load_layout`, for a caller that needs the loaded layouts.

        Returns
        -------
        dict of str to bytes, or None
            The layout of the first file at least, and of as many others as there was time for. None if there was a
            problem with any file: `inspect` each by itself to learn which.
        """
        try:
            with contextlib.ExitStack() as files:
                opened = {path: files.enter_context(_opened(path)) for path in paths}
                if any(members_of(path)[0] is not None for path in paths):
                    return None
                sizes = {path: os.fstat(fd).st_size for path, fd in opened.items()}
                layouts: dict[str, bytes] = {}
                for path, fd in opened.items():
                    if (layout := self._same.find(fd, sizes[path])) is not None:
                        layouts[path] = layout
                inspected = self._layouts([path for path in paths if path not in layouts], load)
                for path, layout in inspected.items():
                    same = self._same.find(opened[path], sizes[path])
                    if same is None:
                        self._same.learn(opened[path], sizes[path], layout, partial(self._recorded, sizes[path]))
                    elif same != layout:
                        return None
                return layouts | inspected
        except (FeedError, OSError, EOFError, struct.error):
            return None

    def _recorded(self, size: int, recorder: Recorder) -> bytes | None:
        """The layout of a file of which all that is read is recorded; None if it cannot be inspected like that."""
        try:
            return self._layout([size], read=recorder.read)
        except FeedError:
            return None

    def inspect_written(self, path: str) -> bytes:
        """Same as `inspect`, for a file that another process has open for SWMR writing."""
        return self._layout({"swmr": [path]})

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
        return _checked(answer)

    def _layouts(self, paths: Sequence[str], load: Callable[[bytes], FileLayout]) -> dict[str, bytes]:
        """The layouts of the first of these files, inspected together.

        Raises
        ------
        FeedError, OSError, EOFError, struct.error
            There was a problem with one of them, or the response is not valid.
        """
        if not paths:
            return {}
        answer = self._ask({"together": [*paths]}, (), None)
        if bytes(answer[:1]) != b"T":
            raise Unreadable("one of the files cannot be inspected")
        layouts: dict[str, bytes] = {}
        rest = answer[1:]
        for path in paths:
            if rest:
                (nbytes,) = LENGTH.unpack(rest[: LENGTH.size])
                layouts[path] = _checked(rest[LENGTH.size : LENGTH.size + nbytes], load)
                rest = rest[LENGTH.size + nbytes :]
        if rest:
            raise EOFError
        return layouts

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
            if isinstance(file, (int, list)) and bytes(answer[:1]) != b"L":
                # A reply that it did not wait for may still be in the pipe.
                child.end()
            else:
                self._children.put_back(child, rests)
            return answer
        raise EOFError


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """Open a file that may be HDF5. Do so here first: a child cannot tell an error of the system from a fault of it.

    Raises
    ------
    Unreadable, OSError
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Unreadable("it is not a regular file")
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if (problem := why_no_hdf5(file.fileno())) is not None:
            raise Unreadable(problem)
        yield file.fileno()


def _checked(answer: memoryview, load: Callable[[bytes], FileLayout] = load_layout) -> bytes:
    """The layout in a child's response about one file.

    Raises
    ------
    Unreadable, SourceUnavailable
        There is none, or it is not consistent.
    """
    kind, content = bytes(answer[:1]), bytes(answer[1:])
    if kind == b"E":
        reason = content.decode("utf-8", "replace")
        raise SourceUnavailable(reason, retry_after=1) if says_away(reason) else Unreadable(reason)
    try:
        layout = load(content)
    except ValueError:
        raise Unreadable("the inspector sent an invalid response") from None
    if not layout.arrays and not layout.links:
        raise Unreadable("; ".join(("it holds no arrays", *layout.notes[:5])))
    return content
