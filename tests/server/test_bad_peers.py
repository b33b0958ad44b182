"""Clients that send garbage, disconnect early or never finish: clients that train at the same time get every row."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5feed
import h5py
import numpy as np
import pytest

from benchmarks.troubles import MALFORMED
from tests.support.server_process import ServerProcess
from tests.support.usage import Usage
from tests.support.waiting import wait_until

ROWS, SIDE = 512, 40
GROWTH = 100 << 20
"""Bytes by which all workers together may grow, once they have served everything."""

_WORKERS, _POOL_THREADS = 2, 6

_OPENED_LATER = 3 * _WORKERS
"""Each worker opens a data file when it first reads it, which may be after the first look at its descriptors."""

DATASETS = {"pictures": {}, "packed": {"chunks": (8, SIDE, SIDE), "compression": "gzip"}}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (ROWS, SIDE, SIDE), np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("bad_peers")
    for name, stored in DATASETS.items():
        with h5py.File(path / f"{name}.h5", "w") as file:
            file.create_dataset("x", data=pixels, **stored)
            file["y"] = np.arange(ROWS) % 7
    with h5py.File(path / "large.h5", "w") as file:
        file["x"] = np.zeros((64, 1 << 17), np.uint8)
    return path


class GoodClients:
    """Clients that train continuously. They compare each row with the file, and check that it comes once per epoch."""

    def __init__(self, server: ServerProcess, pixels: np.ndarray) -> None:
        self._ended = threading.Event()
        self.epochs: Counter[str] = Counter()
        self.batches = 0
        self._threads = ThreadPoolExecutor(len(DATASETS))
        self._work = [self._threads.submit(self._train, server.url, name, pixels) for name in DATASETS]

    def _train(self, url: str, name: str, pixels: np.ndarray) -> None:
        with h5feed.connect(url, deadline=60) as feed:
            for epoch in itertools.count():
                times = np.zeros(ROWS, int)
                for batch in feed[name].batches(batch_size=32, shuffle=True, epoch=epoch):
                    assert np.array_equal(batch["x"], pixels[batch.rows]) and np.array_equal(batch["y"], batch.rows % 7)
                    np.add.at(times, batch.rows, 1)
                    self.batches += 1
                assert (times == 1).all(), f"{name}, epoch {epoch}: {Counter(times.tolist())}"
                self.epochs[name] += 1
                if self._ended.is_set():
                    return

    def finish(self) -> None:
        """Let the clients finish at least one epoch; raises the error of a client if there is one."""
        self._ended.set()
        for work in self._work:
            work.result(120)
        assert set(self.epochs) == set(DATASETS)


@contextlib.contextmanager
def _good_clients(server: ServerProcess, pixels: np.ndarray) -> Iterator[GoodClients]:
    clients = GoodClients(server, pixels)
    try:
        yield clients
    finally:
        clients.finish()


def _use_it(server: ServerProcess, pixels: np.ndarray) -> None:
    """Send requests until the workers have opened files, filled caches and started threads."""
    for _ in range(2):
        with _good_clients(server, pixels):
            pass


def _bad_peers(port: int, requests: int, downloads: int) -> Counter[str]:
    """Run sixteen at a time; returns how often each status was received."""
    with ThreadPoolExecutor(16) as threads:
        left = [threads.submit(_aborted_download, port, number) for number in range(downloads)]
        work = [threads.submit(_malformed_peer, port, _REQUESTS[n % len(_REQUESTS)]) for n in range(requests)]
        for one in left:
            one.result(300)
        return Counter(itertools.chain.from_iterable(one.result(300) for one in work))


def _malformed_peer(port: int, sent: bytes) -> list[str]:
    """Statuses of all responses until the connection is closed; for incomplete requests, until no more data arrives."""
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 60) as connected:
        connected.settimeout(0.25 if sent in _UNFINISHED else 60)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connected.sendall(sent)
        while more := connected.recv(1 << 16):
            received += more
    return re.findall(r"^HTTP/1.1 (\d+)", received.decode("latin-1"), re.MULTILINE) or ["none"]


_REQUESTS = [request.encode("latin-1") for request in MALFORMED]
_UNFINISHED = [one for one in _REQUESTS if b"Content-Length: 500" in one or one.startswith(b"\x16")]
"""The server waits for the rest of these."""


def _aborted_download(port: int, number: int) -> None:
    """Request megabytes, read some of them, and disconnect, with or without closing properly."""
    targets = (
        "/v1/datasets/large/batches?batch_size=8&start=0&stop=8",
        "/v1/datasets/large/batches/0?batch_size=64",
        "/v1/datasets/packed/batches?batch_size=64&start=0&stop=8&shuffle=true",
        "/v1/datasets/large/rows?start=0&stop=60&format=npz",
    )
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), 60) as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connected.sendall(
            f"GET {targets[number % 4]} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        for _ in range(number % 5):
            connected.recv(4096)
        if number % 2:
            # As a process that is killed: what was not read resets the connection.
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize(("requests", "downloads"), [(2000, 400), pytest.param(20_000, 4000, marks=pytest.mark.slow)])
def test_good_clients_beside_malformed_requests_and_aborted_downloads(
    serve: Callable[..., ServerProcess],
    data: Path,
    pixels: np.ndarray,
    requests: int,
    downloads: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No client gets a 500, every row is correct and comes once, and the workers do not grow.

    A client that disconnects is not an error of the server, so the log is empty.
    """
    # Bodies are kept for the next ones, up to this bound: how many there are at once depends on the machine.
    server = serve(data, "--workers", str(_WORKERS), H5FEED_INFLIGHT_BYTES=str(32 << 20))
    _use_it(server, pixels)
    _bad_peers(server.port, requests // 8, downloads // 8)
    pids, before = server.worker_pids(), Usage.of(server)
    with _good_clients(server, pixels) as good:
        answers = _bad_peers(server.port, requests, downloads)
        assert good.batches > 0
    assert sum(answers.values()) >= requests and not [status for status in answers if status.startswith("5")], answers
    assert answers["400"] > requests // 4 and answers["431"] > requests // 20, answers
    assert server.worker_pids() == pids
    wait_until(lambda: Usage.of(server).connections <= before.connections)
    wait_until(lambda: Usage.of(server).descriptors <= before.descriptors + _OPENED_LATER)
    after = Usage.of(server)
    assert after.rss - before.rss < GROWTH, f"{before.rss >> 20} MiB, then {after.rss >> 20} MiB"
    assert "ERROR" not in capfd.readouterr().err


# Half of the headers, half of a body ---------------------------------------------------------------------------------

_SLOW_PEERS = """
import contextlib, resource, socket, sys, time
port, count, lasts = map(int, sys.argv[1:])
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4 * count), most))
head = b"GET /v1/datasets HTTP/1.1\\r\\nHost: localhost\\r\\nX: "
body = b"POST /v1/datasets/pictures/rows HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
body += b"Content-Length: 900000\\r\\n\\r\\n"
peers = []
for number in range(count):
    peer = socket.create_connection(("127.0.0.1", port), 60)
    peer.sendall(body if number % 2 else head)
    peer.setblocking(False)
    peers.append((peer, number % 2))
print("connected", flush=True)
deadline = time.monotonic() + lasts
while peers and time.monotonic() < deadline:
    time.sleep(0.5)
    going_on = []
    for peer, sends_body in peers:
        try:
            # Bodies come faster than the least rate, so that it is their own deadline that ends them.
            peer.send(b" " * 1500 if sends_body else b"1")
            with contextlib.suppress(BlockingIOError):
                while peer.recv(4096):
                    pass
                raise ConnectionError
        except BlockingIOError:
            pass
        except OSError:
            peer.close()
            continue
        going_on.append((peer, sends_body))
    peers = going_on
print("left", len(peers), flush=True)
"""


@pytest.mark.parametrize("count", [500, pytest.param(1500, marks=pytest.mark.slow)])
def test_good_clients_beside_clients_that_never_finish(
    serve: Callable[..., ServerProcess], data: Path, pixels: np.ndarray, count: int
) -> None:
    """Their connections are closed at the deadlines for headers and bodies. Meanwhile, clients that train get their
    batches."""
    options = {"H5FEED_READ_TIMEOUT": "8", "H5FEED_REQUEST_THREADS": str(_POOL_THREADS)}
    server = serve(data, "--workers", str(_WORKERS), **options)
    _use_it(server, pixels)
    pids, before = server.worker_pids(), Usage.of(server)
    command = [sys.executable, "-c", _SLOW_PEERS, str(server.port), str(count), "90"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as slow:
        try:
            assert slow.stdout is not None and slow.stdout.readline() == "connected\n"
            # On a slow machine, the first are cut off before the last are there.
            assert Usage.of(server).connections > 0
            while slow.poll() is None:
                # Epoch after epoch, each checked for itself.
                with _good_clients(server, pixels):
                    pass
            assert slow.stdout.read() == "left 0\n"
        finally:
            slow.kill()
    assert server.worker_pids() == pids
    wait_until(lambda: Usage.of(server).descriptors <= before.descriptors + _OPENED_LATER)
    # Threads of the pool are made as they are needed, and stay: there is none for each peer.
    wait_until(lambda: Usage.of(server).threads <= before.threads + _WORKERS * _POOL_THREADS)
    after = Usage.of(server)
    assert after.rss - before.rss < GROWTH, f"{before.rss >> 20} MiB, then {after.rss >> 20} MiB"
