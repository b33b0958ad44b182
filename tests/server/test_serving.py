"""Processes: several answer alike, dead ones are replaced, files that change are noticed, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import h5feed
import h5py
import httpx
import numpy as np
import psutil
import pytest
from fastapi import FastAPI
from h5feed.errors import ConnectionFailed, RevisionChanged
from h5feed_server.serve.supervisor import STILL_SECONDS
from h5feed_server.serve.worker import CONNECTION, _Worker
from h5feed_server.settings import Settings

from tests.support.fork_server import COMMANDS
from tests.support.server_process import ServerProcess
from tests.support.waiting import suspend, wait_until

URL = "/v1/datasets/mixed/batches/3?split=train&test=0.2&shuffle=true&seed=9&epoch=4&batch_size=16"

BIG = "/v1/datasets/tall/batches/0?fields=x,z&batch_size=40"
"""7.2 MB."""

BIG_STREAM = "/v1/datasets/tall/batches?fields=x,z&batch_size=10&start=0&stop=4"

OPENSSL = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
OPENSSL += ["-addext", "subjectAltName=IP:127.0.0.1"]


def test_two_servers_answer_the_same_bytes(
    serve: Callable[..., ServerProcess], server: ServerProcess, folder: Path, tmp_path: Path
) -> None:
    """The same URL, asked of two servers over copies of the folder with caches of their own: identical."""
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(folder / "mixed.h5", copy)
    other = serve(copy)
    first, second = (httpx.get(one.url + URL, timeout=60) for one in (server, other))
    assert first.status_code == 200
    assert first.content == second.content
    assert first.headers["etag"] == second.headers["etag"]


def test_connections_are_spread_over_the_workers(server: ServerProcess) -> None:
    """Two connections that stay open land on two workers."""
    port = server.port
    with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
        held = [psutil.Process(pid) for pid in server.worker_pids()]

        def counts() -> list[int]:
            return [
                sum(c.laddr.port == port and c.status == "ESTABLISHED" for c in p.net_connections("tcp")) for p in held
            ]

        assert len(held) == 2
        wait_until(lambda: min(counts()) >= 1)


def test_connections_that_wait_are_taken_together(tmp_path: Path) -> None:
    """All in one turn of a worker's loop, whose turns are long while it answers many: nobody waits for its turn to
    connect behind those who ask again and again."""

    async def taken(channel: socket.socket) -> int:
        settings = Settings.model_validate({"data_dir": tmp_path, "cache_dir": tmp_path})
        worker = _Worker(FastAPI(), channel, settings)
        worker._receive()
        tasks = list(worker.host.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks)

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours, theirs, socket.socket() as connection:
        for _ in range(100):
            socket.send_fds(ours, [CONNECTION], [connection.fileno()])
        assert asyncio.run(taken(theirs)) == 100


def test_a_dead_worker_is_replaced(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """A worker killed costs its connections only: the client retries, and a new worker comes."""
    process = serve(folder, "--workers", "2")
    before = process.worker_pids()
    with h5feed.connect(process.url, deadline=60) as feed:
        dataset = feed["mixed"]
        os.kill(before[0], signal.SIGKILL)
        assert len(dataset.batch(0, batch_size=4).rows) == 4
        wait_until(lambda: len(process.worker_pids()) == 2 and process.worker_pids() != before)
        os.kill(before[1], signal.SIGKILL)
        assert len(dataset.batch(1, batch_size=4).rows) == 4


def test_killed_and_restarted_in_mid_epoch(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """SIGKILL to everything in mid-epoch, a new server a second later: each row still comes once."""
    process = serve(folder, "--workers", "2")
    with h5feed.connect(process.url, deadline=60) as feed:
        rows: list[int] = []
        batches = feed["tall"].batches(batch_size=2, shuffle=True, fields=["x"], readahead=200_000)
        for number, batch in enumerate(batches):
            rows += batch.rows.tolist()
            if number == 5:
                process.kill()
                restart = threading.Timer(1.0, process.start)
                restart.start()
        restart.join()
    assert sorted(rows) == list(range(40))


def test_workers_end_with_their_supervisor(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """When the supervisor is killed, its workers notice and end."""
    process = serve(folder)
    workers = [psutil.Process(pid) for pid in process.worker_pids()]
    process.process.kill()
    process.process.wait(10)
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive and gone


def test_stops_quickly_with_open_connections(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """SIGTERM ends it, with exit code 0, idle clients or not."""
    process = serve(folder, "--workers", "2")
    with h5feed.connect(process.url) as feed:
        feed["mixed"].batch(0)
        assert process.stop() == 0


def test_a_worker_that_does_not_end_is_killed(
    serve: Callable[..., ServerProcess], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It cannot hold up who stops the server, who is told."""
    process = serve(folder, "--workers", "2")
    stuck = psutil.Process(process.worker_pids()[0])
    suspend(stuck)
    assert process.stop() == 0
    assert not stuck.is_running()
    assert f"worker {stuck.pid} did not end within 8 s; killing it" in capfd.readouterr().err


