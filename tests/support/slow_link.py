"""What lies between a client and a server: a line with a round trip and a rate of its own."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time

_PIECE = 16 << 10
_QUEUE = 64
"""Pieces under way in one direction of a connection at most; whoever sends more has to wait."""


class Line:
    """A TCP proxy on a port of its own that hands on what it receives later, and no faster than its rate.

    Parameters
    ----------
    port : int
        Of the server, on the loopback.
    delay : float
        Seconds that a byte is under way, in each direction.
    rate : float, optional
        Bytes per second from the server to all of its clients together.

    Attributes
    ----------
    url : str
    received : int
        Bytes that the server has sent.
    """

    def __init__(self, port: int, delay: float = 0.0, rate: float | None = None) -> None:
        self._port, self._delay, self._rate = port, delay, rate
        self._guard = threading.Lock()
        self._free_at = 0.0
        self.received = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more; connections end with their peers."""
        # Closing alone does not wake the thread that accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port), 10)
            except OSError:
                return
            far.settimeout(None)
            ended = threading.Event()
            for source, target, rated in ((near, far, False), (far, near, True)):
                pieces: queue.Queue[tuple[float, bytes]] = queue.Queue(_QUEUE)
                threading.Thread(target=self._receive, args=(source, pieces, rated, ended), daemon=True).start()
                threading.Thread(target=self._send, args=(target, pieces, ended), daemon=True).start()

    def _receive(
        self, source: socket.socket, pieces: queue.Queue[tuple[float, bytes]], rated: bool, ended: threading.Event
    ) -> None:
        content = b"begin"
        while content:
            try:
                content = source.recv(_PIECE)
            except OSError:
                content = b""
            if not rated and not content:
                # The client has gone: what is still to come for it must not keep the line from others.
                ended.set()
            if ended.is_set():
                content = b""
            through_at = time.monotonic()
            if rated:
                with self._guard:
                    self.received += len(content)
                    if self._rate is not None:
                        self._free_at = through_at = max(through_at, self._free_at) + len(content) / self._rate
            pieces.put((through_at + self._delay, content))
            # Nothing more is taken before the line is free.
            time.sleep(max(0.0, through_at - time.monotonic()))
        if rated:
            source.close()

    def _send(self, target: socket.socket, pieces: queue.Queue[tuple[float, bytes]], ended: threading.Event) -> None:
        while True:
            at, content = pieces.get()
            if not content:
                break
            # What is left is only emptied out, so that whoever fills the queue comes to an end.
            if not ended.is_set():
                time.sleep(max(0.0, at - time.monotonic()))
                try:
                    target.sendall(content)
                except OSError:
                    ended.set()
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
