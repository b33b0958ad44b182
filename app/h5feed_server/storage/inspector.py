"""The parent's end of file inspection: hands paths to child processes, bounds their time, replaces those that die."""

from __future__ import annotations

import json
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from types import TracebackType

from h5feed.errors import Unreadable

from .layout import load_layout

MEMORY_BYTES = 2 << 30
"""Address space of a child. Some of it is libraries that are mapped, not used."""

MAX_ANSWER_BYTES = 512 << 20
"""Bound on a layout: 32 bytes a chunk, and the text, which is written down up to six bytes a character, twice."""

START_SECONDS = 60.0
"""How long a child may take to import its libraries, on whatever machine."""

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
        self._idle: list[_Child] = []
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
            It is no HDF5 file, or it crashed, outlasted or outgrew the child.
        """
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise Unreadable("it is not a regular file")
        except OSError as error:
            raise Unreadable(f"it cannot be opened: {error.strerror}") from None
        try:
            kind, content = self._ask(path)
        except TimeoutError:
            raise Unreadable(f"inspecting it took more than {self._timeout:g} s") from None
        except (OSError, EOFError):
            raise Unreadable("inspecting it crashed the inspector") from None
        if kind == b"E":
            raise Unreadable(content.decode("utf-8", "replace"))
        try:
            layout = load_layout(content)
        except ValueError:
            raise Unreadable("the inspector's answer makes no sense") from None
        if not layout.arrays:
            raise Unreadable("; ".join(("it holds no arrays", *layout.notes[:5])))
        return content

    def _ask(self, path: str) -> tuple[bytes, bytes]:
        """Kind and content of a child's answer; a child that is found dead is replaced once."""
        for attempt in (1, 2):
            with self._lock:
                child, rests = (self._idle.pop() if self._idle else None), self._rests
            try:
                child = child or _Child(self._timeout)
                answer = child.ask(path)
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


class _Child:
    """A process that inspects files one after the other. It must be ended by `end`."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.inspect", str(MEMORY_BYTES), str(timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # libhdf5 prints its error stack; what matters of it is in the answer.
            stderr=subprocess.DEVNULL,
            bufsize=0,
            # No plug-ins: a file names the filters that it wants, and needs none to be described.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"},
            # It is ended together with the process that it has forked for a file.
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._started = False

    def ask(self, path: str) -> tuple[bytes, bytes]:
        """Kind and content of the answer.

        Raises
        ------
        TimeoutError, EOFError, OSError
            The child is of no use any more.
        """
        if not self._started:
            self._receive(time.monotonic() + START_SECONDS)
            self._started = True
        self._in.write(json.dumps(path).encode() + b"\n")
        answer = self._receive(time.monotonic() + self._timeout + GRACE_SECONDS)
        return bytes(answer[:1]), bytes(answer[1:])

    def _receive(self, deadline: float) -> memoryview:
        (length,) = struct.unpack("<Q", self._read_exactly(8, deadline))
        if length > MAX_ANSWER_BYTES:
            raise EOFError
        return self._read_exactly(length, deadline)

    def _read_exactly(self, nbytes: int, deadline: float) -> memoryview:
        view = memoryview(bytearray(nbytes))
        done = 0
        while done < nbytes:
            ready, _, _ = select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            received = os.readv(self._out.fileno(), [view[done:]])
            if not received:
                raise EOFError
            done += received
        return view

    def end(self) -> None:
        """End it and what it has forked."""
        self._in.close()
        try:
            # It ends by itself when it sees the end of its input.
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._out.close()
