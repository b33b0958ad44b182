"""The listening socket. For Unix sockets, only dead sockets are ever removed, no other file."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from ..settings import Settings


def listen(settings: Settings) -> socket.socket:
    """The listening socket; its options are inherited by the connections.

    Raises
    ------
    OSError
        The address is taken, by a server that lives or by a file that is no socket, or cannot be had.
    """
    if settings.uds is not None:
        _make_room(settings.uds)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(settings.uds)
    else:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def _make_room(path: str) -> None:
    """Remove the socket file of a server that is gone.

    Raises
    ------
    FileExistsError
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise FileExistsError(errno.EEXIST, "a file that is not a socket has this name: use another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            # It may live and be too busy to answer: binding will say that the address is in use.
            pass


def remove_socket(path: str, own: os.stat_result) -> None:
    """Remove our own socket file, unless another server has replaced it."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.lstat(path), own):
            os.unlink(path)
