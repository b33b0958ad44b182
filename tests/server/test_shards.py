"""Datasets of many files: each is read as h5py does, most without an inspection of its own, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import psutil
import pytest
from h5feed.errors import RevisionChanged, Unreadable
from h5feed.stored.column import Column, Segment
from h5feed.stored.layout import ArrayLayout, load_layout
from h5feed.stored.local_file import YOUNG_SECONDS, Identity, LocalFile, OpenFiles
from h5feed_server.catalog.known_files import KnownFiles
from h5feed_server.storage.hdf5.inspector import Inspector
from h5feed_server.storage.hdf5.same_metadata import Recorder, SameMetadata

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS = 5


def _write(path: Path, number: int, **options: object) -> None:
    """A shard whose values tell its number and their row."""
    with h5py.File(path, "w") as file:
        rows = number * ROWS + np.arange(ROWS)
        file.create_dataset("x", data=np.repeat(rows[:, None], 4, 1).astype("<i4"), **options)
        file["label"] = (rows % 3).astype("u1")


def _folder(path: Path, count: int) -> Path:
    """A folder of shards that are old enough for what is known of them to be kept."""
    path.mkdir()
    for number in range(count):
        _write(path / f"train-{number:05d}-of-{count:05d}.h5", number)
    time.sleep(YOUNG_SECONDS)
    return path


@contextmanager
def _running(folder: Path, cache: Path, *options: str, **environment: str) -> Iterator[ServerProcess]:
    server = ServerProcess(folder, cache, *options, **environment)
    try:
        yield server
    finally:
        server.stop()


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _alone(path: Path) -> bytes:
    """The layout that an inspection of its own gives."""
    with Inspector(60) as inspector:
        return inspector.inspect(str(path))


@pytest.mark.parametrize("options", [{}, {"chunks": (2, 4)}, {"chunks": (2, 4), "maxshape": (None, 4)}], ids=str)
def test_a_file_with_the_same_metadata_is_not_inspected(tmp_path: Path, options: dict[str, object]) -> None:
    """Its layout is that of an inspection of its own, whatever its values are."""
    paths = [tmp_path / f"{number}.h5" for number in range(5)]
    for number, path in enumerate(paths):
        _write(path, number, **options)
    expected = [_alone(path) for path in paths]
    with Inspector(60) as inspector:
        assert [inspector.inspect(str(path)) for path in paths[:2]] == expected[:2]
        # The second one was recorded. From now on, no process is needed.
        inspector.rest()
        before = _children()
        assert [inspector.inspect(str(path)) for path in paths[2:]] == expected[2:]
        assert _children() == before


def test_a_file_whose_metadata_differs_is_inspected(tmp_path: Path) -> None:
    """Though it is of the same size: in its shape, its type, an attribute, or text that the layout holds."""
    for number in range(3):
        _write(tmp_path / f"{number}.h5", number)

    def write(
        name: str, shape: tuple[int, ...] = (ROWS, 4), dtype: str = "<i4", unit: str = "", text: str = ""
    ) -> Path:
        with h5py.File(tmp_path / name, "w") as file:
            x = file.create_dataset("x", data=np.zeros(shape, dtype))
            file["label"] = np.zeros(ROWS, "u1")
            if unit:
                x.attrs["unit"] = np.bytes_(unit)
            if text:
                file["names"] = np.array([text.encode()] * ROWS)
        return tmp_path / name

    others = [write("shape.h5", shape=(ROWS, 2, 2)), write("type.h5", dtype="<f4")]
    others += [write(f"unit{unit}.h5", unit=unit) for unit in ("mm", "mm", "km", "km")]
    others += [write(f"text{number}.h5", text=text) for number, text in enumerate(("cat", "cat", "dog", "cat"))]
    expected = [_alone(path) for path in others]
    with Inspector(60) as inspector:
        for number in range(3):
            inspector.inspect(str(tmp_path / f"{number}.h5"))
        assert [inspector.inspect(str(path)) for path in others] == expected
    assert {one.stat().st_size for one in others[:2]} == {(tmp_path / "0.h5").stat().st_size}
    assert load_layout(expected[0]).arrays != load_layout(expected[1]).arrays


def test_every_byte_that_was_read_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file gets what an inspection of its own finds in it, and not the layout of its neighbours."""
    for number in range(3):
        _write(tmp_path / f"{number}.h5", number)
    whole = (tmp_path / "2.h5").read_bytes()
    generator = np.random.default_rng(0)

    def found(inspector: Inspector, path: Path) -> bytes | str:
        try:
            return inspector.inspect(str(path))
        except Unreadable as error:
            return str(error)

    with Inspector(60) as inspector, Inspector(60) as plain:
        layouts = {inspector.inspect(str(tmp_path / f"{number}.h5")) for number in range(3)}
        for place in sorted(generator.choice(1200, 40, replace=False).tolist()):
            damaged = tmp_path / "damaged.h5"
            damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
            monkeypatch.setattr(plain, "_same", SameMetadata())
            assert found(inspector, damaged) == found(plain, damaged), place
    assert len(layouts) == 1


