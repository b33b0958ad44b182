"""The listening sockets. Stale Unix sockets are removed, but never any other file."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from ..settings import Settings


def listen(settings: Settings) -> list[socket.socket]:
    """The listening sockets, with the one of the port first. Connections inherit their options.

    Raises
    ------
    OSError
        An address is in use by a running server or by a file that is not a socket, or is not available. ``filename`` is
        the address.
    """
    listeners: list[socket.socket] = []
    try:
        if settings.has_port:
            where = f"{settings.host}:{settings.port}"
            listeners.append(_on_port(settings.host, settings.port))
        if settings.uds is not None:
            where = settings.uds
            listeners.append(_on_unix_socket(settings.uds, settings.uds_mode))
    except OSError as error:
        for listener in listeners:
            listener.close()
        error.filename = where
        raise
    return listeners


def _on_port(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        return _begun(listener)
    except BaseException:
        listener.close()
        raise


def _on_unix_socket(path: str, mode: str) -> socket.socket:
    _make_room(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        # Set the mode before anybody can connect.
        if mode:
            os.chmod(path, int(mode, 8))
        return _begun(listener)
    except BaseException:
        listener.close()
        raise


def _begun(listener: socket.socket) -> socket.socket:
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def _make_room(path: str) -> None:
    """Remove the socket file of a server that has ended.

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
            # The server may be running but busy. Then bind() fails because the address is in use.
            pass


def remove_socket(path: str, own: os.stat_result) -> None:
    """Remove our own socket file, unless another server has replaced it."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.lstat(path), own):
            os.unlink(path)
