"""A dataset of more rows than are listed: its splits are found by the keyed hash, and kept as bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import SplitImpossible, TooLarge
from h5feed.order import hashed
from h5feed_server.row_bits import LISTED_ROWS
from h5feed_server.splits.by_hash import division_key

from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.slow

ROWS = LISTED_ROWS + 1003
DIVIDED: dict[str, Any] = {"test": 1000, "val": 0.1}
PATIENCE = 300


@pytest.fixture(scope="module")
def labels() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(2).choice(4, ROWS, p=[0.5, 0.3, 0.15, 0.05]).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, labels: npt.NDArray[np.uint8]) -> Path:
    """`many`: labels, and a field that was never written. `stored`: the same with stored splits."""
    path = tmp_path_factory.mktemp("many")
    for name in ("many", "stored"):
        with h5py.File(path / f"{name}.h5", "w") as file:
            file.create_dataset("labels", data=labels, chunks=(1 << 18,), compression="gzip", compression_opts=1)
            file.create_dataset("x", (ROWS, 2), np.float32)
    (path / "h5feed.toml").write_text(
        f'[datasets.stored]\nfiles = ["stored.h5"]\n[datasets.stored.splits]\ntrain = [[0, 20], [40, {ROWS}]]\n'
        "test = [20, 40]\n"
    )
    return path


@pytest.fixture(scope="module")
def server(data: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    return serve_module(data, "--workers", "2")


@pytest.fixture(scope="module")
def feed(server: ServerProcess) -> Iterator[h5feed.Feed]:
    with h5feed.connect(server.url, deadline=PATIENCE) as connected:
        yield connected


def report(url: str, name: str, **query: Any) -> dict[str, Any]:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        answer = httpx.get(f"{url}/v1/datasets/{name}/splits", params=query, headers={"prefer": "wait=20"}, timeout=60)
        if answer.status_code not in (202, 503):
            return dict(answer.json())
    raise TimeoutError("the splits were not found")


def test_the_rows_of_each_split(feed: h5feed.Feed, server: ServerProcess, labels: npt.NDArray[np.uint8]) -> None:
    """Test has the first rows of each class by their hash; batches have each row of val once, as `split_rows` lists."""
    many = feed["many"]
    told: list[tuple[int, int]] = []
    found = many.splits(timeout=PATIENCE, progress=lambda *state: told.append(state), **DIVIDED)
    assert found.method == "keyed hash within each class" and found["stratify"] == "labels"
    assert {name: one["rows"] for name, one in found["splits"].items()} == {
        "all": ROWS, "train": ROWS - 1000 - -(-ROWS // 10), "val": -(-ROWS // 10), "test": 1000,
    }  # fmt: skip
    assert all(one["max_deviation"] < 1e-3 for one in found["splits"].values())
    assert all(done <= total for done, total in told)
    hashes = hashed(np.arange(ROWS), division_key(42))
    expected = []
    for entry in found["splits"]["test"]["classes"]:
        own = np.flatnonzero(labels == entry["value"])
        expected += own[np.argpartition(hashes[own], entry["rows"])[: entry["rows"]]].tolist()
    test = many.split_rows("test", **DIVIDED)
    assert test.tolist() == sorted(expected)
    val = many.split_rows("val", **DIVIDED)
    assert not np.intersect1d(val, test).size
    order = {"split": "val", "batch_size": 4096, "shuffle": True, "seed": 3, "fields": ["labels"], **DIVIDED}
    ids = np.concatenate([batch.rows for batch in many.batches(**order)])
    assert np.array_equal(np.sort(ids), val)
    last = many.batch(many.plan(**order).batches - 1, **order)
    assert np.array_equal(last["labels"], labels[last.rows])
    halves = [many.batch(7, **{**order, "shards": 2, "shard": shard, "batch_size": 2048}) for shard in (0, 1)]
    assert np.array_equal(np.concatenate([half.rows for half in halves]), many.batch(7, **order).rows)
    ascending = many.batch(3, **{**order, "shuffle": False, "seed": None})
    assert np.array_equal(ascending.rows, val[3 * 4096 : 4 * 4096])
    server.stop()
    server.start()
    again = report(server.url, "many", **DIVIDED)
    assert again == {**found}


def test_filters_limits_windows_and_statistics(feed: h5feed.Feed, labels: npt.NDArray[np.uint8]) -> None:
    """What else selects rows, and what describes them, works on bits as on lists."""
    many = feed["many"]
    test = many.split_rows("test", **DIVIDED)
    rare = many.split_rows("test", where="labels == 3", **DIVIDED)
    assert np.array_equal(rare, test[labels[test] == 3])
    every = many.splits(where="labels == 3", timeout=PATIENCE, **DIVIDED)
    assert every["splits"]["all"]["rows"] == np.count_nonzero(labels == 3)
    assert every["splits"]["test"]["rows"] == len(rare)
    order = {"batch_size": 50, "shuffle": True, "fields": ["labels"], **DIVIDED}
    first = np.concatenate([batch.rows for batch in many.batches(split="test", limit=200, window=30, **order)])
    assert np.array_equal(np.sort(first), test[:200])
    for field in ("labels", "x"):
        assert many.stats("test", field=field, timeout=PATIENCE, **DIVIDED)["rows"] == 1000


def test_stored_splits(feed: h5feed.Feed, server: ServerProcess) -> None:
    """Stored splits are ranges of rows, and are not divided again."""
    stored = feed["stored"]
    assert stored.split_rows("test").tolist() == [*range(20, 40)]
    assert stored.batch(0, split="train", batch_size=30).rows.tolist() == [*range(20), *range(40, 50)]
    found = stored.splits(timeout=PATIENCE)
    assert found["splits"]["train"]["rows"] == ROWS - 20 and found["splits"]["train"]["stored"]
    with pytest.raises(TooLarge, match="other splits than the stored ones"):
        stored.splits(test=0.1)


@pytest.mark.parametrize(
    ("refused", "options"),
    [
        ("group=", {"split": "train", "test": 0.1, "group": "labels"}),
        ("balance=", {"balance": True}),
        ("weights=", {"weights": "labels"}),
    ],
)
def test_what_needs_a_list_is_refused(feed: h5feed.Feed, refused: str, options: dict[str, Any]) -> None:
    with pytest.raises(TooLarge, match=f"more than the limit of {LISTED_ROWS} for {refused}"):
        feed["many"].batch(0, batch_size=8, **options)


def test_a_field_without_classes_is_refused(feed: h5feed.Feed) -> None:
    with pytest.raises(SplitImpossible, match="cannot stratify by 'x'"):
        feed["many"].splits(test=0.1, stratify="x", timeout=PATIENCE)


def test_pages(feed: h5feed.Feed, server: ServerProcess) -> None:
    """The pages show such splits, too."""
    query = "test=1000&val=0.1"
    report(server.url, "many", test=1000, val=0.1)
    for page in (f"/datasets/many/splits?{query}", f"/datasets/many/rows?split=test&{query}", "/datasets/stored"):
        answer = httpx.get(f"{server.url}{page}", headers={"accept": "text/html"}, timeout=60)
        assert answer.status_code == 200, (page, answer.text[:500])
    row = int(feed["many"].split_rows("test", **DIVIDED)[70])
    path = f"/datasets/many/rows/{row}?split=test&{query}&format=json"
    shown = httpx.get(server.url + path, timeout=60)
    assert shown.json()["place"] == 70


def test_a_cache_folder_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    """Bits that cannot be stored are refused, not found again for every request."""
    blocked = tmp_path / "blocked"
    blocked.write_text("not a folder")
    server = ServerProcess(data, blocked)
    try:
        answer = report(server.url, "many", **DIVIDED)
        assert answer["code"] == "too_large" and "cache folder" in answer["detail"]
    finally:
        server.stop()
