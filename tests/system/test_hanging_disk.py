"""A disk that hangs, and cannot be got rid of: what lies on it is refused in time, and all else is served."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed_server.api.health import READY_DEADLINE
from prometheus_client.parser import text_string_to_metric_families

from tests.support.waiting import wait_until

ROWS, SIDE = 120, 128
SLACK = 5.0
"""Seconds that a machine which is busy with something else may add to a deadline."""


def _values(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (ROWS, SIDE, SIDE), dtype=np.uint8)


NEAR, FAR = _values(1), _values(2)


def _write(path: Path, values: np.ndarray) -> None:
    """As they lie, in compressed chunks, and as only h5py reads them."""
    with h5py.File(path, "w") as file:
        file["x"] = values
        file.create_dataset("z", data=values, chunks=(7, SIDE, SIDE), compression="gzip", compression_opts=1)
        lists = file.create_dataset("v", (ROWS,), h5py.vlen_dtype("u1"))
        for row in range(ROWS):
            lists[row] = values[row, 0]


class Served:
    """A server of two workers with `near` on a disk that works, and `nas.far` on one that hangs when it is told to."""

    def __init__(self, folder: Path, **settings: str) -> None:
        data, nas = folder / "data", folder / "nas"
        (data / "nas").mkdir(parents=True)
        nas.mkdir()
        _write(data / "near.h5", NEAR)
        _write(nas / "far.h5", FAR)
        self.log = folder / "log"
        environment = {f"H5FEED_{name}": value for name, value in {"CACHE_BYTES": "0", **settings}.items()}
        serve = [sys.executable, "-m", "h5feed_server.cli", "serve", str(data), "--cache-dir", str(folder / "cache")]
        disk = [sys.executable, "-m", "tests.system.hanging_disk", str(nas), str(data / "nas")]
        alone = ["unshare", "--user", "--map-root-user", "--mount", "env", *map("=".join, environment.items())]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*alone, *disk, *serve, "--port", "0", "--workers", "2"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=Path(__file__).parents[2],
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert " at " in line, (line, self.log.read_text())
        self.url = line.rsplit(" at ", 1)[1].strip()
        self.port = int(self.url.rsplit(":", 1)[1])

    def tell(self, command: str) -> None:
        """Let the disk hang, or go on."""
        assert self._process.stdin is not None
        before = self.log.read_text().count(f"disk: {command}")
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        wait_until(lambda: self.log.read_text().count(f"disk: {command}") > before)

    def stop(self) -> int:
        self._process.terminate()
        try:
            return self._process.wait(60)
        finally:
            # The kernel ends all waits when nobody serves the disk any more.
            self._process.kill()


@contextlib.contextmanager
def served(folder: Path, **settings: str) -> Iterator[Served]:
    server = Served(folder, **settings)
    try:
        yield server
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text(), server.log.read_text()


def _epoch(server: Served, name: str, values: np.ndarray, fields: Sequence[str] = ("x", "z", "v")) -> None:
    """Each row once, as it is in the file."""
    with h5feed.connect(server.url, deadline=60) as feed:
        seen: list[int] = []
        for batch in feed[name].batches(batch_size=16, shuffle=True, fields=list(fields)):
            for field in {"x", "z"} & set(fields):
                np.testing.assert_array_equal(batch[field], values[batch.rows])
            seen += batch.rows.tolist()
        assert sorted(seen) == list(range(ROWS))


@contextlib.contextmanager
def _to_both(server: Served, **options: Any) -> Iterator[list[httpx.Client]]:
    """Connections to both workers: each new one goes to the worker with the fewest."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=server.url, timeout=60, **options)) for _ in range(4)]
        for client in clients:
            client.get("/healthz")
        yield clients


def _timed(client: httpx.Client, path: str, **headers: str) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    answer = client.get(path, headers=headers)
    return answer, time.monotonic() - began


class Hammering:
    """Threads that ask for batches of a dataset again and again, whatever comes."""

    def __init__(self, server: Served, fields: Sequence[str], threads: int = 12) -> None:
        self.answers: list[tuple[int, str, float]] = []
        self._server, self._ended = server, threading.Event()
        self._threads = [
            threading.Thread(target=self._go_on, args=(number, field))
            for number, field in zip(range(threads), itertools.cycle(fields), strict=False)
        ]
        for thread in self._threads:
            thread.start()

    def _go_on(self, number: int, field: str) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            for index in itertools.count(number):
                if self._ended.wait(0.05):
                    return
                path = f"/v1/datasets/nas.far/batches/{index % 15}?batch_size=8&fields={field}"
                answer, seconds = _timed(client, path)
                code = answer.json()["code"] if answer.status_code != 200 else ""
                self.answers.append((answer.status_code, code, seconds))

    def counts(self) -> Counter[tuple[int, str]]:
        return Counter((status, code) for status, code, _ in self.answers)

    def __enter__(self) -> Hammering:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("what", ["reads", "all"])
