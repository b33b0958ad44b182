"""Connections, with limits on what clients may send and how long they may take.

The limits do not depend on who the client is: they apply before any token is checked. The worker calls
`Connection.look` every half second; there is no timer per request.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Sequence
from typing import Any, Protocol

from h5feed.errors import BadParameter, FeedError, TooLarge

from ..api.identity import UNIX, plain_address
from ..api.peer import PEER
from ..api.problems import problem
from ..api.redaction import without_tokens
from ..sharing.request_id import HEADER, REQUEST_ID, new_request_id, valid_id
from .direct import DirectWriter
from .http1 import Exchange, Host, Http1, response_head

HEAD_BYTES = 32 << 10
"""Maximum size of the request line and the headers together. Larger ones get 431."""

KEEP_ALIVE_SECONDS = 75.0
"""How long a connection may be idle."""

HEAD_SECONDS = 10.0
"""Deadline for a request head, from its first byte, and for a TLS handshake."""

RATE_SECONDS = 20.0
"""Window over which the minimum rate ``min_rate`` is measured."""

_DISCARDED_BYTES = 64 << 20
"""Maximum size of a body that is read and discarded after its response was sent, so that the client can read it."""

_MAX_PIPELINED = 64
"""Maximum number of requests that wait behind the current one."""

_LINGER_SECONDS, _LINGER_BYTES = 2.0, 16 << 20
"""After a refusal, how long and for how many bytes input is discarded, so that the client can read the response."""

_NUMBERS = itertools.count()
"""Numbers the connections in the order of their creation. The time of the event loop is the same for many."""

_Refusal = tuple[FeedError, int]
"""The error, and the status of the response."""

_NO_HTTP: _Refusal = BadParameter("not a valid HTTP request"), 400
_TOO_LONG: _Refusal = TooLarge(f"the request headers are longer than {HEAD_BYTES} bytes"), 431


class Owner(Protocol):
    """The worker that a connection belongs to."""

    host: Host
    patience: float
    """Maximum time for receiving the body of a request, in seconds."""
    min_rate: int

    def say_closed(self) -> None:
        """Called once, when the connection is closed."""

    def trusts(self, address: str) -> bool:
        """Whether this is the address of a trusted proxy."""


def address_of(connection: socket.socket) -> str:
    """Address of the client of a new connection."""
    with contextlib.suppress(OSError):
        name = connection.getpeername()
        if isinstance(name, tuple):
            return plain_address(name[0])
    return UNIX


def refusal(error: FeedError, status: int, host: Host) -> bytes:
    """A complete response for a request that does not reach the application. The connection is closed after it."""
    request_id = new_request_id()
    token = REQUEST_ID.set(request_id)
    answer = problem(error, status=status)
    REQUEST_ID.reset(token)
    headers = [*answer.raw_headers, (b"connection", b"close")]
    return response_head(status, host.header_lines(request_id), headers) + bytes(answer.body)


def _given_id(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """The request id that a proxy has created or passed on."""
    given = next((valid_id(value) for name, value in headers if name == HEADER), None)
    # The id is logged and sent back, so it must not be a token that a client has put there by mistake.
    return given if given is None or without_tokens(given) == given else None


class _Refused(Exception):
    """Raised in a callback of the parser, to stop it."""


class Connection(Http1):
    """An HTTP/1.1 connection with limits; threads may write responses to its socket."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner.host)
        self._owner = owner
        self.caller = ""
        """The caller that it counts for: the address of the client, until a request has a token."""
        self.number = next(_NUMBERS)
        self._is_proxy = False
        self._refusal = _NO_HTTP
        self._refused = self._upgraded = self._ended = False
        self._idle: asyncio.TimerHandle | None = None

        # State of receiving.
        self._thrown_away = 0
        self._in_head = self._is_first_piece = False
        self._head_since = self._request_since = 0.0
        self._received = self._body_received = 0

        # The window in which bytes are counted. It is open while the server waits for the client.
        self._window_since: float | None = None
        self._progress = 0
        self._unsent_seen = 0

    # Receiving

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.caller = self.client[0] if self.client else UNIX
        self._is_proxy = self._owner.trusts(self.caller)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_awaiting()
        self._owner.say_closed()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._thrown_away += len(data)
            if self._thrown_away > _LINGER_BYTES:
                self.abort()
            return
        if self._upgraded:
            return
        self._is_first_piece = False
        super().data_received(data)
        if self._refused:
            return
        latest = self.latest
        if self._in_head or (latest is not None and latest.more_body):
            self._progress += len(data)
            self._bound(len(data))
        if self._in_head or (latest is not None and not latest.complete):
            # Other deadlines apply from now on. Data that starts no request, such as an empty line, does not count.
            self._stop_awaiting()

    def _bound(self, nbytes: int) -> None:
        """Limit everything that could be endless: heads, trailers, chunk framing, and bodies that are discarded."""
        if self._is_first_piece:
            # Some of it may belong to the previous request.
            self._received = self._body_received = 0
            return
        self._received += nbytes
        if self._in_head or (self.latest is not None and not self.latest.complete):
            if self._received > HEAD_BYTES + 2 * self._body_received:
                self._refuse(*_TOO_LONG)
        elif self._received > _DISCARDED_BYTES:
            self.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._is_first_piece = True
        self._head_since = self.loop.time()

    def on_headers_complete(self) -> None:
        nbytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if nbytes > HEAD_BYTES:
            self._refusal = _TOO_LONG
            raise _Refused
        if len(self.waiting) >= _MAX_PIPELINED:
            raise _Refused
        self._in_head = False
        self._request_since = self._head_since
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_received += len(body)
        super().on_body(body)

    def offer(self, exchange: Exchange) -> None:
        exchange.request_id = (self._is_proxy and _given_id(self.headers)) or new_request_id()
        # The peer belongs to this request: more requests may have arrived before its turn comes.
        exchange.scope["extensions"] = {PEER: _Peer(self, exchange, self.has_asked() and self.is_idle())}

    def upgrade_wanted(self) -> None:
        # No upgrade is supported: the request is answered, and everything after it is ignored.
        if self.latest is not None:
            self.latest.keep_alive = False
        self._upgraded = True

    def no_request(self) -> None:
        self._refuse(*self._refusal)

    # Refusing and closing

    def _refuse(self, error: FeedError, status: int) -> None:
        self._refused = True
        running, latest = self.running, self.latest
        if running is not None and not running.complete:
            if latest is not None and not latest.more_body:
                # What came before is whole: it is answered, and then the connection ends.
                latest.keep_alive = False
                return
            running.disconnect()
            running.is_refused = running.is_waiting and not running.started and running is latest
            if not running.is_refused:
                # A response is in progress, and a thread may be writing it, so no other response can be sent.
                self.abort()
                return
        self.transport.write(refusal(error, status, self.host))
        # Closing with unread bytes would reset the connection, and the client might not see the response.
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(_LINGER_SECONDS, self.transport.abort)
        else:
            self.transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._ended = True
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.descriptor())) as connection:
            connection.shutdown(socket.SHUT_RDWR)
        self.transport.abort()

    def descriptor(self) -> int:
        """File descriptor of the socket."""
        number: int = self.transport.get_extra_info("socket").fileno()
        return number

    def answered(self) -> None:
        super().answered()
        if self.running is None or self.running.complete:
            self._await_request()

    def _await_request(self) -> None:
        """Start the keep-alive timer."""
        self._stop_awaiting()
        self._idle = self.loop.call_later(KEEP_ALIVE_SECONDS, self._close_idle)

    def _stop_awaiting(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _close_idle(self) -> None:
        """Called when the keep-alive timer expires; `look` handles data that is still buffered."""
        if self.unsent():
            self._await_request()
        elif not self.transport.is_closing():
            self.transport.close()

    # Measuring the rate

    def resume_writing(self) -> None:
        """Called when the write buffer is nearly empty."""
        self._count_sent()
        super().resume_writing()

    def unsent(self) -> int:
        """Bytes that the server buffers for the client."""
        return self.transport.get_write_buffer_size()

    def _count_sent(self) -> int:
        unsent = self.unsent()
        self._progress += max(0, self._unsent_seen - unsent)
        self._unsent_seen = unsent
        return unsent

    def rate(self, now: float) -> float | None:
        """Bytes per second that the client has accepted or sent recently; None if the server is not waiting for it."""
        if self._window_since is None:
            return None
        return self._progress / max(now - self._window_since, 0.1)

    def watched_for(self, now: float) -> float:
        """Seconds over which `rate` is measured."""
        return 0.0 if self._window_since is None else now - self._window_since

    def is_idle(self) -> bool:
        """Whether no response is in progress or buffered."""
        return not self.unsent() and (self.running is None or self.running.complete)

    def is_ended(self) -> bool:
        """Whether the server has aborted it, even if it is not closed yet."""
        return self._ended

    def has_asked(self) -> bool:
        """Whether the client has sent a request."""
        return self.running is not None

    def look(self, now: float) -> bool:
        """Whether the connection must be closed because the client is too slow."""
        unsent = self._count_sent()
        latest = self.latest
        if self._in_head:
            if self.running is not None and not self.running.complete:
                # It is behind a request in progress, so the server does not read it now.
                self._head_since = now
            elif now - self._head_since > HEAD_SECONDS:
                return True
        elif latest is not None and latest.more_body:
            if not self.is_reading:
                self._request_since = now
            elif now - self._request_since > self._owner.patience:
                return True
            else:
                unsent = unsent or 1
        if not unsent:
            self._window_since = None
            return False
        if self._window_since is None:
            self._window_since, self._progress = now, 0
        elif now - self._window_since >= RATE_SECONDS:
            slow = self._progress < self._owner.min_rate * (now - self._window_since)
            self._window_since, self._progress = now, 0
            return slow
        return False


class _Peer:
    """See `api.peer.Peer`."""

    def __init__(self, connection: Connection, exchange: Exchange, keeps_up: bool) -> None:
        self._connection = connection
        self._exchange = exchange
        self._keeps_up = keeps_up

    def direct(self) -> DirectWriter | None:
        connection, exchange = self._connection, self._exchange
        usual = connection.scheme == "http" and exchange.keep_alive and not exchange.expects_continue
        # The event loop must first send the rest of the previous response.
        if not usual or self.is_gone() or connection.unsent():
            return None
        try:
            return DirectWriter(exchange, connection.descriptor())
        except OSError:
            # There are no free file descriptors.
            return None

    def is_local(self) -> bool:
        family: socket.AddressFamily = self._connection.transport.get_extra_info("socket").family
        return family == socket.AF_UNIX

    def is_gone(self) -> bool:
        return self._exchange.disconnected or self._connection.transport.is_closing()

    def has_begun(self) -> bool:
        return self._exchange.started

    def has_all(self) -> bool:
        return self._exchange.is_handed_over()

    def sent_bytes(self) -> int:
        return self._exchange.length - self._exchange.rest

    def counts_for(self, caller: str) -> bool:
        self._connection.caller = caller
        return self._keeps_up

    def abort(self) -> None:
        self._exchange.disconnected = True
        self._connection.abort()
