"""The supervisor: accepts connections and passes each to the worker with the fewest.

If workers shared a listening socket, one of them would get nearly all connections. So the supervisor accepts the
connections and passes their descriptors on (SCM_RIGHTS). It also replaces workers that crash or hang, and stops all
workers when it stops. Workers exit when the supervisor has exited. The supervisor never blocks on a worker.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..jobs.registry import NO_SCRATCH
from ..main import metrics_catalogue
from ..services import Shared
from ..settings import MAX_WORKERS, Settings
from ..sharing.local_socket import LocalSocket
from ..sharing.logs import say
from ..sharing.metrics import Metrics
from ..sharing.scoreboard import SUPERVISOR, Scoreboard
from ..tokens.keyring import Keyring
from .embedded import Embedding
from .listening import remove_socket
from .service_manager import ServiceManager
from .worker import ALIVE_SECONDS, CLOSED, CONNECTION, LEAVING, READY, Tls, run_worker

SEND_BUFFER_BYTES = 256 << 10
"""SO_SNDBUF of connections with a short round trip. This size was the fastest in measurements; two thirds of it and
twice as much were slower."""

_NEAR_SECONDS = 0.001
"""Maximum round trip of connections that get this send buffer. On longer ones, a send buffer per round trip limits the
throughput, so the kernel adjusts the size."""

_TCP_INFO_ROUND_TRIP = 68
"""Offset of ``tcpi_rtt``, in microseconds, in the kernel's ``struct tcp_info``."""

STOP_SECONDS = 8.0
"""Time after which workers that have not ended are killed. Container engines wait for 10 s."""

STILL_SECONDS = 4.0
"""A worker is replaced if it has sent no heartbeat for this long, and has been stopped or waiting for a disk for the
last `_SURE_SECONDS`."""

SILENT_SECONDS = 20.0
"""A worker that has sent no heartbeat for this long is always replaced. The machine may be slow, so it is longer."""

START_SECONDS = 60.0
"""A worker that is not ready this long after its start is replaced."""

_LOOK_SECONDS = 0.2
_SURE_SECONDS = 1.0
_RESTART_SECONDS = 0.5
_KILLED_SECONDS = 1.0
_START_ATTEMPTS = 3


def _round_trip(connection: socket.socket) -> float:
    """Round trip of the TCP handshake in seconds; 0 if the system does not report it."""
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
    heard: float = field(default_factory=time.monotonic)
    """Time of its last message, or of its start."""
    still_since: float | None = None
    """Time since which every check has found the process stopped or waiting for a disk."""


