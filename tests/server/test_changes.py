"""Files that are replaced, truncated and grown while they are read: an error, never wrong rows."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from operator import contains
from pathlib import Path

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.errors import BadAnswer, DatasetCorrupt, FeedError, RevisionChanged, Unreadable

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

ROWS, WIDTH = 600, 3000


def _values(rows: np.ndarray, version: int) -> np.ndarray:
    """What a file of this version holds in these rows; every value tells its row and its version."""
    return (rows[:, None] * 64 + version).astype("<i4") + np.zeros(WIDTH, "<i4")


def _write(path: Path, version: int, rows: int = ROWS) -> None:
    with h5py.File(path, "w") as file:
        options = {"chunks": (4, WIDTH), "compression": "gzip", "compression_opts": 1} if "gzip" in path.name else {}
        if options:
            options["maxshape"] = (None, WIDTH)
        file.create_dataset("x", data=_values(np.arange(rows), version), **options)


class Reader(threading.Thread):
    """Reads epoch after epoch; begins anew when it is told that the data has changed."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(daemon=True)
        self.url, self.name_of_dataset = url, name
        self.stopped = threading.Event()
        self.wrong: list[str] = []
        self.refused: list[FeedError] = []
        self.versions: set[int] = set()
        self.epochs = 0

    def run(self) -> None:
        with h5feed.connect(self.url, deadline=60) as feed:
            while not self.stopped.is_set():
                try:
                    dataset = feed[self.name_of_dataset]
                    self._epoch(dataset)
                    self.epochs += 1
                except (RevisionChanged, DatasetCorrupt, Unreadable) as error:
                    self.refused.append(error)
                    time.sleep(0.05)
                except BadAnswer as error:
                    self.wrong.append(str(error))

    def _epoch(self, dataset: h5feed.Dataset) -> None:
        seen: list[int] = []
        versions = set()
        for batch in dataset.batches(batch_size=16, shuffle=True, epoch=self.epochs):
            version = int(batch["x"][0, 0]) % 64
            versions.add(version)
            if not (batch["x"] == _values(batch.rows, version)).all():
                self.wrong.append(f"rows {batch.rows} mixed or wrong")
            seen += batch.rows.tolist()
            if self.stopped.is_set():
                return
        if sorted(seen) != list(range(dataset.rows)) or len(versions) != 1:
            self.wrong.append(f"an epoch of {len(seen)} rows, versions {versions}")
        self.versions |= versions


@pytest.fixture
def changing(
    serve: Callable[..., ServerProcess], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Path, Reader]]:
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / f"{request.param}.h5"
    _write(path, 0)
    # No cache of whole fields or chunks: every batch is read from the file.
    server = serve(folder, "--workers", "2", H5FEED_CACHE_BYTES="0", H5FEED_CHUNK_CACHE_BYTES="0")
    reader = Reader(server.url, path.stem)
    reader.start()
    wait_until(lambda: 0 in reader.versions)
    workers = server.worker_pids()
    yield path, reader
    reader.stopped.set()
    reader.join(60)
    assert not reader.is_alive()
    assert not reader.wrong, reader.wrong[:3]
    assert server.worker_pids() == workers


@pytest.mark.parametrize("changing", ["plain", "gzip"], indirect=True)
def test_replaced_under_load(changing: tuple[Path, Reader]) -> None:
    """Another file under the same name, again and again: each epoch is of one version, and new ones arrive."""
    path, reader = changing
    with h5feed.connect(reader.url, deadline=60) as feed:
        old = feed[path.stem]
        for version in range(1, 5):
            _write(path.with_suffix(".new"), version)
            os.replace(path.with_suffix(".new"), path)
            wait_until(partial(contains, reader.versions, version))
        with pytest.raises(RevisionChanged):
            old.batch(0)


@pytest.mark.parametrize("changing", ["plain", "gzip"], indirect=True)
def test_overwritten_in_place_under_load(changing: tuple[Path, Reader]) -> None:
    """The same file with other values, written over the old ones byte by byte."""
    path, reader = changing
    for version in range(1, 4):
        _write(path.with_suffix(".new"), version)
        data = path.with_suffix(".new").read_bytes()
        with open(path, "r+b") as file:
            file.write(data)
            file.truncate(len(data))
        wait_until(partial(contains, reader.versions, version))


@pytest.mark.parametrize("changing", ["plain", "gzip"], indirect=True)
def test_truncated_and_mended_under_load(changing: tuple[Path, Reader]) -> None:
    """Half a file is an error with a reason; when it is whole again, reading goes on."""
    path, reader = changing
    size = path.stat().st_size
    refused = len(reader.refused)
    os.truncate(path, size // 2)
    wait_until(lambda: len(reader.refused) > refused)
    _write(path.with_suffix(".new"), 7)
    os.replace(path.with_suffix(".new"), path)
    wait_until(lambda: 7 in reader.versions)


@pytest.mark.parametrize("changing", ["gzip"], indirect=True)
def test_grown_under_load(changing: tuple[Path, Reader]) -> None:
    """Rows appended by another process: the old revision is refused, the new one has them."""
    path, reader = changing
    with h5py.File(path, "r+", locking=False) as file:
        file["x"].resize(ROWS + 100, axis=0)
        file["x"][ROWS:] = _values(np.arange(ROWS, ROWS + 100), 0)
    epochs = reader.epochs
    wait_until(lambda: reader.epochs > epochs + 1)
    with h5feed.connect(reader.url, deadline=60) as feed:
        assert feed[path.stem].rows == ROWS + 100
