"""An HTTP/1.1 transport for httpx that reads large bodies into recycled buffers.

httpx remains the interface: auth, timeouts, event hooks, headers. This transport manages the connections (TCP, TLS or a
Unix socket). If a request has a `BufferPool` in ``extensions["h5feed.pool"]``, the body of a successful response is
read directly into a leased buffer and returned in ``response.extensions["h5feed.body"]``. Stock httpx joins network
chunks into new memory, which is several times slower.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import math
import os
import re
import socket
import ssl
import struct
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..buffers import BufferPool
from .addresses import is_address
from .cancellation import Cancellation
from .certificates import default_context
from .http import httpx
from .proxies import Proxy, proxy_for
from .trace import TRANSFER, enter

POOL = "h5feed.pool"
"""Request extension: the `BufferPool` for the body, or the `Places` where it goes."""

MAX_BYTES = "h5feed.max_bytes"
"""Request extension: maximum size of this body in bytes."""

BODY = "h5feed.body"
"""Response extension: the body, a (content-length,) uint8 array from the pool."""

DEADLINE = "h5feed.deadline"
"""Request extension: `time.monotonic()` by which the whole response must have arrived."""

CANCELLED = "h5feed.cancelled"
"""Request extension: the `Cancellation` that aborts the request."""

MAX_PLAIN_BYTES = 64 << 20
"""Maximum size of a body that is read without a pool (metadata, row ids, errors), in bytes."""

MAX_HEAD_BYTES = 64 << 10
"""Maximum size of the status line and headers, in bytes."""

_TCP_INFO = struct.Struct("@68xI")
"""Linux's ``struct tcp_info`` as far as ``tcpi_rtt``, in microseconds."""

_LENGTH_DIGITS = 18
"""Maximum number of digits of a Content-Length: fits into an int64."""

_HTTP = b"HTTP/"
"""The first bytes of every HTTP response."""

_TLS = (b"\x15\x03", b"\x16\x03")
"""The first bytes of a TLS alert or handshake."""

_HEAD_READ = 16 << 10
"""Bytes per read until the head is complete. Body bytes read along with it are copied."""

Timeouts = Mapping[str, float | None]
"""Timeouts ``connect``, ``write`` and ``read`` in seconds, as in httpx."""


class BodyCut(httpx.RemoteProtocolError):
    """The connection ended in the middle of a body that was being read into a buffer.

    ``received`` is what arrived, a (n,) uint8 array. It may contain complete batches.
    """

    def __init__(self, message: str, received: npt.NDArray[np.uint8]) -> None:
        super().__init__(message)
        self.received = received


class _SpeaksTLS(http.client.HTTPException):
    """What should be HTTP is TLS."""


class ProxyFailed(httpx.ProxyError):
    """A proxy does not open a connection to the server; `is_final` says that it will not do so later, either."""

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


class Places(Protocol):
    """Where a body goes that is to be divided while it arrives."""

    def places(self, length: int) -> Iterator[npt.NDArray[np.uint8]]:
        """The buffers for a body of `length` bytes, one after the other; each is filled when the next is asked for.

        Called again if the request is repeated.
        """


@dataclass(frozen=True)
class Answer:
    """A complete response.

    Attributes
    ----------
    status : int
    headers : list of (str, str)
    body : (content-length,) uint8 or None
        The body of a successful response that was read into a pool; `content` is then empty. Empty if it went to
        `Places`.
    content : bytes
    """

    status: int
    headers: list[tuple[str, str]]
    body: npt.NDArray[np.uint8] | None
    content: bytes

    def header(self, name: str) -> str | None:
        """Value of a header; `name` is in lower case."""
        return next((value for known, value in self.headers if known.lower() == name), None)

    def as_response(self) -> httpx.Response:
        """The same as an httpx response."""
        # The body has already been read. httpx must not decompress it either: we never request compression, and a small
        # body could expand to any size.
        headers = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in self.headers
            if name.lower() not in ("transfer-encoding", "content-encoding")
        ]
        extensions: dict[str, Any] = {"http_version": b"HTTP/1.1"}
        if self.body is not None:
            extensions[BODY] = self.body
        return httpx.Response(self.status, headers=headers, content=self.content, extensions=extensions)


@dataclass(frozen=True)
class _Call:
    """A complete request and the limits of its response."""

    request: bytes
    method: str
    pool: BufferPool | Places | None
    max_bytes: int
    timeouts: Timeouts
    deadline: float
    cancelled: Cancellation | None


