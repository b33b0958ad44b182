"""A link with a round trip and a rate of its own, and a server behind it: ``python -m benchmarks.link … -- COMMAND``.

Real TCP over it, real packets: a TUN device here, another in a new network namespace in which the command runs, and
this process between them, which holds every packet back for half of the round trip and lets no more pass than the rate.
The MTU is as large as it may be, since every packet passes through Python. Needs Linux, ``/dev/net/tun`` and the right
to make network devices; within ``unshare --map-root-user --net`` everybody has it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

HERE, THERE = "10.99.99.1", "10.99.99.2"
"""Addresses of the two ends; the command's is the second."""

_MTU = 65535
_QUEUE_SECONDS = 0.25
"""What waits longer for its turn at the link is dropped, as a router would."""

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000


class _Direction:
    """Packets from one device to the other."""

    def __init__(self, source: int, sink: int, delay: float, rate: float) -> None:
        self._source, self._sink = source, sink
        self._delay, self._rate = delay, rate
        self._free_at = 0.0
        self._held: deque[tuple[float, bytes]] = deque()

    def receive(self, now: float) -> None:
        """Take all packets that are there."""
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = os.read(self._source, _MTU)
                begins = max(now, self._free_at)
                if begins - now < _QUEUE_SECONDS:
                    self._free_at = begins + len(packet) / self._rate
                    self._held.append((self._free_at + self._delay, packet))

    def deliver(self, now: float) -> float:
        """Hand over all packets whose time has come; returns when the next one's will."""
        while self._held and self._held[0][0] <= now:
            # A device whose queue is full drops, as the real ones do.
            with contextlib.suppress(BlockingIOError):
                os.write(self._sink, self._held[0][1])
            self._held.popleft()
        return self._held[0][0] if self._held else float("inf")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command behind the link until it ends or this process is told to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.link")
    parser.add_argument("--round-trip", type=float, required=True, help="round trip in seconds")
    parser.add_argument("--rate", type=float, required=True, help="bytes per second in each direction")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)
    near = _device("near", HERE)
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot create a network namespace")
    far = _device("far", THERE)
    child = subprocess.Popen(options.command)
    signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    delay = options.round_trip / 2
    directions = {
        near: _Direction(near, far, delay, options.rate),
        far: _Direction(far, near, delay, options.rate),
    }
    while child.poll() is None:
        now = time.monotonic()
        due = min(direction.deliver(now) for direction in directions.values())
        readable, _, _ = select.select(list(directions), [], [], min(0.1, max(0.0, due - time.monotonic())))
        for device in readable:
            directions[device].receive(time.monotonic())
    return child.returncode


def _device(name: str, address: str) -> int:
    """File descriptor of a new TUN device in the network namespace of now."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    for command in (
        ["address", "add", f"{address}/30", "dev", name],
        ["link", "set", "dev", name, "mtu", str(_MTU), "txqueuelen", "5000", "up"],
        ["link", "set", "dev", "lo", "up"],
    ):
        subprocess.run(["ip", *command], check=True)
    return device


if __name__ == "__main__":
    sys.exit(main())
