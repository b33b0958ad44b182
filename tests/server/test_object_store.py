"""Datasets in an object store: the same rows as from the same files in a folder, or a reason."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import BadParameter, RevisionChanged, SourceUnavailable, Unreadable
from h5feed_server.storage.objects.store import check
from h5feed_server.store_address import StoreAddress

from tests.support.object_store import Answer, StoreProcess, StoreProxy, copy_files, honest, serve_folder
from tests.support.served_rows import described, epoch_of
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

pytest.importorskip("obstore")
pytest.importorskip("hadro")

Serve = Callable[..., ServerProcess]

ROOT = Path(__file__).parents[2]

ROWS = 240

UNCACHED = {"H5FEED_CACHE_BYTES": "0"}
"""Small fields are read batch by batch, like large ones."""


def write_rows(path: Path, seed: int) -> None:
    """Images contiguous, one to a chunk and several to a chunk; labels, and tokens of different lengths."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (ROWS, 24, 20, 3), dtype=np.uint8)
    lengths = random.integers(0, 50, ROWS)
    with h5py.File(path, "w") as file:
        file["plain"] = images
        file.create_dataset("single", data=images, chunks=(1, 24, 20, 3), compression="gzip")
        file.create_dataset("several", data=images, chunks=(16, 12, 20, 3), compression="gzip", shuffle=True)
        file.create_dataset("unfiltered", data=images, chunks=(16, 24, 20, 3))
        file["labels"] = np.arange(ROWS)
        file["tokens"] = random.integers(0, 1000, lengths.sum()).astype("i4")
        file["tokens.offsets"] = np.cumsum([0, *lengths])


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bucket ``data``, for tests that do not change it."""
    path = tmp_path_factory.mktemp("buckets") / "data"
    (path / "sub").mkdir(parents=True)
    write_rows(path / "sub" / "rows.h5", 0)
    (path / "notes.txt").write_text("no dataset")
    return path


@pytest.fixture(scope="module")
def store(bucket: Path) -> Iterator[StoreProcess]:
    process = serve_folder(bucket.parent)
    yield process
    process.stop()


@pytest.fixture
def proxy(store: StoreProcess) -> Iterator[StoreProxy]:
    between = StoreProxy(store)
    yield between
    between.stop()


def test_a_shuffled_epoch_has_the_rows_that_h5py_reads(serve: Serve, store: StoreProcess, bucket: Path) -> None:
    server = serve("s3://data", "--workers", "2", **store.environment)
    about = described(server, "sub.rows")
    assert about["revision_covers"] == "store version" and not about["provisional"]
    assert about["files"] == ["sub/rows.h5"]
    epoch_of(server, "sub.rows", bucket / "sub" / "rows.h5", ["plain", "single", "several", "unfiltered", "labels"])


def test_every_field_is_served_as_from_a_folder(
    serve: Serve, server: ServerProcess, folder: Path, tmp_path: Path
) -> None:
    copy_files(folder, tmp_path / "buckets" / "all")
    store = serve_folder(tmp_path / "buckets")
    try:
        remote = serve("s3://all", **store.environment)
        with h5feed.connect(server.url, deadline=60) as here, h5feed.connect(remote.url, deadline=60) as there:
            own = {line["name"]: line for line in here.datasets() if line["status"] == "ok"}
            wait_until(lambda: all(line["status"] != "preparing" for line in there.datasets()))
            compared = 0
            for name in sorted(own):
                about, known = described(remote, name), described(server, name)
                reasons = {field["name"]: field["reason"] for field in about["fields"]}
                for field in known["fields"]:
                    if not field["readable"]:
                        continue
                    assert reasons[field["name"]] is None
                    options: dict[str, Any] = {"batch_size": 64, "shuffle": True, "fields": [field["name"]]}
                    for mine, theirs in zip(there[name].batches(**options), here[name].batches(**options), strict=True):
                        np.testing.assert_array_equal(mine[field["name"]], theirs[field["name"]])
                    compared += 1
            assert compared > 10
    finally:
        store.stop()


def test_ranges_of_a_batch_go_out_together(serve: Serve, proxy: StoreProxy, bucket: Path) -> None:
    """The store answers none of them before it has been asked for most of the batch."""
    server = serve("s3://data/sub/", **proxy.environment, **UNCACHED)
    described(server, "rows")
    for field in ("plain", "single", "unfiltered", "tokens"):
        gate = Gate(28)
        proxy.behave = gate
        rows = np.arange(5, 5 + 7 * 32, 7)
        with h5feed.connect(server.url, deadline=60) as feed, h5py.File(bucket / "sub" / "rows.h5") as file:
            got = feed["rows"].take(rows, fields=[field])
            if field != "tokens":
                np.testing.assert_array_equal(got[field], file[field][rows])
        assert gate.opened.is_set(), field


class Gate:
    """Answers requests for ranges when so many of them have come, or late."""

    def __init__(self, together: int) -> None:
        self.opened = threading.Event()
        self._left = together
        self._lock = threading.Lock()

    def __call__(self, path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if ranged is not None:
            with self._lock:
                self._left -= 1
                if self._left <= 0:
                    self.opened.set()
            self.opened.wait(9)
        return ask()


def test_inspection_reads_little(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "large.h5", "w") as file:
        file.create_dataset("images", data=np.zeros((4000, 64, 64, 3), np.uint8), chunks=(1, 64, 64, 3))
    size = (tmp_path / "data" / "large.h5").stat().st_size
    store = serve_folder(tmp_path)
    between = StoreProxy(store)
    try:
        server = serve("s3://data/large.h5", **between.environment)
        assert described(server, "large")["rows"] == 4000
        assert between.nbytes < size / 4
        read = between.nbytes
        server.stop()
        server.start()
        described(server, "large")
        assert between.nbytes == read, "the layout was kept under the version"
    finally:
        between.stop()
        store.stop()


@pytest.mark.parametrize("fault", ["status", "cut", "short"])
def test_passing_faults_of_a_store_change_no_row(serve: Serve, proxy: StoreProxy, bucket: Path, fault: str) -> None:
    """503, a connection that ends early, and an answer that is whole but shorter than the range."""
    lock = threading.Lock()
    count = 0

    def fail(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        nonlocal count
        with lock:
            count += 1
            is_bad = count % 3 == 0
        status, headers, body = ask()
        if not is_bad or ranged is None:
            return status, headers, body
        if fault == "status":
            return 503, {"content-length": "0"}, b""
        body = body[: len(body) // 2]
        if fault == "short":
            begin = int(ranged.removeprefix("bytes=").split("-")[0])
            total = headers["content-range"].rsplit("/", 1)[1]
            headers = {**headers, "content-length": str(len(body))}
            headers["content-range"] = f"bytes {begin}-{begin + len(body) - 1}/{total}"
        return status, headers, body

    server = serve("s3://data/sub", **proxy.environment, **UNCACHED)
    described(server, "rows")
    proxy.behave = fail
    epoch_of(server, "rows", bucket / "sub" / "rows.h5", ["plain", "single"])
    assert count > 20


def test_a_store_that_is_away_is_told_as_such(serve: Serve, proxy: StoreProxy) -> None:
    server = serve("s3://data/sub", **proxy.environment, **UNCACHED, H5FEED_READ_TIMEOUT="6")
    described(server, "rows")
    proxy.behave = lambda path, ranged, ask: (503, {"content-length": "0"}, b"")
    with h5feed.connect(server.url, deadline=5) as feed, pytest.raises(SourceUnavailable, match="status 503"):
        feed["rows"].take([0, 1], fields=["plain"])
    proxy.behave = lambda path, ranged, ask: (429, {"content-length": "0"}, b"")
    with h5feed.connect(server.url, deadline=5) as feed, pytest.raises(SourceUnavailable, match="status 429"):
        feed["rows"].take([0, 1], fields=["plain"])
    proxy.behave = lambda path, ranged, ask: (403, {"content-length": "0"}, b"")
    with h5feed.connect(server.url, deadline=5) as feed, pytest.raises(Unreadable, match="refused the server's cred"):
        feed["rows"].take([0, 1], fields=["plain"])


def test_what_a_store_said_is_told_though_it_hangs_then(serve: Serve, proxy: StoreProxy) -> None:
    server = serve("s3://data/sub", **proxy.environment, **UNCACHED, H5FEED_READ_TIMEOUT="10")
    described(server, "rows")
    asked = itertools.count()
    over = threading.Event()

    def fail_then_hang(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if next(asked):
            over.wait(60)
        return 503, {"content-length": "0"}, b""

    proxy.behave = fail_then_hang
    try:
        answer = httpx.get(
            f"{server.url}/v1/datasets/rows/rows", params={"start": 0, "stop": 2, "fields": "plain"}, timeout=60
        )
    finally:
        over.set()
    assert answer.status_code == 503 and "status 503" in answer.json()["detail"], answer.text


@pytest.mark.parametrize("heeds_conditions", [False, True])
def test_an_object_that_is_replaced_ends_the_epoch(serve: Serve, tmp_path: Path, heeds_conditions: bool) -> None:
    """Then its new version is served, as another revision; when it is deleted, it is gone."""
    path = tmp_path / "data" / "rows.h5"
    path.parent.mkdir()
    write_rows(path, 0)
    store = serve_folder(tmp_path)
    between = StoreProxy(store)
    between.conditional = heeds_conditions
    try:
        server = serve("s3://data", **between.environment, **UNCACHED)
        before = described(server, "rows")["revision"]
        with h5feed.connect(server.url, deadline=60) as feed:
            dataset = feed["rows"]
            dataset.take([0], fields=["plain"])
            # Of the same size.
            write_rows(tmp_path / "new.h5", 1)
            (tmp_path / "new.h5").replace(path)
            with pytest.raises(RevisionChanged):
                dataset.take([3, 1], fields=["plain"])
        wait_until(lambda: described(server, "rows")["revision"] != before)
        epoch_of(server, "rows", path, ["plain"])
        path.unlink()
        with h5feed.connect(server.url, deadline=60) as feed, pytest.raises(Unreadable, match="no such object"):
            feed["rows"].take([7], fields=["single"])
        wait_until(lambda: httpx.get(f"{server.url}/v1/datasets/rows").status_code == 404)
    finally:
        between.stop()
        store.stop()


FIELDS = ["plain", "single", "several", "unfiltered", "labels"]

UNCACHED_CHUNKS = {**UNCACHED, "H5FEED_CHUNK_CACHE_BYTES": "0"}


def test_the_second_epoch_reads_nothing_from_the_store(serve: Serve, proxy: StoreProxy, bucket: Path) -> None:
    """Nor does one after a restart. What was damaged on the disk is fetched again."""
    path = bucket / "sub" / "rows.h5"
    server = serve("s3://data/sub", "--workers", "2", **proxy.environment, **UNCACHED_CHUNKS)
    described(server, "rows")
    epoch_of(server, "rows", path, FIELDS)
    fetched = proxy.ranges
    epoch_of(server, "rows", path, FIELDS, epoch=1)
    server.stop()
    server.start()
    described(server, "rows")
    epoch_of(server, "rows", path, FIELDS, epoch=2)
    assert proxy.ranges == fetched
    (data,) = (server.cache_dir / "ranges").glob("*.data")
    (index,) = (server.cache_dir / "ranges").glob("*.index")
    content = np.fromfile(data, np.uint8)
    content[::5000] += 1
    with data.open("r+b") as file:
        file.write(content.tobytes())
    epoch_of(server, "rows", path, FIELDS, epoch=3)
    assert proxy.ranges > fetched
    # Cut off in the middle of an entry, and of the data.
    server.stop()
    os.truncate(index, index.stat().st_size // 48 * 24 - 5)
    os.truncate(data, data.stat().st_size // 2)
    server.start()
    described(server, "rows")
    epoch_of(server, "rows", path, FIELDS, epoch=4)
    shutil.rmtree(server.cache_dir / "ranges")
    epoch_of(server, "rows", path, FIELDS, epoch=5)


def test_the_cache_of_ranges_is_bounded(serve: Serve, proxy: StoreProxy, bucket: Path) -> None:
    most = 400_000
    limits = {"H5FEED_STORE_CACHE_BYTES": str(most), **UNCACHED_CHUNKS}
    server = serve("s3://data/sub", **proxy.environment, **limits)
    described(server, "rows")
    for epoch in (0, 1):
        epoch_of(server, "rows", bucket / "sub" / "rows.h5", FIELDS, epoch=epoch)
    used = sum(path.stat().st_blocks * 512 for path in (server.cache_dir / "ranges").iterdir())
    # A range takes whole blocks of the disk.
    assert 0 < used < 2 * most
    none = serve("s3://data/sub", **proxy.environment, **{**limits, "H5FEED_STORE_CACHE_BYTES": "0"})
    described(none, "rows")
    epoch_of(none, "rows", bucket / "sub" / "rows.h5", ["plain"])
    assert not (none.cache_dir / "ranges").exists()


def write_lists(path: Path, seed: int, items: int = 5000) -> None:
    """Lists and text of any length, which only h5py can read, in many blocks."""
    random = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        lists = file.create_dataset("lists", (ROWS,), h5py.vlen_dtype("<i4"))
        words = file.create_dataset("words", (ROWS,), h5py.string_dtype(), chunks=(16,), compression="gzip")
        for row in range(ROWS):
            lists[row] = random.integers(0, 1000, items + row)
            words[row] = f"{seed}-{row}" * (row % 50)


def lists_of(server: ServerProcess, path: Path, epoch: int = 0) -> None:
    """Read a shuffled epoch of lists and text with the client and hold each row against h5py's."""
    with h5py.File(path) as file:
        lists, words = file["lists"][()], file["words"].asstr()[()]
    seen = []
    with h5feed.connect(server.url, deadline=60) as feed:
        fields = ["lists", "words"]
        for batch in feed["rows"].batches(batch_size=32, shuffle=True, seed=1, epoch=epoch, fields=fields):
            seen += batch.rows.tolist()
            for found, row in zip(batch.lists("lists"), batch.rows.tolist(), strict=True):
                np.testing.assert_array_equal(found, lists[row])
            assert batch.text("words") == words[batch.rows].tolist()
    assert sorted(seen) == list(range(ROWS))


