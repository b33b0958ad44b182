"""Starts and stops the servers, each in processes of its own."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py

from . import raw_server

START_SECONDS = 60.0
"""How long a server may take to start."""


class ServerFailed(RuntimeError):
    """A server did not start."""


@dataclass(frozen=True)
class H5feedServer:
    """A running h5feed server."""

    url: str
    pid: int

    def workers(self) -> list[int]:
        """Process ids of its workers.

        Raises
        ------
        OSError
            The system does not tell (no Linux).
        """
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def cpu_seconds(self) -> float:
        """CPU seconds that all processes that it has started have taken so far: its workers, above all.

        Raises
        ------
        OSError
            The system does not tell (no Linux).
        """
        waiting, ticks = self.workers(), 0
        while waiting:
            pid = waiting.pop()
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                waiting += map(int, children.split())
                times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, times[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def worker_peaks(self) -> list[int]:
        """Most memory that each worker ever had resident, in bytes; empty where the system does not tell (no Linux)."""
        try:
            states = [Path(f"/proc/{pid}/status").read_text() for pid in self.workers()]
        except OSError:
            return []
        peaks = [re.search(r"VmHWM:\s+(\d+) kB", state) for state in states]
        return [int(peak[1]) << 10 for peak in peaks if peak]

    def reset_peaks(self) -> list[int]:
        """Let the peak of each worker's memory be what it has now; which is that, in bytes."""
        for pid in self.workers():
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        return self.worker_peaks()


@contextlib.contextmanager
def h5feed_server(
    folder: Path | str,
    workers: int,
    cache: Path | None = None,
    through: Sequence[str] = (),
    options: Sequence[str] = (),
    **environment: str,
) -> Iterator[H5feedServer]:
    """The real server over `folder`, with settings of its own, and unless `cache` is one with an empty cache folder.

    `through` is a command that runs the server's, given behind it, and `options` are more options of that. Files are
    hashed before they are served, unless the environment says otherwise: no figure is to include that.
    """
    environment = {"H5FEED_PROVISIONAL_BYTES": str(1 << 40), **environment}
    with tempfile.TemporaryDirectory(prefix="h5feed-cache-") as empty:
        command = [*through, sys.executable, "-m", "h5feed_server.cli", "serve", str(folder), "--port", "0"]
        command += ["--workers", str(workers), "--cache-dir", str(cache or empty), *options]
        with _running(command, environment) as process:
            announced = re.search(r"at (\S+)", _first_line(process))
            if announced is None:
                raise ServerFailed("the h5feed server did not print its address")
            yield H5feedServer(announced[1], process.pid)


@contextlib.contextmanager
def hot_buffer_servers(batch_bytes: int, count: int) -> Iterator[list[int]]:
    """Ports of raw servers that send the same bytes again and again."""
    with _raw_servers(["--batch-bytes", str(batch_bytes)], count) as ports:
        yield ports


@contextlib.contextmanager
def reading_servers(path: Path, batch: int, count: int) -> Iterator[list[int]]:
    """Ports of raw servers that read the shuffled rows of the contiguous ``images`` of a file."""
    with h5py.File(path) as file:
        images = file["images"]
        row_bytes = images[0].nbytes
        arguments = ["--batch-bytes", str(batch * row_bytes), "--file", str(path)]
        arguments += [
            "--offset",
            str(images.id.get_offset()),
            "--rows",
            str(len(images)),
            "--row-bytes",
            str(row_bytes),
        ]
    with _raw_servers(arguments, count) as ports:
        yield ports


def receive(connection: socket.socket, epoch: int, first: int, step: int, batches: int, buffer: memoryview) -> int:
    """Ask a raw server for batches and receive each into `buffer`; returns the bytes received."""
    connection.sendall(raw_server.REQUEST.pack(epoch, first, step, batches))
    for _ in range(batches):
        done = 0
        while done < len(buffer):
            received = connection.recv_into(buffer[done:])
            if not received:
                raise ConnectionError("a raw server exited")
            done += received
    return batches * len(buffer)


@contextlib.contextmanager
def _raw_servers(arguments: Sequence[str], count: int) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "benchmarks.raw_server", *arguments]
        processes = [stack.enter_context(_running(command)) for _ in range(count)]
        yield [int(_first_line(process)) for process in processes]


@contextlib.contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **(environment or {})}, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
    line = process.stdout.readline() if ready else ""
    if not line:
        raise ServerFailed(f"a server did not start: {process.args!r}")
    return line
