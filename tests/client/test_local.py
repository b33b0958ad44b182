"""From TCP to the server's Unix socket: when, when not, and that nobody else gets a token."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5feed
import httpx
import pytest
from h5feed.errors import BadParameter, ConnectionFailed
from h5feed.net.local import OFFER_SECONDS

from tests.support.authority import Authority
from tests.support.listener import Listener, hand_on
from tests.support.server_process import ServerProcess
from tests.support.short_folder import short_folder
from tests.support.waiting import wait_until

TOKEN = "a-secret-token-of-this-test"
ORDER: Any = {"batch_size": 2, "shuffle": True, "seed": 3, "fields": ["x"]}
SECONDS = 60.0


@pytest.fixture
def runtime() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def begin(serve: Callable[..., ServerProcess], folder: Path, runtime: Path) -> Callable[..., ServerProcess]:
    """Starts servers whose own Unix sockets are in `runtime`."""

    def start(*options: str, **environment: str) -> ServerProcess:
        return serve(folder, *options, **{"H5FEED_LOCAL": "1", "XDG_RUNTIME_DIR": str(runtime), **environment})

    return start


def _fetch(feed: h5feed.Feed, via: str = "") -> str:
    """How the server is reached after some requests. On a busy machine, it takes more to get to `via`."""
    tall = feed["tall"]
    rows = sorted(row for batch in tall.batches(**ORDER) for row in batch.rows.tolist())
    assert rows == list(range(40))

    def is_so() -> bool:
        tall.batch(0, **ORDER)
        return via in next(iter(feed.via.values()))

    wait_until(is_so)
    return next(iter(feed.via.values()))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_loopback_url_becomes_a_unix_socket(begin: Callable[..., ServerProcess], runtime: Path, host: str) -> None:
    """The server opens one by itself, for its own user, and removes it; `stats()` shows that it is used."""
    server = begin("--workers", "2", H5FEED_ACCESS_LOG="1", H5FEED_TOKENS=TOKEN)
    (path,) = (runtime / "h5feed").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    url = server.url.replace("127.0.0.1", host)
    with h5feed.connect(url, token=TOKEN, local=True, deadline=SECONDS) as feed:
        assert feed.via == {url: "TCP: the server has not offered a Unix socket"}
        assert feed["tall"].name == "tall"
        assert feed.via == {url: "TCP: the next request tries the server's Unix socket"}
        _fetch(feed, "Unix socket ")
        loader = feed["tall"].loader("all", x="x", batch_size=2, shuffle=True)
        assert sum(len(labels) for _, labels in loader) == 40
        stats = loader.stats()
        assert stats.via == loader.stats().via == f"Unix socket {path}"
        assert f"over Unix socket {path}" in repr(stats) and f"over Unix socket {path}" in stats._repr_html_()
        # A copy has connections of its own.
        copy = pickle.loads(pickle.dumps(feed["tall"]))
        assert copy.batch(3, **ORDER).rows.tolist() == feed["tall"].batch(3, **ORDER).rows.tolist()
    server.stop()
    lines = server.process.stdout.read().splitlines()
    assert any(" unix " in line and "/batches" in line for line in lines)
    assert any(" 200 " in line for line in lines if "/v1/local/proof" in line) and TOKEN not in "".join(lines)
    assert not path.exists()


def test_where_it_is_not_wanted(begin: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    """By an argument, a variable, or the server's own settings."""
    server = begin()
    with h5feed.connect(server.url, local=False, deadline=SECONDS) as feed:
        assert _fetch(feed) == "TCP: local=False"
    monkeypatch.setenv("H5FEED_LOCAL", "0")
    with h5feed.connect(server.url, deadline=SECONDS) as feed:
        assert _fetch(feed) == "TCP: local=False"
    monkeypatch.delenv("H5FEED_LOCAL")
    with h5feed.connect(server.url, deadline=SECONDS) as feed:
        _fetch(feed, "Unix socket ")
    monkeypatch.setenv("H5FEED_LOCAL", "maybe")
    with pytest.raises(BadParameter, match="H5FEED_LOCAL='maybe'"):
        h5feed.connect(server.url)
    without = begin(H5FEED_LOCAL="0")
    with h5feed.connect(without.url, local=True, deadline=SECONDS) as feed:
        assert _fetch(feed) == "TCP: the server has not offered a Unix socket"
    assert httpx.get(f"{without.url}/v1/local").status_code == 404


