"""The local cache: the same batches, fetched once; bounded, shared, and never a torn row."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.cache import RowCache
from h5feed.cache.store import FieldStore
from h5feed.errors import BadParameter

from tests.support.cached import Asked, all_same, damage
from tests.support.data_folder import ROWS
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

FIELDS = ["images", "labels", "big_endian", "flags", "half", "waves", "shuffled"]


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def dataset(server: ServerProcess, asked: Asked) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(server.url, deadline=60, event_hooks={"request": [asked]}) as feed:
        yield feed["mixed"]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 64},
        {"batch_size": 1},
        {"batch_size": 64, "shuffle": True, "seed": 3},
        {"batch_size": 64, "shuffle": True, "window": 96},
        {"batch_size": 48, "shuffle": True, "shard": 1, "shards": 3, "last": "pad"},
        {"batch_size": 64, "shuffle": True, "last": "drop", "limit": 777},
        {"batch_size": 64, "balance": True, "epoch_rows": 1500, "seed": 1},
        {"batch_size": 33, "split": "val", "val": 0.2, "test": 0.1, "shuffle": True},
    ],
)
def test_the_same_batches(dataset: h5feed.Dataset, tmp_path: Path, options: dict[str, Any]) -> None:
    """With the cache empty, half full and full, every batch is the server's, byte for byte."""
    for batch in dataset.batches("all", limit=ROWS // 2, cache=tmp_path, fields=FIELDS):
        assert len(batch.rows)
    for epoch in range(3):
        assert all_same(dataset, tmp_path, fields=FIELDS, epoch=epoch, **options)


def test_only_what_is_missing_is_fetched(dataset: h5feed.Dataset, asked: Asked, tmp_path: Path) -> None:
    """Rows that are there are not asked for again, those that are not are asked for once."""
    options: dict[str, Any] = {"batch_size": 50, "fields": ["images", "labels"], "cache": tmp_path}
    for _ in dataset.batches(limit=400, **options):
        pass
    asked.requests.clear()
    for _ in dataset.batches(shuffle=True, **options):
        pass
    assert sorted(asked.single_rows) == list(range(400, ROWS))
    asked.requests.clear()
    for epoch in (1, 2):
        for _ in dataset.batches(shuffle=True, epoch=epoch, **options):
            pass
    assert not asked.single_rows and not asked.batches
    assert len(asked.requests) <= 4, "the row ids of an epoch are asked for by one request, ahead of need"
    cache = dataset.cache(tmp_path)
    assert cache.cached_rows == ROWS and "1,000" in repr(cache)


def test_text_is_cached(dataset: h5feed.Dataset, asked: Asked, tmp_path: Path) -> None:
    """Fields of unequal lengths are kept like those beside them."""
    options: dict[str, Any] = {"batch_size": 100, "fields": ["images", "text"], "shuffle": True}
    for epoch in range(3):
        assert all_same(dataset, tmp_path, epoch=epoch, **options) == ROWS
    asked.requests.clear()
    for batch in dataset.batches(cache=tmp_path, epoch=3, **options):
        assert batch.text("text") == ["one" if row % 2 == 0 else "two" for row in batch.rows]
    assert {request.url.params["fields"] for request in asked.requests if "fields" in request.url.params} == {""}
    assert not asked.single_rows


def test_a_cache_of_other_data_is_refused(feed: h5feed.Feed, tmp_path: Path) -> None:
    cache = feed["mixed"].cache(tmp_path)
    with pytest.raises(BadParameter, match="belongs to 'mixed'"):
        feed["tall"].batches(cache=cache)
    with pytest.raises(BadParameter, match="cache_bytes=0"):
        feed["mixed"].cache(tmp_path, cache_bytes=0)


@contextlib.contextmanager
def warnings_of_cache() -> Iterator[list[str]]:
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
        texts += [str(warning.message) for warning in caught if "the cache folder" in str(warning.message)]


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def test_the_bound_holds(feed: h5feed.Feed, tmp_path: Path) -> None:
    """A full cache keeps what it has, says so once, and the rest is fetched as if there were none."""
    dataset = feed["tall"]
    bound = 24 * 300 * 300
    cache = dataset.cache(tmp_path, cache_bytes=bound)
    with warnings_of_cache() as warned:
        for epoch in range(4):
            assert all_same(dataset, cache, batch_size=4, shuffle=True, epoch=epoch, fields=["x", "y"]) == 40
            assert disk_bytes(tmp_path) <= bound
    assert len(warned) == 1 and "is full at" in warned[0]
    assert 15 <= cache.cached_rows <= 24


@contextlib.contextmanager
def small_disk(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk(feed: h5feed.Feed, tmp_path: Path) -> None:
    """A disk that fills up costs one warning, no batch."""
    dataset = feed["tall"]
    with small_disk(tmp_path / "disk", "size=1m") as disk, warnings_of_cache() as warned:
        for epoch in range(3):
            cache = dataset.cache(disk, cache_bytes=1 << 40)
            assert all_same(dataset, cache, batch_size=4, shuffle=True, epoch=epoch, fields=["x", "y"]) == 40
    assert len(warned) == 1


def test_a_read_only_disk(feed: h5feed.Feed, server: ServerProcess, tmp_path: Path) -> None:
    """What others have put there is read; what they have not is fetched, with one warning."""
    options: dict[str, Any] = {"batch_size": 50, "fields": ["images", "labels"]}
    with small_disk(tmp_path / "disk", "size=16m") as disk:
        dataset = feed["mixed"]
        assert all_same(dataset, dataset.cache(disk, 8 << 20), limit=500, **options) == 500
        # What is open for writing keeps a disk from becoming read-only.
        del dataset
        gc.collect()
        remount = ["mount", "-o", "remount,ro", str(disk)]
        wait_until(lambda: subprocess.run(remount, capture_output=True).returncode == 0)
        with h5feed.connect(server.url) as other, warnings_of_cache() as warned:
            dataset = other["mixed"]
            assert all_same(dataset, disk, shuffle=True, **options) == ROWS
            assert dataset.cache(disk).cached_rows == 500
    assert len(warned) == 1 and "Read-only" in warned[0]


def test_a_folder_that_cannot_be(feed: h5feed.Feed, tmp_path: Path) -> None:
    """Where there can be no folder, there is no cache, which is said once."""
    (tmp_path / "file").write_text("in the way")
    dataset = feed["mixed"]
    with warnings_of_cache() as warned:
        for epoch in range(2):
            assert all_same(dataset, tmp_path / "file" / "cache", epoch=epoch, fields=["labels"]) == ROWS
        assert "cannot be used" in repr(dataset.cache(tmp_path / "file" / "cache"))
    assert len(warned) == 1 and "cannot be used" in warned[0]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("how", ["rows lost", "a few bytes", "a bit", "cut off", "empty", "longer", "a FIFO"])
@pytest.mark.parametrize("ending", [".rows", ".sums"])
def test_torn_rows_are_never_delivered(server: ServerProcess, tmp_path: Path, how: str, ending: str) -> None:
    """Whatever part of the files was lost: a process that opens them delivers the server's rows, and mends them."""
    options: dict[str, Any] = {"batch_size": 50, "fields": ["images", "labels"]}
    with h5feed.connect(server.url) as feed:
        assert all_same(feed["mixed"], tmp_path, **options) == ROWS
    damaged = list(tmp_path.rglob(f"*{ending}"))
    assert len(damaged) == 2
    for path in damaged:
        damage(path, how)
    with h5feed.connect(server.url) as feed, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for epoch in range(2):
            assert all_same(feed["mixed"], tmp_path, shuffle=True, epoch=epoch, **options) == ROWS


def test_a_file_cut_off_while_it_is_read(feed: h5feed.Feed, tmp_path: Path) -> None:
    """It is noticed before the mapping is touched: that would be the end of the process."""
    dataset = feed["mixed"]
    options: dict[str, Any] = {"batch_size": 50, "fields": ["images", "labels"]}
    assert all_same(dataset, tmp_path, **options) == ROWS
    for path in tmp_path.rglob("*.rows"):
        os.truncate(path, 0)
    assert all_same(dataset, tmp_path, shuffle=True, **options) == ROWS


FILL = """
import sys, h5feed
url, folder, seed = sys.argv[1:]
dataset = h5feed.connect(url)["mixed"]
print("ready", flush=True)
for epoch in range(int(seed), int(seed) + 1000):
    for batch in dataset.batches(batch_size=7, shuffle=True, epoch=epoch, cache=folder, fields=["images", "shuffled"]):
        pass
"""


def fill(url: str, folder: Path, seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FILL, url, str(folder), str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_processes_share_it_and_are_killed(server: ServerProcess, feed: h5feed.Feed, tmp_path: Path) -> None:
    """Two processes at a time fill one folder and are killed at any instant; what is read from it is right."""
    chance = random.Random(0)
    dataset = feed["mixed"]
    for number in range(6):
        writers = [fill(server.url, tmp_path, 10 * number + k) for k in range(2)]
        for writer in writers:
            time.sleep(chance.uniform(0.0, 0.15))
            writer.send_signal(signal.SIGKILL)
            writer.wait(60)
            assert writer.stdout is not None
            writer.stdout.close()
        with h5feed.connect(server.url) as other:
            count = all_same(
                other["mixed"], tmp_path, batch_size=50, shuffle=True, epoch=number, fields=["images", "shuffled"]
            )
        assert count == ROWS
    assert dataset.cache(tmp_path).store("images", np.dtype(np.uint8), (12, 10, 3)).count() == ROWS  # type: ignore[union-attr]


def test_readers_see_what_others_store(server: ServerProcess, feed: h5feed.Feed, asked: Asked, tmp_path: Path) -> None:
    """Rows that another process stores meanwhile are not fetched again."""
    with h5feed.connect(server.url, event_hooks={"request": [asked]}) as mine:
        dataset = mine["mixed"]
        options: dict[str, Any] = {"batch_size": 50, "fields": ["images", "shuffled"]}
        assert sum(len(batch.rows) for batch in dataset.batches(limit=50, cache=tmp_path, **options)) == 50
        other = fill(server.url, tmp_path, 0)
        wait_until(lambda: dataset.cache(tmp_path).cached_rows == ROWS)
        other.kill()
        other.wait(60)
        asked.requests.clear()
        assert sum(len(batch.rows) for batch in dataset.batches(shuffle=True, cache=tmp_path, **options)) == ROWS
        assert not asked.single_rows and not asked.batches


def write(path: Path, value: int) -> None:
    unfinished = path.with_suffix(".tmp")
    with h5py.File(unfinished, "w") as file:
        file["x"], file["y"] = np.full((64, 50, 50), value, np.uint8), np.arange(64) % 2
    unfinished.rename(path)


def test_old_revisions_make_room(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Rows of a revision that no process has open go when room is needed; those that one has open stay."""
    data, folder = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    write(data / "d.h5", 1)
    server = serve(data)
    bound = 3 * 64 * 2500 // 2
    with h5feed.connect(server.url) as feed:
        first = feed["d"]
        old = first.revision
        assert all_same(first, first.cache(folder, bound), fields=["x"]) == 64
    write(data / "d.h5", 2)
    with h5feed.connect(server.url) as feed:
        wait_until(lambda: feed["d"].revision != old)
        second = feed["d"]
        with warnings_of_cache() as warned:
            for epoch in range(8):
                assert all_same(second, second.cache(folder, bound), epoch=epoch, fields=["x"]) == 64
        assert len(warned) == 1 and "is full" in warned[0]
        assert first.cache(folder, bound).cached_rows == 64
        # Now nobody has the first revision open.
        del first
        gc.collect()
        other = RowCache(folder, second.name, second.revision, second.rows, bound)
        for epoch in range(2):
            assert all_same(second, other, epoch=epoch, shuffle=True, fields=["x"]) == 64
        assert other.cached_rows == 64
        assert disk_bytes(folder) <= bound


def test_a_folder_that_is_deleted(feed: h5feed.Feed, tmp_path: Path) -> None:
    """Who has it open goes on with what was there; the next one begins anew."""
    dataset = feed["mixed"]
    folder = tmp_path / "cache"
    assert all_same(dataset, folder, limit=500, fields=["images"]) == 500
    shutil.rmtree(folder)
    with warnings_of_cache() as warned:
        for epoch in range(2):
            assert all_same(dataset, folder, shuffle=True, epoch=epoch, fields=["images"]) == ROWS
    assert len(warned) == 1 and "cannot store more rows" in warned[0]
    assert "500" in repr(dataset.cache(folder))
    other = RowCache(folder, dataset.name, dataset.revision, dataset.rows)
    assert all_same(dataset, other, fields=["images"]) == ROWS and other.cached_rows == ROWS


def test_stores(tmp_path: Path) -> None:
    """Rows come back as they were put, others are not found; repeated and unordered rows too."""
    store = FieldStore(tmp_path / "f.rows", 100, 12)
    values = np.arange(300, dtype=np.int32).reshape(100, 3)
    assert store.fresh
    assert store.put(np.array([5, 6, 7, 3, 99]), values[[5, 6, 7, 3, 99]]) == 5
    assert store.put(np.array([7, 8]), values[[7, 8]]) == 1
    for opened in (store, FieldStore(tmp_path / "f.rows", 100, 12)):
        assert not opened.fresh and opened.count() == 6
        rows = np.array([99, 5, 5, 0, 8, 3, 50])
        out = np.full((7, 3), -1, np.int32)
        found = opened.take(rows, out)
        assert found.tolist() == [True, True, True, False, True, True, False]
        np.testing.assert_array_equal(out[found], values[rows[found]])
    # Files of another size are damaged ones: they are made anew, and whoever has them open goes on.
    anew = FieldStore(tmp_path / "f.rows", 101, 12)
    assert anew.count() == 0 and store.take(np.array([5]), np.empty((1, 3), np.int32)).all()


def test_a_fork_goes_on(feed: h5feed.Feed, tmp_path: Path) -> None:
    """A child process reads and stores with the handle that it was forked with."""
    dataset = feed["mixed"]
    cache = dataset.cache(tmp_path)
    assert all_same(dataset, cache, limit=100, fields=["labels"]) == 100
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if all_same(dataset, cache, fields=["labels"]) == ROWS else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + 100
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(status) == 0
    assert cache.cached_rows == ROWS
    assert pickle.loads(pickle.dumps(cache)).store("labels", np.dtype(np.int64), ()).count() == ROWS
