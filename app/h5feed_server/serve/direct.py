"""Writes responses to the socket from the thread that reads them, bypassing the event loop.

The event loop would wake up for every piece that the socket accepts, and the thread would have to hand over each
response. A slow client does not hold up the thread: after a moment the rest is left to the event loop.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Sequence

from .http1 import Exchange, response_head

PATIENCE_SECONDS = 0.05
"""How long a thread goes on with one block for a peer that takes it slowly."""

_POLL_MS = 50


class DirectWriter:
    """See `api.peer.Writer`.

    Parameters
    ----------
    exchange : Exchange
        What the event loop knows of the answer.
    descriptor : int
        Of the connection's socket, non-blocking; duplicated, so that it stays ours when the server closes its own.
    """

    def __init__(self, exchange: Exchange, descriptor: int) -> None:
        self._exchange = exchange
        # Family and type are not looked at, and need not be asked for.
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
        """The peer does not keep up: `write` keeps away from the socket from now on."""

    def start(self, headers: Sequence[tuple[bytes, bytes]], nbytes: int) -> None:
        """Begin an answer of `nbytes`, with status 200.

        Raises
        ------
        ConnectionAbortedError
            Nobody waits for this answer any more.
        """
        self._head = response_head(200, self._exchange.own_headers(), headers)
        with self._lock:
            if self._revoked:
                raise ConnectionAbortedError("the answer came too late")
            self.started = True
            self._exchange.begin_elsewhere(nbytes)
            self._unsent = nbytes

    def write(self, data: memoryview) -> int:
        """Send what the peer takes of `data`; returns how many bytes that were."""
        total = len(data)
        deadline = time.monotonic() + PATIENCE_SECONDS
        send, room = self._socket.send, self._room
        if self._head:
            # Head and body in one packet: the peer wakes once.
            with contextlib.suppress(BlockingIOError):
                sent = self._socket.sendmsg((self._head, data))
                in_head = min(sent, len(self._head))
                self._head = self._head[in_head:]
                data = data[sent - in_head :]
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
        """Let go of the socket. For the thread alone: under it, a closed descriptor might be another's soon."""
        self._socket.close()

    def take_back(self) -> bytes:
        """End the direct way: the server goes on with what is unsent, beginning with the bytes returned."""
        self._exchange.rest = len(self._head) + self._unsent
        return self._head

    def revoke(self) -> None:
        """Give up: an answer that has not begun will not, one that has is cut off."""
        with self._lock:
            self._revoked = True
            if self.started:
                self._exchange.disconnected = True
                self._exchange.connection.transport.abort()
                with contextlib.suppress(OSError):
                    # A thread that is writing still must not get on with it.
                    self._socket.shutdown(socket.SHUT_RDWR)
