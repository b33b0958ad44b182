"""One server: its address, the connections to it, and what is known of its state."""

from __future__ import annotations

import contextlib
import random
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from json import dumps
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

from ..buffers import BufferPool
from ..errors import BadAnswer, BadParameter
from ..handshake import OFFER_PATH
from ..schema import read_json
from .addresses import may_have_several
from .cancellation import Cancellation
from .embedded import Embedded, EmbeddedTransport
from .exchange import BODY, MAX_PLAIN_BYTES, Answer, Places, Timeouts
from .http import auth_of, httpx, timeout_of
from .local import DIRECT, LoopbackTransport, describe, is_eligible
from .transport import CANCELLED, DEADLINE, MAX_BYTES, POOL, FeedTransport, head_after_target, port_of, with_headers

jitter = random.Random()
"""Not the global generator: a retry must not change the random numbers of a seeded training run."""

LOOK_SECONDS = 2.0
"""Timeout of the health check of a server that failed."""

_RECENT = 8
"""Number of responses whose pace is kept."""

Hooks = Mapping[str, list[Callable[..., Any]]]

_WHO = re.compile(r"//[^/]*@")
"""User name and password, which no message shows."""


class Server:
    """The address of one server and the connections to it.

    Parameters
    ----------
    url : str
        ``http://…``, ``https://…`` or ``unix:///path/to.sock``.
    headers
        Sent with every request.
    timeout, verify, event_hooks, auth
        See `httpx.Client`.
    local : bool
        Whether to use the Unix socket of a server at a loopback URL: see `h5feed.net.local`.
    embedded : Embedded, optional
        The server is this one, and `url` its path.
    address : str, optional
        The one to connect to, of those of the URL's host. The ``Host`` header and the name in the certificate remain
        those of the URL.

    Attributes
    ----------
    url : str
        For display: without user name and password.
    name : str
        The same, with the address.
    identity : str
        The same for all clients that reach it at the same host or address and port, or through the same Unix socket.
    under_way : int
        Number of requests in flight.
    requests : int
        Number of requests answered.
    failures : int
        Number of consecutive failures.
    why : str
        The last of them.
    is_well : bool
        Whether it has passed a health check since the last failure.
    has_answered : bool
        Whether it has ever sent an HTTP response.
    asked_at, failing_since, failed_at, rests_until : float
        `time.monotonic()` of the last request, of the first and the last of the consecutive failures, and of the end of
        the time it is skipped.
    paces : deque of float
        Seconds that it took for a byte of each of the last responses.
    paced_at : float
        `time.monotonic()` of the last of them.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        timeout: float | httpx.Timeout,
        verify: ssl.SSLContext | bool,
        event_hooks: Hooks | None,
        auth: httpx.Auth | tuple[str, str] | None,
        local: bool = False,
        embedded: Embedded | None = None,
        address: str | None = None,
    ) -> None:
        base_url, uds = _split_url(url) if embedded is None else (httpx.URL("http://localhost"), embedded.socket)
        if base_url.userinfo:
            # Sent in a header, and not left in the URL, which httpx writes to its log.
            auth = auth or (base_url.username, base_url.password)
            base_url = base_url.copy_with(username=None, password=None)
            url = str(base_url).rstrip("/")
        self.url = url
        self.address = address
        self.name = url if address is None else f"{url} ({address})"
        host, prefix = address or base_url.host, base_url.path.rstrip("/")
        self.identity = uds or f"{host}:{port_of(base_url)}{prefix}"
        self._local = LoopbackTransport() if local and uds is None and is_eligible(base_url) else None
        self._transport = self._local or FeedTransport(uds=uds, verify=verify, address=address)
        if embedded is not None:
            self._transport = EmbeddedTransport(embedded)
        self.via = partial(describe, self._transport, uds, local, base_url)
        self._http = httpx.Client(
            base_url=base_url,
            transport=self._transport,
            timeout=timeout_of(timeout),
            auth=auth_of(auth),
            event_hooks=dict(event_hooks or {}),
            headers=headers,
        )
        # Whether all requests have the same headers and no hook observes them.
        self._plain = auth is None and not event_hooks
        self._prefix = self._http.base_url.raw_path.decode("ascii").rstrip("/")
        self._templates: dict[str, tuple[bytes, Timeouts]] = {}
        self.under_way = self.requests = self.failures = 0
        self.why = ""
        self.has_answered = self.is_well = False
        self.asked_at = self.failing_since = self.failed_at = self.rests_until = self.paced_at = 0.0
        self.paces: deque[float] = deque(maxlen=_RECENT)

    def send(
        self,
        method: str,
        target: str,
        accept: str,
        *,
        json: Any = None,
        content: bytes | None = None,
        pool: BufferPool | Places | None = None,
        max_bytes: int = MAX_PLAIN_BYTES,
        deadline: float,
        cancelled: Cancellation | None = None,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> Answer:
        """Send a request once and return the response.

        `max_bytes` limits a body that is read into the `pool`, or goes to its places. `more` are headers of this
        request alone. `content` is a body that is not JSON, for requests without a `pool`.

        Raises
        ------
        httpx.TransportError
        """
        if self._local is not None and self._local.is_due():
            self._local.improve(self._ask_for_socket, self._http.base_url, self._prefix)
        if pool is not None and self._plain:
            answer = self._send_plain(method, target, accept, json, pool, max_bytes, deadline, cancelled, more)
            self.has_answered = True
            return answer
        extensions = {DEADLINE: deadline, POOL: pool, MAX_BYTES: max_bytes, CANCELLED: cancelled}
        headers = {"accept": accept, **more}
        request = self._http.build_request(
            method, target, headers=headers, json=json, content=content, extensions=extensions
        )
        response = self._http.send(request)
        self.has_answered = True
        if self._local is not None:
            self._local.hear(response.headers)
        # Removed from the response, which is part of a reference cycle: the buffer must not wait for the collector.
        body = response.extensions.pop(BODY, None)
        return Answer(response.status_code, response.headers.multi_items(), body, response.content)

    @property
    def is_trusted(self) -> bool:
        """Whether it has not failed since its last response or health check."""
        return not self.failures or self.is_well

    @property
    def origin(self) -> tuple[str, int] | None:
        """Host and port, if the host may be a name of several servers.

        Raises
        ------
        BadParameter
            The environment names a proxy that cannot be used.
        """
        url = self._http.base_url
        if self._transport.is_local or not may_have_several(url.host) or self.proxy:
            return None
        return url.host, port_of(url)

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, behind a Unix socket."""
        return self._transport.is_local

    @property
    def is_near(self) -> bool:
        """Whether its address is this machine, and it is not reached through a proxy."""
        host = self._http.base_url.host
        return self.is_local or (not self.proxy and (host == "localhost" or host == "::1" or host.startswith("127.")))

    def receive_descriptor(self, target: str) -> tuple[int, bytes, int | None]:
        """Send a GET request, and receive a descriptor with the response: its status, its content, the descriptor.

        Raises
        ------
        OSError, http.client.HTTPException
        """
        request = self._http.build_request("GET", "/", headers={"accept": "application/json"})
        line = f"GET {self._prefix}{target}".encode("ascii")
        return self._transport.receive_descriptor(line + head_after_target(request.headers), LOOK_SECONDS)

    def _ask_for_socket(self, deadline: float, names: list[str]) -> Any:
        """Request the server's offer of a Unix socket; see `LoopbackTransport.improve`."""
        extensions = {DEADLINE: deadline, DIRECT: names}
        headers = {"accept": "application/json"}
        request = self._http.build_request("GET", OFFER_PATH, headers=headers, extensions=extensions)
        response = self._http.send(request)
        if response.status_code != 200:
            raise BadAnswer(f"{OFFER_PATH} returned HTTP status {response.status_code}")
        return read_json(response.content)

    def authorize(self, token: str) -> None:
        """Send another token from now on."""
        self._http.headers["authorization"] = f"Bearer {token}"
        self._templates = {}

    @property
    def round_trip(self) -> float:
        """Round trip in seconds; infinite before the first connection."""
        return self._transport.round_trip

    @property
    def proxy(self) -> str:
        """The proxy through which it is asked, for messages; empty if there is none."""
        return self._transport.proxy_of(self._http.base_url)

    def wants_tls(self) -> bool:
        """Whether it has never responded because its URL should start with ``https``."""
        url = self._http.base_url
        return not self.has_answered and url.scheme == "http" and self._transport.speaks_tls(url, LOOK_SECONDS)

    def is_alive(self) -> bool:
        """Whether it passes a quick health check."""
        with contextlib.suppress(httpx.TransportError):
            answer = self.send("GET", "/healthz", "*/*", deadline=time.monotonic() + LOOK_SECONDS)
            return answer.status < 500
        return False

    def after_fork(self) -> None:
        """In the child: no request is in flight, and the connections belong to the parent."""
        self.under_way = 0
        self._transport.after_fork()
        # Copy the cookies to a new jar, because the jar has a lock too.
        self._http.cookies = self._http.cookies

    def retire(self) -> None:
        """Close the idle connections now, and the others after the requests that use them."""
        self._transport.close()

    def close(self) -> None:
        self._http.close()

    def _send_plain(
        self,
        method: str,
        target: str,
        accept: str,
        json: Any,
        pool: BufferPool | Places,
        max_bytes: int,
        deadline: float,
        cancelled: Cancellation | None,
        more: Mapping[str, str],
    ) -> Answer:
        """Bypass httpx: send the same bytes, without building them for every batch."""
        # The one in use now: what is built beside a change of the token is not kept.
        templates = self._templates
        template = templates.get(accept)
        if template is None:
            request = self._http.build_request("GET", "/", headers={"accept": accept})
            template = head_after_target(request.headers), request.extensions["timeout"]
            templates[accept] = template
        head, timeouts = template
        content = b""
        if json is not None:
            content = dumps(json, ensure_ascii=False, separators=(",", ":")).encode()
            more = {**more, "content-type": "application/json", "content-length": str(len(content))}
        if more:
            head = with_headers(head, more)
        line = f"{method} {self._prefix}{target}".encode("ascii")
        answer = self._transport.exchange(
            self._http.base_url,
            line + head + content,
            method=method,
            pool=pool,
            max_bytes=max_bytes,
            timeouts=timeouts,
            deadline=deadline,
            cancelled=cancelled,
        )
        if answer.header("set-cookie") is not None:
            # A proxy set a cookie: use httpx from now on, which stores cookies.
            self._plain = False
        return answer


def _split_url(url: str) -> tuple[httpx.URL, str | None]:
    parts = urlsplit(url)
    shown = _WHO.sub("//", url.partition("?")[0])
    if parts.query or parts.fragment:
        raise BadParameter(f"a server URL ends with its path, as {shown!r} does: pass a token as token=")
    if parts.scheme == "unix" and parts.path:
        return httpx.URL("http://localhost"), unquote(parts.path)
    if parts.scheme in ("http", "https") and parts.hostname:
        return httpx.URL(url.rstrip("/")), None
    raise BadParameter(
        f"invalid server URL {shown!r}: use http://host:8000, https://host or unix:///path/to.sock, or "
        "servers+http://host:8001 for a list of servers"
    )
