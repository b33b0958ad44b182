"""Notifies systemd, or another manager that sets ``$NOTIFY_SOCKET``, of the server's state: sd_notify(3).

Without the variable, nothing is sent. The server does not wait for a manager that is gone or slow.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

_SEND_SECONDS = 0.1


class ServiceManager:
    """The manager of this process, if there is one.

    Attributes
    ----------
    watchdog_seconds : float or None
        Maximum interval between signs of life that it expects; None if it expects none.
    """

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self.watchdog_seconds = _watchdog_seconds() if self._address else None
        self._alive_at = -float("inf")

    def ready(self, status: str) -> None:
        """The server has started or reloaded. `status` is a line for people."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        # By the time, the manager recognises the reload that it requested.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def status(self, status: str) -> None:
        """A line for people."""
        self._send(f"STATUS={status}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self, now: float) -> None:
        """Send a sign of life if one is due, twice as often as needed. Called in every turn of the main loop."""
        if self.watchdog_seconds is not None and now - self._alive_at >= self.watchdog_seconds / 2:
            self._alive_at = now
            self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        # An address that begins with @ is in Linux's abstract namespace.
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(_SEND_SECONDS)
            manager.sendto(state.encode(), address)


def _watchdog_seconds() -> float | None:
    # Child processes inherit the variables, so they may be meant for the parent process.
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    given = os.environ.get("WATCHDOG_USEC", "")
    return int(given) / 1e6 if given.isascii() and given.isdigit() and int(given) else None
