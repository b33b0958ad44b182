"""From TCP to a Unix socket, for servers on this machine.

A loopback URL begins with TCP. If a response has `OFFER_HEADER`, the client asks for the server's Unix socket, checks
that the socket is that server's, and uses it from then on. Whatever goes wrong means TCP. See `h5feed.handshake`.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypedDict
from urllib.parse import urlencode

from ..environment import is_set
from ..handshake import MAX_SOCKET_PATH, OFFER_HEADER, PROOF_PATH, proof_of
from ..schema import checked, read_json
from .cancellation import Cancellation
from .exchange import Answer
from .http import httpx
from .transport import FeedTransport

OFFER_SECONDS = 1.0
"""Deadline of everything between seeing the header and using the socket."""

DIRECT = "h5feed.direct"
"""Request extension: a list, to which the client's address of the connection is appended. Requests with it get a
connection of their own."""

_FIRST_REST, _LONGEST_REST = 5.0, 300.0
"""Seconds until a failed attempt is repeated, which doubles each time."""

_LOST_SECONDS = 1.0
"""Time after which the socket is tried again, when the server has restarted or removed it."""

_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})

_CREDENTIALS = struct.Struct("3i")
"""``struct ucred``: process, user and group that listen at the other end of a Unix socket."""

_NOT_OFFERED = "the server has not offered a Unix socket"
_NOT_TRIED = "the next request tries the server's Unix socket"


class _NotLocal(Exception):
    """Why the socket is not used."""


class _Offer(TypedDict):
    """See ``GET /v1/local`` in the HTTP API."""

    socket: str
    instance: str
    uid: int
    client: str
    ticket: str
    secret: str


class _Proof(TypedDict):
    instance: str
    proof: str


@dataclass(frozen=True)
class _Identity:
    """What a Unix socket is, as far as the system knows: the file, and who listens."""

    device: int
    inode: int
    pid: int
    uid: int
    gid: int


def is_wanted(given: bool | None) -> bool:
    """`given`, else ``$H5FEED_LOCAL``, else True.

    Raises
    ------
    BadParameter
        The variable is neither true nor false.
    """
    return is_set("H5FEED_LOCAL", True) if given is None else given


def is_eligible(url: httpx.URL) -> bool:
    """Whether a server at this URL may have a Unix socket that this process can use."""
    return url.scheme == "http" and url.host in _HOSTS and hasattr(socket, "SO_PEERCRED")


class LoopbackTransport(FeedTransport):
    """A pool of connections to a server on the loopback address: over TCP, or over its Unix socket.

    Attributes
    ----------
    via : str
        Which of them is used, and if it is TCP, why.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unix: _OwnSocket | None = None
        self._why = _NOT_OFFERED
        self._try_at: float | None = None
        """When the socket may be tried; None if the server has not offered it."""
        self._failures = 0
        self._trying = threading.Lock()

    @property
    def via(self) -> str:
        unix = self._unix
        return f"TCP: {self._why}" if unix is None else f"Unix socket {unix.path}"

    @property
    def is_local(self) -> bool:
        """Whether it uses the server's Unix socket now."""
        return self._unix is not None

    def receive_descriptor(self, request: bytes, timeout: float) -> tuple[int, bytes, int | None]:
        unix = self._unix
        if unix is None:
            raise ConnectionError("the connection to the Unix socket is lost")
        return unix.receive_descriptor(request, timeout)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        names = request.extensions.get(DIRECT)
        if names is None:
            return super().handle_request(request)
        with _Direct(names) as direct:
            return direct.handle_request(request)

    def exchange(self, url: httpx.URL, request: bytes, **limits: Any) -> Answer:
        unix = self._unix
        if unix is not None:
            try:
                return unix.exchange(url, request, **limits)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                # Nothing was sent.
                self._lose(unix, str(error.__cause__ or error))
        return super().exchange(url, request, **limits)

    def is_due(self) -> bool:
        """Whether `improve` would try to use the socket now."""
        return self._unix is None and self._try_at is not None and time.monotonic() >= self._try_at

    def hear(self, headers: httpx.Headers) -> None:
        """Look for the server's offer in the headers of a response."""
        if self._try_at is None and OFFER_HEADER in headers:
            self._why, self._try_at = _NOT_TRIED, 0.0

    def improve(self, ask: Callable[[float, list[str]], Any], url: httpx.URL, prefix: str) -> None:
        """Use the server's Unix socket from now on, if it proves to be the server's. Never raises.

        Parameters
        ----------
        ask : callable
            Requests the offer within a deadline, with `DIRECT`, and returns the JSON object.
        """
        # Meanwhile, the other threads continue over TCP.
        if not self._trying.acquire(blocking=False):
            return
        try:
            if self.is_due():
                self._improve(ask, url, prefix)
        finally:
            self._trying.release()

    def close(self) -> None:
        unix = self._unix
        if unix is not None:
            unix.close()
        super().close()

    def after_fork(self) -> None:
        super().after_fork()
        self._trying = threading.Lock()
        if self._unix is not None:
            self._unix.after_fork()

    def _improve(self, ask: Callable[[float, list[str]], Any], url: httpx.URL, prefix: str) -> None:
        deadline = time.monotonic() + OFFER_SECONDS
        unix: _OwnSocket | None = None
        try:
            names: list[str] = []
            offer = checked(ask(deadline, names), _Offer, "offer of a Unix socket")
            if not names or not _is_same(names[-1], offer["client"]):
                raise _NotLocal("something between this process and the server relays the requests")
            unix = _OwnSocket(offer["socket"], offer["uid"])
            unix.prove(offer, url, prefix, deadline)
        # Hooks and `auth` of the user may raise anything; the request that has just succeeded must not fail for it.
        except Exception as error:
            if unix is not None:
                unix.close()
            self._failures += 1
            rest = min(_LONGEST_REST, _FIRST_REST * 2 ** min(self._failures - 1, 16))
            self._why, self._try_at = " ".join(str(error).split())[:200], time.monotonic() + rest
            return
        unix.round_trip = min(unix.round_trip, self.round_trip)
        self.round_trip = unix.round_trip
        self._failures = 0
        self._unix = unix

    def _lose(self, unix: _OwnSocket, why: str) -> None:
        """Return to TCP."""
        if self._unix is unix:
            self._why, self._try_at = why, time.monotonic() + _LOST_SECONDS
            self._unix = None
        unix.close()


