"""Our HTTP/1.1 against what the standard says, and the application on another ASGI server."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import h5feed
import httpx
import numpy as np
import pytest
import uvicorn
from h5feed_server.main import create_app
from h5feed_server.settings import Settings

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ORDER = "shuffle=true&seed=3&batch_size=50&fields=images,labels"
PATHS = [f"/v1/datasets/mixed/batches/2?{ORDER}", f"/v1/datasets/mixed/batches?{ORDER}&start=0&stop=4"]


@contextlib.contextmanager
def by_uvicorn(folder: Path, cache: Path) -> Iterator[str]:
    """The application, served by uvicorn as it comes."""
    app = create_app(Settings.model_validate({"data_dir": folder, "cache_dir": cache}))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)


def test_plain_asgi(server: ServerProcess, feed: h5feed.Feed, folder: Path, tmp_path: Path) -> None:
    """A server that offers nothing beside ASGI answers the same bytes, and a loop over it is the same."""
    with by_uvicorn(folder, tmp_path) as url, h5feed.connect(url, deadline=60) as plain:
        dataset = plain["mixed"]
        for path in PATHS:
            assert httpx.get(url + path, timeout=60).content == httpx.get(server.url + path, timeout=60).content
        passes = [one["mixed"].batches(batch_size=30, shuffle=True, fields=["images"]) for one in (plain, feed)]
        for theirs, ours in zip(*passes, strict=True):
            np.testing.assert_array_equal(theirs["images"], ours["images"])
        assert dataset.stats(field="labels")["rows"] == feed["mixed"].stats(field="labels")["rows"]


def exchange(server: ServerProcess, *requests: bytes) -> bytes:
    """All that comes for these requests, sent at once, until the connection is closed: the last must ask for that."""
    with socket.create_connection(("127.0.0.1", server.port), 60) as connected:
        connected.sendall(b"".join(requests))
        received = bytearray()
        while piece := connected.recv(1 << 16):
            received += piece
    return bytes(received)


def request(path: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: localhost", *headers, "", ""]).encode()


def parts(answer: bytes) -> tuple[str, dict[str, str], bytes]:
    """Status line, headers and what follows."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    return status, dict(line.lower().split(": ", 1) for line in lines), body


@pytest.mark.parametrize("path", ["/healthz", PATHS[0]])
def test_http_1_0(server: ServerProcess, path: str) -> None:
    """An old peer gets a body without chunks, and its connection is closed."""
    status, headers, body = parts(exchange(server, request(path, version="1.0")))
    assert status == "HTTP/1.1 200 OK"
    assert headers["connection"] == "close" and "transfer-encoding" not in headers
    assert body == httpx.get(server.url + path, timeout=60).content


def test_head(server: ServerProcess) -> None:
    """Headers alone, and the connection goes on."""
    close = "Connection: close"
    answer = exchange(server, request("/healthz", method="HEAD"), request("/healthz", close))
    status, _, rest = parts(answer)
    assert status.startswith("HTTP/1.1 ") and not rest.startswith(b"{")
    assert parts(rest)[0] == "HTTP/1.1 200 OK"


def test_requests_that_come_early(server: ServerProcess) -> None:
    """Sent without waiting, they are answered in turn."""
    paths = [f"/v1/datasets/mixed/batches/{index}?{ORDER}" for index in (0, 3, 1)]
    answer = exchange(server, *map(request, paths), request("/healthz", "Connection: close"))
    for path in paths:
        expected = httpx.get(server.url + path, timeout=60).content
        status, headers, answer = parts(answer)
        assert status == "HTTP/1.1 200 OK" and int(headers["content-length"]) == len(expected)
        assert answer.startswith(expected)
        answer = answer[len(expected) :]
    assert parts(answer)[0] == "HTTP/1.1 200 OK"


def test_expect_continue(server: ServerProcess) -> None:
    """Who waits to be told that the body may come is told."""
    body = b'{"rows": [1, 2], "fields": ["labels"]}'
    lines = (f"Content-Length: {len(body)}", "Content-Type: application/json", "Expect: 100-continue")
    with socket.create_connection(("127.0.0.1", server.port), 60) as connected:
        connected.sendall(request("/v1/datasets/mixed/rows", *lines, method="POST"))
        assert connected.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connected.sendall(body)
        assert connected.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")


def test_chunked_body(server: ServerProcess) -> None:
    """A body in chunks is the same body."""
    lines = ("Transfer-Encoding: chunked", "Content-Type: application/json", "Connection: close")
    head = request("/v1/datasets/mixed/rows", *lines, method="POST")
    status, _, body = parts(exchange(server, head + b'8\r\n{"rows":\r\n5\r\n [3]}\r\n0\r\n\r\n'))
    assert status == "HTTP/1.1 200 OK"
    assert body == httpx.post(f"{server.url}/v1/datasets/mixed/rows", json={"rows": [3]}, timeout=60).content


def test_trailers_are_no_headers(folder: Path, tmp_path: Path) -> None:
    """Proxies pass them on as they are: they are no token, and do not say whom a proxy asks for."""
    settings = {"H5FEED_TOKENS": "token-of-a-test", "H5FEED_TRUSTED_PROXIES": "127.0.0.1"}
    server = ServerProcess(folder, tmp_path / "cache", "--access-log", **settings)
    try:
        lines = ("Transfer-Encoding: chunked", "Content-Type: application/json", "Connection: close")
        said = request("/v1/datasets/mixed/rows", "X-Forwarded-For: 9.9.9.9", *lines, method="POST")
        body = b'd\r\n{"rows": [3]}\r\n0\r\nAuthorization: Bearer token-of-a-test\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n'
        status, _, _ = parts(exchange(server, said + body))
        assert status.split()[1] == "401"
        assert server.process.stdout is not None
        server.process.send_signal(signal.SIGTERM)
        logged = server.process.stdout.read()
        assert '9.9.9.9 "POST' in logged and "6.6.6.6" not in logged
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("rubbish", "answered"),
    [(b"GARBAGE\r\n\r\n", 3), (request("/" + "x" * 40_000), 3), (request("/healthz") * 80, 65)],
)
def test_requests_before_rubbish(server: ServerProcess, rubbish: bytes, answered: int) -> None:
    """What is whole is answered, by its own answer, whatever comes behind it; then the connection ends."""
    path = f"/v1/datasets/mixed/batches/0?{ORDER}"
    received = exchange(server, request(path), request("/healthz") * 2, rubbish)
    status, headers, rest = parts(received)
    assert status == "HTTP/1.1 200 OK"
    assert rest[: int(headers["content-length"])] == httpx.get(server.url + path, timeout=60).content
    assert received.count(b"HTTP/1.1 200 OK\r\n") == answered == received.count(b"HTTP/1.1 ")


@pytest.mark.parametrize("path", ["*", "/%00", "/%ff%fe", "//", "/v1/datasets/%2e%2e"])
def test_odd_targets(server: ServerProcess, path: str) -> None:
    """They are answered, as errors of theirs."""
    status, _, _ = parts(exchange(server, request(path, "Connection: close")))
    assert status.split()[1] in ("400", "404")
