"""Batches of an object store that are fetched before they are asked for: each range once, in bounded memory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import SourceUnavailable
from h5feed.stored.local_file import Identity
from h5feed.stored.scratch import Bytes
from h5feed.wire import ROWS as ROW_IDS
from h5feed.wire import read_body
from h5feed_server.batches.upcoming import Looked, Upcoming
from h5feed_server.storage.objects import fetching_ahead, object_file
from h5feed_server.storage.objects import store as store_module
from h5feed_server.storage.objects.backend import StoredObject
from h5feed_server.storage.objects.claims import Claims
from h5feed_server.storage.objects.fetching_ahead import FetchingAhead
from h5feed_server.storage.objects.object_file import FetchedRanges, ObjectFile
from h5feed_server.storage.objects.range_cache import RangeCache
from h5feed_server.storage.objects.request_rate import RequestRate
from h5feed_server.storage.objects.store import MOST_SLOW, ObjectStore
from h5feed_server.store_address import StoreAddress

from tests.support.object_store import Answer, StoreProcess, StoreProxy, serve_folder
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

pytest.importorskip("obstore")
pytest.importorskip("hadro")

Serve = Callable[..., ServerProcess]

ROWS = 320
ROW = (40, 20, 3)
ROW_BYTES = 40 * 20 * 3
BATCH = 8

UNCACHED = {"H5FEED_CACHE_BYTES": "0", "H5FEED_CHUNK_CACHE_BYTES": "0"}
"""Small fields are read batch by batch, like large ones."""

NO_DISK = {"H5FEED_STORE_CACHE_BYTES": "0"}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("buckets") / "data"
    path.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (ROWS, *ROW), dtype=np.uint8)
    with h5py.File(path / "rows.h5", "w") as file:
        file["labels"] = np.arange(ROWS)
        file["plain"] = rows
        file.create_dataset("single", data=rows, chunks=(1, *ROW), compression="gzip")
        file.create_dataset("several", data=rows, chunks=(4, *ROW), compression="gzip")
    return path


@pytest.fixture(scope="module")
def store(bucket: Path) -> Iterator[StoreProcess]:
    process = serve_folder(bucket.parent)
    yield process
    process.stop()


class Watch:
    """Notes which bytes are asked for, and holds the answers back if it is told to."""

    def __init__(self, path: Path) -> None:
        with h5py.File(path) as file:
            self.begin = file["plain"].id.get_offset()
        self.asked: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()

    def __call__(self, path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if ranged is not None:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", ranged)
            assert match is not None
            with self._lock:
                self.asked.append((int(match[1]), int(match[2]) + 1))
            self._open.wait(9)
        return ask()

    def hold(self) -> None:
        self._open.clear()

    def let_go(self) -> None:
        self._open.set()

    @property
    def nbytes(self) -> int:
        return sum(end - begin for begin, end in self.asked)

    @property
    def rows(self) -> list[int]:
        """Rows of ``plain`` that were asked for, with repeats."""
        found: list[int] = []
        for begin, end in self.asked:
            assert (begin - self.begin) % ROW_BYTES == (end - begin) % ROW_BYTES == 0
            found += range((begin - self.begin) // ROW_BYTES, (end - self.begin) // ROW_BYTES)
        return found


@pytest.fixture
def proxy(store: StoreProcess) -> Iterator[StoreProxy]:
    between = StoreProxy(store)
    yield between
    between.stop()


def started(serve: Serve, proxy: StoreProxy, *options: str, **environment: str) -> tuple[ServerProcess, Watch]:
    """A server that has inspected the file, and what is asked for from then on."""
    server = serve("s3://data", *options, **proxy.environment, **UNCACHED, **environment)
    wait_until(lambda: httpx.get(f"{server.url}/v1/datasets/rows", timeout=60).status_code == 200, 30)
    watch = Watch(Path(proxy._store._command[1]) / "data" / "rows.h5")
    proxy.behave = watch
    return server, watch


def batch_of(server: ServerProcess, index: int, **options: Any) -> list[int]:
    """Row ids of one batch of a shuffled epoch."""
    query = {"batch_size": BATCH, "shuffle": "true", "seed": 1, "fields": "plain", **options}
    answer = httpx.get(f"{server.url}/v1/datasets/rows/batches/{index}", params=query, timeout=60)
    assert answer.status_code == 200, answer.text
    tensors, _, _ = read_body(np.frombuffer(answer.content, np.uint8))
    rows: list[int] = tensors[ROW_IDS].tolist()
    return rows


@pytest.mark.parametrize("field", ["plain", "single", "several"])
@pytest.mark.parametrize(
    ("options", "environment"), [((), NO_DISK), ((), {}), (("--workers", "3"), {})], ids=["memory", "disk", "workers"]
)
def test_no_range_is_fetched_twice(
    serve: Serve,
    proxy: StoreProxy,
    bucket: Path,
    field: str,
    options: tuple[str, ...],
    environment: dict[str, str],
) -> None:
    if field == "several" and "H5FEED_STORE_CACHE_BYTES" in environment:
        pytest.skip("without any cache, a chunk of several rows is read for each batch")
    server, watch = started(serve, proxy, *options, **environment)
    seen: list[int] = []
    with h5feed.connect(server.url, deadline=60) as feed, h5py.File(bucket / "rows.h5") as file:
        reading: dict[str, Any] = {"batch_size": BATCH, "shuffle": True, "seed": 1, "fields": [field], "connections": 4}
        for batch in feed["rows"].batches(**reading):
            seen += batch.rows.tolist()
            np.testing.assert_array_equal(batch[field], np.stack([file[field][row] for row in batch.rows.tolist()]))
        stored = file[field].id.get_storage_size()
    assert sorted(seen) == list(range(ROWS))
    assert watch.nbytes == stored


def test_without_a_disk_to_share_workers_waste_little(serve: Serve, proxy: StoreProxy) -> None:
    server, watch = started(serve, proxy, "--workers", "3", **NO_DISK, H5FEED_STORE_AHEAD_BYTES=str(ROWS * ROW_BYTES))
    with h5feed.connect(server.url, deadline=60) as feed:
        for epoch in range(4):
            reading: dict[str, Any] = {
                "batch_size": BATCH,
                "shuffle": True,
                "seed": 1,
                "fields": ["plain"],
                "connections": 4,
            }
            assert sum(len(batch.rows) for batch in feed["rows"].batches(epoch=epoch, **reading)) == ROWS
    assert watch.nbytes < 1.6 * 4 * ROWS * ROW_BYTES


def test_what_comes_next_is_fetched_before_it_is_asked_for(serve: Serve, proxy: StoreProxy) -> None:
    server, watch = started(serve, proxy, **NO_DISK)
    known = [*batch_of(server, 0), *batch_of(server, 1)]
    wait_until(lambda: len(watch.rows) >= len(known) + BATCH)
    fetched = set(watch.rows) - set(known)
    asked = len(watch.asked)
    assert set(batch_of(server, 2)) <= fetched
    # The next ones are fetched instead.
    assert not fetched & set(watch.rows[asked:])


def test_a_batch_that_is_on_its_way_is_joined(serve: Serve, proxy: StoreProxy) -> None:
    server, watch = started(serve, proxy, **NO_DISK)
    batch_of(server, 0)
    watch.hold()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(batch_of, server, 1)]
        wait_until(lambda: len(set(watch.rows)) >= 3 * BATCH)
        asked.append(pool.submit(batch_of, server, 2))
        time.sleep(0.2)
        watch.let_go()
        rows = [row for future in asked for row in future.result()]
    assert {watch.rows.count(row) for row in rows} == {1}


def test_nothing_is_fetched_ahead_of_an_order_that_is_not_read_in_sequence(serve: Serve, proxy: StoreProxy) -> None:
    server, watch = started(serve, proxy, **NO_DISK)
    rows: list[int] = []
    for index in (39, 3, 37, 1, 38, 0):
        rows += batch_of(server, index)
    assert sorted(watch.rows) == sorted(rows)


def test_it_can_be_switched_off(serve: Serve, proxy: StoreProxy) -> None:
    server, watch = started(serve, proxy, **NO_DISK, H5FEED_STORE_AHEAD_BYTES="0")
    rows = [row for index in range(6) for row in batch_of(server, index)]
    assert sorted(watch.rows) == sorted(rows)


def test_rows_come_although_the_worker_that_fetches_them_dies(serve: Serve, proxy: StoreProxy) -> None:
    server, watch = started(serve, proxy, "--workers", "2")
    with h5feed.connect(server.url, deadline=60) as feed:
        reading: dict[str, Any] = {
            "batch_size": BATCH,
            "shuffle": True,
            "seed": 1,
            "fields": ["plain"],
            "connections": 2,
        }
        batches = feed["rows"].batches(**reading)
        seen = next(batches).rows.tolist()
        watch.hold()
        time.sleep(0.2)
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        watch.let_go()
        for batch in batches:
            seen += batch.rows.tolist()
    assert sorted(seen) == list(range(ROWS))


def test_an_object_that_hangs_holds_few_threads(serve: Serve, tmp_path: Path, bucket: Path) -> None:
    """While many ask for it, another dataset is served."""
    (tmp_path / "data").mkdir()
    for name in ("here", "hanging"):
        (tmp_path / "data" / f"{name}.h5").write_bytes((bucket / "rows.h5").read_bytes())
    store = serve_folder(tmp_path)
    between = StoreProxy(store)
    over = threading.Event()
    try:
        server = serve("s3://data", **between.environment, **UNCACHED, H5FEED_REQUEST_THREADS="8")
        for name in ("here", "hanging"):
            url = f"{server.url}/v1/datasets/{name}"
            wait_until(lambda url=url: httpx.get(url, timeout=60).status_code == 200)  # type: ignore[misc]

        def hang(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
            if "hanging" in path and ranged is not None:
                over.wait(60)
            return ask()

        def ask(name: str, index: int) -> httpx.Response:
            query: dict[str, Any] = {"batch_size": BATCH, "fields": "plain"}
            return httpx.get(f"{server.url}/v1/datasets/{name}/batches/{index}", params=query, timeout=90)

        between.behave = hang
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(ask, "hanging", index) for index in range(20)]
            wait_until(lambda: sum(future.done() for future in asked) >= 16)
            assert not all(future.done() for future in asked)
            refused = [future.result() for future in asked if future.done()]
            assert {answer.status_code for answer in refused} == {503}
            assert ask("here", 0).status_code == 200
            assert not all(future.done() for future in asked)
            over.set()
            wait_until(lambda: ask("hanging", 0).status_code == 200)
    finally:
        over.set()
        between.stop()
        store.stop()


def test_an_object_that_hangs_holds_few_requests(
    opened: Callable[..., tuple[ObjectStore, ObjectFile]],
    bucket: Path,
    proxy: StoreProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many of its ranges are wanted, those of another object need not wait for them."""
    monkeypatch.setattr(store_module, "ATTEMPT_SECONDS", 1.0)
    monkeypatch.setattr(store_module, "_SLOW_SECONDS", 0.5)
    over = threading.Event()
    asked: list[str] = []

    def hang(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if "hanging" in path and ranged is not None:
            asked.append(ranged)
            over.wait(60)
        return ask()

    proxy.behave = hang
    store, file = opened(0, seconds=60.0)
    (bucket / "hanging.h5").write_bytes((bucket / "rows.h5").read_bytes())
    hanging = store.head("hanging.h5")
    wanted = [(1000 * number, 10) for number in range(700)]
    try:
        with ThreadPoolExecutor(MOST_SLOW) as pool:
            futures = store.begin(hanging, wanted)
            waiting = [pool.submit(store.wait, hanging, future) for future in futures[:MOST_SLOW]]
            assert store.read(file.object, 10, 100) == (bucket / "rows.h5").read_bytes()[10:110]
            assert len(asked) < len(wanted) / 2
            # What nobody would wait for is not even begun.
            wait_until(lambda: all(future.done() for future in store.begin(hanging, wanted)))
            over.set()
            for known in waiting:
                assert known.result(60).nbytes == 10
    finally:
        over.set()
        (bucket / "hanging.h5").unlink()


@pytest.fixture
def opened(
    proxy: StoreProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[ObjectStore, ObjectFile]]]:
    """Opens the store within this process."""
    for name, value in proxy.environment.items():
        monkeypatch.setenv(name, value)
    stores: list[ObjectStore] = []

    def start(
        max_bytes: int, cache: RangeCache | None = None, request_rate: float = 0.0, seconds: float = 5.0
    ) -> tuple[ObjectStore, ObjectFile]:
        address = StoreAddress.parse("s3://data")
        ahead = FetchingAhead(cache, max_bytes, None, True)
        store = ObjectStore(address, seconds, cache, ahead=ahead, rate=RequestRate(request_rate))
        stores.append(store)
        return store, ObjectFile(store, store.head("rows.h5"), "rows.h5", Identity(0, 0, 0, 0, 0))

    yield start
    for store in stores:
        store.close()
        store.ahead.close()