def test_unix_socket_and_tls(serve: Callable[..., ServerProcess], folder: Path, tmp_path: Path) -> None:
    """The client reads over a Unix socket and over TLS what it reads over tcp."""
    import ssl

    path = tmp_path / "feed.sock"
    over_uds = serve(folder, "--uds", str(path))
    assert over_uds.url == f"unix://{path}"
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [*OPENSSL, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    over_tls = serve(folder, "--tls-cert", str(certificate), "--tls-key", str(key), "--workers", "2")
    assert over_tls.url.startswith("https://")
    trusted = ssl.create_default_context(cafile=str(certificate))
    with h5feed.connect(over_uds.url) as one, h5feed.connect(over_tls.url, verify=trusted) as two:
        rows = [sum(batch.rows.sum() for batch in feed["tall"].batches(batch_size=7)) for feed in (one, two)]
        assert rows == [780, 780]
    with h5feed.connect(over_tls.url, deadline=60) as distrusting, pytest.raises(ConnectionFailed, match="certificate"):
        distrusting["mixed"]


def test_a_new_certificate(
    serve: Callable[..., ServerProcess], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is used for new connections without a signal; one that cannot be used is told, and changes nothing."""
    import ssl

    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def renew() -> str:
        subprocess.run(
            [*OPENSSL, "-keyout", f"{key}.new", "-out", f"{certificate}.new"], check=True, capture_output=True
        )
        for path in (certificate, key):
            Path(f"{path}.new").replace(path)
        return certificate.read_text()

    def shown() -> str:
        return ssl.get_server_certificate(("127.0.0.1", server.port), timeout=60)

    first = renew()
    server = serve(folder, "--tls-cert", str(certificate), "--tls-key", str(key))
    assert shown().split() == first.split()
    pids = server.worker_pids()
    second = renew()
    wait_until(lambda: shown().split() == second.split())
    certificate.write_text("broken")
    said = ""

    def is_told() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "the previous one stays in use" in said

    wait_until(is_told)
    assert str(certificate) in said and shown().split() == second.split() and server.worker_pids() == pids


def test_changed_files_are_noticed(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A file that appears is listed; one that is replaced has a new revision, and the old handle gets an error."""
    data = tmp_path / "data"
    data.mkdir()

    def write(name: str, value: int) -> None:
        with h5py.File(tmp_path / "new.h5", "w") as file:
            file["x"] = np.full((10, 4), value)
        os.replace(tmp_path / "new.h5", data / name)

    write("one.h5", 1)
    process = serve(data)
    with h5feed.connect(process.url, deadline=60) as feed:
        old = feed["one"]
        assert old.batch(0)["x"].max() == 1
        write("two.h5", 2)
        assert feed["two"].batch(0)["x"].max() == 2
        write("one.h5", 3)
        with pytest.raises(RevisionChanged, match="again"):
            old.batch(0)
        assert feed["one"].batch(0)["x"].max() == 3
        (data / "two.h5").unlink()
        wait_until(lambda: list(feed) == ["one"])


def test_cached_layouts_survive_a_restart(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """A restarted server reads its cache folder; one whose cache cannot be written serves all the same."""
    process = serve(folder)
    with h5feed.connect(process.url, deadline=60) as feed:
        revision = feed["mixed"].revision
        process.stop()
        process.start()
        assert feed["mixed"].revision == revision
    blocked = serve(folder, H5FEED_CACHE_DIR="unused")
    assert httpx.get(blocked.url + URL, timeout=60).status_code == 200


def test_libhdf5_is_not_in_the_serving_process(server: ServerProcess) -> None:
    """No worker has libhdf5 mapped, however much it has served."""
    for pid in server.worker_pids():
        assert "libhdf5" not in Path(f"/proc/{pid}/maps").read_text()


def test_usage_errors(tmp_path: Path) -> None:
    """A folder that is not there, a bad port, a taken address: one line each, no traceback."""
    for arguments in (["serve", str(tmp_path / "nix")], ["serve", str(tmp_path), "--port", "99999"]):
        done = COMMANDS.run(arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


REST = [pytest.param(left, marks=pytest.mark.slow) for left in (b"\n", b"\xff\xfe" * 16, b"\0" * 32)]


@pytest.mark.parametrize("left", [b"", b"abc", *REST])
def test_a_damaged_token_file_lets_nobody_in(tmp_path: Path, left: bytes) -> None:
    """What a crash left of the token file is replaced: another address is never served without a token."""
    (tmp_path / "data").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "token").write_bytes(left)
    process = ServerProcess(tmp_path / "data", tmp_path / "cache", "--host", "0.0.0.0")
    try:
        url = f"http://127.0.0.1:{process.port}/v1/datasets"
        token = (tmp_path / "cache" / "token").read_text().strip()
        assert len(token) > 20
        assert httpx.get(url, timeout=60).status_code == 401
        assert httpx.get(url, timeout=60, headers={"authorization": f"Bearer {token}"}).status_code == 200
    finally:
        process.stop()


def test_a_stopped_worker_is_replaced(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """One that stands still is noticed within seconds: its connections end, what it was asked is asked again."""
    process = serve(folder, "--workers", "2")
    with h5feed.connect(process.url, deadline=60) as feed:
        # Both workers have a connection of this client's.
        batches = feed["tall"].batches(batch_size=2, shuffle=True, fields=["x"], readahead=400_000, connections=2)
        rows = next(batches).rows.tolist()
        stopped = psutil.Process(process.worker_pids()[0])
        with (
            socket.create_connection(("127.0.0.1", process.port)) as one,
            socket.create_connection(("127.0.0.1", process.port)) as other,
        ):
            suspend(stopped)
            began = time.monotonic()
            for connected in (one, other):
                connected.settimeout(1)
            ended = []

            def has_ended() -> bool:
                for connected in (one, other):
                    try:
                        if connected.recv(1) == b"":
                            ended.append(connected)
                    except TimeoutError:
                        continue
                    except ConnectionError:
                        ended.append(connected)
                return bool(ended)

            wait_until(has_ended)
            assert time.monotonic() - began < 10
            wait_until(lambda: not stopped.is_running())
        for batch in batches:
            rows += batch.rows.tolist()
        assert sorted(rows) == list(range(40))
        wait_until(lambda: len(process.worker_pids()) == 2 and stopped.pid not in process.worker_pids())


def test_a_pause_of_everything_replaces_nobody(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """Supervisor and workers stopped together, as `docker pause` does: the same workers go on."""
    process = serve(folder, "--workers", "2")
    before = process.worker_pids()
    everybody = [psutil.Process(pid) for pid in (process.process.pid, *before)]
    suspend(*everybody)
    time.sleep(STILL_SECONDS + 1)
    for one in everybody:
        one.resume()
    assert httpx.get(process.url + URL, timeout=60).status_code == 200
    time.sleep(1)
    assert process.worker_pids() == before


def test_a_hangup_without_a_terminal_replaces_the_workers(
    serve: Callable[..., ServerProcess], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGHUP to a service, as `systemctl reload` sends it: new workers, and no row of an epoch is lost."""
    monkeypatch.setattr(ServerProcess, "new_session", True)
    process = serve(folder, "--workers", "2")
    before = set(process.worker_pids())
    with h5feed.connect(process.url, deadline=60) as feed:
        rows: list[int] = []
        for number, batch in enumerate(
            feed["tall"].batches(batch_size=2, shuffle=True, fields=["x"], readahead=200_000)
        ):
            rows += batch.rows.tolist()
            if number == 3:
                process.process.send_signal(signal.SIGHUP)
                # Workers get it as well where it comes for a group of processes.
                for pid in before:
                    os.kill(pid, signal.SIGHUP)
        assert sorted(rows) == list(range(40))
        wait_until(lambda: len(process.worker_pids()) == 2 and not before & set(process.worker_pids()))
        assert len(feed["mixed"].batch(0, batch_size=4).rows) == 4
    assert process.stop() == 0


def test_the_end_of_the_terminal_ends_the_server(folder: Path, tmp_path: Path) -> None:
    """A terminal that is closed: answers under way are finished, and nothing is left behind."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "h5feed_server.cli", "serve", str(folder), "--port", "0", "--workers", "2"]
    script = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command, "--cache-dir", str(tmp_path / "cache")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    try:
        os.close(theirs)
        shown = ""
        while "browse it" not in shown:
            shown += os.read(ours, 1000).decode()
        address = re.search(r"http://[\d.:]+", shown)
        assert address
        workers = psutil.Process(process.pid).children()
        with httpx.stream("GET", address[0] + BIG, timeout=60) as answer:
            length = int(answer.headers["content-length"])
            os.close(ours)
            assert sum(map(len, answer.iter_raw())) == length
        assert process.wait(60) == 0
        assert not psutil.wait_procs(workers, timeout=60)[1]
    finally:
        process.kill()
        process.wait()


def test_stops_in_time_with_slow_readers(
    serve: Callable[..., ServerProcess], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM while peers take nothing, or send nothing: over within the ten seconds that container engines wait."""
    process = serve(folder, "--workers", "2")
    peers = []
    try:
        for number in range(20):
            connected = socket.socket()
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connected.settimeout(60)
            connected.connect(("127.0.0.1", process.port))
            peers.append(connected)
            request = [f"GET {BIG} HTTP/1.1", f"GET {BIG_STREAM} HTTP/1.1", "POST /v1/datasets/mixed/rows HTTP/1.1"][
                number % 3
            ]
            lines = [
                "Host: localhost",
                "Content-Type: application/json",
                *(["Content-Length: 900"] if number % 3 == 2 else []),
            ]
            connected.sendall("\r\n".join([request, *lines, "", ""]).encode())
        assert peers[1].recv(100).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - began < 10
    finally:
        for connected in peers:
            connected.close()
    said = capfd.readouterr().err
    assert "connections were closed before their responses were complete" in said
    for word in ("ERROR", "CancelledError", "Traceback", "killed"):
        assert word not in said
