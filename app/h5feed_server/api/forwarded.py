"""Path prefix, scheme and host of a request as the client of a reverse proxy sees them.

Headers are used only from trusted proxies, because anybody can send them. Inside the application, paths never have the
prefix. `here` adds it to paths that are sent to clients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..settings import checked_prefix

logger = logging.getLogger(__name__)

_PREFIX: ContextVar[str] = ContextVar("prefix", default="")

_HOST = "forwarded_host"
"""Key in the scope's state: the host name that the client of the proxy uses."""

_TRUSTED = "forwarded_trusted"

_ADDS_PREFIX = "forwarded_adds_prefix"
"""Key in the scope's state: the proxy adds the prefix to paths in redirects, although they already have it."""

_NAMES = (b"x-forwarded-prefix", b"x-forwarded-proto", b"x-forwarded-host")

_OF_JUPYTER = b"x-proxycontextpath"
"""Only jupyter-server-proxy sends this header."""

_REDIRECTS = (301, 302, 303, 307, 308)
_BY_FRAMEWORK = 307

_SCHEMES = ("http", "https")

_MAX_TOLD = 8
"""Maximum number of warnings per process."""

_SHOWN = 80

_told: set[str] = set()


def here(path: str) -> str:
    """A path of this server with the prefix that the client of the current request has to use."""
    return _PREFIX.get() + path


def public_origin(request: Request) -> tuple[str, str]:
    """Scheme and host that the client used. The host is not validated."""
    _tell_if_ignored(request)
    return request.scope["scheme"], forwarded_host(request.scope) or request.headers.get("host", "")


def forwarded_host(scope: Scope) -> str:
    """The host from the header of a trusted proxy; empty if there is none."""
    host: str = scope.get("state", {}).get(_HOST, "")
    return host


class Forwarded:
    """ASGI middleware that strips the path prefix, and uses the scheme and the host from trusted proxies.

    Requests may arrive with or without the prefix, because some proxies strip it.

    Parameters
    ----------
    root_path : str
        The prefix of requests without a prefix from a trusted proxy; empty for none.
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
        # Other ASGI servers set it from an option of the same name.
        prefix = scope.get("root_path", "").rstrip("/") or self._root_path
        scope["root_path"] = ""
        if self._trusts(scope):
            prefix = self._read_headers(scope, prefix)
        _PREFIX.set(prefix)
        climb = ""
        if prefix:
            _take_off(prefix, scope)
        if prefix and _ADDS_PREFIX in scope["state"]:
            # A relative path that climbs to the root is correct at any depth, and the proxy adds nothing to it.
            climb = "../" * (prefix + scope["path"]).count("/")

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in _REDIRECTS:
                by_framework = message["status"] == _BY_FRAMEWORK
                message["headers"] = [
                    (name, _as_asked(value, by_framework, climb) if name.lower() == b"location" else value)
                    for name, value in message["headers"]
                ]
            await send(message)

        await self._app(scope, receive, sending)

    def _read_headers(self, scope: Scope, prefix: str) -> str:
        """Read the headers of a trusted proxy; returns the prefix."""
        scope["state"][_TRUSTED] = True
        prefixes: list[str] = []
        for name, value in scope["headers"]:
            if name == _OF_JUPYTER:
                scope["state"][_ADDS_PREFIX] = True
            if name not in _NAMES:
                continue
            said = value.decode("latin-1").strip()
            if name == b"x-forwarded-prefix":
                prefixes.append(said)
            elif name == b"x-forwarded-host":
                # With several proxies, the client used the first host.
                scope["state"].setdefault(_HOST, said.partition(",")[0].strip())
            elif (scheme := said.partition(",")[0].strip().lower()) in _SCHEMES:
                scope["scheme"] = scheme
        if not prefixes:
            return prefix
        # With several proxies, each appends its own prefix.
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
            # The raw path is percent-encoded differently.
            scope["raw_path"] = scope["path"].encode()


def _as_asked(location: bytes, by_framework: bool, climb: str) -> bytes:
    """The target of a redirect, as the client of the proxy has to request it.

    The framework's redirects, which add or remove a trailing slash, are full URLs without the prefix, with the host and
    scheme that the proxy used.
    """
    path = location.decode("latin-1")
    if by_framework:
        parts = urlsplit(path)
        path = here("/" + parts.path.lstrip("/")) + (f"?{parts.query}" if parts.query else "")
    return (climb + path[1:] if climb and path.startswith("/") else path).encode("latin-1")


def _tell_if_ignored(request: Request) -> None:
    if request.scope.get("state", {}).get(_TRUSTED):
        return
    sent = [name.decode() for name in _NAMES if request.headers.get(name.decode())]
    if sent:
        client: Any = request.client
        address = client.host if client else "unix"
        _tell(
            address,
            f"ignored {' and '.join(sent)} from {address}: if this is the address of your reverse proxy, set "
            f"H5FEED_TRUSTED_PROXIES={address}",
        )


def _tell(key: str, what: str) -> None:
    if key not in _told and len(_told) < _MAX_TOLD:
        _told.add(key)
        logger.warning("%s", what)
