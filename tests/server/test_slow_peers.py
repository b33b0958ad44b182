"""Peers that take or send next to nothing: others are served beside them, and what they hold is given up in time."""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS, SIDE = 256, 250
LONGEST_WAIT = 10.0
"""Seconds that a good client may wait for a batch."""

_STREAM = "GET /v1/datasets/pixels/batches?batch_size=64&start=0&stop=4 HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""16 MB, in blocks of as much as the good client asks for."""

_POST = "POST /v1/datasets/pixels/rows HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
_POST += "Content-Length: 900000\r\n\r\n"


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (ROWS, SIDE, SIDE), dtype=np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("slow")
    with h5py.File(path / "pixels.h5", "w") as file:
        file["x"] = pixels
        file["y"] = np.arange(ROWS) % 3
    return path


class SlowPeers:
    """Connections that take, or send, a little every half second; those that are cut off come again.

    Parameters
    ----------
    addresses : sequence of str
        That they come from, in turn.
    """

    def __init__(self, server: ServerProcess, count: int, addresses: Sequence[str]) -> None:
        self._server = server
        self._addresses = itertools.cycle(addresses)
        self.cut_off = 0
        self.refused = 0
        self._ended = threading.Event()
        self._peers = [
            (kind, self._connect(kind)) for kind, _ in zip(itertools.cycle("rrhb"), range(count), strict=False)
        ]
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()

    def _connect(self, kind: str) -> socket.socket:
        connected = socket.socket()
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connected.settimeout(60)
        connected.bind((next(self._addresses), 0))
        connected.connect(("127.0.0.1", self._server.port))
        connected.sendall(
            {"r": _STREAM, "h": "GET /v1/datasets HTTP/1.1\r\nHost: localhost\r\nX: ", "b": _POST}[kind].encode()
        )
        connected.setblocking(False)
        return connected

    def _go_on(self) -> None:
        while not self._ended.wait(0.5):
            for number, (kind, connected) in enumerate(self._peers):
                try:
                    if kind != "r":
                        connected.send(b"1" if kind == "h" else b" " * 1500)
                    # Readers ask for 4 kB/s: above what is the least where nobody waits.
                    if not (received := connected.recv(2048)):
                        raise ConnectionError
                    self.refused += received.startswith(b"HTTP/1.1 503")
                except BlockingIOError:
                    pass
                except OSError:
                    self.cut_off += 1
                    connected.close()
                    self._peers[number] = kind, self._connect(kind)

    def __enter__(self) -> SlowPeers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        for _, connected in self._peers:
            connected.close()


def _waits(server: ServerProcess, pixels: np.ndarray, seconds: float, **options: Any) -> Iterator[float]:
    """What a good client waits for each batch, all rows of which are looked at."""
    order = random.Random(0)
    with h5feed.connect(server.url, deadline=60, **options) as feed:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.monotonic()
            batch = feed["pixels"].batch(order.randrange(4), batch_size=64, shuffle=True, fields=["x", "y"])
            yield time.monotonic() - began
            assert np.array_equal(batch["x"], pixels[batch.rows])
            assert np.array_equal(batch["y"], batch.rows % 3)


OTHER, SAME = "127.0.0.2", "127.0.0.1"
"""Addresses: another than the good client's, and its own."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "addresses", "room", "seconds"),
    [
        (80, [OTHER, SAME], 24 << 20, 6),
        pytest.param(760, [OTHER], 256 << 20, 40, marks=pytest.mark.slow),
        pytest.param(760, [SAME], 256 << 20, 40, marks=pytest.mark.slow),
    ],
)
def test_a_good_client_beside_slow_ones(
    serve: Callable[..., ServerProcess],
    data: Path,
    pixels: np.ndarray,
    count: int,
    addresses: Sequence[str],
    room: int,
    seconds: float,
) -> None:
    """Slow readers and senders, more than there is room for: every row is right, and none comes late."""
    server = serve(data, "--workers", "2", H5FEED_INFLIGHT_BYTES=str(room), H5FEED_READ_TIMEOUT="20")
    with SlowPeers(server, count, addresses) as peers:
        # All the room is theirs.
        wait_until(lambda: peers.refused > 0 or peers.cut_off > 0)
        waits = list(_waits(server, pixels, seconds))
    print(f"{len(waits)} batches, longest wait {max(waits):.2f} s; {peers.cut_off} cut off, {peers.refused} refused")
    assert max(waits) < LONGEST_WAIT
