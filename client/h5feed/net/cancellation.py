"""Cancellation of requests whose responses are no longer needed."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator

_TCP_INFO = struct.Struct("@52xI")
"""Linux's ``struct tcp_info`` as far as ``tcpi_last_data_recv``, in milliseconds."""


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

    def heard(self) -> None:
        """Report that the response has begun."""

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


class Attempt(Cancellation):
    """One of several attempts of a request, which can be cancelled alone, and is cancelled with the request.

    Parameters
    ----------
    request : Cancellation, optional
        That of the whole request.

    Attributes
    ----------
    began_at, heard_at : float
        `time.monotonic()` of the start, and of the first byte of the response; infinite before that.
    """

    def __init__(self, request: Cancellation | None) -> None:
        super().__init__()
        self.request = request
        self.began_at, self.heard_at = time.monotonic(), float("inf")

    def is_set(self) -> bool:
        return super().is_set() or (self.request is not None and self.request.is_set())

    def heard(self) -> None:
        self.heard_at = time.monotonic()

    @contextlib.contextmanager
    def ends(self, connected: socket.socket) -> Iterator[None]:
        """See `Cancellation.ends`."""
        whole = contextlib.nullcontext() if self.request is None else self.request.ends(connected)
        with whole, super().ends(connected):
            yield

    def silence(self) -> float:
        """Seconds for which nothing has arrived. Where the system does not tell, those since the start."""
        silence = time.monotonic() - self.began_at
        with self._guard:
            for connected in self._sockets:
                silence = min(silence, _since_data(connected))
        return silence


def _since_data(connected: socket.socket) -> float:
    """Seconds since the last data arrived at a socket; infinite if the system does not tell."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, struct.error):
            info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
            return float(_TCP_INFO.unpack(info)[0]) * 1e-3
    return float("inf")


def _shut_down(connected: socket.socket) -> None:
    # Not closed: the descriptor could be reused before the reading thread notices. socket.socket's own method, because
    # that of a TLS socket would also discard the TLS state in use.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
