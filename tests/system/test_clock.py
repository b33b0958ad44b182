"""A server and its clients while somebody sets the clock back by a day, and forward again."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed_server.cli import main as server_main

from tests.support.waiting import wait_until

ROWS = 4000
DAY = 24 * 3600


class Clock:
    """The wall clock of processes with this environment. The monotonic clock goes on as it is, as on a real machine."""

    def __init__(self, folder: Path) -> None:
        assert shutil.which("gcc") is not None, "gcc is not installed: run `make setup-system`"
        library, self._file = folder / "wall_clock.so", folder / "wall_clock"
        source = Path(__file__).with_name("wall_clock.c")
        subprocess.run(["gcc", "-O1", "-Wall", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self._file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK_OFFSET": str(self._file)}

    def set(self, seconds: int) -> None:
        """Set it forward by so many seconds from the real time, or back."""
        with self._file.open("r+b") as file:
            file.write(seconds.to_bytes(8, sys.byteorder, signed=True))


class Training(threading.Thread):
    """Epoch after epoch, each row once as it is in the file."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__()
        self.url, self.token = url, token
        self.epochs = 0
        self.failure: BaseException | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            with h5feed.connect(self.url, token=self.token, deadline=60) as feed:
                for epoch in itertools.count():
                    if self.ended.is_set():
                        return
                    seen: list[int] = []
                    for batch in feed["rows"].batches(batch_size=50, shuffle=True, epoch=epoch, readahead=1 << 16):
                        np.testing.assert_array_equal(batch["x"][:, 0], batch.rows)
                        seen += batch.rows.tolist()
                    assert sorted(seen) == list(range(ROWS))
                    self.epochs += 1
        except BaseException as error:
            self.failure = error

    def goes_on(self) -> None:
        before = self.epochs
        wait_until(lambda: self.epochs > before + 1 or self.failure is not None)
        assert self.failure is None, self.failure


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.fixture
def served(clock: Clock, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The URL of a server of two workers with this clock, and its log."""
    data, log = tmp_path / "data", tmp_path / "log"
    data.mkdir()
    with h5py.File(data / "rows.h5", "w") as file:
        values = np.arange(ROWS)[:, None] + np.zeros((ROWS, 64), "i8")
        file.create_dataset("x", data=values, chunks=(40, 64), compression="gzip")
    serve = [sys.executable, "-m", "h5feed_server.cli", "serve", str(data), "--cache-dir", str(tmp_path / "cache")]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*serve, "--port", "0", "--workers", "2", "--token-file", str(tmp_path / "tokens")],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **clock.environment, "H5FEED_READ_TIMEOUT": "20", "H5FEED_JOB_PATIENCE": "30"},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " at " in line, (line, log.read_text())
            yield line.rsplit(" at ", 1)[1].strip(), log
        finally:
            process.terminate()
            code = process.wait(60)
    assert code == 0
    assert "Traceback" not in log.read_text(), log.read_text()


def _token(tmp_path: Path, name: str, *options: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        assert server_main(["token", "create", name, *options, "--token-file", str(tmp_path / "tokens")]) == 0
    return out.getvalue().strip()


@pytest.fixture
def tokens(tmp_path: Path) -> tuple[str, str]:
    """One without an end, and one that expires in an hour."""
    return _token(tmp_path, "always"), _token(tmp_path, "brief", "--expires", "1h")


def test_the_clock_is_set(tokens: tuple[str, str], served: tuple[str, Path], clock: Clock, tmp_path: Path) -> None:
    """Back by a day, forward by two and right again: every row comes once, jobs end, new files are found, metrics and
    pages are there; a token expires by the clock as it is."""
    always, brief = tokens
    url, _ = served
    training = Training(url, always)
    training.start()
    bearer = {"authorization": f"Bearer {always}"}
    try:
        with httpx.Client(base_url=url, timeout=60, headers=bearer) as client:
            training.goes_on()
            counted = _batches(client)
            for number, (days, new) in enumerate([(-1, "ant"), (1, "bee"), (-1, "cat"), (0, "dog")]):
                clock.set(days * DAY)

                def is_set(days: int = days) -> bool:
                    now = parsedate_to_datetime(client.get("/healthz").headers["date"])
                    return abs(now - datetime.now(UTC) - timedelta(days=days)) < timedelta(hours=1)

                wait_until(is_set)
                training.goes_on()
                # A job that has not been run before, waited for while it runs.
                with h5feed.connect(url, token=always, deadline=60) as feed:
                    held_out = 400 + 40 * number
                    stats = feed["rows"].stats("train", test=held_out / ROWS)
                    assert stats["x"]["count"] == 64 * (ROWS - held_out)
                    with h5py.File(tmp_path / "data" / f"{new}.h5", "w") as file:
                        file["x"] = np.arange(5)
                    assert feed[new].take([3])["x"][0] == 3
                status = client.get("/v1/datasets", headers={"authorization": f"Bearer {brief}"}).status_code
                assert status == (401 if days > 0 else 200)
                for path in ("/readyz", "/metrics", "/feed", "/", "/v1/datasets"):
                    assert client.get(path, headers={"accept": "text/html"}).status_code == 200, path
                assert "-86" not in client.get("/feed", headers={"accept": "text/html"}).text
                before, counted = counted, _batches(client)
                assert counted > before
            training.goes_on()
    finally:
        training.ended.set()
        training.join(60)
    assert training.failure is None


def _batches(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("h5feed_batches_total ")).split()[1])