def ranges(first: int, stop: int, nbytes: int = 1000) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ranges that do not touch."""
    offsets = 8000 + np.arange(first, stop, dtype=np.int64) * (nbytes + 100)
    return offsets, np.full(len(offsets), nbytes, np.int64)


def test_requests_are_limited(opened: Callable[..., tuple[ObjectStore, ObjectFile]]) -> None:
    """After a burst of one second's worth, they are as far apart as the rate says. What takes too long is refused."""
    store, file = opened(0, request_rate=20)
    began = time.monotonic()
    for future in store.begin(file.object, list(zip(*(part.tolist() for part in ranges(0, 60)), strict=True))):
        assert len(store.wait(file.object, future)) == 1000
    assert time.monotonic() - began > (60 - 20 - 2) / 20
    futures = store.begin(file.object, list(zip(*(part.tolist() for part in ranges(0, 200)), strict=True)))
    with pytest.raises(SourceUnavailable, match="H5FEED_STORE_REQUEST_RATE allows no more"):
        store.wait(file.object, futures[-1])


def test_memory_is_bounded(opened: Callable[..., tuple[ObjectStore, ObjectFile]], bucket: Path) -> None:
    store, file = opened(20_000)
    content = np.fromfile(bucket / "rows.h5", np.uint8)
    assert store.ahead.fetch("order", 0, file, *ranges(0, 15)).has_room
    assert not store.ahead.fetch("order", 1, file, *ranges(15, 30)).has_room, "only some of them"
    assert store.ahead.nbytes == 20_000
    # What has been read makes room.
    for begin in (0, 15):
        offsets, sizes = ranges(begin, begin + 15)
        target = np.empty(15_000, np.uint8)
        FetchedRanges(file, offsets, sizes).read_rows(offsets, sizes, target, np.arange(0, 15_000, 1000))
        assert target.tobytes() == b"".join(content[offset : offset + 1000].tobytes() for offset in offsets.tolist())
    wait_until(lambda: store.ahead.nbytes == 0)
    assert store.traffic.nbytes == 30_000
    # So does what nobody has read for a while.
    store.ahead.fetch("order", 2, file, *ranges(30, 40))
    store.ahead.drop_old(60)
    assert store.ahead.nbytes == 10_000
    store.ahead.drop_old(0)
    wait_until(lambda: store.ahead.nbytes == 0)