@pytest.fixture
def lists(tmp_path: Path) -> Iterator[tuple[Path, StoreProxy]]:
    """An object with `write_lists`, and the store that it is in."""
    path = tmp_path / "data" / "rows.h5"
    path.parent.mkdir()
    write_lists(path, 0)
    process = serve_folder(tmp_path)
    between = StoreProxy(process)
    yield path, between
    between.stop()
    process.stop()


def test_lists_are_read_from_the_store_once(serve: Serve, lists: tuple[Path, StoreProxy]) -> None:
    """Whichever process reads them, also after a restart."""
    path, proxy = lists
    server = serve("s3://data", "--workers", "2", **proxy.environment)
    described(server, "rows")
    lists_of(server, path)
    fetched = proxy.ranges
    assert proxy.nbytes < 2 * path.stat().st_size
    lists_of(server, path, epoch=1)
    server.stop()
    server.start()
    described(server, "rows")
    lists_of(server, path, epoch=2)
    # A reader asks for a little more than it needs, in each epoch something else.
    assert proxy.ranges < fetched + 20


@pytest.mark.parametrize("heeds_conditions", [False, True])
def test_lists_of_an_object_that_is_replaced(
    serve: Serve, lists: tuple[Path, StoreProxy], tmp_path: Path, heeds_conditions: bool
) -> None:
    """Whoever reads on is told, and never gets a mixture, though the reader has some of the old version."""
    path, proxy = lists
    # Much longer than what is read to describe it.
    write_lists(path, 0, 40_000)
    proxy.conditional = heeds_conditions
    server = serve("s3://data", **proxy.environment)
    before = described(server, "rows")["revision"]
    with h5feed.connect(server.url, deadline=60) as feed:
        dataset = feed["rows"]
        with h5py.File(path) as file:
            np.testing.assert_array_equal(dataset.take([0], fields=["lists"]).lists("lists")[0], file["lists"][0])
        write_lists(tmp_path / "new.h5", 1, 40_000)
        assert (tmp_path / "new.h5").stat().st_size == path.stat().st_size
        (tmp_path / "new.h5").replace(path)
        with pytest.raises(RevisionChanged):
            dataset.take([ROWS - 1, 0, ROWS // 2], fields=["lists"])
    wait_until(lambda: described(server, "rows")["revision"] != before)
    lists_of(server, path)


def test_a_store_that_is_away_while_h5py_reads(serve: Serve, lists: tuple[Path, StoreProxy]) -> None:
    """The error is that of the store, and the next request is answered."""
    path, proxy = lists
    server = serve("s3://data", **proxy.environment, H5FEED_READ_TIMEOUT="6")
    described(server, "rows")
    for code, error in ((503, SourceUnavailable), (403, Unreadable)):
        proxy.behave = lambda path, ranged, ask, code=code: (code, {"content-length": "0"}, b"")  # type: ignore[misc]
        with h5feed.connect(server.url, deadline=5) as feed, pytest.raises(error, match=r"the (object )?store"):
            feed["rows"].take([ROWS - 1, ROWS // 3], fields=["lists"])
        for ask in ("tree", "tree?path=/lists"):
            answer = httpx.get(f"{server.url}/v1/datasets/rows/{ask}", timeout=60)
            assert answer.status_code in (200, 422, 503)
    proxy.behave = honest
    lists_of(server, path)
    assert httpx.get(f"{server.url}/v1/datasets/rows/tree", timeout=60).json()["node"]["members"] == 2


def metrics_of(server: ServerProcess) -> dict[str, float]:
    """Names and labels of all samples with their values."""
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def test_metrics_tell_what_the_store_was_asked(serve: Serve, proxy: StoreProxy, bucket: Path) -> None:
    began = time.time()
    server = serve("s3://data/sub", "--workers", "2", **proxy.environment, **UNCACHED_CHUNKS)
    described(server, "rows")
    for epoch in (0, 1):
        epoch_of(server, "rows", bucket / "sub" / "rows.h5", FIELDS, epoch=epoch)
    proxy.behave = lambda path, ranged, ask: (403, {"content-length": "0"}, b"")
    with h5feed.connect(server.url, deadline=5) as feed, pytest.raises(Unreadable):
        feed["rows"].take([0], fields=["tokens"])

    def is_complete() -> bool:
        # The numbers of the other worker are up to a second old.
        found = metrics_of(server)
        listings = found['h5feed_store_requests_total{outcome="ok"}'] - proxy.ranges
        return (
            found["h5feed_store_read_bytes_total"] == proxy.nbytes
            and found['h5feed_store_requests_total{outcome="refused"}'] >= 1
            and 0 <= listings <= found["h5feed_store_request_duration_seconds_count"]
        )

    wait_until(is_complete)
    found = metrics_of(server)
    assert found["h5feed_store_requests_running"] == 0
    assert found["h5feed_store_cache_hits_total"] > ROWS and found["h5feed_store_cache_read_bytes_total"] > 0
    assert found["h5feed_store_cache_bytes"] > 0
    assert began <= found["h5feed_store_listed_timestamp_seconds"] <= time.time()
    assert found["h5feed_store_request_duration_seconds_sum"] > 0


def count_listings(proxy: StoreProxy) -> list[float]:
    """When each listing came, from now on."""
    times: list[float] = []

    def behave(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if ranged is None and "list-type" in path:
            times.append(time.monotonic())
        return ask()

    proxy.behave = behave
    return times


def test_workers_list_once_in_each_interval(serve: Serve, proxy: StoreProxy) -> None:
    times = count_listings(proxy)
    server = serve("s3://data/sub", "--workers", "4", **proxy.environment, H5FEED_LISTING_SECONDS="2")
    described(server, "rows")
    wait_until(lambda: len(times) >= 6)
    # Five intervals, less what may delay the first request. Four workers on their own would need one or two.
    assert times[5] - times[0] > 5, times


def test_a_listing_that_hangs_holds_up_nobody(serve: Serve, proxy: StoreProxy, bucket: Path) -> None:
    """What was listed before is served, all workers say that it is ready, and the server stops at once."""
    server = serve("s3://data/sub", "--workers", "2", **proxy.environment, H5FEED_LISTING_SECONDS="1")
    described(server, "rows")
    hanging, over = threading.Event(), threading.Event()

    def hang(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if ranged is None:
            hanging.set()
            over.wait(120)
        return ask()

    proxy.behave = hang
    try:
        assert hanging.wait(60)
        epoch_of(server, "rows", bucket / "sub" / "rows.h5", ["plain"])
        for _ in range(8):
            assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200
        began = time.monotonic()
        assert server.stop() == 0
        # A listing may take two minutes.
        assert time.monotonic() - began < 40
    finally:
        over.set()


def test_a_failed_listing_is_told_by_all_workers(serve: Serve, proxy: StoreProxy, bucket: Path) -> None:
    """Until it succeeds again. Meanwhile, they serve what they know."""
    server = serve("s3://data/sub", "--workers", "2", **proxy.environment, H5FEED_LISTING_SECONDS="1")
    described(server, "rows")

    def away(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        return ask() if ranged else (503, {"content-length": "0"}, b"")

    proxy.behave = away

    def said() -> set[str]:
        answers = [httpx.get(f"{server.url}/readyz", timeout=60) for _ in range(12)]
        assert {answer.status_code for answer in answers} == {200}
        return {answer.text for answer in answers}

    reason = "the object store is not available at the moment: it answered with status 503"
    wait_until(lambda: said() == {f"ok, but the object store cannot be listed: {reason}"})
    epoch_of(server, "rows", bucket / "sub" / "rows.h5", ["plain"])
    proxy.behave = honest
    wait_until(lambda: said() == {"ok"})


@pytest.mark.parametrize("key", ["sub//rows.h5", "sub/../rows.h5", "sub/ro\nws.h5"])
def test_a_name_that_cannot_be_used_is_told(serve: Serve, proxy: StoreProxy, bucket: Path, key: str) -> None:
    """The library lists no object of the page with it. What was listed earlier is served."""
    server = serve("s3://data", **proxy.environment, H5FEED_LISTING_SECONDS="1")
    described(server, "sub.rows")

    def odd(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        status, headers, body = ask()
        if "list-type=" in path:
            body = body.replace(b"<Key>notes.txt</Key>", f"<Key>{key}</Key>".encode())
            headers["content-length"] = str(len(body))
        return status, headers, body

    proxy.behave = odd

    def said() -> str:
        return httpx.get(f"{server.url}/readyz", timeout=60).text

    wait_until(lambda: "the name of an object cannot be used" in said())
    assert " ".join(key.split()) in said() and "rename" in said()
    epoch_of(server, "sub.rows", bucket / "sub" / "rows.h5", ["plain"])
    proxy.behave = honest
    wait_until(lambda: said() == "ok")


def test_new_objects_are_found(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    store = serve_folder(tmp_path)
    try:
        server = serve("s3://data", "--workers", "2", **store.environment, H5FEED_LISTING_SECONDS="1")
        assert httpx.get(f"{server.url}/v1/datasets").json()["datasets"] == []
        write_rows(tmp_path / "data" / "rows.h5", 0)
        described(server, "rows")
    finally:
        store.stop()


def test_declarations_of_a_store(serve: Serve, tmp_path: Path) -> None:
    """``h5feed.toml`` below the prefix is read as in a folder, and again when it was replaced or deleted."""
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    write_rows(data / "sub" / "rows.h5", 0)
    # Only at the top.
    (data / "sub" / "h5feed.toml").write_text("not even TOML")
    declared = '[datasets.mine]\nfiles = ["sub/rows.h5"]\nfields = { x = "plain" }\n'
    (data / "h5feed.toml").write_text(f"{declared}[datasets.mine.splits]\ntrain = [0, 10]\ntest = [10, {ROWS}]\n")
    store = serve_folder(tmp_path)
    try:
        server = serve("s3://data", "--workers", "2", **store.environment, H5FEED_LISTING_SECONDS="1")
        about = described(server, "mine")
        assert [field["name"] for field in about["fields"]] == ["x"]
        with h5feed.connect(server.url, deadline=60) as feed:
            assert feed["mine"].split_rows("train").tolist() == [*range(10)]
            batch = feed["mine"].batch(0, batch_size=4)
        with h5py.File(data / "sub" / "rows.h5") as file:
            np.testing.assert_array_equal(batch["x"], file["plain"][:4])

        def names() -> dict[str, str]:
            lines = httpx.get(f"{server.url}/v1/datasets", timeout=60).json()["datasets"]
            return {line["name"]: line["reason"] or "" for line in lines}

        (data / "h5feed.toml").write_text(declared.replace("mine", "yours").replace("rows.h5", "others.h5"))
        wait_until(lambda: "no file matches 'sub/others.h5'" in names().get("yours", "") and "mine" not in names())
        (data / "h5feed.toml").unlink()
        wait_until(lambda: names() == {"sub.rows": ""})
    finally:
        store.stop()


def test_a_store_that_cannot_be_listed_has_a_reason(serve: Serve, store: StoreProcess) -> None:
    wrong = {**store.environment, "AWS_SECRET_ACCESS_KEY": "another"}
    for url, environment, reason in (
        ("s3://data", wrong, "the store refused the server's credentials"),
        ("s3://data/sub/rows.h5", wrong, "the store refused the server's credentials"),
        ("s3://other", store.environment, "no such bucket"),
        ("s3://data", {**store.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be reached"),
    ):
        server = serve(url, **environment)

        def lines(server: ServerProcess = server) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = httpx.get(f"{server.url}/v1/datasets", timeout=60).json()["datasets"]
            return found

        wait_until(lambda lines=lines: len(lines()) > 0)  # type: ignore[misc]
        (line,) = lines()
        assert line["status"] == "unreadable" and reason in line["reason"], line


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", StoreAddress("s3", "bucket", "")),
        ("s3://bucket/a/b/", StoreAddress("s3", "bucket", "a/b")),
        ("s3://bucket/a/B.H5", StoreAddress("s3", "bucket", "a", "B.H5")),
        ("gs://some_bucket/x.hdf5", StoreAddress("gs", "some_bucket", "", "x.hdf5")),
        ("az://container/a", StoreAddress("az", "container", "a")),
        ("https://Files.example.org:8443/my%20data/", StoreAddress("https", "files.example.org:8443", "my data")),
        ("http://[::1]:80/x.h5", StoreAddress("http", "[::1]:80", "", "x.h5")),
    ],
)
def test_addresses(url: str, expected: StoreAddress) -> None:
    assert StoreAddress.parse(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/a",
        "s3://key:secret@bucket",
        "https://me:secret@host/a",
        "s3://b/../c",
        "https://host/a/%2e%2e/c",
        "s3://b?x=1",
        "https://host/a.h5?signature=secret",
        "s3://B_C/x",
        "az://",
        "http:///a",
        "http://a_b/c",
    ],
)
def test_bad_addresses(url: str) -> None:
    with pytest.raises(BadParameter) as caught:
        StoreAddress.parse(url)
    assert "expected s3://" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "environment", "said"),
    [
        ("az://container", {"AZURE_STORAGE_ACCOUNT_NAME": ""}, "set AZURE_STORAGE_ACCOUNT_NAME"),
        (
            "az://container",
            {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "a secret!"},
            "set AZURE_STORAGE_ACCOUNT_NAME",
        ),
        ("gs://bucket", {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere.json"}, "/nowhere.json"),
        ("gs://bucket", {"GOOGLE_SERVICE_ACCOUNT_KEY": "a secret!"}, "set GOOGLE_APPLICATION_CREDENTIALS"),
        ("https://host/a", {"NETRC": "/nowhere"}, "/nowhere cannot be read"),
        ("https://host/a", {"NETRC": "LICENSE"}, "LICENSE cannot be used for credentials"),
        ("https://host/a", {"SSL_CERT_FILE": "/nowhere"}, "SSL_CERT_FILE"),
        ("https://host/a", {"HTTPS_PROXY": "ftp://proxy:1"}, "proxy"),
    ],
)
def test_what_the_environment_lacks_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], said: str
) -> None:
    """In the words of the store, and without secrets."""
    monkeypatch.chdir(ROOT)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadParameter) as caught:
        check(StoreAddress.parse(url))
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_bad_address_ends_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "h5feed_server.cli", "serve", "ftp://host/x", "--cache-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1 and "ftp:// is not the URL of an object store" in ended.stderr
    assert "Traceback" not in ended.stderr
