"""HTTP/1.1 for httpx over our own sockets, so that big bodies land in recycled buffers.

httpx stays the face: auth, timeouts, event hooks, headers. Beneath it this transport keeps plain connections (tcp, TLS
or a Unix socket) and, for a request that carries a `BufferPool` in ``extensions["h5feed.pool"]``, reads the body of a
successful answer straight into one leased buffer, found in ``response.extensions["h5feed.body"]``. Stock httpx joins
network chunks into fresh memory, which is several times slower.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from .buffers import BufferPool, PoolExhausted

POOL = "h5feed.pool"
"""Request extension: the `BufferPool` that the body is to be read into."""

BODY = "h5feed.body"
"""Response extension: the body, a (content-length,) uint8 array from that pool."""

DEADLINE = "h5feed.deadline"
"""Request extension: `time.monotonic()` by which the whole answer must be there."""

MAX_PLAIN_BYTES = 64 << 20
"""Bytes: bound on a body that is read without a pool (metadata, row ids, errors)."""


class BodyCut(httpx.RemoteProtocolError):
    """The connection ended in the middle of a body that was being read into a buffer.

    ``received`` holds what came before, a (n,) uint8 array: a stream of batches may have whole ones in it.
    """

    def __init__(self, message: str, received: npt.NDArray[np.uint8]) -> None:
        super().__init__(message)
        self.received = received


class FeedTransport(httpx.BaseTransport):
    """A pool of HTTP/1.1 connections to one server.

    Parameters
    ----------
    uds : str, optional
        Path of a Unix socket to connect to instead of the URL's host.
    verify : ssl.SSLContext or bool
        What `httpx.Client(verify=…)` takes; used for ``https`` URLs.
    max_idle : int
        Connections kept open while idle.
    """

    def __init__(self, *, uds: str | None = None, verify: ssl.SSLContext | bool = True, max_idle: int = 16) -> None:
        self._uds = uds
        self._verify = verify
        self._max_idle = max_idle
        self._idle: dict[tuple[str, str, int], list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        timeouts = request.extensions.get("timeout", {})
        deadline = request.extensions.get(DEADLINE, float("inf"))
        origin = (
            request.url.scheme,
            request.url.host,
            request.url.port or (443 if request.url.scheme == "https" else 80),
        )
        body = request.read()
        connection = self._idle_connection(origin)
        if connection is not None:
            try:
                return self._exchange(connection, request, body, timeouts, deadline, origin)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                # The server closed an idle connection before it saw this request: not a failure, try a new one.
                pass
            except (OSError, http.client.HTTPException) as error:
                raise _as_httpx_error(error, request) from error
        try:
            connection = self._connect(origin, min(timeouts.get("connect") or 1e9, deadline - time.monotonic()))
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection to {request.url.host}: {error}", request=request) from error
        except OSError as error:
            raise httpx.ConnectError(f"no connection to {request.url.host}: {error}", request=request) from error
        try:
            return self._exchange(connection, request, body, timeouts, deadline, origin)
        except (OSError, http.client.HTTPException) as error:
            raise _as_httpx_error(error, request) from error

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections = [connection for idle in self._idle.values() for connection in idle]
            self._idle.clear()
        for connection in connections:
            connection.close()

    def _idle_connection(self, origin: tuple[str, str, int]) -> http.client.HTTPConnection | None:
        with self._lock:
            idle = self._idle.get(origin)
            return idle.pop() if idle else None

    def _keep(self, origin: tuple[str, str, int], connection: http.client.HTTPConnection) -> None:
        with self._lock:
            idle = self._idle.setdefault(origin, [])
            if not self._closed and len(idle) < self._max_idle:
                idle.append(connection)
                return
        connection.close()

    def _connect(self, origin: tuple[str, str, int], timeout: float) -> http.client.HTTPConnection:
        scheme, host, port = origin
        if timeout <= 0:
            raise TimeoutError("the deadline has passed")
        if self._uds is not None:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connected.settimeout(timeout)
                connected.connect(self._uds)
            except BaseException:
                connected.close()
                raise
        else:
            connected = socket.create_connection((host, port), timeout)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if scheme == "https":
            try:
                connected = self._ssl_context().wrap_socket(connected, server_hostname=host)
            except BaseException:
                connected.close()
                raise
        connection = http.client.HTTPConnection(host, port)
        connection.sock = connected
        return connection

    def _ssl_context(self) -> ssl.SSLContext:
        with self._lock:
            if not isinstance(self._verify, ssl.SSLContext):
                self._verify = httpx.create_ssl_context(verify=self._verify)
            return self._verify

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        request: httpx.Request,
        body: bytes,
        timeouts: dict[str, float | None],
        deadline: float,
        origin: tuple[str, str, int],
    ) -> httpx.Response:
        """One request and its whole answer; the connection is kept or closed, whatever happens."""
        reusable = False
        try:
            # Held here too: http.client lets go of a socket whose server announces that it will close it.
            connected = connection.sock
            _limit(connected, timeouts.get("write"), deadline)
            connection.putrequest(
                request.method, request.url.raw_path.decode("ascii"), skip_host=True, skip_accept_encoding=True
            )
            for name, value in request.headers.raw:
                connection.putheader(name, value)
            connection.endheaders(body or None)
            _limit(connected, timeouts.get("read"), deadline)
            answer = connection.getresponse()
            extensions: dict[str, Any] = {"http_version": b"HTTP/1.1"}
            pool = request.extensions.get(POOL)
            if pool is not None and answer.status == 200 and answer.length is not None and request.method != "HEAD":
                extensions[BODY] = _read_into(connected, answer, pool, timeouts.get("read"), deadline)
                content = b""
            else:
                content = b"".join(_plain_chunks(connected, answer, timeouts.get("read"), deadline))
            answer.close()
            reusable = not answer.will_close
            # The body is here already, whole and decoded: httpx must not look for it again.
            headers = [(n, v) for n, v in answer.getheaders() if n.lower() != "transfer-encoding"]
            return httpx.Response(answer.status, headers=headers, content=content, extensions=extensions)
        finally:
            if reusable:
                self._keep(origin, connection)
            else:
                connection.close()


def _limit(connected: Any, timeout: float | None, deadline: float) -> None:
    """Let the next socket operation take at most `timeout`, and none of it lie beyond the deadline."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("the deadline has passed")
    allowed = min(remaining, 1e9 if timeout is None else timeout)
    connected.settimeout(allowed)


