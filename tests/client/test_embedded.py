"""A folder or a file instead of a URL: a server of one's own, shared, restarted, and ended with its last client."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import numpy as np
import psutil
import pytest
from h5feed.cli import main
from h5feed.errors import BadParameter, ConnectionFailed, RevisionChanged
from h5feed.net.embedded import START_SECONDS

from tests.support.short_folder import short_folder
from tests.support.waiting import wait_until

ROWS = 60
ORDER: Any = {"batch_size": 2, "shuffle": True, "seed": 3}
SECONDS = 60.0
GONE_SECONDS = 30.0
"""After its last client, a server ends within 10 s; more on a machine that is busy with something else."""


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the servers have their folders. All have ended when the test has."""
    with short_folder() as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        yield path
        wait_until(lambda: not _servers(path), GONE_SECONDS)


@pytest.fixture
def data(runtime: Path) -> Path:
    path = runtime / "data"
    path.mkdir()
    _write(path / "things.h5")
    return path


def _write(path: Path, begin: int = 0) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(begin, begin + 1000 * ROWS, dtype="f4").reshape(ROWS, 1000)
        file["label"] = np.arange(ROWS) % 3


def _servers(runtime: Path) -> list[psutil.Process]:
    """The supervisors of the servers below `runtime`."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if "--embedded" in line and line[-1].startswith(str(runtime)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    own = {process.pid for process in found}
    supervisors = []
    for process in found:
        with contextlib.suppress(psutil.Error):
            if process.ppid() not in own:
                supervisors.append(process)
    return supervisors


def _kill(server: psutil.Process) -> None:
    """SIGKILL, to the supervisor and its workers."""
    for process in [server, *server.children(recursive=True)]:
        process.kill()


def _rows(feed: h5feed.Feed) -> list[int]:
    return sorted(row for batch in feed["things"].batches(**ORDER) for row in batch.rows.tolist())


def _client(path: Path, *, lines: str = "") -> subprocess.Popen[str]:
    """Another process that opens `path`, prints a line, and waits."""
    script = f"import h5feed, sys; feed = h5feed.connect({str(path)!r}); print(feed['things'].rows, flush=True)"
    waiting = "sys.stdin.readline()"
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join([script, lines, waiting])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.communicate(timeout=SECONDS)


def test_a_folder_and_a_file(data: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As str or as path, relative or not; a file alone is the only one that is served; another server each."""
    _write(data / "others.h5")
    monkeypatch.chdir(data.parent)
    with h5feed.connect("data/") as feed, h5feed.connect(data / "things.h5") as alone:
        assert (feed.url, alone.url) == (str(data), str(data / "things.h5"))
        assert repr(feed) == f"<Feed {data}>"
        assert sorted(feed) == ["others", "things"] and sorted(alone) == ["things"]
        assert _rows(feed) == _rows(alone) == list(range(ROWS))
        assert feed.via[str(data)].startswith(f"Unix socket {runtime}/h5feed/own-")
        assert "over Unix socket" in repr(alone["things"].loader("all").stats())
        assert len(_servers(runtime)) == 2
        folder = next((runtime / "h5feed").iterdir())
        assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
        monkeypatch.setenv("H5FEED_URL", "data")
        with h5feed.connect() as same:
            assert same.url == str(data) and len(_servers(runtime)) == 2
        assert main(["ls", "data"]) == 0
    wait_until(lambda: not list((runtime / "h5feed").iterdir()), GONE_SECONDS)


