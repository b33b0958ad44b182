"""Requests to one server: errors as classes, retries, deadlines. Knows URLs and bodies, not datasets."""

from __future__ import annotations

import contextlib
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from json import loads
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit

import httpx
import numpy as np
import numpy.typing as npt

from . import __version__
from .buffers import BufferPool
from .errors import BadAnswer, BadParameter, ConnectionFailed, FeedError, Transient, from_problem
from .transport import BODY, DEADLINE, POOL, Answer, BodyCut, FeedTransport, Timeouts, head_after_target
from .wire import MEDIA_TYPE

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT: httpx.Timeout = httpx.Timeout(60.0, connect=10.0)
"""Seconds that one step of an exchange may take: connecting, sending, or waiting for the next bytes."""

DEFAULT_DEADLINE = 120.0
"""Seconds that one request may take in all, with its retries."""

POOL_BYTES = 256 << 20
"""Bytes: bound on the recycled buffers of one client; bodies beyond it get memory of their own."""

_FIRST_BACKOFF = 0.1
_LONGEST_BACKOFF = 5.0
"""Seconds: the wait before retry n is drawn from 0 … min(longest, first · 2ⁿ) ("full jitter")."""

Params = Mapping[str, str]
Hooks = Mapping[str, list[Callable[..., Any]]]