def test_what_lies_on_other_disks_is_served(tmp_path: Path, what: str) -> None:
    """Reads that hang, or everything on that disk: its batches get 504 by the deadline, and 503 when threads hang
    already; the server is not ready, and says why; other datasets, pages and metrics are there. When the disk is back,
    nothing has to be restarted."""
    timeout = 3.0
    with served(tmp_path, READ_TIMEOUT=f"{timeout:g}") as server:
        _epoch(server, "nas.far", FAR)
        _epoch(server, "near", NEAR)
        with _to_both(server) as clients:
            for client in clients:
                wait_until(lambda client=client: client.get("/readyz").status_code == 200)  # type: ignore[misc]
        server.tell(f"hang {what}")
        with Hammering(server, ["x", "z", "v"]) as hammering, _to_both(server) as clients:
            wait_until(lambda: hammering.counts()[504, "read_timeout"] > 0)
            wait_until(lambda: hammering.counts()[503, "source_unavailable"] > 20)
            for _ in range(2):
                _epoch(server, "near", NEAR)
                for client in clients:
                    ready, seconds = _timed(client, "/readyz")
                    assert ready.status_code == 503 and seconds < READY_DEADLINE + SLACK
                    assert "waiting for" in ready.json()["detail"] and "disk" in ready.json()["detail"], ready.text
                    for path in ("/healthz", "/metrics", "/v1/datasets", "/", "/v1/datasets/near"):
                        answer, seconds = _timed(client, path, accept="*/*" if "v1" in path else "text/html")
                        assert answer.status_code == 200 and seconds < SLACK, (path, answer.status_code, seconds)
                time.sleep(2 * timeout)
            late = [answer for answer in hammering.answers if answer[2] > timeout + SLACK]
            assert not late, late
            assert not [status for status, _ in hammering.counts() if status not in (504, 503, 200)], hammering.counts()
            server.tell("go on")
            for client in clients:
                wait_until(lambda client=client: client.get("/readyz").status_code == 200)  # type: ignore[misc]
        _epoch(server, "nas.far", FAR)
        _epoch(server, "near", NEAR)


def _gauge(client: httpx.Client, name: str) -> float:
    text = client.get("/metrics").text
    return next(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"h5feed_{name}"
    )


def _ask(server: Served, address: str, target: str) -> socket.socket:
    """Send a request, and take nothing of the response."""
    asking = socket.socket()
    asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    asking.bind((address, 0))
    asking.connect(("127.0.0.1", server.port))
    asking.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return asking


def test_a_reserve_for_pages_and_operations(tmp_path: Path) -> None:
    """With every thread waiting for a disk, all memory for responses in use and more requests waiting for both, each
    worker answers who watches it and who looks at it: also callers that hold all the rest."""
    threads, deadline = 4, 5.0
    settings = {"READ_TIMEOUT": "20", "REQUEST_THREADS": str(threads), "INFLIGHT_BYTES": str(4 << 20)}
    with served(tmp_path, MIN_RATE="1", ADMIT_TIMEOUT="1", **settings) as server, contextlib.ExitStack() as stack:
        _epoch(server, "nas.far", FAR)
        _epoch(server, "near", NEAR)
        callers = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
        clients = [
            client
            for address in ("127.0.0.1", callers[0])
            for client in stack.enter_context(_to_both(server, transport=httpx.HTTPTransport(local_address=address)))
        ]
        for address in callers[:2]:
            # A response of a megabyte, which nobody takes.
            target = "/v1/datasets/near/batches?batch_size=20&fields=x&start=0&stop=3"
            stack.enter_context(_ask(server, address, target))
        wait_until(lambda: _gauge(clients[0], "inflight_bytes") > 1 << 20)
        server.tell("hang reads")
        for number in range(90):
            # Those that are read hold memory, too: most of what is left.
            target = f"/v1/datasets/nas.far/batches/{number % 7}?batch_size=16&fields=x"
            stack.enter_context(_ask(server, callers[number % 3], target))
        wait_until(lambda: _gauge(clients[0], "request_threads_busy") >= 2 * threads)
        refused = clients[0].get("/v1/datasets/near/batches/0?batch_size=60&fields=x")
        # On a slow machine, threads that were given up have been replaced, and one of these answers.
        assert refused.status_code in (200, 504) or (refused.status_code == 503 and "retry-after" in refused.headers)
        for client in clients:
            for path in ("/healthz", "/metrics", "/readyz", "/v1/datasets", "/", "/feed", "/docs", "/openapi.json"):
                answer, seconds = _timed(client, path)
                # Whether it is ready depends on which dataset it has tried.
                assert answer.status_code in ((200, 503) if path == "/readyz" else (200,)), (path, answer.text)
                assert seconds < deadline, (path, seconds)
        server.tell("go on")
        stack.close()
        _epoch(server, "nas.far", FAR)
