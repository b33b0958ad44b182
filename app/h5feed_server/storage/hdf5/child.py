"""Child processes that run libhdf5, seen from the parent: frames over pipes, a deadline for each, an end for all."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence

LENGTH = struct.Struct("<Q")
"""What goes before the content of a frame."""

_START_SECONDS = 60.0
"""How long a child may take to import its libraries, on whatever machine."""

KIND_BYTES = 8
"""What answers with rows begin with: as many bytes as leave the numbers that follow aligned."""


class Child:
    """A process that answers one frame for each request. It must be ended by `end`.

    Parameters
    ----------
    module : str
        What it runs, by ``python -m``; it answers an empty frame when it has started.
    max_answer_bytes : int
        Bound on an answer.
    """

    def __init__(self, module: str, arguments: Sequence[str], max_answer_bytes: int) -> None:
        self._max_answer_bytes = max_answer_bytes
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # libhdf5 prints its error stack; what matters of it is in the answer.
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=_environment(),
            # It is ended together with what it has forked.
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        # A child that hangs does not read: the deadline must hold for writing too.
        os.set_blocking(self._in.fileno(), False)
        self._started = False

    def ask(self, request: bytes, seconds: float) -> memoryview:
        """The answer to a request.

        Raises
        ------
        TimeoutError, EOFError, OSError
            The child is of no use any more.
        """
        if not self._started:
            self._receive(time.monotonic() + _START_SECONDS)
            self._started = True
        deadline = time.monotonic() + seconds
        rest = memoryview(request)
        while rest:
            _wait(self._in.fileno(), select.POLLOUT, deadline)
            rest = rest[os.write(self._in.fileno(), rest) :]
        return self._receive(deadline)

    def _receive(self, deadline: float) -> memoryview:
        (length,) = LENGTH.unpack(self._read_exactly(LENGTH.size, deadline))
        if length > self._max_answer_bytes:
            raise EOFError
        return self._read_exactly(length, deadline)

    def _read_exactly(self, nbytes: int, deadline: float) -> memoryview:
        view = memoryview(bytearray(nbytes))
        done = 0
        while done < nbytes:
            _wait(self._out.fileno(), select.POLLIN, deadline)
            received = os.readv(self._out.fileno(), [view[done:]])
            if not received:
                raise EOFError
            done += received
        return view

    def kill(self) -> None:
        """Have what waits for its answer fail; whoever asked ends it."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self, patience: float = 1.0) -> None:
        """End it and what it has forked; it has `patience` seconds to end by itself when its input ends."""
        self._in.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._out.close()


def _wait(fd: int, event: int, deadline: float) -> None:
    # Not by select, which knows no descriptors above 1,023.
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _environment() -> dict[str, str]:
    # No plug-ins: a file names the filters that it wants. No prefixes: they would say where its other files lie.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HDF5_")}
    return {**kept, "OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}


# In the child itself ------------------------------------------------------------------------------------------------


def confine(memory_bytes: int) -> int:
    """Limit this process, and say that it has started; returns the descriptor that answers go to."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # Where memory runs out, the kernel shall end this process and not the one that serves.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    answers = os.dup(1)
    # Whatever a library prints must not fall between the frames.
    os.dup2(2, 1)
    write_frame(answers, b"")
    return answers


def write_frame(fd: int, *parts: bytes | memoryview) -> None:
    """Answer these bytes, one after the other."""
    for part in (LENGTH.pack(sum(len(part) for part in parts)), *parts):
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(fd, rest) :]