class _Direct(FeedTransport):
    """A TCP connection that is used once, whose own address is appended to `names`."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(max_idle=0)
        self._names = names

    def _connect(
        self, origin: tuple[str, str, int], timeout: float, cancelled: Cancellation | None = None
    ) -> socket.socket:
        connected = super()._connect(origin, timeout, cancelled)
        host, port = connected.getsockname()[:2]
        self._names.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        return connected


class _OwnSocket(FeedTransport):
    """A pool of connections to one Unix socket; all of them lead to the process that the first one led to.

    Parameters
    ----------
    path : str
    uid : int
        The user of that process.

    Raises
    ------
    _NotLocal
        The path cannot be one of a Unix socket.
    """

    def __init__(self, path: str, uid: int) -> None:
        if not os.path.isabs(path) or "\0" in path or len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise _NotLocal(f"{path[:200]!r} is not the path of a Unix socket")
        super().__init__(uds=path)
        self.path = path
        self._uid = uid
        self._identity: _Identity | None = None

    def prove(self, offer: _Offer, url: httpx.URL, prefix: str, deadline: float) -> None:
        """Make sure that the server that made the `offer` listens on the socket.

        Raises
        ------
        _NotLocal, httpx.TransportError
        """
        nonce = secrets.token_hex(32)
        query = urlencode({"ticket": offer["ticket"], "nonce": nonce})
        # No token, no cookies, and none of the user's headers: it is not known yet who reads them.
        head = f"GET {prefix}{PROOF_PATH}?{query} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n"
        answer = self.exchange(
            url,
            head.encode("ascii"),
            method="GET",
            pool=None,
            max_bytes=0,
            timeouts={"connect": OFFER_SECONDS, "read": OFFER_SECONDS, "write": OFFER_SECONDS},
            deadline=deadline,
        )
        if answer.status != 200:
            raise _NotLocal(f"{self.path} returned HTTP status {answer.status} instead of a proof")
        proof = checked(read_json(answer.content), _Proof, "proof")
        expected = proof_of(bytes.fromhex(offer["secret"]), offer["instance"], nonce)
        if not hmac.compare_digest(proof["proof"].encode(), expected.encode()):
            raise _NotLocal(f"{self.path} belongs to another server")

    def _connect(
        self, origin: tuple[str, str, int], timeout: float, cancelled: Cancellation | None = None
    ) -> socket.socket:
        status = os.stat(self.path)
        if not stat.S_ISSOCK(status.st_mode):
            raise OSError(f"{self.path} is not a socket")
        connected = super()._connect(origin, timeout, cancelled)
        try:
            credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            identity = _Identity(status.st_dev, status.st_ino, *_CREDENTIALS.unpack(credentials))
            if identity.uid != self._uid:
                raise OSError(f"{self.path} belongs to user {identity.uid}, but the server runs as user {self._uid}")
            if self._identity not in (None, identity):
                raise OSError(f"another process listens at {self.path} now")
            self._identity = identity
        except BaseException:
            connected.close()
            raise
        return connected


def _is_same(one: str, other: str) -> bool:
    """Whether two addresses with ports are the same."""
    try:
        (host, _, port), (other_host, _, other_port) = one.rpartition(":"), other.rpartition(":")
        return port == other_port and ip_address(host.strip("[]")) == ip_address(other_host.strip("[]"))
    except ValueError:
        return False


def describe(transport: FeedTransport, uds: str | None, wanted: bool, url: httpx.URL) -> str:
    """How a server is reached."""
    if isinstance(transport, LoopbackTransport):
        return transport.via
    if uds is not None:
        return f"Unix socket {uds}"
    return "TCP: local=False" if is_eligible(url) and not wanted else "TCP"
