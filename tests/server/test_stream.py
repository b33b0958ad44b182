"""The way of a batch over the socket: slow readers, pipelined requests, peers that leave, the short way to a batch."""

from __future__ import annotations

import http.client
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5feed
import h5py
import httpx
import pytest

from tests.support.server_process import ServerProcess

BIG = "/v1/datasets/tall/batches/0?fields=x,z&batch_size=40&shuffle=true&seed=1"
"""7.2 MB."""

STREAM = "/v1/datasets/tall/batches?fields=x,z&batch_size=10&shuffle=true&seed=1&start=0&stop=4"
SMALL = "/v1/datasets/mixed/batches/{index}?fields=images&batch_size=8&seed=2&shuffle=true"


@pytest.fixture
def http_client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def _ask(path: str, *lines: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/{version}", "Host: localhost", *lines, "", ""]).encode()


def _connect(server: ServerProcess, *, receive_bytes: int | None = None) -> socket.socket:
    connected = socket.socket()
    if receive_bytes is not None:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connected.settimeout(60)
    connected.connect(("127.0.0.1", server.port))
    return connected


def _read_body(connected: socket.socket, pause: float = 0.0) -> bytes:
    """The body of an answer, a little at a time."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connected.recv(1024)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        time.sleep(pause)
        more = connected.recv(1 << 16)
        assert more, f"cut after {len(body)} of {length} bytes"
        body += more
    return body


@pytest.mark.parametrize("path", [BIG, STREAM])
def test_a_slow_reader_gets_all_of_it(server: ServerProcess, http_client: httpx.Client, path: str) -> None:
    """What a peer does not take at once comes later, the same bytes; nobody else waits for it, and it can ask again."""
    expected = http_client.get(path).raise_for_status().content
    with _connect(server, receive_bytes=1 << 14) as connected:
        for _ in range(2):
            connected.sendall(_ask(path))
            # The answer has begun, and is larger than what the kernel keeps for a peer that takes nothing.
            assert select.select([connected], [], [], 60)[0]
            assert http_client.get(SMALL.format(index=0)).status_code == 200
            assert _read_body(connected, 0.002) == expected


def test_many_stalled_readers_leave_room_for_others(server: ServerProcess, http_client: httpx.Client) -> None:
    """More peers that take nothing than there are threads: the server answers all the same."""
    expected = http_client.get(BIG).raise_for_status().content
    stalled = [_connect(server, receive_bytes=1 << 12) for _ in range(24)]
    try:
        for connected in stalled:
            connected.sendall(_ask(BIG))
        for index in range(10):
            assert http_client.get(SMALL.format(index=index)).status_code == 200
        assert _read_body(stalled[-1]) == expected
    finally:
        for connected in stalled:
            connected.close()


def test_peers_that_go_away(server: ServerProcess, http_client: httpx.Client) -> None:
    """Peers that leave in mid-body cost nothing: the same processes go on."""
    expected = http_client.get(BIG).raise_for_status().content
    workers = server.worker_pids()
    for number in range(12):
        with _connect(server) as connected:
            connected.sendall(_ask(BIG))
            connected.recv(1 << (4 + number))
    assert http_client.get(BIG).content == expected
    assert server.worker_pids() == workers


def test_pipelined_requests(server: ServerProcess, http_client: httpx.Client) -> None:
    """Requests sent without waiting for answers are answered in order."""
    expected = [http_client.get(SMALL.format(index=index)).raise_for_status().content for index in range(6)]
    with _connect(server) as connected:
        connected.sendall(b"".join(_ask(SMALL.format(index=index)) for index in range(6)))
        file = connected.makefile("rb")
        for body in expected:
            length = 0
            while (line := file.readline().lower().strip()) != b"":
                if line.startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert file.read(length) == body


@pytest.mark.parametrize(("version", "lines"), [("1.0", ()), ("1.1", ("Connection: close",))])
def test_connections_that_end_with_the_answer(
    server: ServerProcess, http_client: httpx.Client, version: str, lines: tuple[str, ...]
) -> None:
    """HTTP/1.0, and 1.1 with ``Connection: close``: the whole body, then the end."""
    expected = http_client.get(BIG).raise_for_status().content
    with _connect(server) as connected:
        connected.sendall(_ask(BIG, *lines, version=version))
        answer = http.client.HTTPResponse(connected)
        answer.begin()
        assert answer.will_close
        assert answer.read() == expected
        assert connected.recv(1) == b""


def test_the_short_way_answers_like_the_long_one(http_client: httpx.Client) -> None:
    """A query that is known is answered past the framework: headers, errors and refusals stay what they are."""
    path = SMALL.format(index=1) + "&limit=100"
    first, second = http_client.get(path), http_client.get(path)
    assert first.status_code == second.status_code == 200
    assert first.content == second.content
    volatile = ("date", "server-timing", "x-request-id")
    assert {k: v for k, v in first.headers.items() if k not in volatile} == {
        k: v for k, v in second.headers.items() if k not in volatile
    }
    assert set(first.headers) == set(second.headers)
    assert http_client.get(path, headers={"if-none-match": first.headers["etag"]}).status_code == 304
    npz = http_client.get(path, headers={"accept": "application/x-npz"})
    assert npz.headers["content-type"] == "application/x-npz"
    assert http_client.get(path, headers={"accept": "image/png"}).status_code == 406
    assert http_client.post(path).status_code == 405
    beyond = http_client.get(SMALL.format(index=13) + "&limit=100")
    assert (beyond.status_code, beyond.json()["code"]) == (404, "batch_out_of_range")
    nowhere = http_client.get(path.replace("mixed", "nowhere"))
    assert (nowhere.status_code, nowhere.json()["code"]) == (404, "dataset_not_found")
    stream = path.replace("/batches/1?", "/batches?") + "&start=0&stop=2"
    whole = http_client.get(stream)
    assert whole.content == http_client.get(stream).content
    assert whole.content[len(whole.content) // 2 :] == first.content
    empty = http_client.get(stream.replace("stop=2", "stop=0"))
    assert (empty.status_code, empty.json()["code"]) == (400, "bad_parameter")
    beyond = http_client.get(stream.replace("stop=2", "stop=99"))
    assert (beyond.status_code, beyond.json()["code"]) == (404, "batch_out_of_range")


def test_nothing_is_written_into_an_answer(server: ServerProcess, http_client: httpx.Client) -> None:
    """Rubbish sent behind a request cuts its answer off; it never puts an error into the middle of it."""
    expected = http_client.get(BIG).raise_for_status().content
    for _ in range(6):
        with _connect(server) as connected:
            connected.sendall(_ask(BIG))
            connected.sendall(b"\0\r\n\r\n")
            received = b""
            try:
                while more := connected.recv(1 << 20):
                    received += more
            except ConnectionError:
                pass
        _, _, body = received.partition(b"\r\n\r\n")
        assert received.startswith(b"HTTP/1.1 400") or expected.startswith(body)


def test_a_body_that_never_ends(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """A request of which the rest does not come is given up; one that takes its time is not."""
    server = serve(folder, H5FEED_READ_TIMEOUT="8")
    body = b'{"rows": [1, 2]}'
    # Looking at a file for the first time takes as long as it takes.
    with h5feed.connect(server.url, deadline=120) as feed:
        feed["mixed"].take([1, 2])
    lines = ["POST /v1/datasets/mixed/rows HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode()
    with _connect(server) as connected:
        began = time.monotonic()
        connected.sendall(head + body[:5])
        assert connected.recv(100) == b""
        assert time.monotonic() - began > 7.5
    with _connect(server) as connected:
        connected.sendall(head + body[:5])
        time.sleep(0.3)
        connected.sendall(body[5:])
        assert connected.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_forked_processes_do_not_share_a_connection(server: ServerProcess, tmp_path: Path) -> None:
    """A client that was used before a fork: every process gets the batches that it asked for."""
    script = tmp_path / "fork.py"
    script.write_text(
        "import os, sys, h5feed\n"
        f"dataset = h5feed.connect({server.url!r})['mixed']\n"
        "dataset.batch(0)\n"
        "pids = []\n"
        "for child in range(3):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        right = all(dataset.batch(i, batch_size=8).rows[0] == 8 * i for i in range(40))\n"
        "        os._exit(0 if right else 1)\n"
        "    pids.append(pid)\n"
        "right = all(dataset.batch(i, batch_size=8).rows[0] == 8 * i for i in range(40))\n"
        "sys.exit(not right or any(os.waitpid(pid, 0)[1] for pid in pids))\n"
    )
    assert subprocess.run([sys.executable, script], timeout=180, check=False).returncode == 0


def test_text_in_several_blocks(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Nobody knows how long text is before all of it is read: the body has no length, and all of the batches."""
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "texts.h5", "w") as file:
        file.create_dataset("text", data=[f"{row}" * 500 for row in range(4000)], dtype=h5py.string_dtype())
    server = serve(tmp_path / "data")
    path = "/v1/datasets/texts/batches"
    with httpx.Client(base_url=server.url, timeout=60) as client:
        one_by_one = [client.get(f"{path}/{index}?fields=text&batch_size=40").content for index in range(100)]
        expected = b"".join(one_by_one)
        query = "fields=text&batch_size=40&start=0&stop=100"
        # The second time, the query is known.
        for _ in range(2):
            answer = client.get(f"{path}?{query}")
            assert answer.status_code == 200 and answer.headers["transfer-encoding"] == "chunked"
            assert "content-length" not in answer.headers and answer.content == expected
    with _connect(server) as connected:
        connected.sendall(_ask(f"{path}?{query}", version="1.0"))
        received = b"".join(iter(lambda: connected.recv(1 << 16), b""))
    assert received.partition(b"\r\n\r\n")[2] == expected and len(expected) > 4 << 20
