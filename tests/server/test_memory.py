"""What a worker's memory is bounded by, and that it goes back."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import tracemalloc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np
import psutil
import pytest
from h5feed.errors import ReadTimeout
from h5feed.stored.byte_cache import ENTRY_BYTES, ByteCache
from h5feed.stored.decoder_pool import Decoders
from h5feed_server.services import Services
from h5feed_server.settings import Settings
from h5feed_server.sharing.trimming import PAUSE_SECONDS
from h5feed_server.stats import pictures, scan

from tests.support.no_threads import no_more_threads
from tests.support.server_process import ServerProcess
from tests.support.waiting import suspend, wait_until

MIB = 1 << 20


def _resident(server: ServerProcess) -> int:
    return max(int(psutil.Process(pid).memory_info().rss) for pid in server.worker_pids())


def _settled(server: ServerProcess) -> int:
    """The least that it has while nobody asks, for longer than it lets pass between two times of giving back."""
    until = time.monotonic() + 2 * PAUSE_SECONDS
    least = _resident(server)
    while time.monotonic() < until:
        time.sleep(0.2)
        least = min(least, _resident(server))
    return least


def _is_listed(client: httpx.Client) -> bool:
    listed = client.get("/v1/datasets").json()["datasets"]
    return bool(listed) and all(one["status"] == "ok" for one in listed)


def _write_greedy(path: Path) -> None:
    """Fields whose answers take memory beside the caches: other byte orders, records, pieces of rows, text."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        rows = 600
        file["swapped"] = random.integers(0, 9, (rows, 3000)).astype(">f8")
        kind = np.dtype([("a", "<f4", (1000,)), ("b", "<i4", (500,))])
        file.create_dataset("table", data=np.zeros(rows, kind), chunks=(40,), compression="gzip")
        pixels = random.integers(0, 256, (rows, 96, 96, 3), dtype=np.uint8)
        file.create_dataset("images", data=pixels, chunks=(20, 48, 96, 3), compression="lzf")
        file["text"] = np.array([b"x" * 900] * rows)
        file["labels"] = np.arange(rows) % 30


