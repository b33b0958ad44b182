"""The parent's end of file inspection: hands paths to child processes, bounds their time, replaces those that die."""

from __future__ import annotations

import json
import os
import stat
import threading
from types import TracebackType

from h5feed.errors import Overloaded, SourceUnavailable, Unreadable

from ..layout import load_layout
from ..local_file import is_away, refused
from ..signatures import why_no_hdf5
from .child import Child
from .text import says_away

MEMORY_BYTES = 2 << 30
"""Address space of a child. Some of it is libraries that are mapped, not used."""

MAX_ANSWER_BYTES = 512 << 20
"""Bound on a layout: 32 bytes a chunk, and the text, which is written down up to six bytes a character, twice."""

GRACE_SECONDS = 10.0
"""What is added to the timeout, which the child keeps itself, before it is taken for hung."""


class Inspector:
    """Inspects files in child processes, one for each thread that asks, which end with the ``with`` block.

    Parameters
    ----------
    timeout : float
        Seconds that one file may take.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._idle: list[Child] = []
        self._rests = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rest()

    def rest(self) -> None:
        """End the children, those that are at work when they have answered; the next file starts another."""
        with self._lock:
            self._rests += 1
            children, self._idle = self._idle, []
        for child in children:
            child.end()

    def inspect(self, path: str) -> bytes:
        """The layout of the file at `path`, as `load_layout` reads it.

        Raises
        ------
        Unreadable
            It is no HDF5 file, or it crashed, outlasted or outgrew the child; or the operating system refuses it, and
            the cause says so.
        Overloaded, SourceUnavailable
            No child can be started, or no file opened or read, now.
        """
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise Unreadable("it is not a regular file")
            # The child's refusal would not tell what the system has refused from what is wrong with the file.
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                problem = why_no_hdf5(file.fileno())
        except OSError as error:
            if is_away(error) or isinstance(refused(error), Overloaded):
                raise refused(error) from None
            raise Unreadable(f"it cannot be opened: {error.strerror}") from error
        if problem is not None:
            raise Unreadable(problem)
        try:
            answer = self._ask(path)
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
            raise Unreadable("the inspector's answer makes no sense") from None
        if not layout.arrays and not layout.links:
            raise Unreadable("; ".join(("it holds no arrays", *layout.notes[:5])))
        return content

    def _start(self) -> Child:
        try:
            return Child(f"{__package__}.inspect", (str(MEMORY_BYTES), str(self._timeout)), MAX_ANSWER_BYTES)
        except OSError as error:
            raise Overloaded(f"no inspector can be started: {error.strerror}", retry_after=1) from None

    def _ask(self, path: str) -> memoryview:
        """A child's answer; a child that is found dead is replaced once."""
        for attempt in (1, 2):
            with self._lock:
                child, rests = (self._idle.pop() if self._idle else None), self._rests
            try:
                child = child or self._start()
                answer = child.ask(json.dumps(path).encode() + b"\n", self._timeout + GRACE_SECONDS)
            except (OSError, EOFError) as error:
                if child is not None:
                    child.end()
                # It is the file that outlasts a child; but it may have been something else that killed it.
                if isinstance(error, TimeoutError) or attempt == 2:
                    raise
                continue
            with self._lock:
                keep = rests == self._rests
                if keep:
                    self._idle.append(child)
            if not keep:
                child.end()
            return answer
        raise EOFError
