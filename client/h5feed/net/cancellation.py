"""Cancellation of requests whose responses are no longer needed."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Cancellation(threading.Event):
    """An event that, when set, also wakes up threads that are reading from a socket.

    Otherwise a thread whose owner is gone would wait for a silent server until the timeout.
    """

    def __init__(self) -> None:
        super().__init__()
        # Reentrant: garbage collection may set the event in a thread that holds the lock.
        self._guard = threading.RLock()
        self._sockets: set[socket.socket] = set()

    def set(self) -> None:
        super().set()
        with self._guard:
            for connected in self._sockets:
                _shut_down(connected)

    @contextlib.contextmanager
    def ends(self, connected: socket.socket) -> Iterator[None]:
        """Within this context, shut `connected` down when the event is set, or immediately if it already is."""
        with self._guard:
            self._sockets.add(connected)
            if self.is_set():
                _shut_down(connected)
        try:
            yield
        finally:
            with self._guard:
                self._sockets.discard(connected)


def _shut_down(connected: socket.socket) -> None:
    # Not closed: the descriptor could be reused before the reading thread notices. socket.socket's own method, because
    # that of a TLS socket would also discard the TLS state in use.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
