"""A worker process. It receives connections from the supervisor over a channel, and sends it a heartbeat every second.
It closes connections of slow clients, sooner if other requests wait for the memory that these connections hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import ssl
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from h5feed.errors import Overloaded

from ..api.identity import TrustedProxies
from ..main import create_app
from ..services import Shared
from ..settings import Settings
from ..sharing.body_pool import BodyPool
from ..sharing.file_watch import FileWatch
from ..sharing.local_socket import LocalSocket
from ..sharing.metrics import Metrics
from ..sharing.shared_bytes import SharedBytes
from ..sharing.trimming import settle
from ..tokens.keyring import Keyring
from .connection import HEAD_SECONDS, Connection, address_of, refusal
from .http1 import Host

logger = logging.getLogger(__name__)

READY, ALIVE, LEAVING, CLOSED, CONNECTION = b"r", b"a", b"l", b"-", b"c"
"""Messages on the channel: worker is ready; is alive; is shutting down; a connection was closed; a new connection."""

ALIVE_SECONDS = 1.0
"""Interval between heartbeats."""

DRAIN_SECONDS = 5.0
"""How long a stopping worker waits for responses in progress."""

_MOST_AT_ONCE = 256
"""Maximum number of new connections that are accepted in one turn of the event loop."""

_OPENING_TURNS = 8
"""Turns of the event loop within which a connection is open. TLS takes longer; the worker does not wait for it."""

_LOOK_SECONDS = 0.5
"""Interval between checks of the connections."""

_CUT_SECONDS = 1.0
"""How long aborted requests may take to end at shutdown."""

_PATIENCE_SECONDS = 1.0
"""How long a request waits for memory before other callers have to release some."""

_PRESSED = 16
"""Factor for the minimum rate while others wait for memory, measured over `_PRESSED_SECONDS`."""

_PRESSED_SECONDS = 2.0

_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cross-origin-resource-policy", b"same-origin"))
"""Headers of every response."""

_OTHER_FILES = 500
"""File descriptors that a worker needs in addition to those of connections and open HDF5 files."""


@dataclass(frozen=True)
class Tls:
    """PEM files of the server's certificate and key.

    Create it before the workers are forked, so that together they log each problem with the files once.
    """

    certificate: str
    key: str
    trouble: SharedBytes = field(default_factory=partial(SharedBytes, "h5feed-certificate-trouble"))

    def context(self) -> ssl.SSLContext:
        """TLS context for the certificate."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        # Without a password function, OpenSSL would prompt for the password of an encrypted key.
        context.load_cert_chain(self.certificate, self.key, password=str)
        return context


def run_worker(
    settings: Settings,
    channel: socket.socket,
    tls: Tls | None,
    keyring: Keyring,
    shared: Shared | None = None,
    local: LocalSocket | None = None,
) -> int:
    """Serve until a signal arrives; returns the exit code."""
    settle()
    # The supervisor gets SIGHUP, too, and replaces the workers.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    server = _Worker(create_app(settings, keyring, shared, local_socket=local), channel, settings, tls)
    with contextlib.suppress(KeyboardInterrupt):
        # No sockets to listen on: connections come through the channel.
        server.run(sockets=[])
    return 0 if server.started else 1


