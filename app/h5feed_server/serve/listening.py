"""The listening sockets. Stale Unix sockets are removed, but never any other file."""

from __future__ import annotations

import contextlib
import errno
import grp
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
            listeners.append(on_unix_socket(settings.uds, settings.permissions, settings.socket_group))
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


def on_unix_socket(path: str, mode: str, group: str = "") -> socket.socket:
    """A listening Unix socket.

    Parameters
    ----------
    mode : str
        Its permissions in octal; empty for those that the umask leaves.
    group : str
        Name or number of its group; empty for that of the server's user.

    Raises
    ------
    OSError
    """
    gid = _group_id(group) if group else -1
    _make_room(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        # Set the group and the mode before anybody can connect.
        if group:
            _give_to_group(path, gid, group)
        if mode:
            os.chmod(path, int(mode, 8))
        return _begun(listener)
    except BaseException:
        listener.close()
        raise


def _group_id(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise OSError(errno.EINVAL, f"there is no group {group!r} for --socket-group: use its number") from None


def _give_to_group(path: str, gid: int, group: str) -> None:
    try:
        os.chown(path, -1, gid)
    except (PermissionError, OverflowError):
        os.unlink(path)
        raise PermissionError(
            errno.EPERM,
            f"the server's user {os.geteuid()} cannot give its socket to the group {group} (--socket-group), because "
            "it is not a member of it",
        ) from None


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
