"""Child processes for code that may crash or hang: frames over pipes, with a deadline for each request."""

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
"""Header of a frame: the length of its content in bytes."""

_START_SECONDS = 60.0
"""How long a child may take to import its libraries, even on a slow machine."""

KIND_BYTES = 8
"""Length of the prefix of responses with rows. It keeps the numbers that follow aligned."""


class Child:
    """A process that sends one frame for each request. Call `end` when you no longer need it.

    Parameters
    ----------
    module : str
        Module to run with ``python -m``. It sends an empty frame when it has started.
    arguments : sequence of str
        Its command line arguments.
    max_answer_bytes : int
        Upper bound on the length of a response.
    """

    def __init__(self, module: str, arguments: Sequence[str], max_answer_bytes: int) -> None:
        self._max_answer_bytes = max_answer_bytes
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # libhdf5 prints its error stack, but the response holds all that matters.
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=_environment(),
            # A process group of its own: `end` kills the child together with its forks.
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        # A child that hangs does not read, so writing needs the deadline too.
        os.set_blocking(self._in.fileno(), False)
        self._started = False

    def ask(self, request: bytes, seconds: float) -> memoryview:
        """Send a request and return the content of the response.

        Parameters
        ----------
        request : bytes
        seconds : float
            Timeout. The first call waits for the start of the child in addition.

        Raises
        ------
        TimeoutError, EOFError, OSError
            The child cannot be used any more: call `end`.
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
        """Kill the child, from any thread. A pending `ask` fails, and its caller must call `end`."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self, patience: float = 1.0) -> None:
        """Close the input, wait up to `patience` seconds for the child to exit, then kill it with its forks."""
        self._in.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._out.close()


def _wait(fd: int, event: int, deadline: float) -> None:
    # Not select, which does not support descriptors above 1,023.
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _environment() -> dict[str, str]:
    # Disable plug-ins, because a file can name any filter, and prefixes, which change where external files are found.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HDF5_")}
    return {**kept, "OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}


# In the child itself ------------------------------------------------------------------------------------------------


def confine(memory_bytes: int) -> int:
    """Limit the resources of this process and report that it has started.

    Parameters
    ----------
    memory_bytes : int
        Bound on its address space.

    Returns
    -------
    int
        The descriptor to write responses to.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # If memory runs out, the kernel should kill this process rather than the server.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    answers = os.dup(1)
    # Redirect standard output: what libraries print must not end up between the frames.
    os.dup2(2, 1)
    write_frame(answers, b"")
    return answers


def write_frame(fd: int, *parts: bytes | memoryview) -> None:
    """Write one frame whose content is these parts."""
    for part in (LENGTH.pack(sum(len(part) for part in parts)), *parts):
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(fd, rest) :]
