"""HTTP/1.1 over a connection, parsed by httptools and answered by an ASGI application.

`Http1` implements the protocol only; `serve.connection.Connection` adds limits and deadlines.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import re
import socket
import time
import urllib.parse
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import httptools
from starlette.types import ASGIApp, Message

from ..api.identity import plain_address
from ..api.redaction import without_secrets
from ..sharing.request_id import HEADER, REQUEST_ID

logger = logging.getLogger(__name__)

_BODY_BYTES = 64 << 10
"""Size of unread request body above which the connection stops reading."""

_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode()) for status in http.HTTPStatus
}

_BAD_NAME = re.compile(b'[\x00-\x20\x7f()<>@,;:\\[\\]={}\\\\"]')
_BAD_VALUE = re.compile(b"[\x00-\x08\x0a-\x1f\x7f]")

_BODILESS = (204, 304)

_NO_CHUNKS_BEFORE = "1.1"


def response_head(status: int, own: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Status line and headers of a response; `own` are header lines that the server adds."""
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return b"".join([line, own, *[b"%b: %b\r\n" % header for header in headers], b"\r\n"])


@dataclass(eq=False)
class Host:
    """State shared by all connections of a process."""

    app: ASGIApp
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Headers of every response, in addition to the date."""
    connections: set[Http1] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    is_closing: bool = False
    """Whether the process is shutting down, so that errors are expected."""
    _dated: tuple[int, bytes] = (-1, b"")

    def header_lines(self, request_id: str) -> bytes:
        """Lines of the headers that every response has."""
        now = int(time.time())
        if self._dated[0] != now:
            headers = [(b"date", formatdate(now, usegmt=True).encode()), *self.headers]
            self._dated = now, b"".join([b"%b: %b\r\n" % header for header in headers])
        return b"%b%b: %b\r\n" % (self._dated[1], HEADER, request_id.encode("ascii"))


class Exchange:
    """One request and its response, as ASGI defines them.

    Attributes
    ----------
    scope : dict
        The ASGI scope; empty when the application has finished.
    keep_alive : bool
        Whether the connection stays open after the response.
    expects_continue : bool
        Whether the client waits for ``100 Continue`` before it sends the body.
    more_body : bool
        Whether more of the request body will arrive.
    is_waiting : bool
        Whether the application has not started, or waits for more of the request body, so that it is not writing.
    is_refused : bool
        Whether the connection has already refused it, so that the application must not start.
    started, complete : bool
        Whether the response was started, and whether all of it was passed to the transport.
    disconnected : bool
        Whether the client has disconnected. Anything that is sent is dropped.
    request_id : str
        Sent with the response.
    length : int
        Size of the response body in bytes: as announced, or as sent so far.
    rest : int
        Bytes of the response body that are still missing, if its size was announced.
    """

    def __init__(self, connection: Http1, scope: dict[str, Any], keep_alive: bool, expects_continue: bool) -> None:
        self.connection = connection
        self.scope = scope
        self.keep_alive = keep_alive
        self.expects_continue = expects_continue
        self.more_body = True
        self.is_waiting, self.is_refused = True, False
        self.started = self.complete = self.disconnected = False
        self.request_id = ""
        self.length = self.rest = 0
        self._is_chunked = self._is_measured = False
        self._has_no_body = scope["method"] == "HEAD"
        self._body = bytearray()
        self._news = asyncio.Event()

    def put(self, body: bytes) -> int:
        """Add to the request body; returns the number of bytes that the application has not read yet."""
        self._body += body
        self._news.set()
        return len(self._body)

    def end_body(self) -> None:
        """The request is complete."""
        self.more_body = False
        self._news.set()

    def disconnect(self) -> None:
        """The client has disconnected."""
        if not self.complete:
            self.disconnected = True
        self._news.set()

    def own_headers(self) -> bytes:
        """Header lines that are added to those of the application."""
        return self.connection.host.header_lines(self.request_id)

    def begin_elsewhere(self, nbytes: int) -> None:
        """The response head, for a body of `nbytes`, is written by another thread. May be called from any thread."""
        self.started = True
        self.expects_continue = False
        self.length = self.rest = nbytes
        self._is_measured = True

    def is_handed_over(self) -> bool:
        """Whether the whole response was passed to the transport or the socket. The client may then have disconnected
        before the application has finished."""
        return self.complete or (self._is_measured and not self.rest)

    async def run(self, app: ASGIApp) -> None:
        """Run `app` for this request."""
        host, connection = self.connection.host, self.connection
        if self.is_refused:
            self.scope = {}
            return
        self.is_waiting = False
        REQUEST_ID.set(self.request_id)
        try:
            await app(self.scope, self.receive, self.send)
            # The transport knows that the client has disconnected shortly before it reports it.
            if not (self.complete or self.disconnected or connection.transport.is_closing()):
                logger.error(
                    "the response to %s was never %s", self._shown_path(), "completed" if self.started else "started"
                )
                await self._fail()
        except Exception as error:
            if not host.is_closing:
                logger.error("request %s failed", self._shown_path(), exc_info=error)
            await self._fail()
        except BaseException:
            # The process is exiting.
            connection.transport.abort()
            raise
        finally:
            # Break the reference cycle.
            self.scope = {}

    def _shown_path(self) -> str:
        """The path for the log: on one line, and without tokens."""
        return without_secrets(self.scope["path"].encode("unicode_escape").decode("ascii"))

    async def _fail(self) -> None:
        if self.complete:
            return
        if self.started:
            self.connection.transport.close()
            return
        text = b"Internal Server Error"
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        headers.append((b"content-length", b"%d" % len(text)))
        await self.send({"type": "http.response.start", "status": 500, "headers": headers})
        await self.send({"type": "http.response.body", "body": text})

    async def receive(self) -> Message:
        """ASGI receive: the next part of the request body, or a disconnect."""
        connection = self.connection
        if self.expects_continue and not connection.transport.is_closing():
            connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.expects_continue = False
        if not self.disconnected and not self.complete:
            connection.resume_reading()
            self.is_waiting = True
            await self._news.wait()
            self.is_waiting = False
            self._news.clear()
        if self.disconnected or self.complete:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), bytearray()
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        """ASGI send: the next part of the response; waits while too much is buffered."""
        connection = self.connection
        if not connection.is_writable.is_set() and not self.disconnected:
            await connection.is_writable.wait()
        if self.disconnected:
            return
        if not self.started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"expected http.response.start, got {message['type']}")
            self._start(message["status"], message.get("headers", ()))
        elif not self.complete:
            if message["type"] != "http.response.body":
                raise RuntimeError(f"expected http.response.body, got {message['type']}")
            self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"got {message['type']} after the response was complete")

    def _start(self, status: int, headers: Any) -> None:
        sent: list[tuple[bytes, bytes]] = []
        length: int | None = None
        says_close = False
        for name, value in headers:
            if _BAD_NAME.search(name) or _BAD_VALUE.search(value):
                raise RuntimeError(f"invalid header {name!r}: {value!r}")
            lowered = name.lower()
            if lowered == b"content-length":
                length = int(value)
            elif lowered == b"transfer-encoding":
                # The server decides itself whether the response is chunked.
                continue
            elif lowered == b"connection" and b"close" in [token.strip() for token in value.lower().split(b",")]:
                self.keep_alive, says_close = False, True
            sent.append((name, value))
        self._has_no_body = self._has_no_body or status in _BODILESS
        if length is None and not self._has_no_body:
            if self.scope["http_version"] >= _NO_CHUNKS_BEFORE:
                self._is_chunked = True
                sent.append((b"transfer-encoding", b"chunked"))
            else:
                # The end of the connection marks the end of the body.
                self.keep_alive = False
        self._is_measured = length is not None and not self._has_no_body
        self.length = self.rest = length or 0
        if not self.keep_alive and not says_close:
            sent.append((b"connection", b"close"))
        self.started = True
        self.expects_continue = False
        self.connection.transport.write(response_head(status, self.own_headers(), sent))

    def _send_body(self, body: bytes | memoryview, more_body: bool) -> None:
        transport = self.connection.transport
        if self._is_chunked:
            self.length += len(body)
            parts = [b"%x\r\n" % len(body), body, b"\r\n"] if body else []
            if not more_body:
                parts.append(b"0\r\n\r\n")
            transport.write(b"".join(parts))
        elif not self._has_no_body:
            if self._is_measured:
                if len(body) > self.rest:
                    raise RuntimeError("the response is longer than its content-length")
                self.rest -= len(body)
            transport.write(body)
        if more_body:
            return
        if self._is_measured and self.rest:
            raise RuntimeError("the response is shorter than its content-length")
        self.complete = True
        self._news.set()
        if not self.keep_alive:
            transport.close()
        self.connection.answered()


class Http1(asyncio.Protocol):
    """An HTTP/1.1 connection.

    Attributes
    ----------
    latest : Exchange or None
        The request that was received last, at least its head.
    running : Exchange or None
        The request that the application is answering or has answered last.
    waiting : deque of Exchange
        Pipelined requests, which are answered in order.
    """

    transport: asyncio.Transport

    def __init__(self, host: Host) -> None:
        self.host = host
        self.loop = asyncio.get_running_loop()
        self.parser: Any = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):
            # Ignore data after a request that closes the connection, instead of refusing this request.
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.client: tuple[str, int] | None = None
        self.server: tuple[str, int | None] | None = None
        self.scheme = "http"
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.latest: Exchange | None = None
        self.running: Exchange | None = None
        self.waiting: deque[Exchange] = deque()
        self.is_reading = True
        self.is_writable = asyncio.Event()
        self.is_writable.set()
        self._expects_continue = self._has_head = False

    # Called by the transport

    def connection_made(self, transport: Any) -> None:
        # uvloop's transports are not subclasses of asyncio's.
        self.transport = transport
        self.host.connections.add(self)
        self.client, self.server = _addresses(transport.get_extra_info("socket"))
        self.scheme = "https" if transport.get_extra_info("sslcontext") else "http"

    def connection_lost(self, exc: Exception | None) -> None:
        self.host.connections.discard(self)
        # Notify all requests, not only the last one.
        for exchange in (self.running, self.latest, *self.waiting):
            if exchange is not None:
                exchange.disconnect()
        self.is_writable.set()
        # Break the reference cycle.
        self.parser = None

    def pause_writing(self) -> None:
        self.is_writable.clear()

    def resume_writing(self) -> None:
        self.is_writable.set()

    def pause_reading(self) -> None:
        if self.is_reading:
            self.is_reading = False
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Resume reading if it was paused."""
        if not self.is_reading:
            self.is_reading = True
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.upgrade_wanted()
        except httptools.HttpParserError:
            self.no_request()

    # Called by the parser

    def on_message_begin(self) -> None:
        self.url, self.headers = b"", []
        self._expects_continue = self._has_head = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_head:
            # A trailer. As a header it would be believed, though no proxy has looked at it.
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._has_head = True
        version = self.parser.get_http_version()
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "method": self.parser.get_method().decode("ascii"),
            "root_path": "",
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": url.path,
            "query_string": url.query or b"",
            "headers": self.headers,
            "state": {},
        }
        keep_alive = version != "1.0" and self.parser.should_keep_alive()
        exchange = self.latest = Exchange(self, scope, keep_alive, self._expects_continue)
        self.offer(exchange)
        if self.running is None or self.running.complete:
            self._run(exchange)
        else:
            self.pause_reading()
            self.waiting.append(exchange)

    def on_body(self, body: bytes) -> None:
        exchange = self.latest
        if exchange is not None and not exchange.complete and exchange.put(body) > _BODY_BYTES:
            self.pause_reading()

    def on_message_complete(self) -> None:
        exchange = self.latest
        if exchange is not None and not exchange.complete:
            exchange.end_body()

    # Answering requests

    def offer(self, exchange: Exchange) -> None:
        """Hook, called before a request is answered: extend its scope."""

    def no_request(self) -> None:
        """Hook, called for data that is not a valid request."""
        self.transport.close()

    def upgrade_wanted(self) -> None:
        """Hook, called for upgrade requests: the request is answered, everything after it is ignored."""

    def _run(self, exchange: Exchange) -> None:
        self.running = exchange
        task = self.loop.create_task(exchange.run(self.host.app))
        self.host.tasks.add(task)
        task.add_done_callback(self.host.tasks.discard)

    def answered(self) -> None:
        """Called when a response is complete."""
        if self.transport.is_closing():
            return
        self.resume_reading()
        if self.waiting:
            self._run(self.waiting.popleft())

    def shutdown(self) -> None:
        """Close the connection once the current request is answered."""
        if self.latest is None or self.latest.complete:
            self.transport.close()
        else:
            self.latest.keep_alive = False


def _addresses(connection: socket.socket | None) -> tuple[tuple[str, int] | None, tuple[str, int | None] | None]:
    """Client and server address, as ASGI defines them."""
    client: tuple[str, int] | None = None
    server: tuple[str, int | None] | None = None
    if connection is not None:
        # A client that has disconnected has no address.
        with contextlib.suppress(OSError):
            name = connection.getpeername()
            client = (plain_address(name[0]), int(name[1])) if isinstance(name, tuple) else None
        with contextlib.suppress(OSError):
            name = connection.getsockname()
            server = (plain_address(name[0]), int(name[1])) if isinstance(name, tuple) else (name, None)
    return client, server
