"""The addresses of a host name: each may be a server of its own, so all of them are used.

A name of Docker Compose's ``--scale`` or of a headless Service of Kubernetes has one address for each server. They are
looked up again now and then, in a thread, because a name server that does not respond must not stop training.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence

from .refreshing import MAX_KNOWN, Refreshing

MAX_ADDRESSES = MAX_KNOWN
"""Maximum number of addresses of one name that are used. Of more, each client takes others."""

_TRY_SECONDS = 1.0
"""Timeout for finding out whether this machine can reach addresses of a family, IPv4 or IPv6."""

Lookup = Callable[[str, int], Sequence[tuple[int, str]]]
"""Returns the family and the text of each address of a name; raises OSError."""


def is_address(host: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def may_have_several(host: str) -> bool:
    """Whether a host is a name of servers. ``localhost`` has two addresses, but both stand for this machine."""
    return not (is_address(host) or host == "localhost" or host.endswith(".localhost"))


def look_up(host: str, port: int) -> list[tuple[int, str]]:
    """Family and text of all addresses of a name, in the order in which the system prefers them.

    Raises
    ------
    OSError
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, str(address[0])) for family, _, _, _, address in found]


class Addresses(Refreshing):
    """The addresses of one host, safe to use from any thread.

    Parameters
    ----------
    host : str
    port : int
    lookup : callable
        Default: the system's.
    """

    def __init__(self, host: str, port: int, lookup: Lookup = look_up) -> None:
        super().__init__()
        self._host, self._port, self._lookup = host, port, lookup
        self._family: int | None = None

    def _find(self, is_urgent: bool) -> Iterable[str]:
        """The addresses to use: of one family, because IPv4 and IPv6 are two ways to the same servers."""
        try:
            addresses = self._lookup(self._host, self._port)
        except (OSError, UnicodeError):
            # What the look-up fails with, a connection to the name fails with as well.
            return ()
        families = list(dict.fromkeys(family for family, _ in addresses))
        if self._family not in families or is_urgent:
            reached = (family for family in families if len(families) == 1 or self._reaches(family, addresses))
            self._family = next(reached, families[0] if families else None)
        return [address for family, address in addresses if family == self._family]

    def _reaches(self, family: int, addresses: Sequence[tuple[int, str]]) -> bool:
        first = next(address for one, address in addresses if one == family)
        with contextlib.suppress(OSError), socket.create_connection((first, self._port), _TRY_SECONDS):
            return True
        return False
