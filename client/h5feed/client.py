"""Requests to one server: errors as classes, retries, deadlines. Knows URLs and bodies, not datasets."""

from __future__ import annotations

import contextlib
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit

import httpx
import numpy as np
import numpy.typing as npt

from . import __version__, transport
from .buffers import BufferPool
from .errors import BadAnswer, BadParameter, ConnectionFailed, FeedError, Transient, from_problem
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
        token = token or os.environ.get("H5FEED_TOKEN")
        self.deadline = deadline
        self.pool = BufferPool(POOL_BYTES)
        base_url, uds = _split_url(self.url)
        self._http = httpx.Client(
            base_url=base_url,
            transport=transport.FeedTransport(uds=uds, verify=verify),
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

    def json(self, path: str, params: Params | None = None) -> Any:
        """The JSON answer to a GET."""
        response = self._request("GET", path, params, {"accept": "application/json"})
        try:
            return response.json()
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
        response = self._request(
            method, path, params, {"accept": MEDIA_TYPE}, json=json, cancelled=cancelled, raise_cut=raise_cut
        )
        if response.headers.get("content-type") != MEDIA_TYPE:
            raise BadAnswer(f"{self.url}{path} did not answer {MEDIA_TYPE}: is an h5feed server there?")
        if transport.BODY not in response.extensions:
            # A proxy took the length away: slower, and bounded by `transport.MAX_PLAIN_BYTES`.
            return np.frombuffer(bytearray(response.content), np.uint8)
        # Taken out of the response, which httpx ties into a cycle: the buffer must come free before the collector runs.
        body: npt.NDArray[np.uint8] = response.extensions.pop(transport.BODY)
        return body

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _request(
        self,
        method: str,
        path: str,
        params: Params | None,
        headers: Mapping[str, str],
        *,
        json: Any = None,
        cancelled: threading.Event | None = None,
        raise_cut: bool = False,
    ) -> httpx.Response:
        """One request, retried until it succeeds, fails for good, or the deadline passes."""
        deadline = time.monotonic() + self.deadline
        cancelled = cancelled or threading.Event()
        extensions: dict[str, Any] = {transport.DEADLINE: deadline}
        if headers["accept"] == MEDIA_TYPE:
            extensions[transport.POOL] = self.pool
        # Encoded here: httpx would take the address apart and put it together again for every part it is given.
        target = f"{path}?{urlencode(params)}" if params else path
        attempt = 0
        while True:
            try:
                request = self._http.build_request(method, target, headers=headers, json=json, extensions=extensions)
                response = self._http.send(request)
                if response.status_code == 200:
                    return response
                raise _error_of(response)
            except Transient as error:
                failure: FeedError = error
            except httpx.TransportError as error:
                if raise_cut and isinstance(error, transport.BodyCut):
                    raise
                failure = ConnectionFailed(
                    f"no whole answer from {self.url}: {error}. Is the server running and reachable?"
                )
            wait = random.uniform(0, min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**attempt))
            wait = max(wait, failure.retry_after or 0.0)
            attempt += 1
            if time.monotonic() + wait >= deadline or cancelled.wait(wait):
                failure.add_note(f"Gave up after {attempt} attempts within the deadline of {self.deadline:g} s.")
                raise failure


def _split_url(url: str) -> tuple[str, str | None]:
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path:
        return "http://localhost", unquote(parts.path)
    if parts.scheme in ("http", "https") and parts.hostname:
        return url.rstrip("/"), None
    raise BadParameter(f"{url!r} is no server address: use http://host:8000, https://host or unix:///path/to.sock")


def _error_of(response: httpx.Response) -> FeedError:
    retry_after = None
    with contextlib.suppress(KeyError, ValueError):
        retry_after = float(response.headers["retry-after"])
    problem: Any = None
    with contextlib.suppress(ValueError):
        problem = response.json()
    return from_problem(response.status_code, problem if isinstance(problem, dict) else {}, retry_after=retry_after)
