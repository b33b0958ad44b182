"""The actor that runs a server on a node, in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from .. import __version__

_ANNOUNCED = re.compile(r'h5feed serves .* at (https?://[^\s"]+)')
"""The line that a server prints when it serves."""

_LAST_LINES = 5
"""Those of a server that has ended, which say why."""

_MAX_LINES = 10_000
"""Maximum number of lines that wait to be fetched. Of more, the oldest are dropped."""

_READY_SECONDS = 10.0
_STOP_SECONDS = 10.0
"""A server ends within 8 seconds by itself."""

_FIRST_REST, _LONGEST_REST = 1.0, 30.0
"""Seconds until a server that has ended is started again: after the n-th in a row that never served, min(longest,
first · 2ⁿ)."""

STARTING = "it is starting"


@dataclass(frozen=True)
class ServerState:
    """What a server does.

    Attributes
    ----------
    url : str
        Where it is reached on its node; empty if it does not run.
    is_ready : bool
        Whether it can read its data.
    why : str
        Why it is not ready.
    failures : int
        Number of servers in a row that have ended before they served.
    lines : tuple of str
        What it has printed since the last report.
    dropped : int
        Number of lines that were printed, but not kept for this report.
    """

    url: str
    is_ready: bool
    why: str
    failures: int = 0
    lines: tuple[str, ...] = ()
    dropped: int = 0


class NodeServer:
    """Runs a server, and starts it again when it ends.

    Parameters
    ----------
    version : str
        Of h5feed-server in the process that asks for the server.
    arguments : sequence of str
        The command ``h5feed-server``, without its name.
    environment : mapping of str to str
        Variables that the server gets in addition to those of the node.

    Raises
    ------
    RuntimeError
        The node has another version.
    """

    def __init__(self, version: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        if version != __version__:
            raise RuntimeError(f"the node has h5feed-server {__version__}, not {version}: install the same version")
        self._arguments = [*arguments]
        self._environment = {**os.environ, **environment}
        self._url = ""
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._lock = threading.Lock()
        self._why = STARTING
        self._failures = 0
        self._process: subprocess.Popen[str] | None = None
        self._is_stopping = threading.Event()
        # The kernel ends the server with the thread that has started it, so this thread waits for it.
        self._thread = threading.Thread(target=self._run, name="h5feed-server", daemon=True)
        self._thread.start()

    def report(self) -> ServerState:
        """What the server does now."""
        url = self._url
        why = _why_not_ready(url) if url else self._why
        with self._lock:
            lines, dropped = tuple(self._lines), self._dropped
            self._lines.clear()
            self._dropped = 0
        return ServerState(url, not why, why, self._failures, lines, dropped)

    def stop(self) -> None:
        """End the server, after the responses in progress."""
        self._is_stopping.set()
        process = self._process
        if process is not None:
            process.terminate()
            self._thread.join(_STOP_SECONDS)
            # If it hangs, with all that it has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _run(self) -> None:
        python = [sys.executable, "-m"]
        bound = [*python, "h5feed_server.cluster.die_with_parent", str(os.getpid())]
        command = [*bound, *python, "h5feed_server.cli", *self._arguments]
        while not self._is_stopping.is_set():
            self._last.clear()
            process = self._process = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            if self._is_stopping.is_set():
                process.terminate()
            assert process.stdout is not None
            for line in process.stdout:
                self._hear(line.rstrip())
            code = process.wait()
            self._failures = 0 if self._url else self._failures + 1
            self._url, self._why = "", " ".join(self._last) or f"the server has ended with exit code {code}"
            self._is_stopping.wait(min(_LONGEST_REST, _FIRST_REST * 2 ** min(self._failures, 16)))

    def _hear(self, line: str) -> None:
        self._last.append(line)
        with self._lock:
            if len(self._lines) == _MAX_LINES:
                self._lines.popleft()
                self._dropped += 1
            self._lines.append(line)
        if not self._url and (match := _ANNOUNCED.search(line)) is not None:
            self._url = match[1]


def _why_not_ready(url: str) -> str:
    """Why a server on this machine is not ready; empty if it is."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        # The certificate names the node, not the address at which the node reaches itself.
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=_READY_SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_READY_SECONDS)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/readyz")
            response = connection.getresponse()
            content = response.read(500).decode("utf-8", "replace")
            return "" if response.status == 200 else f"/readyz returns {response.status}: {content}"
        except (OSError, http.client.HTTPException) as error:
            return f"/readyz does not respond: {error}"
