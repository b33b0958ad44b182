"""Load balancing and failover between several servers with the same data.

All servers respond to a request with the same bytes, so a request can go to any of them: to any URL that the client was
given, and to any address of its host. It goes to the one that is expected to respond first, by the requests it has in
flight and by its measured speed. A server that failed is left out, longer each time, and gets a health check in the
background before its next request.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import ConnectionFailed, FeedError
from .addresses import Addresses
from .server_list import PREFIX, ServerList
from .servers import LOOK_SECONDS, Server, jitter

FIRST_REST = 0.25
LONGEST_REST = 30.0
"""Seconds. After its n-th failure in a row, a server is left out for half to all of min(longest, first · 2ⁿ)."""

_OVERHEAD_BYTES = 1 << 16
"""What a request costs beside its body, expressed in bytes: else small bodies would look slow."""

_LEAST_BYTES = 1 << 16
"""Smaller bodies say nothing about the speed of a server."""

_LEAST_MEASURED = 4
"""Responses after which the speed of a server counts. The first ones are slow everywhere."""

_FORGET_SECONDS = 3.0
"""The speed of a server that gets no requests is forgotten with this time constant, so that it is measured again."""

_SLOWEST = 8.0
"""No server counts as slower than the fastest by more than this factor."""

_TOO_SLOW = 8.0
"""A server that is slower than the fastest by more than this factor owns no rows until its speed is forgotten."""

MOVE_SECONDS = 10.0
"""The rows of a server that has failed for less than this stay its own, and others do not cache them: they would have
no use of them when it is well again."""

_ALIKE = 1.5
"""Servers whose expected times differ by less than this factor take turns."""


@dataclass(frozen=True)
class ReplicaStats:
    """What one server has done for a client.

    Attributes
    ----------
    url : str
        The one that the client was given.
    address : str
        That of this server, if the URL has a host name; else empty.
    requests : int
        Number of requests that it answered.
    left_out : str
        Why it gets no requests at present; empty if it does.
    """

    url: str
    address: str
    requests: int
    left_out: str

    def __str__(self) -> str:
        name = f"{self.url} ({self.address})" if self.address else self.url
        return f"{name}: {self.requests:,} requests" + (f", left out: {self.left_out}" if self.left_out else "")


class _Given:
    """A URL that a client was given, and the servers at the addresses of its host.

    Parameters
    ----------
    make : callable
        Returns the server at one of the addresses; with None, that of a host that needs no look-up.
    """

    def __init__(self, make: Callable[[str | None], Server]) -> None:
        self._make = make
        self.servers: tuple[Server, ...] = (make(None),)
        self._is_asked = False
        self.addresses: Addresses | None = None

    def prepare(self) -> None:
        """Find out whether the host has to be looked up. That depends on the environment at the first request.

        Raises
        ------
        BadParameter
            The environment names a proxy that cannot be used.
        """
        if not self._is_asked:
            origin = self.servers[0].origin
            self.addresses = None if origin is None else Addresses(*origin)
            self._is_asked = True

    def take(self, addresses: Sequence[str]) -> list[Server]:
        """Use these addresses from now on; returns the servers that are no longer used."""
        known = {server.address: server for server in self.servers}
        self.servers = tuple(known.get(address) or self._make(address) for address in addresses)
        return [server for server in known.values() if server not in self.servers]


class _Listed:
    """A list of servers, and those that are in it.

    Parameters
    ----------
    make : callable
        Given a URL, returns what makes its servers.
    """

    def __init__(self, servers: ServerList, make: Callable[[str], Callable[[str | None], Server]]) -> None:
        self.list = servers
        self._make = make
        self._given: dict[str, _Given] = {}

    @property
    def given(self) -> tuple[_Given, ...]:
        return tuple(self._given.values())

    def take(self, urls: Sequence[str]) -> list[Server]:
        """Use these URLs from now on; returns the servers that are no longer used."""
        gone = [server for url, given in self._given.items() if url not in urls for server in given.servers]
        self._given = {url: self._given.get(url) or _Given(self._make(url)) for url in urls}
        return gone


class Servers:
    """The servers of one client.

    Parameters
    ----------
    urls : sequence of str
    make : callable
        Given a URL, returns what makes its server, given the address or None.
    lists : sequence of str
        URLs of lists of further servers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        make: Callable[[str], Callable[[str | None], Server]],
        lists: Sequence[str] = (),
    ) -> None:
        self._fixed = [_Given(make(url)) for url in urls]
        self._lists = [_Listed(ServerList(make(url)(None)), make) for url in lists]
        self._given = self._fixed
        self._servers = tuple(server for given in self._given for server in given.servers)
        names = [server.url for server in self._servers] + [f"{PREFIX}{one.list.server.url}" for one in self._lists]
        self.url = ",".join(names)
        """The URLs, without addresses."""
        self._token: str | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Server]:
        return iter(self._servers)

    def __len__(self) -> int:
        return len(self._servers)

    def look_up(self, seconds: float) -> None:
        """Look up lists and host names, if it is time to. Waits up to `seconds` if nothing of one is known yet.

        Raises
        ------
        BadParameter
            The environment names a proxy that cannot be used.
        """
        for listed in self._lists:
            listed.list.refresh(
                is_urgent=all(server.failures for given in listed.given for server in given.servers),
                wait=0.0 if listed.list.known else seconds,
                found=lambda urls, listed=listed: self._take(listed, urls),  # type: ignore[misc]
            )
        for given in self._given:
            with self._lock:
                given.prepare()
            if given.addresses is not None:
                is_urgent = all(server.failures for server in given.servers)
                given.addresses.refresh(
                    is_urgent=is_urgent,
                    wait=0.0 if given.addresses.known else seconds,
                    found=lambda addresses, given=given: self._take(given, addresses),  # type: ignore[misc]
                )

    @property
    def missing(self) -> FeedError | None:
        """Why there are no servers, if there are none."""
        if self._servers:
            return None
        errors = [listed.list.error for listed in self._lists if listed.list.error is not None]
        urls = ", ".join(listed.list.server.url for listed in self._lists)
        return errors[0] if errors else ConnectionFailed(f"the list of servers at {urls} has not been read yet")

    @contextlib.contextmanager
    def one(self, among: Sequence[Server] = (), owner: Server | None = None) -> Iterator[Server]:
        """The server for the next request, which counts as in flight within this context.

        Parameters
        ----------
        among : sequence of Server
            Those that can answer it; default: all.
        owner : Server, optional
            The one to choose, unless it is left out.
        """
        server = self._choose(among or self._servers, owner)
        try:
            yield server
        finally:
            with self._lock:
                server.under_way -= 1

    @contextlib.contextmanager
    def another(self, than: Server) -> Iterator[Server | None]:
        """Any other server that is not left out, which counts as in flight within this context; None if all are."""
        with self._lock:
            now = time.monotonic()
            trusted = [
                server
                for server in self._servers
                if server is not than and server.rests_until <= now and server.is_trusted
            ]
            chosen = self._soonest(trusted, now) if trusted else None
            if chosen is not None:
                chosen.under_way += 1
        try:
            yield chosen
        finally:
            if chosen is not None:
                with self._lock:
                    chosen.under_way -= 1

    def owners(self) -> list[Server]:
        """The servers that own rows now: those that are neither very slow nor left out for `MOVE_SECONDS`; all if there
        are none. See `h5feed.net.placement`.
        """
        with self._lock:
            now = time.monotonic()
            trusted = self._trusted(self._servers, now)
            measured = {server: pace for server in self._servers if (pace := _measured(server)) is not None}
            best = min(measured.values(), default=1.0)
            return [
                server
                for server in self._servers
                if (server in trusted or now - server.failing_since < MOVE_SECONDS)
                and (measured.get(server, best) / best - 1) * math.exp((server.paced_at - now) / _FORGET_SECONDS)
                < _TOO_SLOW - 1
            ] or list(self._servers)

    def others_awake(self, than: Server, among: Sequence[Server] = ()) -> bool:
        """Whether any other server (of those that can answer) is not left out."""
        now = time.monotonic()
        return any(server.rests_until <= now for server in among or self._servers if server is not than)

    def answered(self, server: Server, nbytes: int = 0, seconds: float = 0.0) -> None:
        """Report that `server` sent a valid response, of `nbytes`, within `seconds`."""
        with self._lock:
            server.requests += 1
            server.failures, server.rests_until = 0, 0.0
            if nbytes >= _LEAST_BYTES:
                server.paces.append(seconds / (nbytes + _OVERHEAD_BYTES))
                server.paced_at = time.monotonic()

    def failed(self, server: Server, asked_at: float, why: str, retry_after: float = 0.0) -> None:
        """Report that a request of `asked_at` (`time.monotonic()`) failed, or must be retried after `retry_after` s."""
        with self._lock:
            # Requests that fail together, because of one crash, count as one failure.
            if asked_at >= server.failed_at:
                server.failed_at = time.monotonic()
                self._leave_out(server, why, retry_after)
            elif retry_after:
                server.rests_until = max(server.rests_until, time.monotonic() + retry_after)

    def authorize(self, token: str) -> None:
        """Send another token from now on."""
        with self._lock:
            self._token = token
            for server in (*self._servers, *(listed.list.server for listed in self._lists)):
                server.authorize(token)

    def stats(self) -> tuple[ReplicaStats, ...]:
        """What each server has done so far."""
        now = time.monotonic()
        with self._lock:
            return tuple(
                ReplicaStats(
                    server.url,
                    server.address or "",
                    server.requests,
                    server.why if server.failures and (server.rests_until > now or not server.is_well) else "",
                )
                for server in self._servers
            )

    def after_fork(self) -> None:
        """In the child: a lock held by a thread of the parent would never be released."""
        self._lock = threading.Lock()
        for listed in self._lists:
            listed.list.after_fork()
        for given in self._given:
            if given.addresses is not None:
                given.addresses.after_fork()
        for server in self._servers:
            server.after_fork()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            servers = (*self._servers, *(listed.list.server for listed in self._lists))
        for server in servers:
            server.close()

    def _take(self, source: _Given | _Listed, found: Sequence[str]) -> None:
        """Use these addresses, or these URLs, from now on."""
        with self._lock:
            if self._is_closed:
                return
            before = self._servers
            gone = source.take(found)
            self._given = [*self._fixed, *(given for listed in self._lists for given in listed.given)]
            self._servers = tuple(server for given in self._given for server in given.servers)
            if self._token is not None:
                for server in self._servers:
                    if server not in before:
                        server.authorize(self._token)
        for server in gone:
            server.retire()

    def _choose(self, among: Sequence[Server], owner: Server | None) -> Server:
        with self._lock:
            now = time.monotonic()
            trusted = self._trusted(among, now)
            if owner is not None and owner in trusted:
                chosen = owner
            elif trusted:
                chosen = self._soonest(trusted, now)
            else:
                # If all are left out, the one whose time is up first.
                chosen = min(among, key=lambda server: (server.rests_until, server.asked_at))
            chosen.asked_at = now
            chosen.under_way += 1
            return chosen

    def _trusted(self, among: Sequence[Server], now: float) -> list[Server]:
        """Those that are not left out. If there are any, others whose time is up get a health check. Call with the
        lock."""
        awake = [server for server in among if server.rests_until <= now]
        trusted = [server for server in awake if server.is_trusted]
        for server in awake if trusted else ():
            if not server.is_trusted:
                self._look_at(server, now)
        return trusted

    def _soonest(self, servers: Sequence[Server], now: float) -> Server:
        """The server that is expected to respond first; among equals, the least recently used. Call with the lock."""
        measured = {server: pace for server in servers if (pace := _measured(server)) is not None}
        best = min(measured.values(), default=1.0)
        costs = {
            server: (server.under_way + 1) * _pace(measured.get(server, best), best, now - server.paced_at)
            for server in servers
        }
        least = min(costs.values())
        alike = [server for server, cost in costs.items() if cost <= _ALIKE * least]
        return min(alike, key=lambda server: (server.under_way, server.asked_at))

    def _look_at(self, server: Server, now: float) -> None:
        """Start a health check in a thread, so that no request waits for it. Call with the lock held."""
        # No other check begins until this one has ended.
        server.rests_until = now + 2 * LOOK_SECONDS

        def look() -> None:
            alive = server.is_alive()
            with self._lock:
                if alive:
                    server.is_well, server.rests_until = True, 0.0
                else:
                    self._leave_out(server, server.why)

        try:
            threading.Thread(target=look, name="h5feed-health", daemon=True).start()
        except RuntimeError:
            # The system cannot start more threads.
            self._leave_out(server, server.why)

    def _leave_out(self, server: Server, why: str, retry_after: float = 0.0) -> None:
        """Call with the lock held."""
        if not server.failures:
            server.failing_since = time.monotonic()
        server.failures += 1
        server.is_well = False
        server.why = why
        # The exponent is limited, or the power would overflow a float after a thousand failures.
        longest = min(LONGEST_REST, FIRST_REST * 2 ** min(server.failures, 16))
        server.rests_until = time.monotonic() + max(retry_after, jitter.uniform(longest / 2, longest))


def _measured(server: Server) -> float | None:
    """Seconds per byte: the least of the last responses, because other work on the machine only ever adds to it."""
    return min(server.paces) if len(server.paces) >= _LEAST_MEASURED else None


def _pace(measured: float, best: float, age: float) -> float:
    """Seconds per byte, of which less is certain the longer ago it was measured."""
    return best + (min(measured, _SLOWEST * best) - best) * math.exp(-age / _FORGET_SECONDS)