def _read_into(
    connected: Any, answer: http.client.HTTPResponse, pool: BufferPool, timeout: float | None, deadline: float
) -> npt.NDArray[np.uint8]:
    length = answer.length
    assert length is not None
    try:
        buffer = pool.lease(length)
    except PoolExhausted:
        # Whoever collects batches in a list keeps every buffer: theirs to do, only slower.
        buffer = np.empty(length, np.uint8)
    target = memoryview(buffer)
    done = 0
    stream: Any = answer.fp
    while done < length:
        # One read of the socket at a time, so that a dripping server meets the deadline too.
        try:
            received = stream.readinto1(target[done:])
        except ConnectionError:
            received = 0
        if not received:
            raise BodyCut(f"the connection ended after {done} of {length} bytes", buffer[:done])
        done += received
        if done < length:
            _limit(connected, timeout, deadline)
    return buffer


def _plain_chunks(
    connected: Any, answer: http.client.HTTPResponse, timeout: float | None, deadline: float
) -> Iterator[bytes]:
    total = 0
    while chunk := answer.read1(1 << 16):
        total += len(chunk)
        if total > MAX_PLAIN_BYTES:
            raise http.client.HTTPException(f"an answer of more than {MAX_PLAIN_BYTES} bytes where a short one was due")
        yield chunk
        _limit(connected, timeout, deadline)
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)


def _as_httpx_error(error: Exception, request: httpx.Request) -> httpx.TransportError:
    if isinstance(error, TimeoutError):
        return httpx.ReadTimeout(f"{request.url.host} did not answer in time: {error}", request=request)
    if isinstance(error, http.client.HTTPException):
        what = "the connection ended in mid-answer" if isinstance(error, http.client.IncompleteRead) else str(error)
        return httpx.RemoteProtocolError(f"{request.url.host}: {what or type(error).__name__}", request=request)
    return httpx.ReadError(f"{request.url.host}: {error}", request=request)