class Supervisor:
    """Runs ``settings.workers`` processes until SIGTERM, SIGINT, or until its terminal closes.

    Without a terminal, SIGHUP replaces the workers one by one, which reads settings and certificates again and frees
    memory; no response is lost.

    Parameters
    ----------
    listeners : sequence of socket
        From `listen`.
    on_ready : callable
        Called once, when every worker serves.
    keyring : Keyring
        Its last valid token file is shared by all workers.
    reread : callable
        Called at SIGHUP; returns the settings and the tokens that new workers get, or None: everything stays as it is.
    local : LocalSocket, optional
        The Unix socket on which the server listens.
    embedding : Embedding, optional
        Says when the server has no clients any more and ends.
    """

    def __init__(
        self,
        settings: Settings,
        listeners: Sequence[socket.socket],
        on_ready: Callable[[], None],
        keyring: Keyring,
        tls: Tls | None = None,
        reread: Callable[[], tuple[Settings, Keyring] | None] | None = None,
        local: LocalSocket | None = None,
        embedding: Embedding | None = None,
    ) -> None:
        self._settings = settings
        self._listeners = listeners
        self._reread = reread or (lambda: (settings, keyring))
        self._manager = ServiceManager()
        self._local = local
        self._embedding = embedding
        self._socket_file = None if local is None else (local.path, os.lstat(local.path))
        if embedding is not None and self._socket_file is not None:
            embedding.begin(self._socket_file[1])
        self._on_ready = on_ready
        self._keyring = keyring
        self._before = settings, keyring
        """Settings and tokens from before the reload, in case the new workers do not start."""
        self._tls = tls
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Worker] = {}
        self._outgoing: list[_Worker] = []
        """Workers that a reload replaces, and that have not been told to stop yet."""
        self._ending: dict[int, float] = {}
        """Processes that are ending, and when they will be killed."""
        self._stopping = self._reloading = False
        self._is_reload_told = True
        self._announced = False
        self._early_deaths = 0
        self._restart_at: list[float] = []
        # A reload may start more workers. Memory that is never written to costs nothing.
        self._board = Scoreboard(MAX_WORKERS)
        self._scratch = NO_SCRATCH
        self._metrics = Metrics(metrics_catalogue(), self._board, SUPERVISOR)

    def run(self) -> int:
        """Serve; returns the exit code."""
        with contextlib.ExitStack() as opened:
            # Without it, workers share a little less.
            with contextlib.suppress(OSError):
                own = tempfile.TemporaryDirectory(prefix="h5feed-", ignore_cleanup_errors=True)
                self._scratch = Path(opened.enter_context(own)) / "jobs"
            return self._serve()

    def _serve(self) -> int:
        wake_receive, wake_send = socket.socketpair()
        wake_send.setblocking(False)
        signal.set_wakeup_fd(wake_send.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        # Under `nohup`, SIGHUP is ignored.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._stop if _has_terminal() else self._reload_soon)
        self._selector.register(wake_receive, selectors.EVENT_READ, lambda: wake_receive.recv(64))
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))
        self._board.occupy(SUPERVISOR, os.getpid())
        self._metrics.add("server_start_time_seconds", None, time.time())
        self._metrics.publish()
        for _ in range(self._settings.workers):
            self._start_worker()
        before = time.monotonic()
        while not self._stopping:
            for key, _ in self._selector.select(_LOOK_SECONDS):
                key.data()
            now = time.monotonic()
            if now - before > ALIVE_SECONDS:
                # This process was suspended, and has not read the heartbeats that were sent meanwhile.
                for worker in self._workers.values():
                    worker.heard = now
            before = now
            self._look_after(now)
            self._manager.alive(now)
            if self._embedding is not None and self._embedding.is_over(now):
                self._stopping = True
            none_serves = not self._announced or not any(worker.ready for worker in self._workers.values())
            if none_serves and self._early_deaths >= _START_ATTEMPTS:
                self._end_workers()
                return 1
        self._end_workers()
        return 0

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True

    def _reload_soon(self, number: int, frame: object) -> None:
        self._reloading = True

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            if _round_trip(connection) <= _NEAR_SECONDS:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            # A worker that has missed two heartbeats may hang, so prefer the others.
            late = time.monotonic() - 2 * ALIVE_SECONDS
            staying = [worker for worker in self._workers.values() if not worker.leaving]
            staying.sort(key=lambda worker: (not worker.ready, worker.heard < late, worker.connections))
            for worker in staying:
                try:
                    socket.send_fds(worker.channel, [CONNECTION], [connection.fileno()])
                except OSError:
                    # Its channel is full or closed, so it hangs or has crashed. Try another worker.
                    continue
                worker.connections += 1
                return

    def _look_after(self, now: float) -> None:
        """Replace workers that hang, start workers that are due, and clean up after processes that have ended."""
        # One reload after the other: each starts as many workers as there are.
        if self._reloading and self._is_reload_told:
            self._reloading = False
            self._reload()
        for worker in list(self._workers.values()):
            silent = now - worker.heard
            is_still = worker.ready and silent > STILL_SECONDS - _SURE_SECONDS and _stands_still(worker.pid)
            worker.still_since = (worker.still_since or now) if is_still else None
            still = now - worker.still_since if worker.still_since else 0.0
            if silent > (SILENT_SECONDS if worker.ready else START_SECONDS) or still >= _SURE_SECONDS:
                self._say(f"worker {worker.pid} has not responded for {silent:.1f} s; killing it")
                # This also closes its connections.
                _kill(worker.pid)
                self._bury(worker, "hung")
        due = [moment for moment in self._restart_at if moment <= now]
        self._restart_at = [moment for moment in self._restart_at if moment > now]
        for _ in due:
            self._start_worker()
        for pid, deadline in list(self._ending.items()):
            if _has_ended(pid):
                del self._ending[pid]
                self._board.leave(pid)
            elif now >= deadline:
                self._ending[pid] = now + 1.0
                _kill(pid)

    def _start_worker(self) -> None:
        place = self._board.take()
        if place is None:
            self._say("too many old workers are still ending: /metrics does not include a new worker")
        shared = None if place is None else Shared(self._board, place, self._scratch)
        ours, theirs = socket.socketpair()
        # This process has no threads and has imported everything, so a fork starts quickly and shares its memory.
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_DFL)
                self._selector.close()
                for listener in self._listeners:
                    listener.close()
                ours.close()
                if self._embedding is not None:
                    self._embedding.leave()
                for worker in self._workers.values():
                    worker.channel.close()
                code = run_worker(self._settings, theirs, self._tls, self._keyring, shared, self._local)
            finally:
                # If the terminal was closed, both fail.
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError):
                        stream.flush()
                os._exit(code)
        theirs.close()
        if place is not None:
            self._board.occupy(place, pid)
        ours.setblocking(False)
        worker = self._workers[pid] = _Worker(pid, ours)
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._hear(worker))

    def _reload(self) -> None:
        self._manager.reloading()
        again = self._reread()
        if again is None:
            self._say("SIGHUP: the new settings cannot be used, so nothing changes")
            self._manager.ready("the new settings cannot be used; serving with the previous ones")
            return
        self._say("SIGHUP: replacing all workers")
        self._before = self._settings, self._keyring
        self._settings, self._keyring = again
        self._is_reload_told = False
        self._outgoing = [worker for worker in self._workers.values() if not worker.leaving]
        self._early_deaths = 0
        for _ in range(self._settings.workers):
            self._start_worker()

    def _hear(self, worker: _Worker) -> None:
        if self._workers.get(worker.pid) is not worker:
            # Buried a moment ago.
            return
        try:
            messages = worker.channel.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            messages = b""
        if not messages:
            self._bury(worker)
            return
        worker.heard = time.monotonic()
        worker.connections -= messages.count(CLOSED)
        worker.leaving = worker.leaving or LEAVING in messages
        if READY in messages:
            worker.ready = True
            self._early_deaths = 0
            self._let_leave()
            everybody = len(self._workers) == self._settings.workers
            if everybody and all(other.ready for other in self._workers.values()) and not self._announced:
                self._announced = True
                self._on_ready()
                self._manager.ready(f"serving {self._settings.source} with {self._settings.workers} workers")

    def _let_leave(self) -> None:
        """A new worker is ready, so stop an old one; when the last new one is ready, stop all remaining old ones."""
        starting = [one for one in self._workers.values() if not one.ready]
        while self._outgoing:
            told = self._outgoing.pop()
            told.leaving = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(told.pid, signal.SIGTERM)
            if starting:
                break
        if not starting and not self._restart_at and not self._is_reload_told:
            self._is_reload_told = True
            self._manager.ready(f"serving {self._settings.source} with {self._settings.workers} workers")

    def _bury(self, worker: _Worker, reason: str = "ended") -> None:
        self._selector.unregister(worker.channel)
        worker.channel.close()
        del self._workers[worker.pid]
        # It has closed its channel, so it is ending, or hangs while it ends.
        self._ending[worker.pid] = time.monotonic() + 1.0
        if not worker.ready:
            self._early_deaths += 1
            if self._early_deaths >= _START_ATTEMPTS and self._outgoing:
                self._say("the new workers do not start; keeping the old ones")
                self._outgoing = []
                self._settings, self._keyring = self._before
                self._is_reload_told = True
                self._manager.ready("the new workers do not start; serving with the old ones")
        with contextlib.suppress(ValueError):
            self._outgoing.remove(worker)
        staying = [other for other in self._workers.values() if not other.leaving and other not in self._outgoing]
        if len(staying) + len(self._restart_at) < self._settings.workers:
            self._say(f"worker {worker.pid} ended unexpectedly; starting another")
            self._metrics.add("worker_restarts_total", reason)
            self._metrics.publish()
            self._restart_at.append(time.monotonic() + _RESTART_SECONDS)

    def _say(self, what: str) -> None:
        """Print to standard error, which may be a closed terminal."""
        say(self._settings.log_format, what, sys.stderr, prefix="h5feed: ", level="WARNING")

    def _end_workers(self) -> None:
        self._manager.stopping()
        # Accept no more connections, not even from the backlog. Then stop all workers at once, with a common deadline.
        for listener in self._listeners:
            listener.close()
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        left = [*self._workers, *self._ending]
        deadline = time.monotonic() + STOP_SECONDS
        while (left := [pid for pid in left if not _has_ended(pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in left:
            self._say(f"worker {pid} did not end within {STOP_SECONDS:g} s; killing it")
            _kill(pid)
        deadline = time.monotonic() + _KILLED_SECONDS
        # A process that waits for a disk only ends when the disk responds.
        while (left := [pid for pid in left if not _has_ended(pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        if self._socket_file is not None:
            remove_socket(*self._socket_file)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal, which sends SIGHUP when it is closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _stands_still(pid: int) -> bool:
    """Whether a process is stopped or waits for a disk; False if the system does not report it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The process name before it may contain anything, including parentheses.
            return file.read().rpartition(b") ")[2][:1] in (b"T", b"t", b"D")
    except OSError:
        return False


def _has_ended(pid: int) -> bool:
    """Whether a child has ended. Calling it again after that is an error."""
    return os.waitpid(pid, os.WNOHANG) != (0, 0)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
