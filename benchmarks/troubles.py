"""The kinds of trouble: each is made as long as its stage lasts, and tells what it did."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import h5py
import httpx
import numpy as np

if TYPE_CHECKING:
    from .trouble import Stage

SMALL = "small"
"""Dataset of the crowd: 512 rows of 16×16×3 bytes and a label."""

CROWD, PROCESSES = 200, 8
PEERS = 760
AWAY_SECONDS = 5.0

_BIG = "GET /v1/datasets/pictures/batches?batch_size=256&start=0&stop=4 HTTP/1.1\r\nHost: localhost\r\n\r\n"
_HEAD = "GET /v1/datasets HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
_POST = _HEAD.replace("GET /v1/datasets", "POST /v1/datasets/pictures/rows") + "Content-Type: application/json\r\n"

_SLOW = {"reader": _BIG, "head": _HEAD + "X: ", "body": _POST + "Content-Length: 900000\r\n\r\n"}
"""How slow peers begin; there are twice as many readers as others."""

_ADDRESSES = ("127.0.0.1", "127.0.0.2")
"""That slow peers come from: that of the clients that train, and another."""


def none(stage: Stage) -> str:
    """nothing goes wrong, for comparison"""
    stage.wait()
    return ""


def crowd(stage: Stage) -> str:
    """200 more clients train on small rows"""
    for _ in range(PROCESSES):
        stage.train(SMALL, CROWD // PROCESSES)
    stage.wait()
    return f"{CROWD} more clients in {PROCESSES} processes"


class _SlowPeer:
    """A connection that takes, or sends, a little at a time; when it is cut off it comes again."""

    def __init__(self, port: int, kind: str, address: str) -> None:
        self._port, self._kind, self._address = port, kind, address
        self.cut_off = self.refused = 0
        self._connect()

    def _connect(self) -> None:
        self.connection = socket.socket()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.connection.settimeout(60)
        self.connection.bind((self._address, 0))
        self.connection.connect((_ADDRESSES[0], self._port))
        self.connection.sendall(_SLOW[self._kind].encode())
        self.connection.setblocking(False)

    def go_on(self) -> None:
        """Called every half second."""
        try:
            if self._kind != "reader":
                self.connection.send(b"1" if self._kind == "head" else b" " * 1500)
            # 4 kB/s: more than has to be taken where nobody waits.
            if not (received := self.connection.recv(2048)):
                raise ConnectionError
            self.refused += received.startswith(b"HTTP/1.1 503")
        except BlockingIOError:
            pass
        except OSError:
            self.cut_off += 1
            self.connection.close()
            self._connect()


def slow(stage: Stage) -> str:
    """760 peers receive or send very slowly"""
    kinds, addresses = itertools.cycle(("reader", "reader", "head", "body")), itertools.cycle(_ADDRESSES)
    peers = [_SlowPeer(_port(stage), next(kinds), next(addresses)) for _ in range(PEERS)]
    while stage.lasts():
        for peer in peers:
            peer.go_on()
        stage.wait(0.5)
    for peer in peers:
        peer.connection.close()
    cut_off, refused = sum(peer.cut_off for peer in peers), sum(peer.refused for peer in peers)
    return f"{PEERS} slow peers, disconnected {cut_off} times, got 503 {refused} times"


def _posted(body: str, *lines: str) -> str:
    return _POST + "\r\n".join([*(lines or [f"Content-Length: {len(body)}"]), "", body])


MALFORMED = (
    # What is no HTTP.
    "hello\r\n\r\n",
    "\x16\x03\x01\x02\x00\x01\x00\x01",
    "GET / HTTP/9.9\r\n\r\n",
    "GET  HTTP/1.1\r\n\r\n",
    # Heads that are too long, or say what cannot be.
    _HEAD + "X: " + "a" * 100_000 + "\r\n\r\n",
    _HEAD + "a:b\r\n" * 20_000 + "\r\n",
    _HEAD.replace("datasets", "datasets/" + "%ff" * 5000) + "\r\n",
    _HEAD.replace("datasets", "datasets/pictures/batches/0?batch_size=-1&shuffle=maybe&fields=nix") + "\r\n",
    _HEAD.replace("datasets", f"datasets/pictures/batches/{'9' * 5000}") + "\r\n",
    _HEAD.replace("datasets", "datasets/pictures/batches/0?" + "&".join(f"a{n}=b" for n in range(1000))) + "\r\n",
    # Bodies that are no JSON, or not what it has to be.
    _posted("{"),
    _posted("[" * 100_000),
    _posted('{"rows": [1e400, -1, "a", null]}'),
    _posted('{"rows": ' + "9" * 100_000 + "}"),
    _posted("{" + ",".join(f'"k{n}": {n}' for n in range(50_000)) + "}"),
    # Lengths that are wrong.
    _posted('{"rows": [1]}', "Content-Length: 5"),
    _posted('{"rows": [1]}', "Content-Length: 500"),
    _posted('{"rows": [1]}', "Content-Length: -5"),
    _posted('{"rows": [1]}', "Content-Length: 13", "Content-Length: 20"),
    _posted("zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    # Many at once, and rubbish behind them.
    (_HEAD.replace("close", "keep-alive") + "\r\n") * 20 + "rubbish\r\n\r\n",
    (_HEAD.replace("close", "keep-alive") + "\r\n") * 500,
)


def malformed(stage: Stage) -> str:
    """eight peers send malformed or impossible requests"""

    def send(number: int) -> Counter[str]:
        answers: Counter[str] = Counter()
        for request in itertools.islice(itertools.cycle(MALFORMED), number, None):
            if not stage.lasts():
                break
            answers.update(_answers(_port(stage), request.encode("latin-1")))
        return answers

    with ThreadPoolExecutor(8) as threads:
        answers = sum(threads.map(send, range(8)), Counter[str]())
    return "responses to malformed requests: " + _counted(answers)


def _answers(port: int, request: bytes) -> list[str]:
    """Statuses of all that is answered until the connection ends, or nothing comes for a second; or `none`."""
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.settimeout(1.0)
        # Who has seen enough may not take it all.
        with contextlib.suppress(OSError):
            connection.sendall(request)
        while more := connection.recv(1 << 16):
            received += more
    return re.findall(r"^HTTP/1.1 (\d+)", received.decode("latin-1"), re.MULTILINE) or ["none"]


def stopped(stage: Stage) -> str:
    """one of the two workers is stopped (SIGSTOP) repeatedly"""
    return _signal(stage, signal.SIGSTOP, 8.0)


def killed(stage: Stage) -> str:
    """one of the two workers is killed repeatedly"""
    return _signal(stage, signal.SIGKILL, 3.0)


def _signal(stage: Stage, number: signal.Signals, every: float) -> str:
    sent = 0
    while stage.lasts():
        for pid in stage.server.workers()[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                sent += 1
        stage.wait(every)
    return f"{number.name} {sent} times"


def away(stage: Stage) -> str:
    """the data folder disappears repeatedly, for five seconds each time"""
    elsewhere = stage.folder.with_name("elsewhere")
    times = 0
    while stage.lasts():
        stage.folder.rename(elsewhere)
        times += 1
        try:
            stage.wait(AWAY_SECONDS)
        finally:
            elsewhere.rename(stage.folder)
        stage.wait(AWAY_SECONDS)
    return f"the folder disappeared {times} times"


_FIELDS = 8


def endless(stage: Stage) -> str:
    """sixteen peers request statistics that would take years"""

    def ask(number: int) -> Counter[str]:
        answers: Counter[str] = Counter()
        with httpx.Client(base_url=stage.server.url, timeout=60, headers={"user-agent": f"asker {number}"}) as client:
            for turn in itertools.count(number):
                if not stage.lasts():
                    return answers
                name, field = ("sparse", "written")[turn % 2], f"x{turn // 2 % _FIELDS}"
                url = f"/v1/datasets/{name}/stats"
                answer = client.get(url, params={"field": field}, headers={"prefer": "wait=1"})
                answers[str(answer.status_code)] += 1
                # Who is refused comes again in a moment, as everybody should.
                if answer.status_code == 503:
                    stage.wait(1.0)
        return answers

    with ThreadPoolExecutor(16) as threads:
        return "responses to requests for statistics: " + _counted(sum(threads.map(ask, range(16)), Counter[str]()))


def make_endless(folder: Path) -> None:
    """Two files of a few kB: of 2⁵⁰ rows that were never written, and of 2³⁸ that count as written."""
    with h5py.File(folder / "sparse.h5", "w") as file:
        for number in range(_FIELDS):
            file.create_dataset(f"x{number}", (1 << 50,), np.int16, chunks=(1 << 20,), compression="gzip")
            file[f"x{number}"][1 << 20] = 1
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(folder / "written.h5", "w") as file:
        for number in range(_FIELDS):
            space = h5py.h5s.create_simple((1 << 38,))
            h5py.h5d.create(file.id, f"x{number}".encode(), h5py.h5t.STD_U8LE, space, properties)


def _port(stage: Stage) -> int:
    port = urlsplit(stage.server.url).port
    assert port is not None
    return port


def _counted(answers: Mapping[str, int]) -> str:
    return ", ".join(f"{status} {count:,} times" for status, count in sorted(answers.items()))


ALL: Mapping[str, Callable[[Stage], str]] = {
    trouble.__name__: trouble for trouble in (none, crowd, slow, malformed, stopped, killed, away, endless)
}
