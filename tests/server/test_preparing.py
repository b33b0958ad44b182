"""Files that are being looked at: those asked for come first, and who asks is told how far it is."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import h5feed
import h5py
import httpx
import numpy as np
import psutil
import pytest
from h5feed.errors import DatasetNotFound, Preparing
from h5feed_server.catalog import catalog as catalogue
from h5feed_server.catalog import discovery, sources
from h5feed_server.catalog.inspections import Inspections, NotYet
from h5feed_server.services import Services
from h5feed_server.settings import Settings

from tests.support.waiting import suspend, wait_until

FILES = 40


def _write(path: Path, arrays: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for number in range(arrays):
            file[f"x{number}"] = np.arange(10)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    for number in range(FILES):
        # Each with a name of its own: no two of them are parts of one dataset.
        _write(tmp_path / "data" / f"{'abcdefghij'[number % 10]}{'klmn'[number // 10]}.h5", 60)
    _write(tmp_path / "data" / "zz.h5", 60)
    settings = Settings.model_validate({"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"})
    started = Services.start(settings)
    yield started
    started.close(wait=True)


def test_what_is_asked_for_is_looked_at_first(services: Services) -> None:
    """The last of many files, by name, is served long before the others."""
    entries = services.catalog.entries()
    wanted = next(entry for entry in entries if entry.name == "zz")
    done_before: list[int] = []
    # Counted at the moment it is done, by the thread that inspects: this one may wait for the processor.
    wanted.outcome.add_done_callback(lambda _: done_before.append(sum(entry.outcome.done() for entry in entries)))
    assert services.catalog.dataset_within(120, "zz").rows == 10
    wait_until(lambda: bool(done_before))
    assert done_before[0] < FILES // 2


def test_nothing_else_holds_up_what_is_asked_for() -> None:
    """Files that take for ever occupy all but one of the threads."""
    inspections = Inspections[str](2)
    held, begun = threading.Event(), threading.Semaphore(0)

    def hang() -> str:
        begun.release()
        held.wait()
        return "late"

    hanging = [inspections.submit(hang) for _ in range(2)]
    assert begun.acquire(timeout=60) and begun.acquire(timeout=60)
    found, asked = inspections.submit(lambda: "found"), inspections.submit(lambda: "asked")
    inspections.prefer(asked)
    assert asked.result(60) == "asked" and not found.done()
    assert inspections.left == 3 and "left in all" in inspections.describe(found)
    held.set()
    assert [one.result(60) for one in (*hanging, found)] == ["late", "late", "found"]
    inspections.close(wait=True)


def test_the_folder_is_walked_through_once_a_second(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask for names that are not there; and each hears so only after a walk that began when it asked."""
    walks: list[float] = []
    real = discovery.walk

    def counted(*arguments: object) -> object:
        walks.append(time.monotonic())
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sources, "walk", counted)
    began = time.monotonic()
    for number in range(2000):
        with pytest.raises((NotYet, DatasetNotFound)):
            services.catalog.dataset(f"nix{number}")
    asked = time.monotonic()
    with pytest.raises(DatasetNotFound, match="nix"):
        services.catalog.dataset_within(60, "nix")
    assert walks[-1] >= asked
    assert len(walks) <= 2 + (time.monotonic() - began) / catalogue.RESCAN_SECONDS


def test_a_file_that_appears_is_found_at_once(services: Services, tmp_path: Path) -> None:
    """Though the folder was walked through only just before."""
    with pytest.raises(DatasetNotFound):
        services.catalog.dataset_within(60, "new")
    _write(tmp_path / "data" / "new.h5")
    assert services.catalog.dataset_within(60, "new").rows == 10


def test_preparing_is_told(tmp_path: Path) -> None:
    """503 with a code of its own, when to come again and how far it is; no warning in the log; a client that gives up
    says so; and then it is served."""
    _write(tmp_path / "data" / "slow.h5")
    log = tmp_path / "log"
    with open(log, "wb") as stream:
        command = [sys.executable, "-m", "h5feed_server.cli", "serve", str(tmp_path / "data"), "--port", "0"]
        command += ["--cache-dir", str(tmp_path / "cache")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True)
        try:
            inspector: list[psutil.Process] = []

            def started() -> bool:
                children = psutil.Process(process.pid).children(recursive=True)
                inspector[:] = [child for child in children if "h5feed_server.storage.hdf5.inspect" in child.cmdline()]
                return bool(inspector)

            wait_until(started)
            suspend(*inspector)
            assert process.stdout is not None
            url = process.stdout.readline().rsplit(" at ", 1)[1].strip()
            answer = httpx.get(f"{url}/v1/datasets/slow", timeout=60)
            assert (answer.status_code, answer.json()["code"]) == (503, "preparing")
            assert answer.headers["retry-after"] == "1" and "left in all" in answer.json()["detail"]
            # Of a batch too, which is to be written to its connection by a thread.
            batch = httpx.get(f"{url}/v1/datasets/slow/batches/0", timeout=60)
            assert (batch.status_code, batch.json()["code"]) == (503, "preparing")
            assert httpx.get(f"{url}/readyz", timeout=60).json()["code"] == "preparing"
            assert httpx.get(f"{url}/v1/datasets", timeout=60).json()["datasets"][0]["status"] == "preparing"
            with h5feed.connect(url, deadline=6) as feed, pytest.raises(Preparing, match="'slow' is being inspected"):
                feed["slow"]
            inspector[0].resume()
            with h5feed.connect(url, deadline=60) as feed:
                assert feed["slow"].rows == 10
        finally:
            process.terminate()
            process.wait(60)
    assert "preparing" not in log.read_text()