def test_the_number_of_ranges_is_bounded(
    opened: Callable[..., tuple[ObjectStore, ObjectFile]],
    bucket: Path,
    proxy: StoreProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of short ones, so many would fit into the bounds on bytes that their futures alone would fill the memory."""
    monkeypatch.setattr(fetching_ahead, "_MOST_PIECES", 100)
    monkeypatch.setattr(object_file, "_MOST_RANGES", 64)
    over = threading.Event()

    def held(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if ranged is not None:
            over.wait(60)
        return ask()

    proxy.behave = held
    store, file = opened(1 << 20, seconds=60.0)
    begun: list[int] = []
    begin = store.begin

    def counting(one: StoredObject, wanted: list[tuple[int, int]], **options: bool) -> list[Future[Bytes]]:
        begun.append(len(wanted))
        return begin(one, wanted, **options)

    monkeypatch.setattr(store, "begin", counting)
    content = np.fromfile(bucket / "rows.h5", np.uint8)
    try:
        assert not store.ahead.fetch("order", 0, file, *ranges(0, 300, 10)).has_room
        assert sum(begun) == 100
        begun.clear()
        offsets, sizes = ranges(0, 300, 10)
        read = FetchedRanges(file, offsets, sizes)
        assert sum(begun) == 64
        over.set()
        target = np.empty(3000, np.uint8)
        read.read_rows(offsets, sizes, target, np.arange(0, 3000, 10))
        assert target.tobytes() == b"".join(content[offset : offset + 10].tobytes() for offset in offsets.tolist())
        assert sum(begun) == 200, "what was fetched ahead is not fetched again"
        wait_until(lambda: store.ahead.nbytes == 0)
        assert store.ahead.fetch("order", 1, file, *ranges(0, 100, 10)).has_room
    finally:
        over.set()


def test_a_fetch_ahead_that_fails_is_tried_again(
    opened: Callable[..., tuple[ObjectStore, ObjectFile]], proxy: StoreProxy
) -> None:
    store, file = opened(20_000)
    proxy.behave = lambda path, ranged, ask: (503, {"content-length": "0"}, b"")
    offsets, sizes = ranges(0, 5)
    store.ahead.fetch("order", 0, file, offsets, sizes)
    joined = FetchedRanges(file, offsets, sizes)
    wait_until(lambda: store.ahead.nbytes == 0)
    with pytest.raises(SourceUnavailable):
        joined.read_rows(offsets, sizes, np.empty(5000, np.uint8), np.arange(0, 5000, 1000))
    proxy.behave = lambda path, ranged, ask: ask()
    FetchedRanges(file, offsets, sizes).read_rows(offsets, sizes, np.empty(5000, np.uint8), np.arange(0, 5000, 1000))


def test_what_is_fetched_ahead_is_on_the_disk(
    opened: Callable[..., tuple[ObjectStore, ObjectFile]], tmp_path: Path
) -> None:
    cache = RangeCache(tmp_path / "ranges", 1 << 30)
    store, file = opened(1 << 20, cache)
    offsets, sizes = ranges(0, 5)
    store.ahead.fetch("order", 0, file, offsets, sizes)
    pieces = set(zip(offsets.tolist(), sizes.tolist(), strict=True))
    wait_until(lambda: cache.held(file.digest, pieces) == pieces)
    store.ahead.drop_old(0)
    assert store.ahead.nbytes == 0
    store.ahead.fetch("order", 0, file, offsets, sizes)
    assert store.ahead.nbytes == 0 and store.traffic.nbytes == 5000


def test_what_is_on_the_disk_is_looked_up_now_and_then(
    opened: Callable[..., tuple[ObjectStore, ObjectFile]], tmp_path: Path, bucket: Path
) -> None:
    """And every batch again as soon as one of them is not there."""
    cache = RangeCache(tmp_path / "ranges", 1 << 30)
    store, file = opened(1 << 20, cache)
    batches, looked = 100, list[int]()

    def read(upcoming: Upcoming, order: str, start: int, stop: int) -> None:
        def fetch(start: int, stop: int, urgent: bool) -> Looked:
            looked.append(start)
            begun = store.ahead.fetch(order, stop - 1, file, *ranges(5 * start, 5 * stop), urgent=urgent)
            return Looked(5000, *begun)

        for batch in range(start, stop):
            upcoming.requested(store, fetch, batch, batch + 1, batches)
            offsets, sizes = ranges(5 * batch, 5 * batch + 5)
            target = np.empty(5000, np.uint8)
            file.ahead(lambda offsets=offsets, sizes=sizes: (offsets, sizes)).read_rows(  # type: ignore[misc]
                offsets, sizes, target, np.arange(0, 5000, 1000)
            )
            assert target.tobytes() == b"".join(content[offset : offset + 1000].tobytes() for offset in offsets)

    content = np.fromfile(bucket / "rows.h5", np.uint8)
    read(Upcoming(), "first", 0, batches)
    assert sorted(looked) == list(range(batches))
    assert store.traffic.nbytes == 5000 * batches
    wait_until(lambda: store.ahead.nbytes == 0)
    looked.clear()
    upcoming = Upcoming()
    read(upcoming, "second", 0, batches // 2)
    assert 4 < len(looked) < batches // 4
    assert store.traffic.nbytes == 5000 * batches
    shutil.rmtree(tmp_path / "ranges")
    looked.clear()
    read(upcoming, "second", batches // 2, batches)
    assert len(set(looked)) > batches // 4, "others were read before one of them was looked up"
    assert store.traffic.nbytes == 5000 * (batches + batches // 2), "each range that was lost is fetched once"


def test_a_new_order_leaves_to_the_disk_what_others_have_fetched(
    opened: Callable[..., tuple[ObjectStore, ObjectFile]], tmp_path: Path
) -> None:
    """Whoever else was asked for it has found it there."""
    cache = RangeCache(tmp_path / "ranges", 1 << 30)
    store, file = opened(1 << 20, cache)
    offsets, sizes = ranges(0, 5)
    store.ahead.fetch("first", 0, file, offsets, sizes)
    pieces = set(zip(offsets.tolist(), sizes.tolist(), strict=True))
    wait_until(lambda: cache.held(file.digest, pieces) == pieces)
    assert store.ahead.nbytes == 5000
    wait_until(lambda: not store.ahead.fetch(str(time.monotonic()), 0, file, offsets, sizes).was_needed)
    assert store.ahead.nbytes == 0 and store.traffic.nbytes == 5000


_CLAIM = """
import sys, time
from pathlib import Path
from h5feed_server.batches.upcoming import Looked, Upcoming
from h5feed_server.storage.objects import fetching_ahead, object_file
from h5feed_server.storage.objects import store as store_module
from h5feed_server.storage.objects.backend import StoredObject
from h5feed_server.storage.objects.claims import Claims
claims = Claims(Path(sys.argv[1]), 600.0)
assert not claims.take(b"version1", [(0, 10), (5, 5)])
print("claimed", flush=True)
sys.stdin.readline()
claims.release(b"version1", [(0, 10)])
print("released", flush=True)
sys.stdin.readline()
"""


def test_claims_of_another_process_are_waited_for(tmp_path: Path) -> None:
    """Until it releases them, or dies."""
    path = tmp_path / "ranges" / "claims"
    own = Claims(path, 600.0)
    other = subprocess.Popen(
        [sys.executable, "-c", _CLAIM, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        pieces = [(0, 10), (5, 5), (9, 9)]
        assert own.theirs(b"version1", pieces) == {(0, 10), (5, 5)}
        assert own.theirs(b"version2", pieces) == set()
        assert own.take(b"version1", pieces) == {(0, 10), (5, 5)}
        own.release(b"version1", pieces)
        waiting = threading.Thread(target=own.wait, args=(b"version1", (0, 10)))
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive()
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "released\n"
        waiting.join(60)
        assert not waiting.is_alive()
        assert own.theirs(b"version1", pieces) == {(5, 5)}
        other.kill()
        own.wait(b"version1", (5, 5))
    finally:
        other.kill()
        other.wait(60)


def test_claims_end_with_the_time_of_a_fetch(tmp_path: Path) -> None:
    path = tmp_path / "claims"
    own = Claims(path, 600.0)
    code = _CLAIM.replace("600.0", "0.0")
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "claimed\n"
        own.wait(b"version1", (0, 10))
        assert own.take(b"version1", [(0, 10)]) == set()
    finally:
        other.kill()
        other.wait(60)
