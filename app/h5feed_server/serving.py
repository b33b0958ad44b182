"""Processes that serve: a supervisor accepts connections and hands each to the worker that has the fewest.

Workers that share a listening socket do not share its connections: one of them gets nearly all. So the supervisor
accepts and passes the descriptors on (SCM_RIGHTS). It also restarts workers that die and ends them all when it is told
to stop; workers end when the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .api.direct import PEER, DirectWriter
from .listening import remove_socket
from .main import create_app
from .settings import Settings

logger = logging.getLogger(__name__)

SEND_BUFFER_BYTES = 256 << 10
"""SO_SNDBUF of connections from near by: measured best; a third less and twice as much are slower."""

_NEAR_SECONDS = 0.001
"""Round trip up to which a connection counts as near. Over a longer one no more than its send buffer passes in each, so
there the kernel finds the size that it takes."""

_TCP_INFO_ROUND_TRIP = 68
"""Offset of ``tcpi_rtt``, in microseconds, in the kernel's ``struct tcp_info``."""

STOP_SECONDS = 8.0
"""After this, workers that have not ended are killed: container engines wait 10 s."""

DRAIN_SECONDS = 5
"""How long a stopping worker lets answers under way finish."""

_READY, _LEAVING, _CLOSED, _CONNECTION = b"r", b"l", b"-", b"c"
"""Messages on the channel: worker is ready; it is ending; one of its connections closed; here is a connection."""

_RESTART_SECONDS = 0.5
_START_ATTEMPTS = 3


@dataclass(frozen=True)
class Tls:
    """PEM files of the server's certificate and key."""

    certificate: str
    key: str


def _round_trip(connection: socket.socket) -> float:
    """Seconds that the handshake took there and back; 0 where the system does not tell."""
    if sys.platform != "linux" or connection.family == socket.AF_UNIX:
        return 0.0
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_ROUND_TRIP + 4)
    except OSError:
        return 0.0
    return int.from_bytes(info[_TCP_INFO_ROUND_TRIP:], sys.byteorder) / 1e6


