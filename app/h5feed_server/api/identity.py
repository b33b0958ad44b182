"""Identifies the caller of a request: its token, else the address from a trusted proxy, else its own address."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from ..sharing.caller import CALLER, KEEPS_UP
from ..tokens.keyring import Token
from .peer import peer_of

UNIX = "unix"
"""Name of who comes through the Unix socket."""

_NETWORK_BITS = 64
"""Of an IPv6 address: every host has so many left to choose from."""


def plain_address(text: str) -> str:
    """An address as its owner writes it: one of IPv4 is another text on a socket that listens to IPv6 as well.

    Raises
    ------
    ValueError
        It is none.
    """
    return str(_parsed(text))


class TrustedProxies:
    """Determines the address of a client, taking trusted proxies into account.

    Parameters
    ----------
    trusted : sequence of str
        Addresses, networks, or ``unix``: who may say whom it asks for, by ``X-Forwarded-For``.

    Raises
    ------
    ValueError
        One is none of these.
    """

    def __init__(self, trusted: Sequence[str]) -> None:
        self._unix = UNIX in trusted
        self._networks = [ipaddress.ip_network(item, strict=False) for item in trusted if item != UNIX]

    def address(self, scope: Scope) -> str:
        """The last address, from the server's side, that no trusted proxy has."""
        client = scope.get("client")
        address: str = client[0] if client else UNIX
        if not self.trusts(address):
            return address
        lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
        for item in reversed(",".join(lines).split(",")):
            try:
                address = plain_address(item.strip().strip("[]"))
            except ValueError:
                # What is no address was not written by a proxy.
                break
            if not self.trusts(address):
                break
        return address

    def trusts_peer(self, scope: Scope) -> bool:
        """Whether the request comes from a trusted proxy."""
        client = scope.get("client")
        return self.trusts(client[0] if client else UNIX)

    def trusts(self, address: str) -> bool:
        """Whether a peer with this address is a trusted proxy."""
        if address == UNIX:
            return self._unix
        return any(_parsed(address) in network for network in self._networks)


class Callers:
    """ASGI middleware that sets `CALLER` and `KEEPS_UP`; runs after authentication."""

    def __init__(self, app: ASGIApp, address: Callable[[Scope], str]) -> None:
        self._app = app
        self._address = address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            token: Token | None = scope.get("state", {}).get("token")
            # A token itself is nobody's name.
            name = _by_network(self._address(scope)) if token is None else token.name
            CALLER.set(name)
            peer = peer_of(scope)
            if peer is not None:
                KEEPS_UP.set(peer.counts_for(name))
        await self._app(scope, receive, send)


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _by_network(address: str) -> str:
    if ":" not in address:
        return address
    try:
        plain = plain_address(address.partition("%")[0])
        return str(ipaddress.ip_network((plain, _NETWORK_BITS), strict=False)) if ":" in plain else plain
    except ValueError:
        return address
