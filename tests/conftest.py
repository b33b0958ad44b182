"""Real servers over real HDF5 files on real sockets."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5feed
import h5py
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, settings

MOST_CPUS = 4
"""As many as tests and servers use: memory that is bounded for each thread is the same on every machine."""


def _begin_alike() -> None:
    """Whoever runs the tests, and wherever: servers and commands begin with the same signals, variables and CPUs."""
    for name in [name for name in os.environ if name.startswith("H5FEED_")]:
        del os.environ[name]
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        os.environ.pop(name, None)
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    # A shell has what it runs in the background ignore the one, `nohup` the other, and children inherit that.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:MOST_CPUS])


_begin_alike()

# What Hypothesis tries is the same each time, so that nobody's change fails by another one's bad luck.
settings.register_profile("alike", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("alike")


class ServerProcess:
    """A server process of its own, started on a free port."""

    new_session = False
    """Whether it has no terminal, whoever runs the tests."""

    def __init__(self, folder: Path, cache_dir: Path, *options: str, **environment: str) -> None:
        self.folder = folder
        self.cache_dir = cache_dir
        self._options = options
        self._environment = environment
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, on the port that it had before."""
        command = [sys.executable, "-m", "h5feed_server.cli", "serve", str(self.folder), "--port", str(self.port)]
        command += ["--cache-dir", str(self.cache_dir), *self._options]
        environment = {**os.environ, **self._environment}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=self.new_session
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        line = self.process.stdout.readline() if ready else ""
        assert " at " in line, f"the server did not start: {line!r}"
        self.url = line.rsplit(" at ", 1)[1].strip()
        if self.url.startswith("http"):
            self.port = int(self.url.rsplit(":", 1)[1])

    def worker_pids(self) -> list[int]:
        """Process ids of its workers, but not of inspectors."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def working_pids(self) -> list[int]:
        """Process ids of the workers that hold the lock of a job."""
        found = []
        for pid in self.worker_pids():
            try:
                links = [os.readlink(descriptor) for descriptor in Path(f"/proc/{pid}/fd").iterdir()]
            except OSError:
                continue
            if any("/jobs/" in link and link.endswith(".lock") for link in links):
                found.append(pid)
        return found

    def unfinished_jobs(self) -> list[str]:
        """Kinds of the jobs that are not over, by what is written down of them."""
        # After a line that says whether what follows is whole.
        files = [path.read_bytes().split(b"\n", 1)[1] for path in self.cache_dir.glob("served-*/jobs/*.json")]
        states = [json.loads(content) for content in files]
        return [state["kind"] for state in states if state["status"] in ("queued", "running")]

    def kill(self) -> None:
        """SIGKILL, to the supervisor and its workers: nothing is said to anybody."""
        workers = self.worker_pids()
        for pid in [self.process.pid, *workers]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(60)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers that end with the test: ``serve(folder, "--workers", "2", H5FEED_MAX_ROWS="10")``."""
    started: list[ServerProcess] = []

    def start(folder: Path, *options: str, **environment: str) -> ServerProcess:
        server = ServerProcess(folder, tmp_path / f"cache{len(started)}", *options, **environment)
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


ROWS = 1000


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: `mixed` (every layout that is read), `sub.small`, `broken` (no HDF5), `odd` (nothing readable)."""
    path = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    with h5py.File(path / "mixed.h5", "w") as file:
        file["images"] = random.integers(0, 256, (ROWS, 12, 10, 3), dtype=np.uint8)
        labels = file.create_dataset("labels", data=random.choice(4, ROWS, p=[0.7, 0.2, 0.07, 0.03]))
        labels.attrs["class_names"] = ["cat", "dog", "bird", "fish"]
        # Rows above the size that is kept in memory, so that the way past the cache is taken too.
        big = random.integers(0, 256, (40, 300, 300), dtype=np.uint8)
        file["big_endian"] = random.integers(-1000, 1000, (ROWS, 3)).astype(">i4")
        file["flags"] = random.random(ROWS) < 0.5
        file["half"] = random.random((ROWS, 2)).astype("<f2")
        file["waves"] = (random.random((ROWS, 4)) + 1j * random.random((ROWS, 4))).astype("<c8")
        file.create_dataset("never_written", (ROWS, 2), "<f4", fillvalue=1.5)
        gzip = {"compression": "gzip", "compression_opts": 1}
        file.create_dataset("by_row", data=random.integers(0, 9, (ROWS, 20), dtype=np.int16), chunks=(1, 20), **gzip)
        values = random.random((ROWS, 7, 5)).astype("<f4")
        file.create_dataset("shuffled", data=values, chunks=(3, 4, 2), shuffle=True, **gzip)
        file.create_dataset("swapped", data=values.astype(">f8"), chunks=(16, 7, 5), shuffle=True, **gzip)
        file.create_dataset("plain_chunks", data=values, chunks=(10, 7, 5))
        file.create_dataset("plain_pieces", data=values, chunks=(10, 3, 5))
        sparse = file.create_dataset("sparse", (ROWS, 4), "<i4", chunks=(10, 4), fillvalue=-7, **gzip)
        sparse[100:130] = 5
        file.create_dataset("lzf", data=np.arange(ROWS), chunks=(10,), compression="lzf")
        file["text"] = np.array([b"one", b"two"] * (ROWS // 2))
        file["meta"] = np.arange(3)
        kind = h5py.enum_dtype({"RED": 0, "GREEN": 1}, basetype="i1")
        file.create_dataset("colour", data=np.arange(ROWS) % 2, dtype=kind)
    with h5py.File(path / "tall.h5", "w") as file:
        file["x"] = big
        file.create_dataset("z", data=big, chunks=(1, 300, 300), compression="gzip")
        file.create_dataset("w", data=big, chunks=(7, 128, 300), compression="gzip", shuffle=True)
        file["y"] = np.arange(40) % 2
    (path / "sub").mkdir()
    with h5py.File(path / "sub" / "small.hdf5", "w") as file:
        file["x"], file["y"] = np.zeros((5, 3)), np.arange(5)
    (path / "broken.h5").write_bytes(b"this is no HDF5 file")
    with h5py.File(path / "odd.h5", "w") as file:
        file["references"] = np.array([file.ref, file.ref], dtype=h5py.ref_dtype)
    os.mkfifo(path / "pipe.h5")
    return path


@pytest.fixture(scope="session")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server of two workers over `folder`, for all tests that do not change it."""
    process = ServerProcess(folder, tmp_path_factory.mktemp("cache"), "--workers", "2")
    yield process
    assert process.stop() == 0


@pytest.fixture(scope="session")
def feed(server: ServerProcess) -> Iterator[h5feed.Feed]:
    with h5feed.connect(server.url, deadline=60) as connected:
        yield connected


def suspend(*processes: psutil.Process) -> None:
    """SIGSTOP, and return when they stand still: one that is busy starting or stopping takes what comes until then."""
    for process in processes:
        process.suspend()
    for process in processes:
        wait_until(lambda process=process: process.status() == psutil.STATUS_STOPPED)  # type: ignore[misc]


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Fail unless `condition` becomes true in time, which is long, for a machine that is busy with something else."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
