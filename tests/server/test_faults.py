"""Faults of the machine: an unusable cache folder, few file descriptors, two servers with one cache folder.

The server continues to run. Clients that train meanwhile get every row of every epoch once, with the right values.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS = 120
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lynx")
RESTING_THREADS = 16
"""Most that an idle worker has, beside one for each core: see docs/promises.md."""

SPLIT: Any = {"test": 0.25, "stratify": "label"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(NAMES):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            values = np.arange(ROWS)[:, None] + np.full((ROWS, 300), number * 1000)
            file.create_dataset("x", data=values, chunks=(7, 300), compression="gzip")
            file["label"] = np.arange(ROWS) % 4
    return folder


@contextlib.contextmanager
def started(folder: Path, cache: Path, before: str) -> Iterator[tuple[str, Path]]:
    """A server whose shell has run `before`, and its log file."""
    cache.mkdir(exist_ok=True)
    log = cache.parent / f"{cache.name}.log"
    serve = f'exec {sys.executable} -m h5feed_server.cli serve "{folder}" --cache-dir "{cache}" --port 0 --workers 2'
    command = ["sh", "-ec", f"{before}\n{serve}"]
    if "mount" in before:
        command = ["unshare", "--user", "--map-root-user", "--mount", *command]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " at " in line, (line, log.read_text())
            yield line.rsplit(" at ", 1)[1].strip(), log
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
    assert code == 0


def train(url: str, epochs: int = 1, datasets: int = len(NAMES)) -> None:
    """Train for some epochs on each dataset and both splits; check that each row arrives once, as in the file."""
    with h5feed.connect(url, deadline=60) as feed:
        for number, name in enumerate(NAMES[:datasets]):
            dataset = feed[name]
            for epoch in range(epochs):
                seen: list[int] = []
                for split in ("train", "test"):
                    for batch in dataset.batches(split, batch_size=8, shuffle=True, epoch=epoch, **SPLIT):
                        np.testing.assert_array_equal(batch["x"], batch.rows[:, None] + number * 1000 + np.zeros(300))
                        seen += batch.rows.tolist()
                assert sorted(seen) == list(range(ROWS))


def look(url: str) -> None:
    """Request statistics, a filter and the page of a job, which use the cache folder."""
    with h5feed.connect(url, deadline=60) as feed:
        stats = feed["dog"].stats(where="label in 1, 2")
        assert stats["x"]["count"] == ROWS // 2 * 300 and stats["x"]["min"] == 3001
    answer = httpx.get(f"{url}/datasets/bee", headers={"accept": "text/html"}, timeout=60)
    assert answer.status_code == 200
    assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("options", "reason"),
    [("size=16k", "No space left on device"), ("ro", "Read-only file system")],
    ids=["full", "ro"],
)
def test_a_cache_folder_without_room(data: Path, tmp_path: Path, options: str, reason: str) -> None:
    """Results are computed each time. Each process logs the problem once."""
    cache = tmp_path / "cache"
    with started(data, cache, f'mount -t tmpfs -o {options} none "{cache}"') as (url, log):
        train(url, datasets=4)
        look(url)
        said = log.read_text()
        assert "the cache folder cannot be used" in said and reason in said
        assert said.count("the cache folder cannot be used") <= 4
        assert "Traceback" not in said


@pytest.mark.slow
def test_a_cache_folder_that_is_deleted_again_and_again(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ended = threading.Event()

    def delete() -> None:
        while not ended.wait(0.05):
            shutil.rmtree(cache, ignore_errors=True)

    with started(data, cache, "true") as (url, log):
        deleting = threading.Thread(target=delete)
        deleting.start()
        try:
            train(url, datasets=4)
            look(url)
        finally:
            ended.set()
            deleting.join()
        assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_a_cache_folder_full_of_garbage(data: Path, tmp_path: Path) -> None:
    """Files of other lengths, folders and pipes in place of files, and files in place of folders."""
    cache = tmp_path / "cache"
    with started(data, cache, "true") as (url, _):
        train(url, datasets=3)
        look(url)
    random = np.random.default_rng(0)
    for number, file in enumerate(sorted(path for path in cache.rglob("*") if path.is_file())):
        kind = number % 4
        if kind < 2:
            file.write_bytes(random.bytes(int(random.integers(0, 5000))))
            continue
        file.unlink()
        if kind == 2:
            file.mkdir()
            (file / "x").write_bytes(b"x")
        else:
            os.mkfifo(file)
    jobs = next(cache.glob("served-*/jobs"), None)
    if jobs is not None:
        shutil.rmtree(jobs)
        jobs.write_bytes(b"no folder")
    with started(data, cache, "true") as (url, log):
        train(url, datasets=3)
        look(url)
        assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_few_descriptors(data: Path, tmp_path: Path) -> None:
    """With 64 descriptors per process, several clients train on more files than can be open at the same time."""
    with started(data, tmp_path / "cache", "ulimit -n 64") as (url, log):
        failures: list[BaseException] = []

        def work() -> None:
            try:
                train(url, epochs=2)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        look(url)
        assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_two_servers_with_one_cache_folder(data: Path, tmp_path: Path) -> None:
    """Both start at the same time. If one is killed, a client continues with the other."""
    cache = tmp_path / "cache"
    servers = [ServerProcess(data, cache, "--workers", "2") for _ in range(2)]
    try:
        urls = [server.url for server in servers]
        threads = [threading.Thread(target=train, args=(url,)) for url in urls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reports = [httpx.get(f"{url}/v1/datasets/cat/splits", params=SPLIT, timeout=60).json() for url in urls]
        assert reports[0] == reports[1]
        with h5feed.connect(",".join(urls), deadline=60) as feed:
            rows: list[int] = []
            for index, batch in enumerate(feed["fox"].batches("train", batch_size=4, shuffle=True, **SPLIT)):
                rows += batch.rows.tolist()
                if index == 3:
                    servers[0].kill()
        assert sorted(rows) == sorted(feed_rows(urls[1]))
        look(urls[1])
    finally:
        for server in servers:
            with contextlib.suppress(ProcessLookupError):
                server.stop()


def feed_rows(url: str) -> list[int]:
    with h5feed.connect(url, deadline=60) as feed:
        rows: list[int] = feed["fox"].split_rows("train", **SPLIT).tolist()
        return rows


def test_a_data_folder_that_disappears_and_returns(
    tmp_path: Path, data: Path, serve: Callable[..., ServerProcess]
) -> None:
    """The server is not ready while the folder is missing. Afterwards, it serves the same datasets."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    server = serve(folder)
    train(server.url, datasets=2)
    folder.rename(tmp_path / "away")
    wait_until(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 503)
    assert httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200
    (tmp_path / "away").rename(folder)
    wait_until(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200)
    train(server.url, datasets=2)


