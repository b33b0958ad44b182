"""Writes responses to the socket from the thread that reads them, bypassing the event loop.

The event loop would wake up whenever the socket accepts more data, and the thread would have to pass each response to
it. A slow client does not block the thread: after a short time, the event loop sends the rest.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence

from .http1 import Exchange, response_head

PATIENCE_SECONDS = 0.05
"""How long a thread keeps writing one block to a slow client."""

_POLL_MS = 50


class DirectWriter:
    """See `api.peer.Writer`.

    Parameters
    ----------
    exchange : Exchange
        The request and its response.
    descriptor : int
        Descriptor of the connection's non-blocking socket. It is duplicated, so that it stays valid when the event loop
        closes the socket.
    """

    def __init__(self, exchange: Exchange, descriptor: int) -> None:
        self._exchange = exchange
        # Family and type are not used. Passing them saves system calls.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, os.dup(descriptor))
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        self._room = poll.poll
        self._lock = threading.Lock()
        self._revoked = False
        self._head = b""
        self._unsent = 0
        self.started = False
        self.stalled = False
        """Whether the client is too slow, so that the event loop must send the rest."""

    def start(self, headers: Sequence[tuple[bytes, bytes]], nbytes: int) -> None:
        """Start a response of `nbytes`, with status 200.

        Raises
        ------
        ConnectionAbortedError
            The response was revoked.
        """
        self._head = response_head(200, self._exchange.own_headers(), headers)
        with self._lock:
            if self._revoked:
                raise ConnectionAbortedError("the answer came too late")
            self.started = True
            self._exchange.begin_elsewhere(nbytes)
            self._unsent = nbytes

    def write(self, data: memoryview, descriptor: int | None = None) -> int:
        """Send as much of `data` as the client accepts; returns the number of bytes.

        Raises
        ------
        ConnectionAbortedError
            There was no room for even the first byte, which would have carried the `descriptor`.
        """
        total = len(data)
        deadline = time.monotonic() + PATIENCE_SECONDS
        send, room = self._socket.send, self._room
        if self._head:
            # Send head and body in one packet, so that the client wakes up once.
            with contextlib.suppress(BlockingIOError):
                sent = self._socket.sendmsg((self._head, data), () if descriptor is None else _passing(descriptor))
                descriptor = None
                in_head = min(sent, len(self._head))
                self._head = self._head[in_head:]
                data = data[sent - in_head :]
        if descriptor is not None:
            raise ConnectionAbortedError("the client does not take the descriptor")
        while data and not self._head:
            if not room(_POLL_MS) or time.monotonic() > deadline:
                break
            with contextlib.suppress(BlockingIOError):
                data = data[send(data) :]
        self.stalled = bool(data)
        sent = total - len(data)
        self._unsent -= sent
        return sent

    def close(self) -> None:
        """Close the duplicated socket. Only the writing thread may do this: the descriptor could be reused at once."""
        self._socket.close()

    def take_back(self) -> bytes:
        """Return to the event loop, which sends the rest, starting with the returned bytes."""
        self._exchange.rest = len(self._head) + self._unsent
        return self._head

    def revoke(self) -> None:
        """Cancel the response: if it has started, it is cut off, else it never starts."""
        with self._lock:
            self._revoked = True
            if self.started:
                self._exchange.disconnected = True
                self._exchange.connection.transport.abort()
                with contextlib.suppress(OSError):
                    # Stop a thread that is still writing.
                    self._socket.shutdown(socket.SHUT_RDWR)


def _passing(descriptor: int) -> list[tuple[int, int, bytes]]:
    """Ancillary data that passes a descriptor to the other process."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))]
