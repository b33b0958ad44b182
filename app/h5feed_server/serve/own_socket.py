"""The Unix socket that a server on a port opens by itself, for clients of its own user on the same machine."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from pathlib import Path

from h5feed.runtime_folder import runtime_folder

from ..cache_folder import locks
from ..settings import Settings
from .exposure import is_every_address, is_loopback
from .listening import on_unix_socket

_MODE = "0600"

_LOCK_SECONDS = 2.0


def own_socket(settings: Settings, port: int, *, is_tls: bool) -> tuple[socket.socket, str] | None:
    """The listening socket and its path; None if the settings exclude it, or if clients could not use it.

    If it cannot be opened, a line on standard error gives the reason, and clients use TCP.
    """
    reachable = is_loopback(settings.host) or is_every_address(settings.host)
    if not settings.local or settings.uds is not None or is_tls or not reachable:
        return None
    try:
        folder = runtime_folder()
        # Between its bind() and listen(), another server refuses connections, and would look like one that was killed.
        held = _held(folder / ".lock")
        try:
            _sweep(folder)
            path = str(folder / f"port-{port}.sock")
            return on_unix_socket(path, _MODE), path
        finally:
            locks.release(folder / ".lock", held)
    except OSError as error:
        reason = error.strerror or error
        print(
            f"h5feed-server: cannot open a Unix socket, so clients on this machine use TCP: {reason}", file=sys.stderr
        )
        return None


def _held(lock: Path) -> int:
    """Acquire the lock, which servers hold while they open their sockets."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while (held := locks.hold(lock)) is None:
        if time.monotonic() >= deadline:
            raise TimeoutError(f"another process has held {lock} for {_LOCK_SECONDS:g} s")
        time.sleep(0.01)
    return held


def _sweep(folder: Path) -> None:
    """Remove the sockets of servers that were killed."""
    for path in folder.glob("port-*.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