def test_ranges_of_rows_in_many_files() -> None:
    """They are those of the single rows, whichever segments are empty."""
    sizes = (0, 3, 1, 0, 0, 5, 2, 0)
    file = LocalFile(OpenFiles(0), "", Identity(0, 0, 0, 0, 0))
    column = Column(tuple(Segment(file, ArrayLayout(str(n), (size,), "<i4", n)) for n, size in enumerate(sizes)))
    for start in range(sum(sizes) + 1):
        for stop in range(start, sum(sizes) + 1):
            found = [(s, row) for s, first, last in column.parts(start, stop) for row in range(first, last)]
            rows = np.arange(start, stop)
            single = column.divide(rows) if len(rows) else ()
            assert found == [(segment, row) for segment, _, local in single for row in local.tolist()]


def test_what_is_recorded(tmp_path: Path) -> None:
    """All bytes that were handed over, once; nothing of a file that was written to meanwhile."""
    path = tmp_path / "file"
    content = np.random.default_rng(0).bytes(4096)
    path.write_bytes(content)
    with path.open("rb") as file:
        recorder = Recorder(file.fileno())
        for offset, nbytes in ((100, 50), (0, 8), (120, 100), (100, 50), (220, 10), (4090, 100), (110, 5)):
            assert recorder.read(offset, nbytes) == content[offset : offset + nbytes]
        assert recorder.parts() == ((0, content[:8]), (100, content[100:230]), (4090, content[4090:]))
        path.write_bytes(content[:125] + bytes([content[125] ^ 1]) + content[126:])
        recorder.read(125, 1)
        assert recorder.parts() is None
        endless = Recorder(file.fileno())
        for offset in range(1001):
            endless.read(offset, 1)
        assert endless.parts() is None


def test_what_is_known_of_files(tmp_path: Path) -> None:
    """It is saved and found again, by identity or digest; layouts are stored once; what is not to be kept is not."""
    _write(tmp_path / "0.h5", 0)
    layout = _alone(tmp_path / "0.h5")
    identities = [Identity(1 << 63, (1 << 64) - 1 - number, 5, -7, 1 << 60) for number in range(100)]
    saved: list[bytes] = []
    known = KnownFiles(None, saved.append)
    for number, identity in enumerate(identities):
        known.learn(identity, bytes([number]) * 64 if number % 2 else None, layout, keep=number != 50)
    known.save(identities[:90])
    assert len(saved) == 1 and len(saved[0]) < 100 * 300 + len(layout)
    known.save()
    assert len(saved) == 1, "nothing was learned since"
    found = KnownFiles(saved[0], saved.append)
    assert found.covers(identities[:50]) and not found.covers(identities[50:51]) and not found.covers(identities[90:])
    assert [found.digest(one) for one in identities[:2]] == [None, b"\1" * 64]
    assert found.layout(identities[0], None) == layout == found.layout(identities[95], b"\1" * 64)
    assert found.layout(identities[95], None) is None
    assert found.loaded(layout) is found.loaded(bytes(bytearray(layout)))


