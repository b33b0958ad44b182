"""Retries: whether one may help, how long to wait before it, and which error to raise in the end."""

from __future__ import annotations

import contextlib
import http.client
import math
import re
import ssl
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from ..errors import BadAnswer, ConnectionFailed, FeedError, Transient, from_problem
from ..schema import read_json
from .certificates import distrust, refusal
from .exchange import Answer, BodyCut
from .http import httpx
from .servers import Server, jitter
from .tunnel import ProxyFailed

_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")
"""OpenSSL's reasons for a response that is not TLS."""

_CERTIFICATE = "SSL certificate"
"""In the title of nginx's pages for those who have none, or one that it does not accept."""

_SIGN_IN = re.compile(r"(log|sign)[-_]?in\b|oauth", re.IGNORECASE)
"""In the address of a page for people who are to sign in, such as that of Jupyter."""

_FIRST_BACKOFF = 0.1
_LONGEST_BACKOFF = 5.0
"""Seconds. The wait before retry n is drawn from 0 … min(longest, first · 2ⁿ) ("full jitter")."""


class FailedAttempts:
    """The failed attempts of one request so far.

    Attributes
    ----------
    count : int
    failures : dict of str to FeedError
        The last failure of each server, by name, in the order of the attempts.
    """

    def __init__(self) -> None:
        self.count = 0
        self.failures: dict[str, FeedError] = {}
        self._answered: dict[str, FeedError] = {}

    def backoff(self) -> float:
        """Seconds to wait before the next attempt: random, so that clients do not all return at once."""
        return jitter.uniform(0, min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2 ** min(self.count - 1, 16)))

    def add(self, name: str, failure: FeedError, deadline: float) -> FeedError:
        """Record a failure, and return the error to report for it."""
        self.count += 1
        if isinstance(failure, Transient):
            self._answered[name] = failure
        elif name in self._answered:
            if time.monotonic() >= deadline:
                # Our own deadline cut this attempt off: the server's earlier error is the reason.
                failure = self._answered[name]
            else:
                failure = ConnectionFailed(f"{failure}; before that it returned: {self._answered[name]}")
        self.failures.pop(name, None)
        self.failures[name] = failure
        return failure


def final_error(error: httpx.TransportError, server: Server) -> FeedError | None:
    """The error to raise without a retry, if the URL or the server is wrong; else None."""
    url, cause = server.url, error.__cause__
    bare = url.partition("://")[2]
    if isinstance(error, ProxyFailed):
        return ConnectionFailed(str(error)) if error.is_final else None
    if isinstance(cause, ssl.SSLCertVerificationError):
        return ConnectionFailed(distrust(url, cause))
    if isinstance(cause, ssl.SSLError) and cause.reason in _NO_TLS:
        return BadAnswer(f"{url} does not speak TLS: is it http://{bare}?")
    if isinstance(cause, ssl.SSLError) and (refused := refusal(url, cause.reason or "")) is not None:
        return ConnectionFailed(refused)
    if isinstance(cause, http.client.RemoteDisconnected) and server.failures == 0 and server.wants_tls():
        return BadAnswer(f"{url} speaks TLS: is it https://{bare}?")
    if isinstance(error, httpx.RemoteProtocolError) and not isinstance(error, BodyCut):
        return BadAnswer(f"invalid response from {url}: {error}. Is it an h5feed server?")
    return None


def reason_of(error: httpx.TransportError) -> str:
    """The system's error message, such as ``Connection refused``."""
    cause = error.__cause__
    return (cause.strerror if isinstance(cause, OSError) else None) or str(error)


def error_of(answer: Answer, server: Server, *, several: bool) -> FeedError:
    """The error for an error response. It names the server if there are several."""
    problem: Any = None
    with contextlib.suppress(ValueError):
        problem = read_json(answer.content)
    if not isinstance(problem, dict):
        # Not from h5feed, but from a proxy or another service.
        problem = {"detail": _described(answer, server)}
    retry_after = _seconds(answer.header("retry-after") or "", answer.header("date") or "")
    error = from_problem(answer.status, problem, retry_after=retry_after)
    if not several or isinstance(error, Transient):
        return error
    return type(error)(f"{server.name} says: {error.detail}", retry_after=retry_after, request_id=error.request_id)


def _described(answer: Answer, server: Server) -> str:
    """A response from something other than h5feed, in one line."""
    url, proxy = server.url, server.proxy
    there = answer.header("location")
    if 300 <= answer.status < 400 and there and _SIGN_IN.search(there.partition("?")[0]):
        return (
            f"{url} redirects to {there[:200]}: a service in front of the server requires you to sign in. Pass its "
            "token as token=, or the headers that it needs as headers="
        )
    if 300 <= answer.status < 400 and there:
        return f"{url} redirects to {there[:200]}: connect to that URL instead"
    # The beginning of an HTML page, usually its title.
    page = answer.content[:2000].decode("utf-8", "replace")
    words = " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL).split())[:120]
    said = f", {words!r}" if words.isprintable() and words else ""
    through = f" through the proxy {proxy}" if proxy else ""
    if _CERTIFICATE in words:
        return f"{url} returned HTTP status {answer.status}{through}{said}: pass a client certificate as cert="
    return f"{url} returned HTTP status {answer.status}{through}{said}: is it an h5feed server?"


def _seconds(retry_after: str, now: str) -> float | None:
    """The seconds to wait from ``Retry-After``, a number or a date (RFC 9110, 10.2.3); None if it is neither.

    A date is compared with that of the response: the clocks of the server and of this machine may differ.
    """
    with contextlib.suppress(ValueError):
        seconds = float(retry_after)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        clock = _moment(now) if now else datetime.now(UTC)
        return max(0.0, (_moment(retry_after) - clock).total_seconds())
    return None


def _moment(date: str) -> datetime:
    """The moment that a header names.

    Raises
    ------
    ValueError, TypeError
    """
    moment = parsedate_to_datetime(date)
    return moment.replace(tzinfo=moment.tzinfo or UTC)