class FeedTransport(httpx.BaseTransport):
    """A pool of HTTP/1.1 connections to one server.

    Parameters
    ----------
    uds : str, optional
        Path of a Unix socket to connect to instead of the URL's host.
    verify : ssl.SSLContext or bool
        What `httpx.Client(verify=…)` takes; used for ``https`` URLs.
    max_idle : int
        Maximum number of idle connections kept open.
    address : str, optional
        The address to connect to, one of those of the URL's host.
    """

    def __init__(
        self,
        *,
        uds: str | None = None,
        verify: ssl.SSLContext | bool = True,
        max_idle: int = 64,
        address: str | None = None,
    ) -> None:
        self._uds = uds
        self._address = address
        self._verify = verify
        self._max_idle = max_idle
        self._idle: dict[tuple[str, str, int], list[socket.socket]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._proxies: dict[tuple[str, str, int], Proxy | None] = {}
        self.round_trip = math.inf
        """The shortest round trip when a connection was opened, in seconds."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        line = b"%b %b" % (request.method.encode("ascii"), request.url.raw_path)
        answer = self.exchange(
            request.url,
            line + head_after_target(request.headers) + request.read(),
            method=request.method,
            pool=request.extensions.get(POOL),
            max_bytes=request.extensions.get(MAX_BYTES, MAX_PLAIN_BYTES),
            timeouts=request.extensions.get("timeout", {}),
            deadline=request.extensions.get(DEADLINE, float("inf")),
            cancelled=request.extensions.get(CANCELLED),
        )
        return answer.as_response()

    def exchange(
        self,
        url: httpx.URL,
        request: bytes,
        *,
        method: str,
        pool: BufferPool | Places | None,
        max_bytes: int,
        timeouts: Timeouts,
        deadline: float,
        cancelled: Cancellation | None = None,
    ) -> Answer:
        """Send a complete request, including its head, to the server of `url`, and read the whole response.

        `deadline` is a time of `time.monotonic()`; `max_bytes` limits a body that is read into the `pool`.

        Raises
        ------
        httpx.RemoteProtocolError
            The server does not speak HTTP or violates it, so a retry would not help (except for `BodyCut`).
        httpx.TransportError
        """
        origin = (url.scheme, url.host, port_of(url))
        host = url.host if self._uds is None else f"the Unix socket {self._uds}"
        proxy = self._proxy(origin)
        if self._address is not None:
            host = f"{host} at {self._address}"
        if proxy is not None:
            host = f"{host} through the proxy {proxy.shown}"
            if url.scheme == "http":
                request = _through(proxy, url, request)
        call = _Call(request, method, pool, max_bytes, timeouts, deadline, cancelled)
        answer = self._answer(call, origin, host)
        if answer.status == 407 and proxy is not None:
            raise _refused(proxy, 407, url.netloc.decode("ascii"), "HTTP status 407")
        return answer

    @property
    def is_local(self) -> bool:
        """Whether it connects to a Unix socket."""
        return self._uds is not None

    def receive_descriptor(self, request: bytes, timeout: float) -> tuple[int, bytes, int | None]:
        """Send a complete GET request over a connection of its own, and receive a descriptor with the response.

        Returns
        -------
        status : int
        content : bytes
        descriptor : int or None

        Raises
        ------
        OSError, http.client.HTTPException
        """
        deadline = time.monotonic() + timeout
        received, descriptors = b"", list[int]()
        with self._connect(("http", "localhost", 80), timeout) as connected:
            try:
                connected.sendall(request)
                length, begin = None, 0
                while length is None or len(received) < begin + length:
                    connected.settimeout(max(1e-3, deadline - time.monotonic()))
                    # Not inheritable, from the beginning. `socket.recv_fds` ignores its flags.
                    room = socket.CMSG_SPACE(array("i").itemsize)
                    more, passed, flags, _ = connected.recvmsg(_HEAD_READ, room, socket.MSG_CMSG_CLOEXEC)
                    for level, kind, data in passed:
                        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                            descriptors += array("i", data[: len(data) - len(data) % array("i").itemsize])
                    if flags & socket.MSG_CTRUNC:
                        raise http.client.HTTPException("it passes more than one descriptor")
                    received += more
                    if not more or len(received) > MAX_HEAD_BYTES + MAX_PLAIN_BYTES:
                        raise http.client.IncompleteRead(received)
                    if length is None and b"\r\n\r\n" in received:
                        usual = _parse_usual(received)
                        if usual is None:
                            raise http.client.HTTPException("its response has no length")
                        status, _, begin, length, _ = usual
                if len(descriptors) > 1:
                    raise http.client.HTTPException(f"it passes {len(descriptors)} descriptors instead of one")
            except BaseException:
                for descriptor in descriptors:
                    os.close(descriptor)
                raise
        return status, received[begin:], descriptors[0] if descriptors else None

    def _answer(self, call: _Call, origin: tuple[str, str, int], host: str) -> Answer:
        """Send a request over an idle connection or a new one; `host` is for messages."""
        timeouts, deadline = call.timeouts, call.deadline
        try:
            connected = self._idle_connection(origin)
            if connected is not None:
                try:
                    return self._exchange(connected, call, origin)
                except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                    # The server closed the idle connection before it got this request: open a new one.
                    pass
            try:
                timeout = min(timeouts.get("connect") or 1e9, deadline - time.monotonic())
                connected = self._connect(origin, timeout, call.cancelled)
            except TimeoutError as error:
                raise httpx.ConnectTimeout(f"could not connect to {host}: {error}") from error
            except OSError as error:
                why = str(error)
                if isinstance(error, PermissionError) and self._uds is not None:
                    why = "permission denied (see H5FEED_UDS and H5FEED_SOCKET_MODE of the server)"
                raise httpx.ConnectError(f"could not connect to {host}: {why}") from error
            return self._exchange(connected, call, origin)
        except TimeoutError as error:
            raise httpx.ReadTimeout(f"{host} did not respond in time: {error}") from error
        except http.client.IncompleteRead as error:
            raise httpx.ReadError(f"{host}: the connection was closed in the middle of the response") from error
        except http.client.RemoteDisconnected as error:
            raise httpx.ReadError(f"{host}: {error}") from error
        except http.client.HTTPException as error:
            raise httpx.RemoteProtocolError(" ".join(str(error).split()) or type(error).__name__) from error
        except OSError as error:
            raise httpx.ReadError(f"{host}: {error}") from error

    def proxy_of(self, url: httpx.URL) -> str:
        """The proxy through which the server of `url` is asked, for messages; empty if there is none."""
        proxy = self._proxy((url.scheme, url.host, port_of(url)))
        return "" if proxy is None else proxy.shown

    def speaks_tls(self, url: httpx.URL, timeout: float) -> bool:
        """Whether the server at an ``http`` URL expects TLS and therefore closes every connection."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # No verification: no data is sent.
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with contextlib.suppress(OSError):
            connected = self._connect(("http", url.host, url.port or 80), timeout)
            with connected, context.wrap_socket(connected, server_hostname=url.host):
                return True
        return False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections = [connection for idle in self._idle.values() for connection in idle]
            self._idle.clear()
        for connection in connections:
            connection.close()

    def after_fork(self) -> None:
        """In the child: leave the connections to the parent; on a shared one, responses would get mixed up."""
        self._lock = threading.Lock()
        with contextlib.suppress(OSError):
            for connection in [one for idle in self._idle.values() for one in idle]:
                os.close(connection.detach())
        self._idle = {}

    def _idle_connection(self, origin: tuple[str, str, int]) -> socket.socket | None:
        with self._lock:
            idle = self._idle.get(origin)
            return idle.pop() if idle else None

    def _keep(self, origin: tuple[str, str, int], connection: socket.socket) -> None:
        with self._lock:
            idle = self._idle.setdefault(origin, [])
            if not self._closed and len(idle) < self._max_idle:
                idle.append(connection)
                return
        connection.close()

    def _connect(
        self, origin: tuple[str, str, int], timeout: float, cancelled: Cancellation | None = None
    ) -> socket.socket:
        scheme, host, port = origin
        if timeout <= 0:
            raise TimeoutError("the deadline has passed")
        began = time.monotonic()
        if self._uds is not None:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connected.settimeout(timeout)
                connected.connect(self._uds)
            except BaseException:
                connected.close()
                raise
        else:
            proxy = self._proxy(origin)
            if proxy is not None:
                connected = socket.create_connection((proxy.host, proxy.port), timeout)
            else:
                connected = _connected(self._address or host, port, timeout, cancelled)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if proxy is not None and scheme == "https":
                try:
                    _open_tunnel(connected, proxy, host, port, began + timeout)
                    connected.settimeout(timeout)
                except BaseException:
                    connected.close()
                    raise
        round_trip = time.monotonic() - began
        if self._proxy(origin) is None:
            # A busy machine or a slow name server makes opening a connection take longer than a round trip.
            round_trip = min(round_trip, _kernel_round_trip(connected))
        self.round_trip = min(self.round_trip, round_trip)
        if scheme == "https":
            try:
                connected = self._ssl_context().wrap_socket(
                    connected, server_hostname=host, do_handshake_on_connect=False
                )
                with _ends(cancelled, connected):
                    connected.do_handshake()
            except BaseException:
                connected.close()
                raise
        return connected

    def _proxy(self, origin: tuple[str, str, int]) -> Proxy | None:
        if self._uds is not None:
            return None
        if origin not in self._proxies:
            self._proxies[origin] = proxy_for(*origin)
        return self._proxies[origin]

    def _ssl_context(self) -> ssl.SSLContext:
        with self._lock:
            if not isinstance(self._verify, ssl.SSLContext):
                self._verify = default_context(self._verify)
            return self._verify

    def _exchange(self, connected: socket.socket, call: _Call, origin: tuple[str, str, int]) -> Answer:
        """Send one request and read the response, then keep or close the connection."""
        reusable = False
        try:
            with _ends(call.cancelled, connected):
                answer, reusable = _ask(connected, call)
            if call.cancelled is not None and call.cancelled.is_set():
                reusable = False
            return answer
        finally:
            if reusable:
                self._keep(origin, connected)
            else:
                connected.close()


def port_of(url: httpx.URL) -> int:
    """The port of an ``http`` or ``https`` URL, which may be that of the scheme."""
    return url.port or (443 if url.scheme == "https" else 80)


def _ends(cancelled: Cancellation | None, connected: socket.socket) -> contextlib.AbstractContextManager[None]:
    """Within this context, the cancellation of the request ends what goes on at the socket."""
    return contextlib.nullcontext() if cancelled is None else cancelled.ends(connected)


def _connected(host: str, port: int, timeout: float, cancelled: Cancellation | None) -> socket.socket:
    """A TCP connection. That to an address can be cancelled while it is being opened."""
    if cancelled is None or not is_address(host):
        return socket.create_connection((host, port), timeout)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    family, kind, protocol, _, address = found[0]
    connected = socket.socket(family, kind, protocol)
    try:
        connected.settimeout(timeout)
        with _ends(cancelled, connected):
            if cancelled.is_set():
                raise ConnectionAbortedError("the request was cancelled")
            connected.connect(address)
    except BaseException:
        connected.close()
        raise
    return connected


def _kernel_round_trip(connected: socket.socket) -> float:
    """The round trip that the kernel has measured, in seconds; infinite where it does not say."""
    if connected.family == socket.AF_UNIX:
        return 0.0
    if sys.platform != "linux":
        return math.inf
    try:
        info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        microseconds = _TCP_INFO.unpack(info)[0]
    except (OSError, struct.error):
        return math.inf
    return microseconds * 1e-6 if microseconds else math.inf


def head_after_target(headers: httpx.Headers) -> bytes:
    """The head of a request, without its method and target."""
    for name, value in headers.raw:
        if b"\n" in name + value or b"\r" in name + value:
            raise httpx.LocalProtocolError(f"the header {name.decode('latin-1')!r} contains a line break")
    lines = [b"%b: %b\r\n" % header for header in headers.raw]
    return b" HTTP/1.1\r\n%b\r\n" % b"".join(lines)


def with_headers(head: bytes, headers: Mapping[str, str]) -> bytes:
    """A head of `head_after_target` with further headers, before the empty line at its end."""
    lines = b"".join(f"{name}: {value}\r\n".encode("ascii") for name, value in headers.items())
    return b"%b%b\r\n" % (head[:-2], lines)


def _through(proxy: Proxy, url: httpx.URL, request: bytes) -> bytes:
    """The request as a proxy wants it: with the whole URL as its target."""
    method, _, rest = request.partition(b" ")
    head, _, following = rest.partition(b"\r\n")
    target = b"%b://%b%b" % (url.raw_scheme, url.netloc, head)
    return b"%b %b\r\n%b%b" % (method, target, proxy.authorization, following)


def _open_tunnel(connected: socket.socket, proxy: Proxy, host: str, port: int, deadline: float) -> None:
    """Ask a proxy for a connection to the server.

    Raises
    ------
    ProxyFailed
        It refuses, or is no HTTP proxy.
    """
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    asked = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n".encode("ascii")
    connected.sendall(b"%b%b\r\n" % (asked, proxy.authorization))
    try:
        received = _receive_head(connected, _Patience(connected, None, deadline))
    except (http.client.RemoteDisconnected, http.client.IncompleteRead):
        raise
    except http.client.HTTPException as error:
        said = "it speaks TLS" if isinstance(error, _SpeaksTLS) else " ".join(str(error).split())
        raise ProxyFailed(f"{proxy.shown} is not an http:// proxy: {said}", is_final=True) from None
    line = received.split(b"\r\n", 1)[0].decode("latin-1")
    match = re.fullmatch(r"HTTP/1\.[01] ([1-9][0-9][0-9])( .*)?", line)
    if match is None or not match[1].startswith("2"):
        raise _refused(proxy, int(match[1]) if match else 0, authority, line)


def _refused(proxy: Proxy, status: int, authority: str, line: str) -> ProxyFailed:
    """The error for what a proxy says itself."""
    what = f"the proxy {proxy.shown} refuses to connect to {authority}: it returned {line[:100]!r}"
    if status == 407:
        what += (
            ". Its user name or password is wrong"
            if proxy.authorization
            else ". Write user name and password into its URL: http://USER:PASSWORD@HOST:PORT"
        )
    elif status < 500:
        what += ". To connect without it, name the server in NO_PROXY"
    return ProxyFailed(what, is_final=status < 500 and status not in (408, 429))


def _ask(connected: socket.socket, call: _Call) -> tuple[Answer, bool]:
    """The response to one request, and whether the connection can be reused."""
    patience = _Patience(connected, call.timeouts.get("write"), call.deadline)
    unsent = memoryview(call.request)
    while unsent:
        patience.extend()
        unsent = unsent[connected.send(unsent) :]
    patience = _Patience(connected, call.timeouts.get("read"), call.deadline)
    received = _receive_head(connected, patience)
    if call.cancelled is not None:
        call.cancelled.heard()
    while received[9:10] == b"1" and received[9:12] != b"101":
        # An interim response, such as 103 Early Hints: the final one follows.
        received = _receive_head(connected, patience, received[received.index(b"\r\n\r\n") + 4 :])
    enter(TRANSFER)
    usual = _parse_usual(received)
    if usual is None or call.method == "HEAD":
        return _read_unusual(connected, received, call.method, patience)
    status, headers, begin, length, keep = usual
    if call.pool is not None and status == 200:
        _check_length(length, call.max_bytes)
        if isinstance(call.pool, BufferPool):
            # If the caller collects batches in a list, all buffers are in use: new memory works too, only slower.
            body = call.pool.lease_or_new(length)
            _receive_into(connected, body, received[begin:], patience)
        else:
            body, begun = np.empty(0, np.uint8), received[begin:]
            for place in call.pool.places(length):
                _receive_into(connected, place, begun, patience)
                begun = begun[len(place) :]
        answer = Answer(status, headers, body, b"")
    else:
        _check_length(length, MAX_PLAIN_BYTES)
        content = np.empty(length, np.uint8)
        _receive_into(connected, content, received[begin:], patience)
        answer = Answer(status, headers, None, content.tobytes())
    # After unexpected bytes behind the body, the connection cannot be trusted.
    return answer, keep and len(received) <= begin + length


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise http.client.HTTPException(f"it announces {length} bytes, expected at most {most}")


class _Patience:
    """Limits each socket operation to a timeout, and all of them to the deadline."""

    def __init__(self, connected: socket.socket, timeout: float | None, deadline: float) -> None:
        self._socket = connected
        self._timeout = 1e9 if timeout is None else timeout
        self._deadline = deadline

    def extend(self, *, in_kernel: bool = False) -> float:
        """Call before every operation; returns the `time.monotonic()` until which it need not be called again.

        With `in_kernel` the kernel enforces the timeout, which then raises `BlockingIOError`.
        """
        now = time.monotonic()
        remaining = self._deadline - now
        if remaining <= 0:
            raise TimeoutError("the deadline has passed")
        allowed = min(self._timeout, remaining)
        if in_kernel:
            self._socket.settimeout(None)
            # struct timeval; zero would mean no timeout.
            allowed = max(allowed, 1e-3)
            timeval = struct.pack("@ll", int(allowed), int(allowed % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        else:
            self._socket.settimeout(allowed)
        return max(now, self._deadline - self._timeout)


def _receive_head(connected: socket.socket, patience: _Patience, received: bytes = b"") -> bytes:
    """Read until the head is complete; returns it with any body bytes read along. Starts with `received`."""
    while True:
        if received[: len(_HTTP)] != _HTTP[: len(received)]:
            if received[:2] in _TLS:
                raise _SpeaksTLS("it speaks TLS: use a URL that starts with https://")
            raise http.client.HTTPException(f"it does not speak HTTP, but sent {received[:20]!r}")
        if b"\r\n\r\n" in received:
            return received
        if len(received) > MAX_HEAD_BYTES:
            raise http.client.HTTPException(f"its headers are longer than {MAX_HEAD_BYTES} bytes")
        patience.extend()
        more = connected.recv(_HEAD_READ)
        if not more:
            if not received:
                raise http.client.RemoteDisconnected("the connection was closed without a response")
            raise http.client.IncompleteRead(received)
        received += more


def _parse_usual(received: bytes) -> tuple[int, list[tuple[str, str]], int, int, bool] | None:
    """Status, headers, start of the body, its length, and whether the connection stays open; None for a response
    without a Content-Length, which is left to http.client."""
    end = received.index(b"\r\n\r\n")
    status_line, *lines = received[:end].decode("latin-1").split("\r\n")
    if not status_line.startswith("HTTP/1.1 ") or not status_line[9:12].isdecimal():
        return None
    status = int(status_line[9:12])
    headers = []
    length: str | None = None
    keep = True
    for line in lines:
        name, colon, value = line.partition(":")
        value = value.strip()
        if not colon or name != name.strip():
            return None
        lower = name.lower()
        if lower == "content-length":
            if length not in (None, value) or not (value.isascii() and value.isdigit()) or len(value) > _LENGTH_DIGITS:
                raise http.client.HTTPException(f"it announces {value[:40]!r} bytes")
            length = value
        elif lower == "transfer-encoding":
            return None
        elif lower == "connection":
            keep = "close" not in value.lower()
        headers.append((name, value))
    if length is None or status < 200 or status in (204, 304):
        return None
    return status, headers, end + 4, int(length), keep


def _receive_into(connected: socket.socket, buffer: npt.NDArray[np.uint8], begun: bytes, patience: _Patience) -> None:
    """Fill `buffer` with the `begun` bytes of a body and those that follow."""
    length = len(buffer)
    view = memoryview(buffer)
    done = min(len(begun), length)
    view[:done] = begun[:done]
    # If possible, the kernel waits for the whole body: each return to Python would have to wait for the GIL, which a
    # busy training loop holds for milliseconds. Not in the main thread, where signals would restart the wait.
    whole = (
        sys.platform == "linux"
        and not isinstance(connected, ssl.SSLSocket)
        and threading.current_thread() is not threading.main_thread()
    )
    until = 0.0
    while done < length:
        if time.monotonic() > until:
            until = patience.extend(in_kernel=whole)
        try:
            received = connected.recv_into(view[done:], 0, socket.MSG_WAITALL if whole else 0)
        except BlockingIOError:
            raise TimeoutError("timed out") from None
        except ConnectionError:
            received = 0
        if not received:
            raise BodyCut(f"the connection was closed after {done} of {length} bytes", buffer[:done])
        done += received


class _Rest(io.RawIOBase):
    """A socket as a file that starts with the bytes already received."""

    def __init__(self, connected: socket.socket, received: bytes, patience: _Patience) -> None:
        self._socket = connected
        self._received = received
        self._patience = patience

    def makefile(self, mode: str) -> io.BufferedReader:
        """The part of the socket interface that http.client uses."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if self._received:
            count = min(len(target), len(self._received))
            target[:count] = self._received[:count]
            self._received = self._received[count:]
            return count
        self._patience.extend()
        return self._socket.recv_into(target)


def _read_unusual(connected: socket.socket, received: bytes, method: str, patience: _Patience) -> tuple[Answer, bool]:
    """A response without a length or without a body, and whether the connection can be reused."""
    rest: Any = _Rest(connected, received, patience)
    answer = http.client.HTTPResponse(rest, method=method)
    answer.begin()
    _check_length(answer.length or 0, MAX_PLAIN_BYTES)
    content = b"".join(_chunks(answer))
    # http.client closes the file, not the socket.
    return Answer(answer.status, answer.getheaders(), None, content), not answer.will_close


def _chunks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    total = 0
    while chunk := answer.read1(1 << 16):
        total += len(chunk)
        _check_length(total, MAX_PLAIN_BYTES)
        yield chunk
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
