"""The addresses of a host name: each may be a server of its own, so all of them are used.

A name of Docker Compose's ``--scale`` or of a headless Service of Kubernetes has one address for each server. They are
looked up again now and then, in a thread, because a name server that does not respond must not stop training.
"""

from __future__ import annotations

import contextlib
import ipaddress
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence

LOOK_UP_SECONDS = 10.0
"""Time after which a name that is in use is looked up again."""

SOON_SECONDS = 1.0
"""The same after a connection has failed, or after a look-up that has failed."""

MAX_ADDRESSES = 32
"""Maximum number of addresses of one name that are used. Of more, each client takes others."""

_TRY_SECONDS = 1.0
"""Timeout for finding out whether this machine can reach addresses of a family, IPv4 or IPv6."""

_any = random.Random()
"""Not the global generator: a look-up must not change the random numbers of a seeded training run."""

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


class Addresses:
    """The addresses of one host, safe to use from any thread.

    Parameters
    ----------
    host : str
    port : int
    lookup : callable
        Default: the system's.

    Attributes
    ----------
    known : tuple of str
        Those of the last look-up that succeeded; empty before it.
    """

    def __init__(self, host: str, port: int, lookup: Lookup = look_up) -> None:
        self._host, self._port, self._lookup = host, port, lookup
        self.known: tuple[str, ...] = ()
        self._family: int | None = None
        self._lock = threading.Lock()
        self._done: threading.Event | None = None
        self._looked_up_at = -1e9

    def refresh(self, *, is_urgent: bool, wait: float, found: Callable[[tuple[str, ...]], None]) -> None:
        """Look the name up in a thread, unless that was done a short time ago or goes on.

        Parameters
        ----------
        is_urgent : bool
            No connection to the known addresses works.
        wait : float
            Seconds to wait until a look-up that goes on is done.
        found : callable
            Called in the thread with the addresses, if they have changed.
        """
        with self._lock:
            age = time.monotonic() - self._looked_up_at
            if self._done is None and age > (SOON_SECONDS if is_urgent or not self.known else LOOK_UP_SECONDS):
                self._looked_up_at = time.monotonic()
                self._done = threading.Event()
                arguments = is_urgent, found, self._done
                threading.Thread(target=self._run, args=arguments, name="h5feed-look-up", daemon=True).start()
            done = self._done
        if done is not None and wait > 0:
            done.wait(wait)

    def after_fork(self) -> None:
        """In the child: a thread that looks the name up exists in the parent only."""
        self._lock = threading.Lock()
        self._done = None

    def _run(self, is_urgent: bool, found: Callable[[tuple[str, ...]], None], done: threading.Event) -> None:
        try:
            # What the look-up fails with, a connection to the name fails with as well.
            with contextlib.suppress(OSError, UnicodeError):
                known = self._chosen(self._lookup(self._host, self._port), is_urgent)
                if known and known != self.known:
                    self.known = known
                    found(known)
        finally:
            with self._lock:
                self._looked_up_at, self._done = time.monotonic(), None
            done.set()

    def _chosen(self, addresses: Sequence[tuple[int, str]], is_urgent: bool) -> tuple[str, ...]:
        """The addresses to use: of one family, because IPv4 and IPv6 are two ways to the same servers."""
        families = list(dict.fromkeys(family for family, _ in addresses))
        if self._family not in families or is_urgent:
            reached = (family for family in families if len(families) == 1 or self._reaches(family, addresses))
            self._family = next(reached, families[0] if families else None)
        of_family = list(dict.fromkeys(address for family, address in addresses if family == self._family))
        kept = [address for address in of_family if address in self.known][:MAX_ADDRESSES]
        others = [address for address in of_family if address not in self.known]
        _any.shuffle(others)
        return tuple(sorted([*kept, *others[: MAX_ADDRESSES - len(kept)]]))

    def _reaches(self, family: int, addresses: Sequence[tuple[int, str]]) -> bool:
        first = next(address for one, address in addresses if one == family)
        with contextlib.suppress(OSError), socket.create_connection((first, self._port), _TRY_SECONDS):
            return True
        return False
