"""What anybody may send: heads, bodies, queries and connections have bounds, and what is no HTTP gets an answer."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from h5feed.wire import read_body

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

HEAD = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
ROWS = "/v1/datasets/mixed/rows"
JSON = {"content-type": "application/json"}


def _connect(server: ServerProcess) -> socket.socket:
    connected = socket.create_connection(("127.0.0.1", server.port))
    connected.settimeout(60)
    return connected


def _answer(connected: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer after which the connection ends."""
    received = b""
    try:
        while more := connected.recv(1 << 16):
            received += more
    except ConnectionError:
        pass
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def _send_on(connected: socket.socket, piece: bytes, nbytes: int) -> int:
    """Send `piece` again and again, as far as it is taken; returns how many bytes were."""
    sent = 0
    try:
        while sent < nbytes:
            connected.sendall(piece)
            sent += len(piece)
    except OSError:
        pass
    return sent


@pytest.fixture(scope="module")
def guarded(folder: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """A server of one worker that wants a token."""
    return serve_module(folder, H5FEED_TOKENS="secret")


@pytest.mark.parametrize(
    "piece",
    [b"X-Filler: " + b"a" * 8000 + b"\r\n", b"x" * 8000, b"a:b\r\n" * 2000],
    ids=["lines", "one line", "short lines"],
)
def test_a_head_that_goes_on(guarded: ServerProcess, piece: bytes) -> None:
    """Headers above 32 KiB are 431, whoever sends them; what comes behind is not kept."""
    memory = psutil.Process(guarded.worker_pids()[0])
    before = memory.memory_info().rss
    with _connect(guarded) as connected:
        connected.sendall(HEAD.encode())
        sent = _send_on(connected, piece, 40 << 20)
        status, headers, body = _answer(connected)
    assert (status, headers["content-type"], headers["connection"]) == (431, "application/problem+json", "close")
    assert json.loads(body)["code"] == "too_large"
    assert "32768" in json.loads(body)["detail"]
    assert sent < 40 << 20 or memory.memory_info().rss - before < 16 << 20
    assert httpx.get(guarded.url + "/healthz").status_code == 200


def test_heads_up_to_the_bound(guarded: ServerProcess) -> None:
    """31 KiB of headers are fine, on a connection that is used again; one byte more than 32 KiB is not."""
    with httpx.Client(base_url=guarded.url) as client:
        for _ in range(3):
            assert client.get("/healthz", headers={"x": "a" * (31 << 10)}).status_code == 200
        assert client.get("/healthz", headers={"x": "a" * (32 << 10)}).status_code == 431


def test_what_hides_behind_a_head(server: ServerProcess) -> None:
    """Trailers and the frames of chunks that never end are as little kept as a head that does not."""
    lines = ["Host: localhost", "Content-Type: application/json", "Transfer-Encoding: chunked"]
    head = "\r\n".join([f"POST {ROWS} HTTP/1.1", *lines, "", ""])
    for begin, piece in [
        ("1\r\n{\r\n0\r\n", b"X-Filler: " + b"a" * 8000 + b"\r\n"),
        ("", b"1;" + b"e" * 8000 + b"\r\n{\r\n"),
    ]:
        with _connect(server) as connected:
            connected.sendall((head + begin).encode())
            assert _send_on(connected, piece, 64 << 20) < 64 << 20


def test_a_head_that_comes_slowly(server: ServerProcess) -> None:
    """A head has ten seconds from its first byte; empty lines are no beginning."""
    with _connect(server) as drip, _connect(server) as empty:
        began = time.monotonic()
        drip.sendall(HEAD.encode())

        def ended() -> bool:
            try:
                empty.sendall(b"\r\n")
                drip.sendall(b"x")
                return drip.recv(1, socket.MSG_DONTWAIT) == b""
            except BlockingIOError:
                return False
            except OSError:
                return True

        wait_until(ended)
        assert time.monotonic() - began > 9


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", "not a valid HTTP"),
        (b"hello\r\n\r\n", "not a valid HTTP"),
        (b"GET / HTTP/9.9\r\n\r\n", "not a valid HTTP"),
    ],
)
def test_what_is_no_request(guarded: ServerProcess, sent: bytes, says: str) -> None:
    """It gets a problem, as every other mistake does."""
    with _connect(guarded) as connected:
        connected.sendall(sent)
        status, headers, body = _answer(connected)
    assert (status, headers["content-type"]) == (400, "application/problem+json")
    problem = json.loads(body)
    assert (problem["code"], problem["status"]) == ("bad_parameter", 400)
    assert says in problem["detail"] and problem["request_id"]


def test_an_upgrade_is_not_made(server: ServerProcess) -> None:
    """A request that wants to speak something else is answered in HTTP/1.1."""
    with _connect(server) as connected:
        connected.sendall((HEAD + "Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n").encode())
        status, _, body = _answer(connected)
    assert (status, body) == (200, b"ok")


