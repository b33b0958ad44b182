"""The parent's end of file inspection: hands paths to the child process, bounds its time, replaces it when it dies."""

from __future__ import annotations

import json
import os
import select
import stat
import struct
import subprocess
import sys
import threading
import time
from types import TracebackType

from h5feed.errors import FeedError, Unreadable

from .layout import load_layout

MEMORY_BYTES = 4 << 30
"""Address space of the child. Most of it is libraries that are mapped, not used."""

MAX_ANSWER_BYTES = 1 << 30
"""Bound on a layout: 32 bytes a chunk."""


class Inspector:
    """Inspects files one after the other in one child process, which ends with the ``with`` block.

    Parameters
    ----------
    timeout : float
        Seconds that one file may take.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rest()

    def rest(self) -> None:
        """End the child; the next file starts another."""
        with self._lock:
            self._end_child()

    def inspect(self, path: str) -> bytes:
        """The layout of the file at `path`, as `load_layout` reads it.

        Raises
        ------
        Unreadable
            It is no HDF5 file, or it crashed, outlasted or outgrew the child.
        """
        with self._lock:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise Unreadable("it is not a regular file")
            try:
                answer = self._ask(path)
            except (OSError, EOFError) as error:
                code = self._end_child()
                if isinstance(error, TimeoutError):
                    raise Unreadable(f"inspecting it took more than {self._timeout:g} s") from None
                raise Unreadable(f"inspecting it crashed the inspector (exit code {code})") from None
        if answer[:1] == b"E":
            raise Unreadable(answer[1:].decode("utf-8", "replace"))
        try:
            load_layout(answer[1:])
        except (FeedError, ValueError, KeyError, TypeError):
            raise Unreadable("the inspector's answer makes no sense") from None
        return answer[1:]

    def _ask(self, path: str) -> bytes:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.inspect", str(MEMORY_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # libhdf5 prints its error stack; what matters of it is in the answer.
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        assert self._child.stdin is not None and self._child.stdout is not None
        deadline = time.monotonic() + self._timeout
        self._child.stdin.write(json.dumps(path).encode() + b"\n")
        out = self._child.stdout.fileno()
        (length,) = struct.unpack("<Q", _read_exactly(out, 8, deadline))
        if not 1 <= length <= MAX_ANSWER_BYTES:
            raise EOFError
        return _read_exactly(out, length, deadline)

    def _end_child(self) -> int | None:
        child, self._child = self._child, None
        if child is None:
            return None
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        try:
            # It ends by itself when it has crashed or sees the end of its input.
            code = child.wait(1)
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        child.stdout.close()
        return code


def _read_exactly(fd: int, nbytes: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < nbytes:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        part = os.read(fd, min(nbytes - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
