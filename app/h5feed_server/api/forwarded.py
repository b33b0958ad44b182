"""What a reverse proxy says about a request: path prefix, scheme and host, as its client sees them.

Headers are believed only from trusted proxies, for a page in a browser can send them, too. Inside the application,
paths never have the prefix; what is sent to clients gets it from `here`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..settings import checked_prefix

logger = logging.getLogger(__name__)

_PREFIX: ContextVar[str] = ContextVar("prefix", default="")

_HOST = "forwarded_host"
"""Key in the scope's state: the name by which the proxy's client knows the server."""

_TRUSTED = "forwarded_trusted"

_NAMES = (b"x-forwarded-prefix", b"x-forwarded-proto", b"x-forwarded-host")

_SCHEMES = ("http", "https")

_MAX_TOLD = 8
"""Addresses that a process logs a line about."""

_SHOWN = 80

_told: set[str] = set()


def here(path: str) -> str:
    """A path of this server as the client of the current request has to ask for it."""
    return _PREFIX.get() + path


def public_origin(request: Request) -> tuple[str, str]:
    """Scheme and host by which the client reached the server; the host is as it was sent, and may be anything."""
    _tell_if_ignored(request)
    return request.scope["scheme"], forwarded_host(request.scope) or request.headers.get("host", "")


def forwarded_host(scope: Scope) -> str:
    """The host that a trusted proxy was asked for; empty if none has said."""
    host: str = scope.get("state", {}).get(_HOST, "")
    return host


class Forwarded:
    """ASGI middleware that takes the path prefix off, and the scheme and the host from trusted proxies.

    Requests may come with the prefix or without it: some proxies take it off themselves.

    Parameters
    ----------
    root_path : str
        The prefix of requests for which no trusted proxy names one; empty for none.
    trusts : callable
        Whether a request comes from a trusted proxy.
    """

    def __init__(self, app: ASGIApp, root_path: str, trusts: Callable[[Scope], bool]) -> None:
        self._app = app
        self._root_path = root_path
        self._trusts = trusts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "state": dict(scope.get("state", {}))}
        # Other ASGI servers have an option of that name.
        prefix = scope.get("root_path", "").rstrip("/") or self._root_path
        scope["root_path"] = ""
        if self._trusts(scope):
            prefix = self._read_headers(scope, prefix)
        _PREFIX.set(prefix)
        if not prefix:
            await self._app(scope, receive, send)
            return
        _take_off(prefix, scope)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 307:
                message["headers"] = list(_with_prefix(message["headers"]))
            await send(message)

        await self._app(scope, receive, sending)

    def _read_headers(self, scope: Scope, prefix: str) -> str:
        """Note what a trusted proxy says; returns the prefix."""
        scope["state"][_TRUSTED] = True
        prefixes: list[str] = []
        for name, value in scope["headers"]:
            if name not in _NAMES:
                continue
            said = value.decode("latin-1").strip()
            if name == b"x-forwarded-prefix":
                prefixes.append(said)
            elif name == b"x-forwarded-host":
                # Of several proxies, the first is the one that the client asked.
                scope["state"].setdefault(_HOST, said.partition(",")[0].strip())
            elif (scheme := said.partition(",")[0].strip().lower()) in _SCHEMES:
                scope["scheme"] = scheme
        if not prefixes:
            return prefix
        # Each of several proxies has added its own below that of the one before.
        joined = "".join(part.strip().rstrip("/") for line in prefixes for part in line.split(","))
        try:
            return checked_prefix(joined)
        except ValueError as error:
            _tell(f"prefix {joined[:_SHOWN]}", f"X-Forwarded-Prefix is ignored: {error}")
            return prefix


def _take_off(prefix: str, scope: Scope) -> None:
    path: str = scope["path"]
    if path == prefix or path.startswith(f"{prefix}/"):
        scope["path"] = path[len(prefix) :] or "/"
        raw: bytes = scope.get("raw_path") or path.encode()
        if raw.startswith(prefix.encode()):
            scope["raw_path"] = raw[len(prefix) :] or b"/"
        else:
            # Somebody has quoted more than is needed.
            scope["raw_path"] = scope["path"].encode()


def _with_prefix(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    """The redirects that the framework makes itself, to the path with or without a slash at its end."""
    for name, value in headers:
        if name.lower() == b"location":
            parts = urlsplit(value.decode("latin-1"))
            value = (here(parts.path) + (f"?{parts.query}" if parts.query else "")).encode("latin-1")
        yield name, value


def _tell_if_ignored(request: Request) -> None:
    if request.scope.get("state", {}).get(_TRUSTED):
        return
    sent = [name.decode() for name in _NAMES if request.headers.get(name.decode())]
    if sent:
        client: Any = request.client
        address = client.host if client else "unix"
        _tell(
            address,
            f"{' and '.join(sent)} from {address} ignored: if that is your reverse proxy, set "
            f"H5FEED_TRUSTED_PROXIES={address}",
        )


def _tell(key: str, what: str) -> None:
    if key not in _told and len(_told) < _MAX_TOLD:
        _told.add(key)
        logger.warning("%s", what)