def test_two_hundred_shards(tmp_path: Path) -> None:
    """Their rows are those of the files; after a restart, nothing is inspected, and one file tells all layouts."""
    folder, count = _folder(tmp_path / "data", 200), 200
    for begin in range(2):
        with _running(folder, tmp_path / "cache", "--workers", "2") as server:
            dataset = h5feed.connect(server.url)["data"]
            assert len(dataset) == count * ROWS
            seen = list(dataset.batches(batch_size=64, shuffle=True, seed=begin, fields=["x", "label"]))
            x, label = (np.concatenate([np.asarray(batch[name]) for batch in seen]) for name in ("x", "label"))
            assert sorted(x[:, 0].tolist()) == list(range(count * ROWS))
            assert np.array_equal(label, x[:, 0] % 3)
        (place,) = tmp_path.glob("cache/served-*/families")
        assert len([*place.iterdir()]) == 1 and not [*tmp_path.glob("cache/served-*/layouts/*")]


def test_a_shard_that_is_replaced_in_mid_epoch(tmp_path: Path) -> None:
    """The pass has the old rows only, and ends with an error if they are not in memory; the next has the new rows."""
    folder = _folder(tmp_path / "data", 40)
    with _running(folder, tmp_path / "cache") as server, h5feed.connect(server.url, deadline=60) as feed:
        dataset = feed["data"]
        expected = np.arange(40 * ROWS)
        batches = iter(dataset.batches(batch_size=8, fields=["x"], readahead=1))
        seen = [next(batches)["x"][:, 0]]
        _write(tmp_path / "new.h5", 1000)
        os.replace(tmp_path / "new.h5", folder / "train-00030-of-00040.h5")
        with contextlib.suppress(RevisionChanged):
            seen += [batch["x"][:, 0] for batch in batches]
        old = np.concatenate(seen)
        assert np.array_equal(old, expected[: len(old)])
        wait_until(lambda: feed["data"].revision != dataset.revision)
        rows = np.concatenate([batch["x"][:, 0] for batch in feed["data"].batches(batch_size=64, fields=["x"])])
        expected[30 * ROWS : 31 * ROWS] = 1000 * ROWS + np.arange(ROWS)
        assert np.array_equal(rows, expected)


def test_one_bad_file_among_many(tmp_path: Path) -> None:
    """The dataset is refused, with the name of the file; when it is mended, the dataset is there."""
    folder = _folder(tmp_path / "data", 50)
    bad = folder / "train-00017-of-00050.h5"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:700])
    with _running(folder, tmp_path / "cache") as server:

        def line() -> dict[str, Any]:
            (found,) = httpx.get(f"{server.url}/v1/datasets").json()["datasets"]
            return dict(found)

        wait_until(lambda: line()["status"] == "unreadable")
        assert bad.name in line()["reason"]
        bad.write_bytes(whole)
        wait_until(lambda: line()["status"] == "ok")
        assert line()["rows"] == 50 * ROWS


@pytest.mark.slow
def test_ten_thousand_shards(tmp_path: Path) -> None:
    """They are ready, cold and from the cache, in less than 500 MB and with few descriptors, and deliver right rows."""
    count = 10_000
    folder = _folder(tmp_path / "data", count)
    for begin in range(2):
        with (
            _running(folder, tmp_path / "cache", H5FEED_OPEN_FILES="64") as server,
            httpx.Client(base_url=server.url, timeout=60) as http,
        ):
            processes = [psutil.Process(server.process.pid)]
            most = 0

            def is_ready(http: httpx.Client = http, processes: list[psutil.Process] = processes) -> bool:
                nonlocal most
                most = max(most, sum(one.memory_info().rss for one in processes))
                (found,) = http.get("/v1/datasets").json()["datasets"] or [{"status": "preparing"}]
                return bool(found["status"] == "ok")

            wait_until(is_ready, 300)
            query: dict[str, int | str] = {"batch_size": 64, "shuffle": "true", "seed": begin}
            dataset = h5feed.connect(server.url)["data"]
            assert len(dataset) == count * ROWS
            batch = next(iter(dataset.batches(batch_size=64, shuffle=True, seed=begin, fields=["x", "label"])))
            x = np.asarray(batch["x"])
            assert len(np.unique(x[:, 0] // ROWS)) > 50, "the rows are in other files each"
            assert np.array_equal(np.asarray(batch["label"]), x[:, 0] % 3)
            assert http.get("/v1/datasets/data/batches/5", params=query).status_code == 200
            assert len(http.get("/v1/datasets/data").json()["files"]) == count
            is_ready()
            assert most < 500e6
            assert processes[0].num_fds() < 64 + 200
