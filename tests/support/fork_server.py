"""Runs ``h5feed-server`` in processes forked from one that has already imported it.

Imports are nine tenths of the CPU time of a short command. Each process is still the whole command, with its own
arguments, environment, output and signals.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from h5feed_server.cli import main

_REQUEST_BYTES = 1 << 20
_RUN_SECONDS = 180


class ForkedProcess:
    """A forked ``h5feed-server``, with the interface of `subprocess.Popen` as far as tests use it."""

    def __init__(self, pid: int, stdout: IO[str], status: int) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, as soon as it has ended.

        Raises
        ------
        subprocess.TimeoutExpired
        """
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("h5feed-server", timeout or 0.0)
        return code

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            self.returncode = int(os.read(self._status, 16))
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            # It may be ending: its exit code comes a moment later.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that forks, started with the first command.

    Parameters
    ----------
    modules
        What it imports. Servers need fewer modules than other commands, and tests check what workers have in memory.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._socket: socket.socket | None = None

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], *, new_session: bool) -> ForkedProcess:
        """Start a server; its output is a pipe."""
        readable, writable = os.pipe()
        with os.fdopen(writable, "w") as output:
            # Standard error as it is now: pytest captures that of each test.
            return self._fork(arguments, environment, output.fileno(), 2, os.fdopen(readable), new_session)

    def run(self, arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with additional variables."""
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            variables = {**os.environ, **environment}
            process = self._fork(arguments, variables, output.fileno(), errors.fileno(), output, new_session=False)
            try:
                code = process.wait(_RUN_SECONDS)
            finally:
                process.kill()
            for file in (output, errors):
                file.seek(0)
            return subprocess.CompletedProcess(arguments, code, output.read(), errors.read())

    def _fork(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        stdout: int,
        stderr: int,
        output: IO[str],
        new_session: bool,
    ) -> ForkedProcess:
        if self._socket is None:
            self._socket = self._launch()
        request = json.dumps([arguments, environment, new_session, os.getcwd()]).encode()
        assert len(request) < _REQUEST_BYTES
        readable, writable = os.pipe()
        try:
            socket.send_fds(self._socket, [request], [stdout, stderr, writable])
        finally:
            os.close(writable)
        return ForkedProcess(int(self._socket.recv(16)), output, readable)

    def _launch(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _REQUEST_BYTES)
        with theirs:
            # It ends when this process does, which closes the socket.
            subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *self._modules],
                cwd=Path(__file__).parents[2],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        ours.settimeout(60)
        return ours


def _serve_forks(requests: socket.socket) -> None:
    """In the process that forks: one process for each request, until the other end is closed."""
    gc.collect()
    gc.freeze()
    # Ctrl-C is for the tests and the servers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    waiting = selectors.DefaultSelector()
    waiting.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is requests:
                request, descriptors, _, _ = socket.recv_fds(requests, _REQUEST_BYTES, 3)
                if not request:
                    return
                pid = os.fork()
                if pid == 0:
                    for other in list(waiting.get_map().values()):
                        os.close(other.fd)
                        if other.data is not None:
                            os.close(other.data[1])
                    waiting.close()
                    _become(*json.loads(request), *descriptors)
                os.close(descriptors[0])
                os.close(descriptors[1])
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, descriptors[2]))
                requests.send(str(pid).encode())
            else:
                pid, status = key.data
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                waiting.unregister(key.fileobj)
                os.close(key.fd)
                os.write(status, str(code).encode())
                os.close(status)


def _become(
    arguments: list[str],
    environment: dict[str, str],
    new_session: bool,
    cwd: str,
    *descriptors: int,
) -> None:
    """In a forked process: be the command, and exit as it does."""
    code = 1
    try:
        stdout, stderr, status = descriptors
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for descriptor in (stdout, stderr, status):
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if new_session:
            os.setsid()
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["h5feed-server", *arguments]
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


SERVERS = ForkServer("h5feed_server.main", "h5feed_server.serve.supervisor")
COMMANDS = ForkServer("h5feed_server.builder.command", "h5feed_server.inspection")

if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    _serve_forks(socket.socket(fileno=int(sys.argv[1])))
