"""Datasets that grow while they are served: each revision is exactly the rows that it began with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import RevisionChanged, Transient
from h5feed.stored.byte_cache import ByteCache
from h5feed_server.services import Services
from h5feed_server.settings import Settings
from h5feed_server.storage.hdf5.reader_pool import ReaderPool
from h5feed_server.storage.hdf5.writers import Writer, writer_of
from h5feed_server.storage.reader import Reader

from tests.support.hdf5_writer import Hdf5Writer, create, labels, values, values_of
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

Serve = Callable[..., ServerProcess]
Write = Callable[..., Hdf5Writer]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    (path / "h5feed.toml").write_text('[datasets.log]\nfiles = ["log.h5"]\ngrowing = true\n')
    return path


@pytest.fixture
def write(data: Path) -> Iterator[Write]:
    """Starts writers of ``log.h5`` that end with the test."""
    started: list[Hdf5Writer] = []

    def start(*arguments: Any, **options: Any) -> Hdf5Writer:
        started.append(Hdf5Writer(data / "log.h5", *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def connect(data: Path, serve: Serve) -> Iterator[Callable[[], h5feed.Feed]]:
    """Connects to a server of two workers."""
    feeds: list[h5feed.Feed] = []

    def open_feed() -> h5feed.Feed:
        feeds.append(h5feed.connect(serve(data, "--workers", "2").url, deadline=60))
        return feeds[-1]

    yield open_feed
    for feed in feeds:
        feed.close()


def _opened(feed: h5feed.Feed, rows: int | None) -> h5feed.Dataset:
    """The dataset, when it has so many rows; None: any."""
    found: list[h5feed.Dataset] = []

    def has_grown() -> bool:
        try:
            found.append(feed["log"])
        except Transient:
            return False
        assert rows is None or len(found[-1]) <= rows
        return rows in (None, len(found[-1]))

    wait_until(has_grown)
    return found[-1]


def _line(feed: h5feed.Feed) -> Any:
    """The dataset in the catalogue."""
    return next(line for line in feed.datasets() if line["name"] == "log")


def _check_epoch(dataset: h5feed.Dataset, rows: int, epoch: int = 0, batch_size: int = 7) -> None:
    """One shuffled epoch has each of these rows once, as they were written."""
    seen: list[int] = []
    for batch in dataset.batches(batch_size=batch_size, shuffle=True, seed=3, epoch=epoch, fields=["x", "y"]):
        np.testing.assert_array_equal(batch["x"], values_of(batch.rows))
        np.testing.assert_array_equal(batch["y"], batch.rows % 5)
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(rows))


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_epochs_while_a_writer_appends(connect: Any, write: Write, compression: str | None) -> None:
    """Each epoch has the rows of its revision, also after others were added; rows of unfilled chunks are not served."""
    writer = write(compression=compression)
    writer("append 37", "flush")
    feed = connect()
    # Full chunks of x end at 32, those of y at 30.
    opened = {30: _opened(feed, 30)}
    _check_epoch(opened[30], 30)
    for step, rows in enumerate((60, 90, 130, 180)):
        writer(f"append {rows + 3 - (37, 63, 93, 133)[step]}", "flush")
        served = min((rows + 3) // 16 * 16, (rows + 3) // 10 * 10)
        opened[served] = _opened(feed, served)
        for then, dataset in opened.items():
            _check_epoch(dataset, then, epoch=step)
    assert len({dataset.revision for dataset in opened.values()}) == len(opened) == 5


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_writer_that_never_rests(connect: Any, write: Write, compression: str | None) -> None:
    """Epochs of the current and of earlier revisions while rows are written, until the writer is killed."""
    writer = write(compression=compression)
    writer("append 100", "flush", "stream")
    feed = connect()
    _opened(feed, None)
    opened: dict[int, h5feed.Dataset] = {}
    while len(opened) < 3:
        dataset = feed["log"]
        opened[len(dataset)] = dataset
        for then in {min(opened), max(opened)}:
            _check_epoch(opened[then], then, epoch=len(opened), batch_size=256)
    assert [*opened] == sorted(opened)
    writer.kill()
    for rows, dataset in opened.items():
        _check_epoch(dataset, rows, batch_size=256)
    last = feed["log"]
    assert len(last) >= max(opened)
    _check_epoch(last, len(last), batch_size=256)


def test_what_is_not_flushed_is_not_served(connect: Any, write: Write) -> None:
    """Rows appear when both fields are flushed, and remain when the writer is killed in the middle of others."""
    writer = write()
    writer("append 40", "flush")
    feed = connect()
    before = _opened(feed, 32)
    writer("append 400", "flush 1")
    _check_epoch(before, 32)
    assert _opened(feed, 40).revision != before.revision
    writer("flush")
    grown = _opened(feed, 432)
    _check_epoch(grown, 432)
    writer("append 500")
    writer.kill()
    _check_epoch(grown, 432, epoch=1)
    assert feed["log"].revision == grown.revision
    # Another server, which has never seen the writer, or any of the states before.
    _check_epoch(_opened(connect(), 432), 432)


def test_revisions_do_not_depend_on_how_a_file_has_grown(tmp_path: Path) -> None:
    """A longer file knows the revision of a shorter one with the same rows, whatever the chunks and the steps."""
    random = np.random.default_rng(0)
    cases = range(8)
    declared = "".join(f'[datasets.case{case}]\nfiles = ["case{case}.h5"]\ngrowing = true\n' for case in cases)
    for name in ("short", "long"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "h5feed.toml").write_text(declared)
    for case in cases:
        heights = {"height": int(random.integers(1, 9)), "height_of_y": int(random.integers(1, 9))}
        lengths = sorted(random.integers(10, 120, 4).tolist())
        for name, ends in (("short", lengths[:2]), ("long", lengths[1:])):
            with h5py.File(tmp_path / name / f"case{case}.h5", "w", libver="latest") as file:
                x, y = create(file, compression="gzip" if case % 2 else None, **heights)
                for end in ends:
                    first = len(x)
                    x.resize(end, 0), y.resize(end, 0)
                    x[first:], y[first:] = values(first, end), labels(first, end)
    services = [
        Services.start(Settings.model_validate({"data_dir": tmp_path / name, "cache_dir": tmp_path / f"cache-{name}"}))
        for name in ("short", "long")
    ]
    reader = Reader(1, ByteCache(0, 60), 0, 60, ReaderPool(0, 0, 0))
    try:
        for case in cases:
            short, long = (one.catalog.dataset_within(60, f"case{case}") for one in services)
            assert short.rows <= long.rows
            earlier = services[1].catalog.dataset_within(60, f"case{case}", short.revision)
            assert (earlier.rows, earlier.revision) == (short.rows, short.revision)
            for field, made in (("x", values), ("y", labels)):
                read = reader.read_all(earlier.field(field).column)
                np.testing.assert_array_equal(read, made(0, short.rows))
            with pytest.raises(RevisionChanged):
                services[1].catalog.dataset_within(60, f"case{case}", "0" * 16)
    finally:
        reader.close()
        for one in services:
            one.close(wait=True)


@pytest.mark.parametrize("kind", ["loader", "torch"])
def test_loops_that_follow(connect: Any, write: Write, kind: str) -> None:
    """Each pass has the rows that there were at its begin. A state names the revision of its pass, which is resumed."""
    if kind == "torch":
        pytest.importorskip("torch")
    writer = write()
    writer("append 40", "flush")
    feed = connect()
    first = _opened(feed, 32)
    options: dict[str, Any] = {"batch_size": 10, "shuffle": True, "seed": 5, "x": "x", "y": None, "follow": True}
    train = getattr(first, kind)(**options)
    seen = [arrays[0] for arrays in train]
    assert sum(map(len, seen)) == 32
    assert len(train) == 4
    passed = iter(train)
    begun = [next(passed)[0], next(passed)[0]]
    writer("append 40", "flush")
    second = _opened(feed, 80)
    state = train.state_dict()
    assert (state["revision"], state["epoch"], state["delivered"]) == (first.revision, 1, 2)
    begun += [arrays[0] for arrays in passed]
    rows = [np.sort(np.concatenate(arrays)[:, 0]) for arrays in (seen, begun)]
    np.testing.assert_array_equal(rows, [values(0, 32)[:, 0]] * 2)
    resumed = getattr(second, kind)(**options)
    resumed.load_state_dict(state)
    rest = [arrays[0] for arrays in resumed]
    np.testing.assert_array_equal(np.concatenate(rest), np.concatenate(begun[2:]))
    for loop in (train, resumed):
        grown = np.concatenate([arrays[0] for arrays in loop])
        np.testing.assert_array_equal(np.sort(grown[:, 0]), values(0, 80)[:, 0])
        assert loop.state_dict()["revision"] == second.revision
    # Without `follow`, the old rows are opened by their revision.
    again = feed.dataset("log", first.revision)
    assert len(again) == 32
    fixed = getattr(again, kind)(**{**options, "follow": False})
    fixed.load_state_dict(state)
    np.testing.assert_array_equal(np.concatenate([arrays[0] for arrays in fixed]), np.concatenate(rest))
    record = first.loader(batch_size=10).source()
    assert h5feed.reopen(record).dataset.revision == first.revision


def test_old_revisions_after_a_restart(connect: Any, write: Write) -> None:
    """A server that has not seen a revision knows it all the same: an epoch goes on, from any batch."""
    writer = write(compression="gzip")
    writer("append 50", "flush")
    before = _opened(connect(), 48)
    writer("append 200", "flush")
    after = connect()
    _opened(after, 240)
    url, revision = after.url, before.revision
    plan = {"revision": revision, "batch_size": "10", "shuffle": "true", "seed": "1", "split": "all", "fields": "y"}
    for number in (4, 2):
        mine = httpx.get(f"{before.url}/v1/datasets/log/batches/{number}", params=plan).content
        assert httpx.get(f"{url}/v1/datasets/log/batches/{number}", params=plan).content == mine


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_rewritten_rows(connect: Any, write: Write, compression: str | None) -> None:
    """Whoever has a dataset open whose old rows are rewritten gets RevisionChanged; shorter ones are as they were."""
    writer = write(compression=compression)
    writer("append 32", "flush")
    feed = connect()
    first = _opened(feed, 30)
    writer("append 64", "flush")
    second = _opened(feed, 90)
    writer("rewrite 70", "flush")
    with pytest.raises(RevisionChanged):
        for epoch in range(1000):
            _check_epoch(second, 90, epoch)
    wait_until(lambda: feed["log"].revision != second.revision)
    assert (feed["log"].take([70])["x"] == -1).all()
    _check_epoch(first, 30)


@pytest.mark.parametrize("libver", ["latest", "earliest"])
def test_closed_and_opened_again(connect: Any, write: Write, data: Path, libver: str) -> None:
    """A writer without SWMR: rows are there when it has closed the file, and old revisions are served meanwhile."""
    writer = write(swmr=False, libver=libver)
    writer("append 40", "flush")
    feed = connect()
    answer = httpx.get(f"{feed.url}/v1/datasets/log", timeout=60)
    assert (answer.status_code, answer.json()["code"]) == (503, "preparing")
    wait_until(lambda: _line(feed)["status"] == "preparing" and "open for writing" in _line(feed)["reason"])
    writer.end()
    before = _opened(feed, 32)
    again = write("a", swmr=False, libver=libver)
    again("append 100", "flush")
    _check_epoch(before, 32)
    again.end()
    # Full chunks of x end at 128, those of y at 140.
    _check_epoch(_opened(feed, 128), 128)
    _check_epoch(before, 32, epoch=1)


def test_other_datasets_do_not_grow(connect: Any, write: Write, data: Path) -> None:
    """Without the declaration, every change is another revision, for all who have it open."""
    (data / "h5feed.toml").unlink()
    with h5py.File(data / "log.h5", "w") as file:
        x, y = create(file)
        x.resize(20, 0), y.resize(20, 0)
        x[:], y[:] = values(0, 20), labels(0, 20)
    feed = connect()
    before = _opened(feed, 20)
    write("a", swmr=False, libver="earliest")("append 20", "close")
    with pytest.raises(RevisionChanged):
        before.take([0])
    assert len(_opened(feed, 40)) == 40


def test_arrays_that_cannot_grow(connect: Any, data: Path) -> None:
    """They are listed with the reason; a declaration that names one is refused."""
    with h5py.File(data / "log.h5", "w", libver="latest") as file:
        create(file)
        for name, made in (("x", values), ("y", labels)):
            file[name].resize(40, 0)
            file[name][:] = made(0, 40)
        file["fixed"] = np.arange(40)
        file.create_dataset("short", data=np.arange(40), chunks=(4,))
    feed = connect()
    dataset = _opened(feed, 32)
    assert {field.name for field in dataset.fields.values() if field.readable} == {"x", "y"}
    assert dataset.fields["fixed"].reason == "it is not stored in chunks"
    (data / "h5feed.toml").write_text(
        '[datasets.log]\nfiles = ["log.h5"]\ngrowing = true\nfields = { a = "x", b = "short" }\n'
    )

    wait_until(lambda: "'short' cannot grow: its first axis cannot be extended" in str(_line(feed)["reason"]))


def test_clients_do_not_read_the_file_themselves(connect: Any, write: Write) -> None:
    """A file that changes is not lent to clients: rows come from the server, which compares them."""
    writer = write(compression="gzip", height=16)
    writer("append 40", "flush")
    feed = connect()
    dataset = _opened(feed, 32)
    answer = httpx.get(
        f"{feed.url}/v1/datasets/log/batches/0", params={"body": "places", "revision": dataset.revision, "fields": "x"}
    )
    assert answer.status_code == 200
    assert b'"files\\": []' in answer.content[:4000]
    answer = httpx.get(f"{feed.url}/v1/datasets/log/batches/0", params={"revision": "0" * 16})
    assert answer.json()["code"] == "revision_changed"


def test_who_has_a_file_open(tmp_path: Path) -> None:
    """The flags in the superblock tell it; without them, the lock of the writer."""
    path = tmp_path / "one.h5"

    def who() -> Writer:
        with path.open("rb") as file:
            return writer_of(file.fileno())

    for libver, swmr, during, after in (
        ("latest", True, Writer.SWMR, Writer.NONE),
        ("latest", False, Writer.OTHER, Writer.NONE),
        ("earliest", False, Writer.OTHER, Writer.UNKNOWN),
    ):
        writer = Hdf5Writer(path, swmr=swmr, libver=libver)
        writer("append 3", "flush")
        assert who() is during
        writer.end()
        assert who() is after