class _Worker(uvicorn.Server):
    """A uvicorn server that gets connections from a channel instead of a listening socket.

    uvicorn runs the event loop, the application's lifespan and the signal handlers; `serve.connection` handles
    connections. Only public API of uvicorn is used: `Config`, `run`, `startup`, `shutdown`, `started` and
    `should_exit`.
    """

    def __init__(self, app: FastAPI, channel: socket.socket, settings: Settings, tls: Tls | None = None) -> None:
        config = uvicorn.Config(
            app,
            loop="uvloop",
            ws="none",
            lifespan="on",
            # uvicorn's messages go to the same log as all others.
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
        )
        super().__init__(config)
        self.host = Host(app, _HEADERS)
        self._app = app
        self._files = tls
        self._tls = tls.context() if tls else None
        self._channel = channel
        self.patience = settings.read_timeout
        self.min_rate = settings.min_rate
        self._most = _most_connections(settings)
        self._closed_unsaid = 0
        self._opened = 0
        self._opening = 0
        self._crowded = asyncio.Lock()

    @property
    def _pool(self) -> BodyPool:
        pool: BodyPool = self._app.state.services.pool
        return pool

    @property
    def _metrics(self) -> Metrics:
        metrics: Metrics = self._app.state.services.metrics
        return metrics

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._metrics.watch(
                lambda: {
                    ("connections", None): len(self.host.connections),
                    ("connections_limit", None): self._most,
                    ("connections_opened_total", None): self._opened,
                }
            )
        # These objects live as long as the process. Collecting them repeatedly would delay one response in a hundred.
        gc.collect()
        gc.freeze()
        self._channel.setblocking(False)
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._receive)
        if self._files is not None:
            files = [Path(self._files.certificate), Path(self._files.key)]
            FileWatch(files, self._renew_certificate).begin("h5feed-certificate")
        self._channel.send(READY)
        self._say_alive()
        self._look()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, let responses in progress finish for a while, then close the rest."""
        loop = asyncio.get_running_loop()
        self._say(LEAVING)
        # The supervisor may just have sent connections: serve these, too.
        await asyncio.sleep(0.05)
        loop.remove_reader(self._channel.fileno())
        held = self.host.connections, self.host.tasks
        for connection in list(self.host.connections):
            connection.shutdown()
        await _until_empty(held, DRAIN_SECONDS)
        late = self._connections()
        self._metrics.add("connections_closed_total", "shutdown", len(late))
        # Errors from now on are caused by the shutdown and not logged.
        self.host.is_closing = True
        for one in late:
            one.abort()
        # Requests that wait for an aborted connection end now.
        await _until_empty(held, _CUT_SECONDS)
        if late:
            logger.warning("shutting down: %d connections were closed before their responses were complete", len(late))
        await super().shutdown(sockets)

    def _renew_certificate(self) -> None:
        """Load the changed certificate for new connections. If it is invalid, keep the previous one."""
        if self._files is None:
            return
        why = ""
        try:
            self._tls = self._files.context()
        except (OSError, ValueError) as error:
            if isinstance(error, ssl.SSLError):
                why = error.reason or "not a PEM file of a certificate"
            else:
                why = getattr(error, "strerror", None) or "invalid"
        with self._files.trouble.locked():
            told = self._files.trouble.read().decode()
            self._files.trouble.replace(why.encode())
        if why and why != told:
            logger.error("certificate %s: %s; the previous one stays in use", self._files.certificate, why)
        elif told and not why:
            logger.warning("certificate %s: it is valid again", self._files.certificate)

    def _connections(self) -> list[Connection]:
        return [connection for connection in self.host.connections if isinstance(connection, Connection)]

    def trusts(self, address: str) -> bool:
        """Whether this is the address of a trusted proxy."""
        proxies: TrustedProxies = self._app.state.proxies
        return proxies.trusts(address)

    # The channel

    def _say(self, message: bytes) -> int:
        """Send a message to the supervisor; returns the number of bytes sent."""
        with contextlib.suppress(OSError):
            return self._channel.send(message)
        return 0

    def _say_alive(self) -> None:
        self._say(ALIVE)
        asyncio.get_running_loop().call_later(ALIVE_SECONDS, self._say_alive)

    def say_closed(self) -> None:
        """Tell the supervisor that a connection was closed."""
        self._closed_unsaid += 1
        self._closed_unsaid -= self._say(CLOSED * self._closed_unsaid)

    def _receive(self) -> None:
        """Take all waiting connections at once: under load a turn of the event loop is long."""
        for _ in range(_MOST_AT_ONCE):
            try:
                messages, descriptors, flags, _ = socket.recv_fds(self._channel, 64, 64)
            except BlockingIOError:
                return
            except OSError:
                messages, descriptors, flags = b"", [], 0
            if flags & socket.MSG_CTRUNC:
                logger.warning("lost connections: too many open files (see `ulimit -n`)")
            for descriptor in descriptors:
                self._opened += 1
                connection = socket.socket(fileno=descriptor)
                task = asyncio.ensure_future(self._serve_connection(connection))
                self.host.tasks.add(task)
                task.add_done_callback(self.host.tasks.discard)
            if not messages:
                # The supervisor is gone, and with it the address: finish what is under way and end.
                asyncio.get_running_loop().remove_reader(self._channel.fileno())
                self.should_exit = True
                return

    async def _serve_connection(self, connection: socket.socket) -> None:
        if not self._is_full():
            await self._open(connection)
            return
        # One after the other: those that are open tell who is to make way.
        async with self._crowded:
            for _ in range(_OPENING_TURNS):
                if not self._opening:
                    break
                await asyncio.sleep(0)
            if self._is_full() and not self._make_way(connection):
                self._turn_away(connection)
                return
            if self._tls is None:
                await self._open(connection)
                return
        await self._open(connection)

    async def _open(self, connection: socket.socket) -> None:
        self._opening += 1
        handshake = HEAD_SECONDS if self._tls else None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Connection(self), connection, ssl=self._tls, ssl_handshake_timeout=handshake
            )
        except OSError:
            connection.close()
            self.say_closed()
        finally:
            self._opening -= 1

    # Who has to give up what

    def _look(self) -> None:
        """Close connections of slow clients; called every half second."""
        loop = asyncio.get_running_loop()
        loop.call_later(_LOOK_SECONDS, self._look)
        now = loop.time()
        self._give_up([one for one in self._connections() if one.look(now)], "too slow")
        self._give_up(self._pressed(now), "too slow while others wait")

    def _give_up(self, slow: list[Connection], why: str) -> None:
        for connection in slow:
            connection.abort()
        if slow:
            self._metrics.add("connections_closed_total", "slow", len(slow))
            most = ", ".join(f"{n} of {name}" for name, n in Counter(one.caller for one in slow).most_common(3))
            logger.warning("closed connections of clients that were %s: %s", why, most)

    def _pressed(self, now: float) -> list[Connection]:
        """Connections to close so that others get memory.

        These are the slowest connections of callers that hold more than their share (but not their last one), and
        connections of anyone who accepts almost nothing.
        """
        late = self._pool.wanted(now - _PATIENCE_SECONDS)
        if not late:
            return []
        held = self._pool.held()
        share = sum(held.values()) / len(held.keys() | late.keys())
        caller = min(late, key=lambda name: held.get(name, 0))
        wanted = late[caller]
        holding = [one for one in self._connections() if not one.is_ended() and one.unsent()]
        holding.sort(key=lambda one: one.rate(now) or 0.0)
        answers = Counter(one.caller for one in holding)
        given_up: list[Connection] = []
        for one in holding:
            if wanted <= 0:
                break
            has = held.get(one.caller, 0)
            crowds = one.caller != caller and has > max(share, held.get(caller, 0)) and answers[one.caller] > 1
            rate = one.rate(now)
            pressed = rate is not None and rate < _PRESSED * self.min_rate
            if crowds or (pressed and one.watched_for(now) >= _PRESSED_SECONDS):
                given_up.append(one)
                answers[one.caller] -= 1
                held[one.caller] = has - one.unsent()
                wanted -= one.unsent()
        return given_up

    def _is_full(self) -> bool:
        if len(self.host.connections) + self._opening < self._most:
            return False
        return sum(not one.is_ended() for one in self._connections()) + self._opening >= self._most

    def _make_way(self, connection: socket.socket) -> bool:
        """Close one connection of the caller that has the most: its oldest idle one or, for another caller's sake,
        its slowest. Returns False if there is none.
        """
        now = asyncio.get_running_loop().time()
        # What others have made way for already is gone in a moment.
        there = [one for one in self._connections() if not one.is_ended()]
        if not there:
            return False
        most, _ = Counter(one.caller for one in there).most_common(1)[0]
        its = [one for one in there if one.caller == most]
        self._metrics.add("connections_closed_total", "crowded")
        idle = [one for one in its if one.is_idle()]
        if idle:
            min(idle, key=lambda one: (one.has_asked(), one.number)).abort()
        elif most != address_of(connection):
            min(its, key=lambda one: one.rate(now) or 0.0).abort()
        else:
            return False
        return True

    def _turn_away(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if self._tls is None:
                error = Overloaded(f"{self._most} connections are open; try again in a moment", retry_after=1)
                connection.send(refusal(error.because_of("connections"), 503, self.host), socket.MSG_DONTWAIT)
        self.say_closed()


async def _until_empty(sets: Iterable[Collection[object]], seconds: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    sets = list(sets)
    while any(sets) and loop.time() < deadline:
        await asyncio.sleep(0.05)


def _most_connections(settings: Settings) -> int:
    """Limit on connections from the settings and the operating system."""
    others = settings.open_files + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.connections + others
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        # It begins low for the sake of programs that use `select`.
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(10, min(settings.connections, allowed - others))