def test_not_through_what_lies_between(begin: Callable[..., ServerProcess]) -> None:
    """A relay that says nothing of itself is noticed by the address, one that does by its headers."""
    server = begin()
    relay = Listener(lambda connected: _relay(connected, server.port))
    with contextlib.closing(relay), h5feed.connect(relay.url, local=True, deadline=SECONDS) as feed:
        said = "TCP: something between this process and the server relays the requests"
        assert _fetch(feed, said) == said
    for name, value in {"X-Forwarded-For": "127.0.0.1", "Via": "1.1 proxy", "Forwarded": "for=127.0.0.1"}.items():
        with h5feed.connect(server.url, local=True, headers={name: value}, deadline=SECONDS) as feed:
            assert _fetch(feed) == "TCP: the server has not offered a Unix socket"
        assert httpx.get(f"{server.url}/v1/local", headers={name: value}).status_code == 404
    # The proof is for the Unix socket alone.
    assert httpx.get(f"{server.url}/v1/local/proof?ticket=x&nonce=y").json()["code"] == "not_found"


def _relay(connected: socket.socket, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), SECONDS) as onwards:
        thread = threading.Thread(target=hand_on, args=(onwards, connected))
        thread.start()
        hand_on(connected, onwards)
        thread.join(SECONDS)


def test_not_over_https(begin: Callable[..., ServerProcess], runtime: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    issued = authority.issue("server")
    server = begin(
        "--tls-cert", str(issued.cert), "--tls-key", str(issued.key), "--uds", str(runtime / "s"), "--port", "0"
    )
    trusting = ssl.create_default_context(cafile=str(authority.cert))
    trusting.check_hostname = False
    with h5feed.connect(server.url, local=True, verify=trusting, deadline=SECONDS) as feed:
        assert _fetch(feed) == "TCP"


def test_what_the_server_offers(begin: Callable[..., ServerProcess], runtime: Path) -> None:
    """To those with a token alone; each time another secret; a ticket of one worker is good for all, for seconds."""
    server = begin("--workers", "2", "--uds", str(runtime / "s"), "--port", "0", H5FEED_TOKENS=TOKEN)
    assert httpx.get(f"{server.url}/v1/local").status_code == 401
    headers = {"authorization": f"Bearer {TOKEN}"}
    offers = []
    for _ in range(4):
        with httpx.Client(headers=headers, base_url=server.url) as http:
            answer = http.get("/v1/local")
            assert answer.headers["cache-control"] == "no-store"
            offers.append(answer.json())
    assert len({offer["secret"] for offer in offers}) == len({offer["ticket"] for offer in offers}) == 4
    assert len({offer["instance"] for offer in offers}) == 1
    assert {(offer["socket"], offer["uid"]) for offer in offers} == {(str(runtime / "s"), os.geteuid())}
    over_socket = httpx.HTTPTransport(uds=str(runtime / "s"))
    with httpx.Client(transport=over_socket, base_url="http://localhost") as http:
        assert http.get("/v1/datasets").status_code == 401
        # No offer over the socket: who is there needs none.
        assert http.get("/v1/local", headers=headers).status_code == 404
        asked = {"ticket": offers[0]["ticket"], "nonce": "n"}
        proofs = set()
        for _ in range(4):
            with httpx.Client(
                transport=httpx.HTTPTransport(uds=str(runtime / "s")), base_url="http://localhost"
            ) as one:
                proofs.add(one.get("/v1/local/proof", params=asked).json()["proof"])
        assert len(proofs) == 1
        assert http.get("/v1/local/proof", params={**asked, "ticket": f"{'0' * 32}.{10**14}"}).status_code == 400

        def has_expired() -> bool:
            return http.get("/v1/local/proof", params=asked).status_code == 400

        wait_until(has_expired)


class Impostor:
    """Listens at the path of a server's socket, answers something, and keeps what it received."""

    def __init__(self, path: Path, answer: bytes | None) -> None:
        self.received = b""
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        self._listener.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = self._listener.accept()
                with connected:
                    self.received += connected.recv(1 << 16)
                    if self._answer is None:
                        self._ended.wait(SECONDS)
                    else:
                        connected.sendall(self._answer)


def _json(text: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_json(b'{"instance": "x", "proof": "00"}'), "belongs to another server"),
        (_json(b"[]"), "invalid proof"),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "404 instead of a proof"),
        (b"220 mail.example ready\r\n", "does not speak HTTP"),
        (b"", "closed"),
        (None, "in time"),
    ],
)
def test_a_socket_that_is_somebody_elses(
    begin: Callable[..., ServerProcess], runtime: Path, answer: bytes | None, reason: str
) -> None:
    """It gets a nonce and nothing more, and costs a second at most."""
    path = runtime / "s"
    server = begin("--uds", str(path), "--port", "0", H5FEED_TOKENS=TOKEN)
    path.unlink()
    with contextlib.closing(Impostor(path, answer)) as impostor:
        with h5feed.connect(server.url, token=TOKEN, local=True, deadline=SECONDS) as feed:
            assert _fetch(feed, reason).startswith("TCP: ")
        assert b"/v1/local/proof" in impostor.received and TOKEN.encode() not in impostor.received
        assert b"/v1/datasets" not in impostor.received and b"uthorization" not in impostor.received


