"""Giving up on answers that nobody wants any more."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Cancellation(threading.Event):
    """An event which, when it is set, also wakes the threads that read from a socket on its behalf.

    Without it a thread whose owner has gone would wait for a silent server until its timeout.
    """

    def __init__(self) -> None:
        super().__init__()
        # Reentrant: the collector may drop an owner, and set this, in a thread that holds the lock.
        self._guard = threading.RLock()
        self._sockets: set[socket.socket] = set()

    def set(self) -> None:
        super().set()
        with self._guard:
            for connected in self._sockets:
                _shut_down(connected)

    @contextlib.contextmanager
    def ends(self, connected: socket.socket) -> Iterator[None]:
        """Within this context `connected` is shut down when the event is set, or at once where it is set already."""
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
    # Not closed: its descriptor could be another's before the thread that reads from it notices. The plain socket's
    # own method, since that of a TLS socket would forget its TLS state under the reader.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