def test_two_lines_train(data: Path, runtime: Path) -> None:
    """As in the README."""
    import keras

    train = h5feed.connect(data / "things.h5")["things"].sequence("train", batch_size=8, shuffle=True, val=0.2)
    model = keras.Sequential([keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert len(model.fit(train, epochs=2, verbose=0).history["loss"]) == 2
    train.close()


def test_processes_share_a_server(data: Path, runtime: Path) -> None:
    """Those that begin at the same time, too; it stays for the last of them, and ends when that one is killed."""
    clients = [_client(data) for _ in range(5)]
    try:
        assert [_said(client) for client in clients] == [f"{ROWS}\n"] * 5
        (server,) = _servers(runtime)
        _end(*clients[:4])
        time.sleep(7)
        assert _servers(runtime) == [server]
    finally:
        _end(*clients)
    began = time.monotonic()
    wait_until(lambda: not _servers(runtime), GONE_SECONDS)
    # Long enough for the next command of a script.
    assert time.monotonic() - began > 2
    assert not list((runtime / "h5feed").iterdir())


def test_a_client_that_comes_while_the_server_ends(data: Path, runtime: Path) -> None:
    """It never gets a server that ends under its hands, whenever it comes."""
    for pause in (3.0, 4.0, 4.5, 5.0, 5.5, 6.0):
        with h5feed.connect(data, deadline=SECONDS) as feed:
            assert feed["things"].rows == ROWS
        del feed
        time.sleep(pause)
    with h5feed.connect(data, deadline=SECONDS) as feed:
        assert _rows(feed) == list(range(ROWS))


@pytest.mark.parametrize("whom", ["all", "supervisor"])
def test_killed_in_mid_epoch(data: Path, runtime: Path, whom: str) -> None:
    """Every row once, as if the server had been restarted by somebody."""
    killed: set[int] = set()
    with h5feed.connect(data, deadline=SECONDS) as feed:
        rows: list[int] = []
        for number, batch in enumerate(feed["things"].batches(**ORDER, readahead=40_000)):
            rows += batch.rows.tolist()
            if number in (3, 9):
                # A worker whose supervisor was killed may still be ending.
                for server in _servers(runtime):
                    killed.add(server.pid)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        _kill(server) if whom == "all" else server.kill()
        assert sorted(rows) == list(range(ROWS))
        feed["things"].batch(0, **ORDER)
        wait_until(lambda: len(_servers(runtime)) == 1)
        (another,) = _servers(runtime)
        assert another.pid not in killed


def test_its_folder_is_deleted(data: Path, runtime: Path) -> None:
    """Clients get another server, and the one that nobody finds any more ends."""
    with h5feed.connect(data, deadline=SECONDS) as feed:
        (server,) = _servers(runtime)
        shutil.rmtree(runtime / "h5feed")
        with h5feed.connect(data, deadline=SECONDS) as other:
            assert _rows(other) == list(range(ROWS))
            wait_until(lambda: not server.is_running(), GONE_SECONDS)
            assert _rows(feed) == list(range(ROWS))
            assert len(_servers(runtime)) == 1


def test_different_settings_and_versions(data: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets a server of its own; the address of another server is not passed on."""
    monkeypatch.setenv("H5FEED_PORT", "1")
    monkeypatch.setenv("H5FEED_TOKEN_FILE", "/nowhere")
    with h5feed.connect(data) as feed:
        monkeypatch.setenv("H5FEED_WORKERS", "2")
        with h5feed.connect(data) as two:
            assert feed["things"].revision == two["things"].revision
            assert sorted(len(server.children()) for server in _servers(runtime)) == [1, 2]
        monkeypatch.delenv("H5FEED_WORKERS")
        monkeypatch.setattr("h5feed.net.embedded.__version__", "0.0.9")
        with h5feed.connect(data) as older:
            assert _rows(older) == list(range(ROWS))
            assert feed.via != older.via


def _sum_rows(dataset: h5feed.Dataset, result: Connection) -> None:
    result.send(sorted(row for batch in dataset.batches(**ORDER) for row in batch.rows.tolist()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*os.fork:RuntimeWarning")
def test_other_processes(data: Path, runtime: Path, method: str) -> None:
    """Forked and spawned ones use the same server."""
    with h5feed.connect(data, deadline=SECONDS) as feed:
        context: Any = multiprocessing.get_context(method)
        pipes = [context.Pipe() for _ in range(3)]
        processes = [context.Process(target=_sum_rows, args=(feed["things"], theirs)) for _, theirs in pipes]
        for process in processes:
            process.start()
        for ours, _ in pipes:
            assert ours.poll(SECONDS) and ours.recv() == list(range(ROWS))
        for process in processes:
            process.join(SECONDS)
        assert len(_servers(runtime)) == 1 and _rows(feed) == list(range(ROWS))


def test_a_killed_parent_of_forked_processes(data: Path, runtime: Path) -> None:
    """They keep the server; it goes with the last of them."""
    fork = "import os, signal\nif os.fork() == 0:\n    print(os.getpid(), flush=True)\n    signal.pause()"
    client = _client(data, lines=fork)
    assert _said(client) == f"{ROWS}\n"
    child = int(_said(client))
    client.kill()
    client.wait(SECONDS)
    time.sleep(7)
    assert len(_servers(runtime)) == 1
    os.kill(child, signal.SIGKILL)
    client.communicate(timeout=SECONDS)


def test_after_close(data: Path, runtime: Path) -> None:
    """A closed feed lets the server go, and starts it again if it is used."""
    feed = h5feed.connect(data, deadline=SECONDS)
    things = feed["things"]
    feed.close()
    wait_until(lambda: not _servers(runtime), GONE_SECONDS)
    assert things.batch(0, **ORDER).rows.shape == (2,)
    assert len(_servers(runtime)) == 1
    del feed, things
    gc.collect()


def test_a_file_that_is_replaced(data: Path, runtime: Path) -> None:
    with h5feed.connect(data / "things.h5", deadline=SECONDS) as feed:
        things = feed["things"]
        things.batch(0, **ORDER)
        _write(data / "new", begin=7)
        os.replace(data / "new", data / "things.h5")

        def is_noticed() -> bool:
            try:
                things.batch(0, **ORDER)
            except RevisionChanged:
                return True
            return False

        wait_until(is_noticed)
        assert feed["things"].batch(0, batch_size=1)["x"][0, 0] == 7


def test_what_is_misspelt(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error suggests a path, or a URL for what looks like the address of a server."""
    monkeypatch.chdir(data.parent)
    for given, said in {
        "dta/": "did you mean 'data'?",
        "data/thing.h5": "did you mean 'data/things.h5'?",
        "localhost:8000": "did you mean 'http://localhost:8000'?",
        "[::1]:8000": "did you mean 'http://[::1]:8000'?",
        "gpu-box": "a server is named by its URL: http://host:8000, https://host or unix:///path/to.sock",
        "nowhere/at/all/": "a server is named by its URL",
    }.items():
        with pytest.raises(BadParameter) as raised:
            h5feed.connect(given)
        assert f"there is no folder or file {given!r}" in str(raised.value) and said in str(raised.value)
    with pytest.raises(BadParameter, match="'ftp://data'"):
        h5feed.connect("ftp://data")
    os.mkfifo("pipe")
    with pytest.raises(BadParameter, match="neither a folder nor a file"):
        h5feed.connect("pipe")
    for options in ({"token": "x"}, {"verify": False}, {"cert": "x.pem"}, {"auth": ("a", "b")}, {"local": False}):
        with pytest.raises(BadParameter, match=f"^{next(iter(options))}= is for the URL of a server"):
            h5feed.connect("data", **options)


def test_a_server_that_does_not_start(data: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the last lines of its log, and says where the log is; it comes at once."""
    monkeypatch.setenv("H5FEED_WORKERS", "many")
    began = time.monotonic()
    with pytest.raises(ConnectionFailed, match="H5FEED_WORKERS=many") as raised:
        h5feed.connect(data)
    assert "server.log" in str(raised.value) and time.monotonic() - began < START_SECONDS
    monkeypatch.delenv("H5FEED_WORKERS")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    with pytest.raises(ConnectionFailed, match=f"no server can be started for {data}"):
        h5feed.connect(data)


def test_without_the_server_package(data: Path) -> None:
    """The error says what to install."""
    script = (
        "import sys, importlib.abc, h5feed\n"
        "from importlib import util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'h5feed_server' else find(name, *more)\n"
        f"h5feed.connect({str(data)!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=SECONDS)
    assert f"pip install h5feed-server=={h5feed.__version__}" in done.stderr


def test_the_log_is_bounded(runtime: Path) -> None:
    """It begins anew at a size; the previous one is kept."""
    script = (
        "import os, sys\n"
        "from h5feed_server.serve.embedded import LOG_BYTES, Embedding\n"
        f"log = os.open({str(runtime / 'server.log')!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "os.dup2(log, 1)\n"
        f"embedding = Embedding({str(runtime)!r})\n"
        "for number in range(4):\n"
        "    os.write(1, b'x' * LOG_BYTES + b'%d' % number)\n"
        "    embedding.is_over(10.0 * number)\n"
        "print('end', flush=True)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=SECONDS)
    assert (runtime / "server.log").read_text() == "end\n"
    assert (runtime / "server.log.1").stat().st_size == 1 << 20