@dataclass
class _Worker:
    pid: int
    channel: socket.socket
    connections: int = 0
    ready: bool = False
    leaving: bool = False
    started: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs ``settings.workers`` processes until SIGTERM or SIGINT.

    Parameters
    ----------
    listener : socket
        From `listen`.
    on_ready : callable
        Called once, when every worker serves.
    """

    def __init__(
        self, settings: Settings, listener: socket.socket, on_ready: Callable[[], None], tls: Tls | None = None
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._socket_file = (settings.uds, os.lstat(settings.uds)) if settings.uds is not None else None
        self._on_ready = on_ready
        self._tls = tls
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Worker] = {}
        self._stopping = False
        self._announced = False
        self._early_deaths = 0
        self._restart_at: list[float] = []

    def run(self) -> int:
        """Serve; returns the exit code."""
        wake_receive, wake_send = socket.socketpair()
        wake_send.setblocking(False)
        signal.set_wakeup_fd(wake_send.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._selector.register(wake_receive, selectors.EVENT_READ, lambda: wake_receive.recv(64))
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        for _ in range(self._settings.workers):
            self._start_worker()
        while not self._stopping:
            for key, _ in self._selector.select(0.2):
                key.data()
            now = time.monotonic()
            due = [moment for moment in self._restart_at if moment <= now]
            self._restart_at = [moment for moment in self._restart_at if moment > now]
            for _ in due:
                self._start_worker()
            if self._early_deaths >= _START_ATTEMPTS:
                self._end_workers()
                return 1
        self._end_workers()
        return 0

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection:
            if _round_trip(connection) <= _NEAR_SECONDS:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            staying = [worker for worker in self._workers.values() if not worker.leaving]
            for worker in sorted(staying, key=lambda worker: (not worker.ready, worker.connections)):
                try:
                    socket.send_fds(worker.channel, [_CONNECTION], [connection.fileno()])
                except OSError:
                    # Its channel is full or gone: it hangs or dies, let another have it.
                    continue
                worker.connections += 1
                return

    def _start_worker(self) -> None:
        ours, theirs = socket.socketpair()
        # This process has no threads, and has everything imported: a fork starts at once and shares that memory.
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_DFL)
                self._selector.close()
                self._listener.close()
                ours.close()
                for worker in self._workers.values():
                    worker.channel.close()
                code = _run_worker(self._settings, theirs, self._tls)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        theirs.close()
        ours.setblocking(False)
        worker = self._workers[pid] = _Worker(pid, ours)
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._hear(worker))

    def _hear(self, worker: _Worker) -> None:
        try:
            messages = worker.channel.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            messages = b""
        if not messages:
            self._bury(worker)
            return
        worker.connections -= messages.count(_CLOSED)
        worker.leaving = worker.leaving or _LEAVING in messages
        if _READY in messages:
            worker.ready = True
            self._early_deaths = 0
            everybody = len(self._workers) == self._settings.workers
            if everybody and all(other.ready for other in self._workers.values()) and not self._announced:
                self._announced = True
                self._on_ready()

    def _bury(self, worker: _Worker) -> None:
        self._selector.unregister(worker.channel)
        worker.channel.close()
        del self._workers[worker.pid]
        # It closed its channel because it ends, or hangs in ending.
        _reap(worker.pid, time.monotonic() + 1.0)
        if not self._stopping:
            if not worker.ready:
                self._early_deaths += 1
            print(f"h5feed: worker {worker.pid} ended, starting another", file=sys.stderr, flush=True)
            self._restart_at.append(time.monotonic() + _RESTART_SECONDS)

    def _end_workers(self) -> None:
        # Nobody new, not even from the backlog; then all at once, then one deadline for all.
        self._listener.close()
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for pid in self._workers:
            _reap(pid, deadline)
        if self._socket_file is not None:
            remove_socket(*self._socket_file)


def _reap(pid: int, deadline: float) -> None:
    """Wait for a child until the deadline, then kill it."""
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() >= deadline:
            print(f"h5feed: worker {pid} did not end in {STOP_SECONDS:g} s and is killed", file=sys.stderr, flush=True)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(0.02)


def _run_worker(settings: Settings, channel: socket.socket, tls: Tls | None) -> int:
    config = uvicorn.Config(
        create_app(settings),
        loop="uvloop",
        http="httptools",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        headers=[("x-content-type-options", "nosniff"), ("cross-origin-resource-policy", "same-origin")],
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    server = _WorkerServer(config, channel, settings.read_timeout)
    with contextlib.suppress(KeyboardInterrupt):
        # Listens to nothing: connections come through the channel.
        server.run(sockets=[])
    return 0 if server.started else 1


class _WorkerServer(uvicorn.Server):
    """A uvicorn server whose connections come through a channel instead of a listening socket."""

    def __init__(self, config: uvicorn.Config, channel: socket.socket, patience: float) -> None:
        super().__init__(config)
        self._channel = channel
        self.patience = patience
        """Seconds that the body of a request may take to come."""
        self._closed_unsaid = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is there now stays: looking through it again and again would hold up every hundredth answer.
        gc.collect()
        gc.freeze()
        self._channel.setblocking(False)
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._receive)
        self._channel.send(_READY)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(_LEAVING)
        # Connections that were on their way are answered still.
        await asyncio.sleep(0.05)
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        await super().shutdown(sockets)

    def _receive(self) -> None:
        try:
            messages, descriptors, flags, _ = socket.recv_fds(self._channel, 64, 64)
        except BlockingIOError:
            return
        except OSError:
            messages, descriptors, flags = b"", [], 0
        if not messages:
            # The supervisor is gone, and with it the address: finish what is under way and end.
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self.should_exit = True
        if flags & socket.MSG_CTRUNC:
            logger.warning("connections were lost: this process has too many files open (see `ulimit -n`)")
        for descriptor in descriptors:
            connection = socket.socket(fileno=descriptor)
            task = asyncio.ensure_future(self._serve_connection(connection))
            self.server_state.tasks.add(task)
            task.add_done_callback(self.server_state.tasks.discard)

    async def _serve_connection(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Connection(self), connection, ssl=self.config.ssl
            )
        except OSError:
            connection.close()
            self.say_closed()

    def say_closed(self) -> None:
        """Tell the supervisor that a connection is gone."""
        self._closed_unsaid += 1
        with contextlib.suppress(OSError):
            self._closed_unsaid -= self._channel.send(_CLOSED * self._closed_unsaid)


class _Connection(HttpToolsProtocol):
    """A connection that says when it is gone, and whose socket a thread may write an answer to."""

    def __init__(self, server: _WorkerServer) -> None:
        super().__init__(config=server.config, server_state=server.server_state, app_state=server.lifespan.state)
        self._owner = server
        self._running: RequestResponseCycle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        # All of them, not only the one that was received last.
        for cycle in (self._running, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
        self._owner.say_closed()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.parser is not None and (self.cycle is None or self.cycle.response_complete):
            # Half a request so far.
            self._await_request()

    def _await_request(self) -> None:
        """Close the connection when no whole request head comes."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Called when nothing has come for a while; what is unsent then is not wanted any more."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent != self._unsent:
            self._unsent = unsent
            self._await_request()
        elif unsent:
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        running = self._running
        if running is not None and not running.response_complete:
            # An answer is under way, and maybe a thread is writing it: nothing may come in between.
            running.disconnected = True
            self.abort()
            return
        super().send_400_response(msg)

    def abort(self) -> None:
        """End the connection at once, for everybody who writes to it."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.descriptor())) as connection:
            connection.shutdown(socket.SHUT_RDWR)
        self.transport.abort()

    def descriptor(self) -> int:
        """Of the socket."""
        number: int = self.transport.get_extra_info("socket").fileno()
        return number

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # Bound to this request: when its turn comes, others may have been received behind it.
        cycle = self.cycle
        offers: Any = {PEER: _Peer(self, cycle)}
        cycle.scope["extensions"] = offers
        if cycle.scope["method"] not in ("GET", "HEAD"):
            self.loop.call_later(self._owner.patience, self._end_unless_whole, cycle)

    def _end_unless_whole(self, cycle: RequestResponseCycle) -> None:
        """End the connection when the body of a request has not come by now."""
        if cycle.more_body and not cycle.disconnected and not cycle.response_complete:
            self.abort()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)


class _Peer:
    """See `api.direct.Peer`."""

    def __init__(self, connection: _Connection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle

    def direct(self) -> DirectWriter | None:
        connection, cycle = self._connection, self._cycle
        usual = connection.scheme == "http" and cycle.keep_alive and not cycle.waiting_for_100_continue
        # Bytes of the answer before, which the loop has not sent yet, come first.
        if not usual or self.is_gone() or self.unsent():
            return None
        try:
            return DirectWriter(cycle, connection.descriptor())
        except OSError:
            # No descriptor is left.
            return None

    def is_gone(self) -> bool:
        return self._cycle.disconnected or self._connection.transport.is_closing()

    def unsent(self) -> int:
        return self._connection.transport.get_write_buffer_size()

    def abort(self) -> None:
        self._cycle.disconnected = True
        self._connection.abort()