def test_a_socket_that_is_missing(runtime: Path) -> None:
    """The error names its path, and no host that nobody has asked for."""
    with h5feed.connect(f"unix://{runtime}/none", deadline=1) as feed:
        with pytest.raises(ConnectionFailed, match=f"could not connect to the Unix socket {runtime}/none: ") as failed:
            feed["tall"]
        assert "localhost" not in str(failed.value)


@pytest.mark.parametrize("kind", ["missing", "file", "folder", "link to nothing"])
def test_what_is_no_socket(begin: Callable[..., ServerProcess], runtime: Path, kind: str) -> None:
    path = runtime / "s"
    server = begin("--uds", str(path), "--port", "0")
    path.unlink()
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to(runtime / "nothing")
    with h5feed.connect(server.url, local=True, deadline=SECONDS) as feed:
        reason = "No such file" if kind in ("missing", "link to nothing") else "is not a socket"
        assert _fetch(feed, reason).startswith("TCP: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_relay_of_another_user(begin: Callable[..., ServerProcess], runtime: Path) -> None:
    """Whoever moves the socket, and passes on what is sent to its path, has another user id, and gets no token."""
    path, moved = runtime / "s", runtime / "moved"
    server = begin("--uds", str(path), "--port", "0", "--socket-mode", "0666", H5FEED_TOKENS=TOKEN)
    runtime.chmod(0o777)
    path.rename(moved)
    script = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
        f"s.bind({str(path)!r}); s.listen(); print('ready', flush=True); c, _ = s.accept(); "
        "print(c.recv(65536), flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "ready\n"
            with h5feed.connect(server.url, token=TOKEN, local=True, deadline=SECONDS) as feed:
                _fetch(feed, "belongs to user 65534, but the server runs as user 0")
            assert other.stdout.readline() in ("b''\n", "")
        finally:
            other.kill()


def test_a_server_that_hangs_where_it_is_asked_for_its_socket(folder: Path) -> None:
    """Servers without the header are never asked; one that has it and does not answer costs a second, once."""
    hint = b""
    paths: list[bytes] = []
    ended = threading.Event()

    def answer(connected: socket.socket) -> None:
        while data := connected.recv(1 << 16):
            paths.append(data.split(b" ")[1])
            if paths[-1] == b"/v1/local":
                ended.wait(SECONDS)
                return
            connected.sendall(b"HTTP/1.1 200 OK\r\n%bcontent-length: 2\r\n\r\n{}" % hint)

    listener = Listener(answer)
    try:
        from h5feed.net.client import Client

        client = Client(listener.url, local=True, deadline=SECONDS)
        for _ in range(3):
            client.json("/v1/x")
        assert paths == [b"/v1/x"] * 3
        hint = b"h5feed-local: 1\r\n"
        client.json("/v1/x")
        began = time.monotonic()
        for _ in range(3):
            client.json("/v1/x")
        assert paths.count(b"/v1/local") == 1 and time.monotonic() - began >= OFFER_SECONDS
        assert "did not respond in time" in client.via[listener.url]
        client.close()
    finally:
        ended.set()
        listener.close()


@pytest.mark.parametrize("how", ["restart", "kill", "socket removed"])
def test_the_socket_goes_in_mid_epoch(begin: Callable[..., ServerProcess], runtime: Path, how: str) -> None:
    """Every row once; and the socket is used again as soon as it is there again."""
    server = begin("--workers", "2")
    (path,) = (runtime / "h5feed").glob("*.sock")
    with h5feed.connect(server.url, local=True, deadline=SECONDS) as feed:
        _fetch(feed, "Unix socket ")
        tall = feed["tall"]
        rows: list[int] = []
        # Not from files, which need no requests.
        for number, batch in enumerate(tall.batches(**ORDER, readahead=200_000, decode="server")):
            rows += batch.rows.tolist()
            if number != 4:
                continue
            if how == "socket removed":
                path.unlink()
                for pid in server.worker_pids():
                    os.kill(pid, signal.SIGKILL)
            else:
                server.stop() if how == "restart" else server.kill()
                server.start()
        assert sorted(rows) == list(range(40))
        if how == "socket removed":
            assert "No such file" in feed.via[server.url]
            return

        def is_used_again() -> bool:
            tall.batch(0, **ORDER)
            return feed.via[server.url].startswith("Unix socket ")

        wait_until(is_used_again)


def _sum_rows(dataset: h5feed.Dataset, result: Connection) -> None:
    rows = sorted(row for batch in dataset.batches(**ORDER) for row in batch.rows.tolist())
    wait_until(lambda: dataset.batch(0, **ORDER) is not None and dataset.via.startswith("Unix socket "))
    result.send(rows)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*os.fork:RuntimeWarning")
def test_other_processes(begin: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Forked and spawned ones use the socket, too, over connections of their own."""
    server = begin("--workers", "2")
    monkeypatch.setenv("H5FEED_LOCAL", "1")
    with h5feed.connect(server.url, deadline=SECONDS) as feed:
        _fetch(feed, "Unix socket ")
        context: Any = multiprocessing.get_context(method)
        pipes = [context.Pipe() for _ in range(3)]
        processes = [context.Process(target=_sum_rows, args=(feed["tall"], theirs)) for _, theirs in pipes]
        for process in processes:
            process.start()
        for ours, _ in pipes:
            assert ours.poll(SECONDS) and ours.recv() == list(range(40))
        for process in processes:
            process.join(SECONDS)
        # The parent's connections are still its own.
        _fetch(feed, "Unix socket ")


def test_what_killed_servers_leave(begin: Callable[..., ServerProcess], runtime: Path) -> None:
    """The next server of the same user removes it; that of one that runs stays."""
    killed, running = begin(), begin()
    killed.kill()
    third = begin()
    names = {path.name for path in (runtime / "h5feed").iterdir()}
    assert names == {f"port-{running.port}.sock", f"port-{third.port}.sock"}


@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs root and setpriv")
@pytest.mark.parametrize(
    ("options", "user", "allowed"),
    [
        ((), "0", False),
        (("--socket-mode", "0666"), "0", True),
        (("--socket-mode", "0666"), "1000", True),
        (("--socket-group", "0"), "0", True),
        (("--socket-group", "1000"), "1000", True),
        (("--socket-group", "1000"), "1001", False),
    ],
)
def test_who_may_connect(folder: Path, runtime: Path, options: tuple[str, ...], user: str, allowed: bool) -> None:
    """A server as in the container, user 10001 without capabilities, and trainers as root or as user 1000 without."""
    (runtime / "data").mkdir()
    shutil.copy(folder / "tall.h5", runtime / "data")
    for path in (runtime, *runtime.rglob("*")):
        os.chown(path, 10001, 10001)
        path.chmod(0o755)
    bare = ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
    group = dict(zip(options[::2], options[1::2], strict=True)).get("--socket-group", "10001")
    environment = {**os.environ, "HOME": str(runtime), "PYTHONDONTWRITEBYTECODE": "1"}
    serving = subprocess.Popen(
        [
            *("setpriv", "--reuid=10001", "--regid=10001", f"--groups=10001,{group}", *bare),
            *(sys.executable, "-m", "h5feed_server.cli", "serve", str(runtime / "data")),
            *("--uds", str(runtime / "s"), *options),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert serving.stdout is not None and " at unix://" in serving.stdout.readline()
        script = f"import h5feed; h5feed.connect('unix://{runtime}/s', deadline=30).check_there(); print('there')"
        trainer = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *bare]
        done = subprocess.run(
            [*trainer, sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert (done.stdout == "there\n") == allowed, done.stderr
        assert allowed or "Permission denied" in done.stderr
        if not allowed:
            script = script.replace("check_there()", "datasets()").replace("deadline=30", "deadline=1")
            done = subprocess.run(
                [*trainer, sys.executable, "-c", script], env=environment, capture_output=True, text=True
            )
            assert f"{runtime}/s: permission denied (see H5FEED_UDS and H5FEED_SOCKET_MODE" in done.stderr
    finally:
        serving.terminate()
        serving.wait(SECONDS)
