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
import threading
import time
from collections.abc import Callable, Sequence

LENGTH = struct.Struct("<Q")
"""Header of a frame: the length of its content in bytes."""

MOST_ASKED_BYTES = select.PIPE_BUF
"""Bound on the frames with which a child asks for bytes: the system writes them to a pipe as a whole, or not at all."""

_START_SECONDS = 60.0
"""How long a child may take to import its libraries, even on a slow machine."""

_KILLED_SECONDS = 1.0
"""How long a child that was killed is waited for."""

DIED = b"X"
"""Kind of the responses about a fork that has died, see `answer_in_fork`."""

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

    def ask(
        self, request: bytes | bytearray, seconds: float, allocate: Callable[[int], memoryview] | None = None
    ) -> memoryview:
        """Send a request and return the content of the response.

        Parameters
        ----------
        request : bytes or bytearray
        seconds : float
            Timeout. The first call waits for the start of the child in addition.
        allocate : callable, optional
            Returns a writeable memoryview of the given number of bytes for the response. If it raises an exception, the
            child cannot be used any more.

        Raises
        ------
        TimeoutError, EOFError, OSError
            The child cannot be used any more: call `end`.
        """
        if not self._started:
            self._receive(time.monotonic() + _START_SECONDS, _new)
            self._started = True
        deadline = time.monotonic() + seconds
        rest = memoryview(request)
        while rest:
            _wait(self._in.fileno(), select.POLLOUT, deadline)
            rest = rest[os.write(self._in.fileno(), rest) :]
        return self._receive(deadline, allocate or _new)

    def _receive(self, deadline: float, allocate: Callable[[int], memoryview]) -> memoryview:
        (length,) = LENGTH.unpack(self._read_into(_new(LENGTH.size), deadline))
        if length > self._max_answer_bytes:
            raise EOFError
        return self._read_into(allocate(length), deadline)

    def _read_into(self, view: memoryview, deadline: float) -> memoryview:
        done = 0
        while done < len(view):
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
        """Close the input, wait up to `patience` seconds for the child to exit, then kill it with its forks.

        A child that waits for a disk that hangs ends when the disk answers; it is not waited for.
        """
        self._in.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILLED_SECONDS)
        self._out.close()


def _new(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


def _wait(fd: int, event: int, deadline: float) -> None:
    # Not select, which does not support descriptors above 1,023.
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _environment() -> dict[str, str]:
    # Disable plug-ins, because a file can name any filter, and the user's prefixes, which change where external files
    # are found: next to the file that refers to them, as the layouts have it. Tokens are no business of a process that
    # reads files of others.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HDF5_", "H5FEED_"))}
    own = {"HDF5_PLUGIN_PRELOAD": "::", "HDF5_EXTFILE_PREFIX": "${ORIGIN}"}
    return {**kept, **own, "OPENBLAS_NUM_THREADS": "1"}


# In the child itself ------------------------------------------------------------------------------------------------


def allow_many_files() -> None:
    """Raise the limit on open files: a virtual array may have sources in thousands of files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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


def answer_in_fork(
    answer: Callable[[], Sequence[bytes | memoryview]], obituary: Callable[[int], bytes], seconds: float, answers: int
) -> bool:
    """Handle one request in a fork of this process, and send the response.

    libhdf5 may corrupt its memory while it reads one file, and crash or fail only when it reads the next. A fork ends
    that with the request.

    Parameters
    ----------
    answer : callable
        Called in the fork. Returns the parts of the response.
    obituary : callable
        Returns the response if the fork died, from the number of the signal that killed it, or 0 if it just failed.
    seconds : float
        Time limit for the request.
    answers : int
        File descriptor that responses are written to.

    Returns
    -------
    bool
        False if the server is gone.
    """
    ended, alive = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.close(ended)
            # SIGALRM kills by default, whatever libhdf5 is doing.
            signal.setitimer(signal.ITIMER_REAL, seconds)
            parts = answer()
            signal.setitimer(signal.ITIMER_REAL, 0)
            write_frame(answers, *parts)
            code = 0
        finally:
            os._exit(code)
    os.close(alive)
    # Wait for a hang-up: of the fork's pipe when the fork ends, of the input when the server does. The event mask is 0
    # because input, the next request, must not wake us.
    poll = select.poll()
    poll.register(ended, 0)
    poll.register(0, 0)
    is_wanted = ended in dict(poll.poll())
    if not is_wanted:
        os.kill(process, signal.SIGKILL)
    os.close(ended)
    _, status = os.waitpid(process, 0)
    if is_wanted and status:
        write_frame(answers, obituary(max(0, -os.waitstatus_to_exitcode(status))))
    return is_wanted


def write_frame(fd: int, *parts: bytes | memoryview) -> None:
    """Write one frame whose content is these parts."""
    for part in (LENGTH.pack(sum(len(part) for part in parts)), *parts):
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(fd, rest) :]


class IdleChildren:
    """Child processes that wait for their next request."""

    def __init__(self) -> None:
        self._idle: list[Child] = []
        self._rests = 0
        self._lock = threading.Lock()

    def take(self) -> tuple[Child | None, int]:
        """A child, if one is idle, and how often all were told to rest."""
        with self._lock:
            return (self._idle.pop() if self._idle else None), self._rests

    def put_back(self, child: Child, rests: int, patience: float = 1.0) -> None:
        """Keep a child for the next request, or end it if `rest` was called since it was taken."""
        with self._lock:
            is_kept = rests == self._rests
            if is_kept:
                self._idle.append(child)
        if not is_kept:
            child.end(patience)

    def rest(self) -> None:
        """End all children; busy ones after their current request."""
        with self._lock:
            self._rests += 1
            children, self._idle = self._idle, []
        for child in children:
            child.end()
