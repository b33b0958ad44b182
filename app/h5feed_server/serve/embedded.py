"""A server that `connect("data/")` has started in the background. It ends after its last client.

`h5feed.net.embedded` describes the files in its folder and who locks them when.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path

_FILES = ("server.sock", "server.log.1", "server.log", "starting", "server", "clients")
"""Of the folder, in the order in which they are removed."""

LINGER_SECONDS = 4.0
"""How long the server waits for another client after the last one has gone."""

LOG_BYTES = 1 << 20
"""Size of the log, in bytes, at which it is rotated. One older log is kept."""

LOCKED = 3
"""Exit code of a server whose predecessor does not end."""

_LOCK_SECONDS = 15.0
_LOOK_SECONDS = 1.0


class Embedding:
    """The folder of an embedded server.

    Parameters
    ----------
    folder : str
        Created by the client, for its user alone.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self.socket = str(self._folder / "server.sock")
        self._own: os.stat_result | None = None
        self._lock = -1
        self._look_at = 0.0
        self._unused_since: float | None = None

    def detach(self) -> None:
        """Become the only server in the folder, in a process that is not a child of the client.

        Exits with `LOCKED` if another server does not end.
        """
        self._lock = os.open(self._folder / "server", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _try_lock(self._lock):
            if time.monotonic() >= deadline:
                print(f"h5feed-server: another server in {self._folder} does not end", file=sys.stderr)
                sys.exit(LOCKED)
            time.sleep(0.02)
        if os.fork():
            # The child has the lock, too.
            os._exit(0)

    def begin(self, own: os.stat_result) -> None:
        """The server listens on its socket, whose file is `own`."""
        self._own = own

    def leave(self) -> None:
        """In a worker: leave the lock to the supervisor, so that it ends with it."""
        os.close(self._lock)

    def is_over(self, now: float) -> bool:
        """Whether the server must end because nobody uses it. Its socket is then removed already."""
        if now < self._look_at:
            return False
        self._look_at = now + _LOOK_SECONDS
        self._bound_log()
        if not self._is_reachable():
            # Somebody has deleted the folder, so clients start another server.
            return self._has_waited(now)
        try:
            clients = os.open(self._folder / "clients", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            print(f"h5feed-server: cannot tell whether there are clients: {error}", file=sys.stderr)
            return False
        try:
            if not _try_lock(clients):
                self._unused_since = None
                return False
            if not self._has_waited(now):
                return False
            # No client can be connecting: each takes its shared lock before it looks for the socket. The lock file is
            # removed, too: a client that waits for the lock notices this, and starts over.
            for name in _FILES:
                with contextlib.suppress(OSError):
                    os.unlink(self._folder / name)
            with contextlib.suppress(OSError):
                os.rmdir(self._folder)
            return True
        finally:
            os.close(clients)

    def _has_waited(self, now: float) -> bool:
        if self._unused_since is None:
            self._unused_since = now
        return now - self._unused_since >= LINGER_SECONDS

    def _is_reachable(self) -> bool:
        try:
            status = os.lstat(self.socket)
        except OSError:
            return False
        return self._own is not None and os.path.samestat(status, self._own)

    def _bound_log(self) -> None:
        with contextlib.suppress(OSError):
            if os.fstat(1).st_size > LOG_BYTES:
                log = self._folder / "server.log"
                # Other processes write to the same open file, so it is copied and emptied, not renamed.
                (self._folder / "server.log.1").write_bytes(log.read_bytes()[-LOG_BYTES:])
                os.ftruncate(1, 0)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