@pytest.mark.slow
def test_memory_goes_back(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """After many large answers to many at once, a worker that nobody asks has little more than when it began."""
    folder = tmp_path / "data"
    folder.mkdir()
    for letter in "abcd":
        _write_greedy(folder / f"{letter}.h5")
    server = serve(folder, H5FEED_IDLE_SECONDS="1", H5FEED_INFLIGHT_BYTES=str(64 * MIB))
    with httpx.Client(base_url=server.url, timeout=120) as client:
        wait_until(lambda: _is_listed(client))

        def ask(path: str) -> int:
            # Those that find no room, or a job at work, come again.
            while (answer := client.get(path)).status_code in (202, 503):
                time.sleep(0.1)
            return answer.status_code

        # What is loaded by the first that needs it stays.
        for path in ("preview", "stats/plot", "stats?field=images", "rows?stop=5", "splits?test=0.1"):
            assert ask(f"/v1/datasets/a/{path}") == 200
        before = _settled(server)
        paths = [
            f"/v1/datasets/{letter}/{path}"
            for letter in "abcd"
            for path in (
                *(f"batches/{n}?batch_size=100&shuffle=true&fields={field}" for n in range(6) for field in FIELDS),
                *(f"rows?fields={field}" for field in FIELDS),
                "preview?per_class=20&side=200",
                "stats",
            )
        ]
        with ThreadPoolExecutor(24) as threads:
            assert set(threads.map(ask, paths)) == {200}
    wait_until(lambda: _resident(server) < before + 48 * MIB, 60)


FIELDS = ("swapped", "images", "text")


def test_values_of_a_few_bytes_count_for_what_they_take() -> None:
    """A cache of very many small values is as large as it is allowed to be, not ten times."""
    cache: ByteCache[Any] = ByteCache(4 * MIB, 1.0)
    tracemalloc.start()
    try:
        for number in range(50_000):
            cache.get((number, "of this"), lambda: np.zeros(1, np.uint8), lambda value: value.nbytes)
        assert tracemalloc.get_traced_memory()[0] < 6 * MIB
    finally:
        tracemalloc.stop()


def test_old_values_are_let_go() -> None:
    """Those that were used lately stay."""
    cache: ByteCache[str] = ByteCache(MIB, 1.0)
    for key in "abc":
        cache.get(key, lambda: "value", len)
    time.sleep(0.02)
    cache.get("a", lambda: "other", len)
    cache.drop_old(0.015)
    assert [key in cache for key in "abc"] == [True, False, False]
    assert cache.get("a", lambda: "other", len) == "value"


def test_values_computed_elsewhere_are_kept_within_the_same_bound() -> None:
    cache: ByteCache[str] = ByteCache(2 * ENTRY_BYTES + 20, 1.0)
    assert cache.find("a") is None
    cache.put("a", "first", 10)
    cache.put("a", "second", 10)
    cache.put("b", "other", 10)
    assert (cache.find("a"), cache.find("b")) == ("second", "other")
    # Used last: it stays.
    assert cache.find("a") == "second"
    cache.put("c", "third", 10)
    assert [key in cache for key in "abc"] == [True, False, True]
    cache.put("d", "too long", 10 * ENTRY_BYTES)
    assert cache.find("d") is None and cache.find("a") == "second"


def test_what_fits_is_admitted_without_a_look_at_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of columns ask, one after the other. Values in use are not evicted for others, older ones are."""

    class Watched(OrderedDict[Any, Any]):
        looked = 0

        def values(self) -> Any:
            for value in super().values():
                self.looked += 1
                yield value

    cache: ByteCache[str] = ByteCache(4 * (ENTRY_BYTES + 10), 60.0)
    entries = cache._entries = Watched()
    for key in "abcd":
        assert cache.admits(key, 10) and not entries.looked
        cache.put(key, "value", 10)
    # In use: the first says that no other is older.
    assert not cache.admits("e", 10) and entries.looked == 1
    assert cache.admits("a", 10)
    monkeypatch.setattr("h5feed.stored.byte_cache.FRESH_SECONDS", -1.0)
    entries.looked = 0
    assert cache.admits("e", 10) and entries.looked == 1
    assert cache.admits("e", 3 * ENTRY_BYTES) and not cache.admits("e", 5 * ENTRY_BYTES)


def test_long_work_lets_short_work_go_on() -> None:
    """Two chunks are decoded while the threads are at work on a million."""
    decoders = Decoders(2, 60.0)
    enough = threading.Event()

    def work(remaining: Iterator[int]) -> None:
        for _ in remaining:
            enough.wait(0.001)

    with ThreadPoolExecutor(1) as other:
        long = other.submit(decoders.share, range(1_000_000), work)
        wait_until(long.running)
        for _ in range(3):
            done: list[int] = []
            decoders.share(range(2), done.extend)
            assert sorted(done) == [0, 1]
        assert not long.done()
        enough.set()
        long.result(60)
    decoders.close()


def test_work_ends_when_a_part_has_failed() -> None:
    """What is left of a million chunks is not decoded for an answer that there will not be."""
    decoders = Decoders(2, 60.0)
    seen: list[int] = []

    def work(remaining: Iterator[int]) -> None:
        for job in remaining:
            seen.append(job)
            if job == 3:
                raise OSError("broken")
            time.sleep(0.001)

    with pytest.raises(OSError, match="broken"):
        decoders.share(range(1_000_000), work)
    assert len(seen) < 10_000
    decoders.close()


def test_decoding_beside_a_disk_that_hangs() -> None:
    """Threads that wait for it are replaced when they are late; their work fails, when it has ended."""
    decoders = Decoders(2, 0.5)
    gate = threading.Event()
    at_work: list[int] = []

    def hang(remaining: Iterator[int]) -> None:
        for job in remaining:
            at_work.append(job)
            gate.wait(60)

    with ThreadPoolExecutor(1) as other:
        hanging = other.submit(decoders.share, range(9), hang)
        wait_until(lambda: len(at_work) == 2)

        def is_decoded() -> bool:
            done: list[int] = []
            with contextlib.suppress(ReadTimeout):
                decoders.share(range(2), done.extend)
                return sorted(done) == [0, 1]
            return False

        wait_until(is_decoded)
        assert not hanging.done()
        gate.set()
        with pytest.raises(ReadTimeout):
            hanging.result(60)
    decoders.close()


def _pausing(seconds: float) -> Callable[[Iterator[int]], None]:
    def work(remaining: Iterator[int]) -> None:
        for _ in remaining:
            time.sleep(seconds)

    return work


@pytest.mark.parametrize("way", ["share", "help"])
def test_decoding_without_threads(way: str) -> None:
    """Where one of several cannot be started, nothing is written for a call that is over, and nothing is missing."""
    decoders = Decoders(4, 60.0)
    decoders.share(range(2), _pausing(0.05))
    at_work, done, lock, returned = [0], list[int](), threading.Lock(), threading.Event()
    late: list[int] = []

    def work(remaining: Iterator[int]) -> None:
        for job in remaining:
            with lock:
                at_work[0] += 1
            time.sleep(0.01)
            with lock:
                at_work[0] -= 1
            done.append(job)
            if returned.is_set():
                late.append(job)

    with no_more_threads():
        if way == "share":
            with pytest.raises(MemoryError, match="no thread"):
                decoders.share(range(100), work)
        else:
            decoders.help(range(100), work)
        assert at_work == [0]
        returned.set()
        time.sleep(0.1)
    assert not late and len(done) == len(set(done))
    assert way == "share" or len(done) == 100
    returned.clear()
    done.clear()
    decoders.share(range(100), work)
    assert sorted(done) == list(range(100))
    decoders.close()


def test_work_beside_threads_that_are_replaced_all_the_time() -> None:
    """What waits for threads that make way is done by others, once, however often they do."""
    decoders = Decoders(2, 0.02)
    ended = threading.Event()
    lost: list[object] = []

    def hang() -> None:
        while not ended.is_set():
            with contextlib.suppress(ReadTimeout):
                decoders.share(range(2), _pausing(0.06))

    def read() -> int:
        whole = 0
        while not ended.is_set() or not whole:
            done: list[int] = []
            with contextlib.suppress(ReadTimeout):
                decoders.share(range(5), done.extend)
                whole += 1
                if sorted(done) != list(range(5)):
                    lost.append(done)
        return whole

    with ThreadPoolExecutor(6) as others:
        hanging = [others.submit(hang) for _ in range(2)]
        reading = [others.submit(read) for _ in range(4)]
        time.sleep(2)
        ended.set()
        for one in hanging:
            one.result(60)
        assert all(one.result(60) for one in reading)
    assert not lost
    assert decoders._waiting == 0
    decoders.close()


def test_who_waits_for_a_reader_holds_no_thread(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """With all readers at work for long, and more requests for them than there are threads, others are answered."""
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "lists.h5", "w") as file:
        lists = file.create_dataset("lists", (4,), h5py.vlen_dtype("i4"))
        for row in range(4):
            lists[row] = np.arange(row)
    with h5py.File(folder / "good.h5", "w") as file:
        file["x"] = np.arange(10)
    server = serve(folder, H5FEED_READERS="1", H5FEED_REQUEST_THREADS="6", H5FEED_ADMIT_TIMEOUT="60")
    with httpx.Client(base_url=server.url, timeout=120) as client:
        path = "/v1/datasets/lists/rows?fields=lists&start=2&stop=3"
        batch = "/v1/datasets/lists/batches/0?batch_size=1&fields=lists"
        assert client.get(path).status_code == client.get(batch).status_code == 200
        (pid,) = server.worker_pids()
        readers = [child for child in psutil.Process(pid).children() if "h5py_reader" in " ".join(child.cmdline())]
        assert readers
        suspend(*readers)
        try:
            with ThreadPoolExecutor(12) as threads:
                waiting = [threads.submit(client.get, asked) for asked in (path, batch) * 6]
                for row in range(20):
                    answer = client.get(f"/v1/datasets/good/rows?start={row % 10}&stop={row % 10 + 1}")
                    assert np.array([row % 10]).tobytes() in answer.content
                assert not any(one.done() for one in waiting)
                for reader in readers:
                    reader.resume()
                assert {one.result().status_code for one in waiting} == {200}
        finally:
            for reader in readers:
                reader.resume()


def test_few_sums_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics hold the sums of the parts that are at work, not those of all parts, and none when one failed."""
    alive: weakref.WeakSet[scan.ColumnAccumulator] = weakref.WeakSet()
    most = [0]

    class Counted(scan.ColumnAccumulator):
        def __init__(self, subject: scan.Subject) -> None:
            super().__init__(subject)
            alive.add(self)
            most[0] = max(most[0], len(alive))

    monkeypatch.setattr(scan, "ColumnAccumulator", Counted)
    monkeypatch.setattr(scan, "BLOCK_BYTES", 8)
    values = np.arange(640, dtype="<i4")
    with h5py.File(tmp_path / "numbers.h5", "w") as file:
        file["x"] = values
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache")
    services = Services.start(settings)
    try:
        dataset = services.catalog.dataset_within(60, "numbers")
        subject, reader, cancelled = scan.Subject(dataset.field("x").column), services.batcher.reader, threading.Event()
        found = scan.scan(reader, subject, None, 2, lambda rows: None, cancelled)
        assert found.numbers is not None and found.numbers.overall().mean == values.mean()
        # One that is added to, two at work, one that has come too early.
        assert most[0] <= 5
        del found
        gc.disable()
        try:
            with pytest.raises(ZeroDivisionError):
                scan.scan(reader, subject, None, 2, lambda rows: 1 // 0, cancelled)  # type: ignore[arg-type]
            assert len(alive) == 0
        finally:
            gc.enable()
    finally:
        services.close(wait=True)


@pytest.mark.parametrize("dtype", ["u1", "i4", "f4", "?"])
def test_brightness_by_pieces(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels are the same, however many values are looked at together."""
    values = np.random.default_rng(0).integers(0, 200, (5, 7, 9, 3)).astype(dtype)
    whole = pictures.to_pixels(values, np.dtype(dtype))
    monkeypatch.setattr(pictures, "_PIECE", 11)
    assert np.array_equal(pictures.to_pixels(values, np.dtype(dtype)), whole)


def test_a_contact_sheet_is_no_larger_than_screens() -> None:
    """A thousand pictures of 512 pixels each are made smaller; a few are not."""
    assert pictures.side_in_sheet(96, 8 * 32) == 96
    assert pictures.side_in_sheet(512, 1024) ** 2 * 1024 <= pictures.MAX_SHEET_PIXELS