def test_many_requests_at_once_on_one_connection(server: ServerProcess) -> None:
    """Requests sent ahead are answered, up to a bound: they are not collected by the thousand."""
    with _connect(server) as connected:
        connected.sendall((HEAD + "\r\n").encode() * 50)
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 50:
            received += connected.recv(1 << 16)
    with _connect(server) as connected:
        _send_on(connected, (HEAD + "\r\n").encode() * 5000, 1)
        answers = 0
        try:
            while more := connected.recv(1 << 16):
                answers += more.count(b"HTTP/1.1 200 OK")
        except ConnectionError:
            pass
    assert answers < 5000


def test_methods_that_are_allowed(server: ServerProcess) -> None:
    """405 names those that are, of all that a path has."""
    for method, path, allowed in [
        ("PUT", ROWS, "GET, POST"),
        ("POST", "/v1/datasets", "GET"),
        ("DELETE", "/healthz", "GET"),
    ]:
        answer = httpx.request(method, server.url + path)
        assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
        assert answer.headers["allow"] == allowed and allowed in answer.json()["detail"]


def _beside(server: ServerProcess, work: Callable[[], httpx.Response]) -> httpx.Response:
    """What `work` got; meanwhile, others are answered."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        while thread.is_alive():
            assert client.get("/healthz").status_code == 200
    return answers[0]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"rows":[1],' + b",".join(b'"k%d":1' % n for n in range(1_500_000)) + b"}", 413, "10000 names"),
        (b'{"rows":[' + b"1," * 3_000_000 + b"1]}", 413, "limit of 1000000"),
        (b'{"rows":[' + b"1.5," * 999_999 + b"1]}", 400, "rows.0=1.5"),
        (b'{"rows":[' + b"null," * 999_999 + b"1]}", 400, "rows.0"),
        (b'{"rows":[' + b'"a",' * 999_999 + b"1]}", 400, "rows.0"),
        (b'{"key":"x","keys":[' + b"1.5," * 999_999 + b"1]}", 400, "keys.0"),
        (b'{"key":"x","keys":[' + b'"a",' * 1_020_000 + b"1]}", 413, "1000000 keys"),
        (b'{"rows":' + b"[" * 5_000_000, 400, "recursion"),
        (b'{"rows":[1],' + b",".join(b'"k%d":1' % n for n in range(4000)) + b"}", 400, "no parameter 'k0'"),
    ],
    ids=["keys", "ids", "fractions", "nulls", "texts", "keys that are none", "many keys", "depth", "few keys"],
)
def test_bodies_that_cost_more_than_they_say(server: ServerProcess, body: bytes, status: int, says: str) -> None:
    """A body of a million mistakes is one short answer, and nobody waits for it."""
    answer = _beside(server, lambda: httpx.post(server.url + ROWS, content=body, headers=JSON, timeout=120))
    assert answer.status_code == status, answer.text[:300]
    assert says in answer.json()["detail"] and len(answer.content) < 2000


def test_posted_bodies(server: ServerProcess) -> None:
    """What is wrong with a body is said; a long list of rows is served."""
    for content, headers, says in [
        (b'{"rows": [1]}', {"content-type": "text/plain"}, "send application/json"),
        (b"", JSON, "EOF"),
        (b'{"fields": ["x"]}', JSON, "give either rows"),
        (b'{"rows": [1], "filds": ["x"]}', JSON, "filds"),
    ]:
        answer = httpx.post(server.url + ROWS, content=content, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_parameter"), answer.text
        assert says in answer.json()["detail"], answer.text
    rows = np.arange(200_000) % 1000
    answer = httpx.post(server.url + ROWS, json={"rows": rows.tolist(), "fields": ["lzf"]}, timeout=60)
    tensors, _, _ = read_body(np.frombuffer(answer.content, np.uint8))
    assert np.array_equal(tensors["lzf"], rows) and np.array_equal(tensors["__rows__"], rows)
    schema = httpx.get(server.url + "/openapi.json", timeout=60).json()
    body = schema["paths"]["/v1/datasets/{name}/rows"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "rows" in schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]


def test_a_body_without_a_token_is_not_read(guarded: ServerProcess) -> None:
    """Who has no token is told so before a byte of the body is looked at."""
    # A young worker still grows: with the first files, and with the first request that it refuses.
    listing = {"authorization": "Bearer secret"}
    wait_until(lambda: "preparing" not in httpx.get(guarded.url + "/v1/datasets", headers=listing).text)
    assert httpx.post(guarded.url + ROWS, content=b"1" * (1 << 20), headers=JSON, timeout=60).status_code == 401
    memory = psutil.Process(guarded.worker_pids()[0])
    before = memory.memory_info().rss
    body = b'{"rows":[' + b"1," * 10_000_000 + b"1]}"
    assert httpx.post(guarded.url + ROWS, content=body, headers=JSON, timeout=60).status_code == 401
    grown = memory.memory_info().rss - before
    assert grown < 10 << 20, grown


def test_bodies_that_are_held(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """Long bodies of one sender, more than are held at once: it is told to come again, and others are served."""
    # Long enough that a slow machine takes all of what is sent before the first of them is cut off.
    server = serve(folder, H5FEED_READ_TIMEOUT="600")
    head = (
        f"POST {ROWS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 24000000\r\n\r\n"
    )
    senders = []
    try:
        for _ in range(4):
            connected = socket.socket()
            connected.settimeout(120)
            connected.bind(("127.0.0.2", 0))
            connected.connect(("127.0.0.1", server.port))
            senders.append(connected)
            connected.sendall(head.encode())
            _send_on(connected, b" " * (1 << 20), 20 << 20)
        assert senders[-1].recv(1000).startswith(b"HTTP/1.1 429 ")
        answer = httpx.post(server.url + ROWS, json={"rows": list(range(1000)), "fields": ["lzf"]}, timeout=60)
        assert answer.status_code == 200
    finally:
        for connected in senders:
            connected.close()


def test_queries_of_many_parameters(server: ServerProcess) -> None:
    """They are refused by their number."""
    query = "&".join(f"k{number}=1" for number in range(2000))
    answer = httpx.get(f"{server.url}/v1/datasets/mixed/batches/0?{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_parameter")
    assert "100 parameters" in answer.json()["detail"]


def test_connections_beyond_the_bound(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """Who has the most connections gives up its oldest idle one for each that comes."""
    server = serve(folder, H5FEED_CONNECTIONS="20")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/healthz").status_code == 200
        idle = []
        try:
            for _ in range(40):
                connected = socket.socket()
                connected.bind(("127.0.0.2", 0))
                connected.connect(("127.0.0.1", server.port))
                connected.settimeout(60)
                idle.append(connected)
            assert idle[0].recv(1) == b""
            # Another one's is left alone.
            assert client.get("/healthz").status_code == 200
            idle[-1].sendall((HEAD + "\r\n").encode())
            assert idle[-1].recv(100).startswith(b"HTTP/1.1 200")
        finally:
            for connected in idle:
                connected.close()


def test_connections_that_come_together_beyond_the_bound(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """Those that a busy worker finds all at once: each takes the place of the oldest, and there are never more."""
    server = serve(folder, H5FEED_CONNECTIONS="20")
    (worker,) = server.worker_pids()
    waiting = []
    try:
        os.kill(worker, signal.SIGSTOP)
        for _ in range(60):
            connected = socket.create_connection(("127.0.0.1", server.port))
            connected.settimeout(60)
            waiting.append(connected)
        os.kill(worker, signal.SIGCONT)
        for connected in waiting[:40]:
            assert connected.recv(1) == b""
        for connected in waiting[40:]:
            connected.sendall((HEAD + "\r\n").encode())
            assert connected.recv(100).startswith(b"HTTP/1.1 200")
    finally:
        os.kill(worker, signal.SIGCONT)
        for connected in waiting:
            connected.close()


def test_the_access_log(serve: Callable[..., ServerProcess], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A line for each request, with the address that a trusted proxy names, and none that a URL could forge."""
    server = serve(folder, "--access-log", H5FEED_TRUSTED_PROXIES="127.0.0.0/8", H5FEED_TOKENS="secret")
    batch = "/v1/datasets/mixed/batches/1?batch_size=8"
    with httpx.Client(base_url=server.url, timeout=60, headers={"authorization": "Bearer secret"}) as client:
        for _ in range(2):
            assert client.get(batch).status_code == 200
        client.get("/nowhere", headers={"x-forwarded-for": "203.0.113.9, 198.51.100.7, 127.0.0.3"})
    assert httpx.get(server.url + batch).status_code == 401
    with _connect(server) as connected:
        connected.sendall(b"GET /a\x85b HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        _answer(connected)
    assert server.process.stdout is not None
    server.process.send_signal(signal.SIGTERM)
    lines = [line for line in server.process.stdout.read().splitlines() if " ms" in line]
    assert "secret" not in "".join(lines)
    assert not any(" gone" in line for line in lines)
    measured = (
        r" \d+ B [\d.]+ ms( \(queue [\d.]+, plan [\d.]+, read [\d.]+, send [\d.]+\))?( by token 1)? [0-9a-f]{16}$"
    )
    shown = [re.sub(r"^[-\d]+ [\d:,]+ ", "", re.sub(measured, "", line)) for line in lines]
    assert shown[:4] == [
        f'127.0.0.1 "GET {batch}" 200',
        f'127.0.0.1 "GET {batch}" 200',
        '198.51.100.7 "GET /nowhere" 404',
        f'127.0.0.1 "GET {batch}" 401',
    ]
    assert all(line.startswith("127.0.0.1 ") and "\x85" not in line for line in shown[4:])
    # Nor is anybody told to install something.
    assert "pgrade" not in capfd.readouterr().err