class Client:
    """One server's address, with the connections to it.

    Parameters
    ----------
    url : str, optional
        ``http://…``, ``https://…`` or ``unix:///path/to.sock``; default ``$H5FEED_URL``, else the loopback, port 8000.
    token : str, optional
        Sent as ``Authorization: Bearer``; default ``$H5FEED_TOKEN``.
    timeout : float or httpx.Timeout
        Seconds for one step of an exchange.
    deadline : float
        Seconds for one request in all. Broken connections and passing errors (429, 502, 503, 504) are retried until
        then, with jittered back-off.
    verify : ssl.SSLContext or bool
        How ``https`` certificates are checked, as in httpx.
    headers, event_hooks, auth
        Handed to `httpx.Client`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        deadline: float = DEFAULT_DEADLINE,
        verify: ssl.SSLContext | bool = True,
        headers: Mapping[str, str] | None = None,
        event_hooks: Hooks | None = None,
        auth: httpx.Auth | tuple[str, str] | None = None,
    ) -> None:
        self.url = url or os.environ.get("H5FEED_URL") or DEFAULT_URL
        token = (token or os.environ.get("H5FEED_TOKEN") or "").strip()
        self.deadline = deadline
        self.pool = BufferPool(POOL_BYTES)
        base_url, uds = _split_url(self.url)
        self._transport = FeedTransport(uds=uds, verify=verify)
        self._http = httpx.Client(
            base_url=base_url,
            transport=self._transport,
            timeout=timeout,
            auth=auth,
            event_hooks=dict(event_hooks or {}),
            headers={
                "user-agent": f"h5feed/{__version__}",
                "accept-encoding": "identity",
                **({"authorization": f"Bearer {token}"} if token else {}),
                **(headers or {}),
            },
        )
        # Whether all requests have the same headers and nobody wants to see them pass.
        self._plain = auth is None and not event_hooks and not self._http.base_url.userinfo
        self._prefix = self._http.base_url.raw_path.decode("ascii").rstrip("/")
        self._templates: dict[str, tuple[bytes, Timeouts]] = {}

    def json(self, path: str, params: Params | None = None) -> Any:
        """The JSON answer to a GET."""
        answer = self._request("GET", path, params, "application/json")
        try:
            return loads(answer.content)
        except ValueError:
            raise BadAnswer(f"{self.url}{path} did not answer JSON: is an h5feed server there?") from None

    def body(
        self,
        path: str,
        params: Params | None = None,
        *,
        json: Any = None,
        cancelled: threading.Event | None = None,
        raise_cut: bool = False,
    ) -> npt.NDArray[np.uint8]:
        """The binary answer to a GET (with `json`: a POST), as one (bytes,) uint8 array from the recycled buffers.

        `cancelled` ends the waiting between retries. With `raise_cut` a body that ends early is raised as
        `transport.BodyCut`, which holds what came, and not retried.
        """
        method = "GET" if json is None else "POST"
        answer = self._request(
            method, path, params, MEDIA_TYPE, json=json, cancelled=cancelled, raise_cut=raise_cut, pool=self.pool
        )
        if answer.header("content-type") != MEDIA_TYPE:
            raise BadAnswer(f"{self.url}{path} did not answer {MEDIA_TYPE}: is an h5feed server there?")
        if answer.body is None:
            # A proxy took the length away: slower, and bounded by `transport.MAX_PLAIN_BYTES`.
            return np.frombuffer(bytearray(answer.content), np.uint8)
        return answer.body

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _request(
        self,
        method: str,
        path: str,
        params: Params | None,
        accept: str,
        *,
        json: Any = None,
        cancelled: threading.Event | None = None,
        raise_cut: bool = False,
        pool: BufferPool | None = None,
    ) -> Answer:
        """One request, retried until it succeeds, fails for good, or the deadline passes."""
        deadline = time.monotonic() + self.deadline
        # Encoded here: httpx would take the address apart and put it together again for every part it is given.
        target = f"{path}?{urlencode(params)}" if params else path
        attempt = 0
        while True:
            try:
                if json is None and pool is not None and self._plain:
                    answer = self._send_plain(target, accept, pool, deadline)
                else:
                    answer = self._send(method, target, accept, json, pool, deadline)
                if answer.status == 200:
                    return answer
                raise _error_of(answer)
            except Transient as error:
                failure: FeedError = error
            except httpx.TransportError as error:
                if raise_cut and isinstance(error, BodyCut):
                    raise
                if isinstance(error, (httpx.LocalProtocolError, httpx.UnsupportedProtocol)):
                    raise BadParameter(f"the request cannot be sent: {error}") from None
                if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                    raise ConnectionFailed(f"{self.url} is not trusted: {error.__cause__}. See `verify=`.") from None
                failure = ConnectionFailed(
                    f"no whole answer from {self.url}: {error}. Is the server running and reachable?"
                )
            wait = random.uniform(0, min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**attempt))
            wait = max(wait, failure.retry_after or 0.0)
            attempt += 1
            cancelled = cancelled or threading.Event()
            if time.monotonic() + wait >= deadline or cancelled.wait(wait):
                failure.add_note(f"Gave up after {attempt} attempts within the deadline of {self.deadline:g} s.")
                raise failure

    def _send(
        self, method: str, target: str, accept: str, json: Any, pool: BufferPool | None, deadline: float
    ) -> Answer:
        """Once, through httpx."""
        extensions = {DEADLINE: deadline, POOL: pool}
        request = self._http.build_request(method, target, headers={"accept": accept}, json=json, extensions=extensions)
        response = self._http.send(request)
        # Taken out of the response, which httpx ties into a cycle: the buffer must come free before the collector runs.
        body = response.extensions.pop(BODY, None)
        return Answer(response.status_code, response.headers.multi_items(), body, response.content)

    def _send_plain(self, target: str, accept: str, pool: BufferPool, deadline: float) -> Answer:
        """Once, past httpx: the same bytes that it would send, without making them anew for every batch."""
        template = self._templates.get(accept)
        if template is None:
            request = self._http.build_request("GET", "/", headers={"accept": accept})
            template = head_after_target(request.headers), request.extensions["timeout"]
            self._templates[accept] = template
        head, timeouts = template
        line = f"GET {self._prefix}{target}".encode("ascii")
        base_url = self._http.base_url
        answer = self._transport.exchange(
            base_url, line + head, method="GET", pool=pool, timeouts=timeouts, deadline=deadline
        )
        if answer.header("set-cookie") is not None:
            # A proxy wants to know us again: from now on through httpx, which keeps cookies.
            self._plain = False
        return answer


def _split_url(url: str) -> tuple[str, str | None]:
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path:
        return "http://localhost", unquote(parts.path)
    if parts.scheme in ("http", "https") and parts.hostname:
        return url.rstrip("/"), None
    raise BadParameter(f"{url!r} is no server address: use http://host:8000, https://host or unix:///path/to.sock")


def _error_of(answer: Answer) -> FeedError:
    retry_after = None
    with contextlib.suppress(ValueError):
        retry_after = float(answer.header("retry-after") or "")
    problem: Any = None
    with contextlib.suppress(ValueError):
        problem = loads(answer.content)
    return from_problem(answer.status, problem if isinstance(problem, dict) else {}, retry_after=retry_after)
