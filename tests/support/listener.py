"""A port that hands each connection to a thread of its own: what proxies and odd servers of tests begin with."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

SECONDS = 60
"""Deadline of a step, on a machine that is busy with something else."""


class Listener:
    """A free port of the loopback.

    Parameters
    ----------
    serve : callable
        Called with each connection, in a thread of its own; the connection is closed when it returns.

    Attributes
    ----------
    port : int
    url : str
    accepted : int
        Connections so far.
    """

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.accepted = 0
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Accept no more; connections end with their peers."""
        # Closing alone does not wake the thread that accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(SECONDS)
        assert not self._accepting.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._handle, args=(connected,), daemon=True).start()

    def _handle(self, connected: socket.socket) -> None:
        with connected:
            self._serve(connected)


def hand_on(source: socket.socket, sink: socket.socket) -> None:
    """Send on what comes, until either side ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
