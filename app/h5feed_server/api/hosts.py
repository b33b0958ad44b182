"""Checks the ``Host`` header of servers without tokens, against DNS rebinding.

A web page can make its own host name resolve to this server's address; the browser then lets the page read the
server's responses. Such a request carries the page's host name. See also Django's ``ALLOWED_HOSTS``.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable

from h5feed.errors import HostNotAllowed
from starlette.types import ASGIApp, Receive, Scope, Send

from ..settings import ANY_HOST, Settings
from .auth import CLIENT_FOLDER, WATCHED_PATHS
from .forwarded import forwarded_host
from .problems import problem

_HOST = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::[0-9]{0,5})?")
"""An address of IPv6 in brackets, or a name or an address of IPv4; and a port, which may be that of a proxy."""

_MAX_REMEMBERED = 64
_SHOWN = 80
"""Characters of a name that are told."""


class HostCheck:
    """ASGI middleware that rejects requests for unknown host names.

    Accepted are IP addresses, loopback names, the machine's own name, and names from the settings. Browsers always
    send the header, so requests without it are accepted.
    """

    def __init__(self, app: ASGIApp, settings: Settings, refused: Callable[[Scope, int], None]) -> None:
        self._app = app
        self._refused = refused
        own = socket.gethostname().lower()
        names = {"localhost", own, own.partition(".")[0], settings.host.lower(), *settings.allowed_host_list}
        self._names = frozenset(names)
        self._good: set[bytes] = set()
        """Values that were found good, so that a batch costs no more than a look."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for name, value in _hosts(scope):
                if name == b"host" and value not in self._good and not self._allows(value):
                    # Nothing there is about the data.
                    if scope["path"] in WATCHED_PATHS or scope["path"].startswith(CLIENT_FOLDER):
                        break
                    self._refused(scope, 421)
                    await problem(_not_allowed(value))(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _allows(self, value: bytes) -> bool:
        match = _HOST.fullmatch(value.decode("latin-1").strip().lower())
        if match is None:
            return False
        address, name = match.groups()
        good = _is_address(address) if name is None else self._allows_name(name.removesuffix("."))
        if good and len(self._good) < _MAX_REMEMBERED:
            self._good.add(value)
        return good

    def _allows_name(self, name: str) -> bool:
        # Browsers resolve what ends in .localhost themselves.
        return name in self._names or ANY_HOST in self._names or name.endswith(".localhost") or _is_address(name)


def _hosts(scope: Scope) -> Iterable[tuple[bytes, bytes]]:
    """The headers, and what a proxy says it was asked for, which counts as another ``Host``."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    forwarded = forwarded_host(scope)
    return [*headers, (b"host", forwarded.encode("latin-1"))] if forwarded else headers


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _not_allowed(value: bytes) -> HostNotAllowed:
    name = value.decode("latin-1")
    shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"
    return HostNotAllowed(
        f"this server does not accept the host name {shown!r}: use its IP address, or start it with "
        "--allowed-host NAME (H5FEED_ALLOWED_HOSTS), or with tokens (H5FEED_TOKENS)"
    )
