"""An HTTP/1.1 transport for httpx that reads large bodies into recycled buffers.

httpx remains the interface: auth, timeouts, event hooks, headers. This transport manages the connections (TCP, TLS or a
Unix socket). If a request has a `BufferPool` in ``extensions["h5feed.pool"]``, the body of a successful response is
read directly into a leased buffer and returned in ``response.extensions["h5feed.body"]``. Stock httpx joins network
chunks into new memory, which is several times slower.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import socket
import ssl
import struct
import sys
import threading
import time
from array import array
from collections.abc import Mapping

from ..buffers import BufferPool
from .addresses import is_address
from .cancellation import Cancellation
from .certificates import default_context
from .exchange import HEAD_READ, MAX_HEAD_BYTES, MAX_PLAIN_BYTES, Answer, Call, Places, Timeouts, ask, parse_usual
from .http import httpx
from .proxies import Proxy, proxy_for
from .tunnel import open_tunnel, refused, through

POOL = "h5feed.pool"
"""Request extension: the `BufferPool` for the body, or the `Places` where it goes."""

MAX_BYTES = "h5feed.max_bytes"
"""Request extension: maximum size of this body in bytes."""

DEADLINE = "h5feed.deadline"
"""Request extension: `time.monotonic()` by which the whole response must have arrived."""

CANCELLED = "h5feed.cancelled"
"""Request extension: the `Cancellation` that aborts the request."""

_TCP_INFO = struct.Struct("@68xI")
"""Linux's ``struct tcp_info`` as far as ``tcpi_rtt``, in microseconds."""


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
                request = through(proxy, url, request)
        call = Call(request, method, pool, max_bytes, timeouts, deadline, cancelled)
        answer = self._answer(call, origin, host)
        if answer.status == 407 and proxy is not None:
            raise refused(proxy, 407, url.netloc.decode("ascii"), "HTTP status 407")
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
                    more, passed, flags, _ = connected.recvmsg(HEAD_READ, room, socket.MSG_CMSG_CLOEXEC)
                    for level, kind, data in passed:
                        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                            descriptors += array("i", data[: len(data) - len(data) % array("i").itemsize])
                    if flags & socket.MSG_CTRUNC:
                        raise http.client.HTTPException("it passes more than one descriptor")
                    received += more
                    if not more or len(received) > MAX_HEAD_BYTES + MAX_PLAIN_BYTES:
                        raise http.client.IncompleteRead(received)
                    if length is None and b"\r\n\r\n" in received:
                        usual = parse_usual(received)
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

    def _answer(self, call: Call, origin: tuple[str, str, int], host: str) -> Answer:
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
                    open_tunnel(connected, proxy, host, port, began + timeout)
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

    def _exchange(self, connected: socket.socket, call: Call, origin: tuple[str, str, int]) -> Answer:
        """Send one request and read the response, then keep or close the connection."""
        reusable = False
        try:
            with _ends(call.cancelled, connected):
                answer, reusable = ask(connected, call)
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