def _held(pid: int) -> tuple[int, int]:
    """Number of threads and descriptors of a process."""
    process = Path(f"/proc/{pid}")
    return len(list((process / "task").iterdir())), len(list((process / "fd").iterdir()))


def test_resources_are_released_after_many_clients(data: Path, serve: Callable[..., ServerProcess]) -> None:
    """After a hundred clients have disconnected, their threads and descriptors are released."""
    server = serve(data, H5FEED_IDLE_SECONDS="1", H5FEED_CACHE_BYTES="0", H5FEED_CHUNK_CACHE_BYTES="0")
    train(server.url, datasets=3)
    (pid,) = server.worker_pids()
    request = "GET /v1/datasets/{}/batches/{}?batch_size=8&shuffle=true HTTP/1.1\r\nHost: localhost\r\n\r\n"

    def crowd() -> tuple[int, int]:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(100)]
            for number, client in enumerate(clients):
                client.sendall(request.format(NAMES[number % 3], number % 15).encode())
            for client in clients:
                client.settimeout(60)
                assert client.recv(64).startswith(b"HTTP/1.1 200")
            return _held(pid)

    most = crowd()
    assert most[0] > 18 and most[1] > 100
    resting = RESTING_THREADS + len(os.sched_getaffinity(pid))
    wait_until(lambda: _held(pid)[0] <= resting)
    descriptors = _held(pid)[1]
    crowd()
    wait_until(lambda: _held(pid)[0] <= resting and _held(pid)[1] <= descriptors)
