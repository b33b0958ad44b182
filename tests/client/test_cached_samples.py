"""The local cache and samples that are not single rows: the same batches as without it, from rows fetched once."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.cache.lists import Lists, ListStore
from h5feed.errors import BadParameter
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cached import Asked, all_same, damage
from tests.support.photographs import encoded, photograph
from tests.support.server_process import ServerProcess

EPISODES = [9, 14, 1, 12, 17, 3]
ROBOT_ROWS = sum(EPISODES)
SCANS, SHAPE = 17, (10, 8, 6)
PAIRS, TEXTS = 60, 90
GENERATOR = np.random.default_rng(0)
IDS = GENERATOR.permutation(200)[:PAIRS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "robot.h5", "w") as file:
        for number, rows in enumerate(EPISODES):
            group = file.create_group(f"data/demo_{number}")
            group["actions"] = GENERATOR.random((rows, 3)).astype("f4")
            group["rewards"] = GENERATOR.random(rows)
            group["obs/image"] = GENERATOR.integers(0, 256, (rows, 6, 5, 3), np.uint8)
    with h5py.File(folder / "series.h5", "w") as file:
        file["x"] = GENERATOR.random((80, 2))
        file["trial"] = np.repeat([7, 3, 5], [30, 20, 30])
        file["words"] = [f"row {row}" for row in range(80)]
    with h5py.File(folder / "scans.h5", "w") as file:
        volumes = GENERATOR.integers(0, 256, (SCANS, *SHAPE), np.uint8)
        file.create_dataset("volume", data=volumes, chunks=(1, 4, 4, 4), compression="gzip")
        file["mask"] = volumes > 128
        file["waves"] = (GENERATOR.random((SCANS, *SHAPE)) + 1j).astype("c8")
        file["labels"] = np.arange(SCANS) % 2
        file["note"] = [f"scan {number}" * (number % 3) for number in range(SCANS)]
    lengths = np.minimum(GENERATOR.geometric(0.05, TEXTS) - 1, 150)
    with h5py.File(folder / "texts.h5", "w") as file:
        for name in ("tokens", "tags"):
            file[name] = GENERATOR.integers(1, 500, lengths.sum(), dtype=np.int32)
            file[f"{name}.offsets"] = np.concatenate([[0], np.cumsum(lengths)])
        file["text"] = ["ä" * (number % 7) + str(number) for number in range(TEXTS)]
        file["labels"] = np.arange(TEXTS) % 3
    with h5py.File(folder / "photos.h5", "w") as file:
        photos = file.create_dataset("photo", (PAIRS,), h5py.vlen_dtype(np.uint8))
        for row in range(PAIRS):
            photos[row] = np.frombuffer(encoded(photograph(row, 40, 32), quality=95), np.uint8)
        photos.attrs.update({"encoding": "mixed", "shape": (40, 32, 3)})
        file["id"] = IDS[::-1]
    with h5py.File(folder / "huge.h5", "w") as file:
        file.create_dataset("volume", data=np.ones((3, 40, 40, 50), np.uint8), chunks=(1, 8, 8, 8), compression="gzip")
    with h5py.File(folder / "main.h5", "w") as file:
        file["images"] = GENERATOR.integers(0, 256, (PAIRS, 4, 4), np.uint8)
        file["labels"], file["id"] = np.arange(PAIRS) % 3, IDS
    with h5py.File(folder / "deep.h5", "w") as file:
        ids = GENERATOR.permutation(np.concatenate([IDS, np.arange(1000, 1030)]))
        file["depth"] = GENERATOR.random((len(ids), 4, 4), np.float32)
        file["number"], file["words"] = ids, [f"word {number}" * (number % 3) for number in ids]
    with h5py.File(folder / "part.h5", "w") as file:
        file["x"], file["id"] = GENERATOR.random((120, 2)), GENERATOR.permutation(120)
    for name, step in (("lists", 1), ("reversed", -1)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            items = file.create_dataset("items", (PAIRS,), h5py.vlen_dtype(np.int32))
            for row in range(PAIRS):
                items[row] = np.arange(IDS[::step][row] % 9) + 100 * row
            file["id"] = IDS[::step]
    with h5py.File(folder / "beside.h5", "w") as file:
        file["images"] = GENERATOR.integers(0, 9, (PAIRS, 2))
    return folder


@pytest.fixture(scope="module")
def server(data: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    return serve_module(data)


@pytest.fixture(scope="module")
def feed(server: ServerProcess) -> Iterator[h5feed.Feed]:
    with h5feed.connect(server.url, deadline=60, local=False) as connected:
        yield connected


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """New names of folders."""
    base = tmp_path_factory.mktemp("caches")
    return (base / str(number) for number in itertools.count())


@contextlib.contextmanager
def counted(server: ServerProcess) -> Iterator[tuple[h5feed.Feed, Asked]]:
    asked = Asked()
    with h5feed.connect(server.url, deadline=60, local=False, event_hooks={"request": [asked]}) as connected:
        yield connected, asked


def nothing_but_row_ids(asked: Asked) -> bool:
    paths = [request.url for request in asked.requests if "/batches" in request.url.path]
    return not asked.single_rows and all(
        "rows" in (url.params.get("body"),) or url.params.get("fields") == "" for url in paths
    )


OFFSETS: list[dict[str, Any]] = [
    {"sequence_length": 3},
    {"sequence_length": 4, "sampling_rate": 2, "sequence_stride": 3},
    {"offsets": {"actions": range(4), "obs.image": [-1, 0]}},
    {"offsets": {"actions": [-20, 5, 0], "rewards": 2}, "ends": "pad"},
    {"offsets": {"later": ("actions", 1), "actions": 0}, "fields": ["actions", "later", "obs.image"]},
    {"sequence_length": 2, "offsets": {"rewards": 0, "later": ("obs.image", -3)}},
]
ORDERS = st.fixed_dictionaries(
    {"shuffle": st.booleans(), "seed": st.integers(0, 3), "epoch": st.integers(0, 2), "batch_size": st.integers(1, 20)},
    optional={"limit": st.integers(5, 30)},
)
SHARDS = st.sampled_from([{}, {}, {"shard": 1, "shards": 3}, {"shard": 0, "shards": 2, "last": "drop"}])


def either(
    dataset: h5feed.Dataset, folders: Iterator[Path], cache_bytes: int | None, options: dict[str, Any]
) -> h5feed.cache.RowCache:
    """Twice with one cache, so that the second time the rows are there, or are not, if it is too small."""
    cache = dataset.cache(next(folders), cache_bytes)
    with warnings.catch_warnings():
        if cache_bytes is not None:
            warnings.simplefilter("ignore", RuntimeWarning)
        for epoch in (options["epoch"], options["epoch"] + 1):
            all_same(dataset, cache, **{**options, "epoch": epoch})
    return cache


BOUNDS = st.sampled_from([None, None, 60_000])
ENDS = st.sampled_from(["drop", "pad"])


@given(windows=st.sampled_from(OFFSETS), ends=ENDS, order=ORDERS, shards=SHARDS, most=BOUNDS)
def test_windows(
    feed: h5feed.Feed,
    folders: Iterator[Path],
    windows: dict[str, Any],
    ends: str,
    order: dict[str, Any],
    shards: dict[str, Any],
    most: int | None,
) -> None:
    """Sequences, offsets, other names, masks: the same, also when the cache is too small for all rows."""
    options = {"fields": ["obs.image", "actions", "rewards"], "ends": ends} | windows
    either(feed["robot"], folders, most, {**options, **order, **shards})


@given(order=ORDERS, split=st.sampled_from(["train", "val"]), ends=ENDS)
def test_windows_of_splits(
    feed: h5feed.Feed, folders: Iterator[Path], order: dict[str, Any], split: str, ends: str
) -> None:
    """Rows beyond the end of a split are not in a sample; text is taken at one offset."""
    options: dict[str, Any] = {"split": split, "val": 0.3, "ends": ends, "fields": ["x", "words", "trial"], **order}
    options |= {"offsets": {"x": [-2, 0, 1], "words": 1, "trial": 0}, "episode": "trial", "where": "trial in 3, 7"}
    either(feed["series"], folders, None, options)


def test_windows_and_rows_share_a_cache(server: ServerProcess, tmp_path: Path) -> None:
    """Each row crosses the network once, whatever the orders are."""
    fields: dict[str, Any] = {"fields": ["obs.image", "actions"], "batch_size": 8}
    windows: dict[str, Any] = {**fields, "offsets": {"actions": range(4)}, "ends": "pad", "shuffle": True}
    with counted(server) as (feed, asked):
        robot = feed["robot"]
        for batch in robot.batches(limit=20, cache=tmp_path, **fields):
            assert len(batch.rows)
        asked.requests.clear()
        for _ in robot.batches(cache=tmp_path, connections=1, **windows):
            pass
        assert sorted(asked.single_rows) == list(range(20, ROBOT_ROWS)), "only what is missing, once"
        for epoch in (1, 2):
            asked.requests.clear()
            assert all_same(robot, tmp_path, epoch=epoch, **windows) == ROBOT_ROWS
            assert all_same(robot, tmp_path, epoch=epoch, shuffle=True, **fields) == ROBOT_ROWS
        asked.requests.clear()
        for epoch in (3, 4):
            for order in (windows, {**fields, "shuffle": True}, {**fields, "sequence_length": 3}):
                for batch in robot.batches(cache=tmp_path, epoch=epoch, **order):
                    assert len(batch.rows)
        assert nothing_but_row_ids(asked)
        assert robot.cache(tmp_path).cached_rows == ROBOT_ROWS


def test_what_a_loop_tells_of_windows(feed: h5feed.Feed, tmp_path: Path) -> None:
    """A later pass gets no rows, and says how many samples came from the cache."""
    loader = feed["robot"].loader(
        x=["obs.image", "actions.mask"],
        y="actions",
        offsets={"actions": range(4)},
        ends="pad",
        batch_size=8,
        shuffle=True,
        cache=tmp_path,
    )
    for _ in range(3):
        # The next pass is read ahead.
        assert len(list(loader)) == 7
    before = loader.stats()
    assert len(list(loader)) == 7
    after = loader.stats()
    rows = ROBOT_ROWS * (6 * 5 * 3 + 3 * 4)
    assert before.bytes > rows > after.bytes - before.bytes
    assert after.cached - before.cached == ROBOT_ROWS


def test_a_pass_with_a_cache_resumes(server: ServerProcess, feed: h5feed.Feed, tmp_path: Path) -> None:
    """In the middle, with another cache, after the server was started anew."""
    options: dict[str, Any] = {"x": ["obs.image", "obs.image.mask"], "y": "later", "batch_size": 8, "shuffle": True}
    options |= {"sequence_length": 2, "offsets": {"later": ("actions", 3)}, "ends": "pad", "seed": 2}
    whole = list(feed["robot"].loader(**options))
    loader = feed["robot"].loader(**options, cache=tmp_path / "one")
    for _, _ in zip(range(3), loader, strict=False):
        state = loader.state_dict()
    server.stop()
    server.start()
    for cache in ("one", "two"):
        resumed = feed["robot"].loader(**options, cache=tmp_path / cache)
        resumed.load_state_dict(state)
        rest = list(resumed)
        assert len(whole) == 7 and len(rest) == 4
        for (x, y), (known, later) in zip(rest, whole[-4:], strict=True):
            np.testing.assert_array_equal(y, later)
            for name in known:
                np.testing.assert_array_equal(x[name], known[name])


READ = """
import json, sys, h5feed
url, folder, name, options = sys.argv[1:]
with h5feed.connect(url, local=False) as feed:
    for epoch in range(4):
        for batch in feed[name].batches(shuffle=True, epoch=epoch, batch_size=3, cache=folder, **json.loads(options)):
            pass
"""


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("robot", {"fields": ["obs.image", "actions"], "sequence_length": 3, "ends": "pad"}, ROBOT_ROWS),
        ("texts", {"fields": ["tokens", "tags"], "pack": 32, "overlong": "split", "pack_by": "tags"}, TEXTS),
    ],
)
def test_processes_share_rows(
    server: ServerProcess, feed: h5feed.Feed, tmp_path: Path, name: str, options: dict[str, Any], rows: int
) -> None:
    """Two processes fill a folder that a third one reads and fills meanwhile; each row is stored once."""
    command = [sys.executable, "-c", READ, server.url, str(tmp_path), name, json.dumps(options)]
    writers = [subprocess.Popen(command) for _ in range(2)]
    dataset = feed[name]
    for epoch in range(3):
        all_same(dataset, tmp_path, **options, shuffle=True, epoch=epoch)
    assert [writer.wait(120) for writer in writers] == [0, 0]
    all_same(dataset, tmp_path, fields=options["fields"])
    assert dataset.cache(tmp_path).cached_rows == rows
    nbytes = [path.stat().st_size for path in tmp_path.rglob("*.lists")]
    assert nbytes == ([] if name == "robot" else [4 * dataset.take(range(TEXTS), fields=["tokens"])["tokens"].size] * 2)


JOINS: dict[str, list[str]] = {
    "deep:id=number": ["deep/depth", "deep/words"],
    "beside": ["beside/images"],
    "part:id": ["part/x"],
}


@given(
    joins=st.lists(st.sampled_from(sorted(JOINS)), min_size=1, unique=True),
    own=st.sampled_from([[], ["images"], ["images", "labels"]]),
    order=ORDERS,
    shards=SHARDS,
    most=BOUNDS,
)
def test_joins(
    feed: h5feed.Feed,
    folders: Iterator[Path],
    joins: list[str],
    own: list[str],
    order: dict[str, Any],
    shards: dict[str, Any],
    most: int | None,
) -> None:
    """By number, by key, and of rows with partners only; with text of another dataset."""
    options: dict[str, Any] = {"fields": [*own, *(name for join in joins for name in JOINS[join])], **order, **shards}
    dataset = feed["main"].join(*joins, how="inner" if "part:id" in joins else None)
    either(dataset, folders, most, options)


@given(ends=st.sampled_from(["drop", "pad", "pad_start", "pad_end"]), order=ORDERS, most=BOUNDS)
def test_joined_windows(
    feed: h5feed.Feed, folders: Iterator[Path], ends: str, order: dict[str, Any], most: int | None
) -> None:
    """By row number; by key, at the sample's own row."""
    offsets = {"images": [-2, 0, 1], "beside/images": [-1, 3]}
    by_number = feed["main"].join("beside")
    options = {"offsets": offsets, "ends": ends, "fields": ["images", "beside/images"], **order}
    either(by_number, folders, most, options)
    by_key = feed["main"].join("deep:id=number")
    options |= {"offsets": {"images": [-2, 0, 1], "deep/depth": 0}, "fields": ["images", "deep/depth", "deep/words"]}
    either(by_key, folders, most, options)


def test_windows_of_rows_joined_by_key(feed: h5feed.Feed, tmp_path: Path) -> None:
    """Refused: the partners of the other rows are not known here."""
    joined = feed["main"].join("deep:id=number")
    options: dict[str, Any] = {"sequence_length": 3, "fields": ["images", "deep/depth"]}
    with pytest.raises(BadParameter, match="'deep' is joined by key, and 'deep/depth' is taken at other rows"):
        next(iter(joined.batches(cache=tmp_path, **options)))
    all_same(joined, tmp_path, **{**options, "fields": ["images"]})


@pytest.mark.parametrize("options", [{"pack": 20}, {"pad": ["items", "reversed/items"], "max_length": 8}], ids=str)
def test_joined_lists(feed: h5feed.Feed, tmp_path: Path, options: dict[str, Any]) -> None:
    joined = feed["lists"].join("reversed:id")
    options = {"fields": ["items", "reversed/items"], "batch_size": 7, "shuffle": True, "last": "pad", **options}
    if "pack" in options:
        options["pack_by"] = "items"
    for epoch in (0, 1, 0):
        all_same(joined, tmp_path, epoch=epoch, **options)


def test_joined_rows_are_fetched_once(server: ServerProcess, tmp_path: Path) -> None:
    """Each dataset has its cache in the folder, which its own loops use as well."""
    options: dict[str, Any] = {"fields": ["images", "deep/depth", "beside/images"], "batch_size": 8, "shuffle": True}
    options |= {"join": ["deep:id=number", "beside"], "cache": tmp_path}
    with counted(server) as (feed, asked):
        for _ in feed["main"].batches(**options, connections=1):
            pass
        posts = [request.url.path.split("/")[3] for request in asked.requests if request.method == "POST"]
        assert {*posts} == {"main", "deep", "beside"}
        assert len(asked.single_rows) == 3 * PAIRS
        asked.requests.clear()
        for epoch in (1, 2):
            for batch in feed["main"].batches(**options, epoch=epoch):
                assert len(batch.rows)
        assert nothing_but_row_ids(asked)
        asked.requests.clear()
        for _ in feed["deep"].batches(fields=["depth"], cache=tmp_path):
            pass
        assert len(asked.single_rows) == 30, "those that no row of main has"
        assert feed["beside"].cache(tmp_path).store("images", np.dtype("i8"), (2,)).count() == PAIRS  # type: ignore[union-attr]


CROPS: list[dict[str, Any]] = [
    {"crop": (4, 4, 4), "fields": ["volume", "mask", "labels"]},
    {"crop": (3, 8), "fields": ["volume", "waves"]},
    {"crop": 7, "fields": ["mask"]},
    {"crop": (4, 3), "crop_fields": ["mask"], "fields": ["volume", "mask"]},
]


@given(
    crop=st.sampled_from(CROPS),
    at=st.sampled_from(["random", "center", "grid"]),
    order=ORDERS,
    shards=SHARDS,
    more=st.sampled_from([{}, {}, {"sequence_length": 2, "ends": "pad"}, {"offsets": {"mask": [0, 2]}}]),
    most=BOUNDS,
)
def test_crops(
    feed: h5feed.Feed,
    folders: Iterator[Path],
    crop: dict[str, Any],
    at: str,
    order: dict[str, Any],
    shards: dict[str, Any],
    more: dict[str, Any],
    most: int | None,
) -> None:
    """Cut from cached rows, at the same places; of rows that do not fit into the cache, the server cuts."""
    either(feed["scans"], folders, most, {**crop, "crop_at": at, **order, **shards, **more})


def test_crops_of_drawn_rows_and_text(feed: h5feed.Feed, folders: Iterator[Path]) -> None:
    """Rows that are drawn twice have two places; text comes whole."""
    options: dict[str, Any] = {"fields": ["volume", "note"], "crop": (4, 4, 4), "batch_size": 5, "epoch": 0}
    either(feed["scans"], folders, None, {**options, "balance": True, "epoch_rows": 60, "fields": ["volume"]})
    either(feed["scans"], folders, None, {**options, "shuffle": True})
    either(feed["scans"], folders, None, {**options, "shuffle": True, "crop_at": "grid"})


def test_whole_rows_are_fetched_once(server: ServerProcess, tmp_path: Path) -> None:
    """The first pass gets whole rows, each once; later ones get none, wherever the crops are."""
    options: dict[str, Any] = {"fields": ["volume", "mask"], "crop": (4, 4, 4), "batch_size": 4}
    with counted(server) as (feed, asked):
        for _ in feed["scans"].batches(**options, crop_at="grid", cache=tmp_path, connections=1):
            pass
        assert sorted(asked.single_rows) == list(range(SCANS))
        asked.requests.clear()
        for at in ("random", "center", "grid"):
            for batch in feed["scans"].batches(**options, crop_at=at, cache=tmp_path, shuffle=True):
                assert batch["volume"].shape[1:] == (4, 4, 4)
        for batch in feed["scans"].batches(fields=["mask", "volume"], cache=tmp_path):
            assert batch["volume"].shape[1:] == SHAPE
        assert nothing_but_row_ids(asked)


def test_a_row_that_is_too_long_to_be_kept(data: Path, tmp_path: Path) -> None:
    """A response could not hold it, but could hold its crops: the message says so."""
    small = ServerProcess(data, tmp_path / "server", H5FEED_MAX_BODY_BYTES="65536")
    with h5feed.connect(small.url, deadline=60, local=False) as feed:
        options: dict[str, Any] = {"fields": ["volume"], "crop": (8, 8, 8), "batch_size": 1}
        assert len([*feed["huge"].batches(**options)]) == 3
        with pytest.raises(BadParameter, match=r"a row of 'volume' has 80,000 bytes, and a response may have 65,536"):
            feed["huge"].batches(**options, cache=tmp_path / "cache")
    assert small.stop() == 0


@given(
    pack=st.sampled_from([20, 64]),
    overlong=st.sampled_from(["truncate", "split"]),
    fields=st.sampled_from([["tokens"], ["tokens", "tags"]]),
    order=ORDERS,
    shards=SHARDS,
    most=st.sampled_from([None, None, 100_000]),
)
def test_packed_rows(
    feed: h5feed.Feed,
    folders: Iterator[Path],
    pack: int,
    overlong: Any,
    fields: list[str],
    order: dict[str, Any],
    shards: dict[str, Any],
    most: int | None,
) -> None:
    """Of lists that are cached as a whole, those items are in a packed row that the server would send."""
    options: dict[str, Any] = {"pack": pack, "overlong": overlong, "fields": fields, "pack_by": "tokens"}
    either(feed["texts"], folders, most, {**options, **order, **shards})


@given(
    layout=st.sampled_from(
        [
            {},
            {"pad": "tokens"},
            {"pad": ["tokens", "text"], "max_length": {"tokens": 12, "text": 4}, "truncate": "end"},
            {"pad": "tokens", "max_length": 9, "truncate": "start"},
            {"pad": "tokens", "bucket": 30, "bucket_by": "tokens"},
        ]
    ),
    order=ORDERS,
    most=st.sampled_from([None, None, 100_000]),
)
def test_lists_and_text(
    feed: h5feed.Feed, folders: Iterator[Path], layout: dict[str, Any], order: dict[str, Any], most: int | None
) -> None:
    """Rows that differ in length are cached as well, and padded as without a cache."""
    either(feed["texts"], folders, most, {"fields": ["tokens", "text", "labels"], **layout, **order})


def test_lists_are_fetched_once(server: ServerProcess, tmp_path: Path) -> None:
    """Packed, padded and flat ones have the same rows."""
    options: dict[str, Any] = {"fields": ["tokens"], "batch_size": 4, "cache": tmp_path, "shuffle": True}
    with counted(server) as (feed, asked):
        packed = {**options, "pack": 32, "overlong": "split", "pack_by": "tokens"}
        for _ in feed["texts"].batches(**packed, connections=1):
            pass
        assert len(asked.single_rows) == len({*asked.single_rows}) < TEXTS, "rows without items are left out"
        for _ in feed["texts"].batches(**options):
            pass
        asked.requests.clear()
        for epoch in (1, 2):
            for _ in feed["texts"].batches(**packed, epoch=epoch):
                pass
            for batch in feed["texts"].batches(**options, pad="tokens", epoch=epoch):
                assert len(batch.rows)
        assert nothing_but_row_ids(asked)
    before = {path: path.stat().st_size for path in tmp_path.rglob("*.lists")}
    with h5feed.connect(server.url, deadline=60, local=False) as other:
        assert all_same(other["texts"], tmp_path, fields=["tokens"], shuffle=True) == TEXTS
    assert before == {path: path.stat().st_size for path in tmp_path.rglob("*.lists")} and len(before) == 1


@pytest.mark.parametrize("how", ["rows lost", "a few bytes", "cut off", "empty", "longer"])
@pytest.mark.parametrize("ending", [".lists", ".entries"])
def test_torn_lists_are_never_delivered(server: ServerProcess, tmp_path: Path, how: str, ending: str) -> None:
    """Whatever part of the files was lost: a process that opens them delivers the server's rows, and mends them."""
    options: dict[str, Any] = {"batch_size": 16, "fields": ["tokens", "text"]}
    with h5feed.connect(server.url, local=False) as feed:
        assert all_same(feed["texts"], tmp_path, **options) == TEXTS
    damaged = list(tmp_path.rglob(f"*{ending}"))
    assert len(damaged) == 2
    for path in damaged:
        damage(path, how)
    with counted(server) as (feed, asked), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        texts = feed["texts"]
        for epoch in range(2):
            assert all_same(texts, tmp_path, shuffle=True, epoch=epoch, **options) == TEXTS
        asked.requests.clear()
        for batch in texts.batches(**options, cache=tmp_path):
            assert len(batch.rows)
        assert nothing_but_row_ids(asked)


def test_a_store_of_lists(tmp_path: Path) -> None:
    """Rows come back as they were put, whole or in part; empty and repeated ones too, and each is stored once."""
    values = [100 * number + np.arange(number * 3, dtype=np.int32) for number in range(10)]

    def lists(rows: list[int]) -> Lists:
        offsets = np.cumsum([0, *(len(values[row]) for row in rows)])
        return Lists(np.concatenate([values[row] for row in rows]), offsets)

    one, two = (ListStore(tmp_path / "f.lists", 10, np.dtype(np.int32)) for _ in range(2))
    assert one.fresh and one.put(np.array([5, 0, 9, 5]), lists([5, 0, 9, 5])) == 3
    assert two.put(np.array([9, 2]), lists([9, 2])) == 1
    assert (tmp_path / "f.lists").stat().st_size == 4 * (15 + 0 + 27 + 6)
    for store in (one, two, ListStore(tmp_path / "f.lists", 10, np.dtype(np.int32))):
        assert not store.fresh and store.count() == 4
        for _ in range(2):
            found = store.take(np.array([9, 1, 0, 5, 2, 9]))
            assert [None if own is None else own.tolist() for own in found] == [
                None if row == 1 else values[row].tolist() for row in (9, 1, 0, 5, 2, 9)
            ]
            parts = store.take(np.array([9, 9, 0]), np.array([[3, 4], [26, 2], [0, 0]]))
            assert parts[0] is not None and parts[0].tolist() == [903, 904, 905, 906]
            assert parts[1] is None and parts[2] is not None and not len(parts[2])
    # Cut off and filled with other rows: what was known is not believed any more.
    os.truncate(tmp_path / "f.lists", 0)
    other = ListStore(tmp_path / "f.lists", 10, np.dtype(np.int32))
    assert other.put(np.array([8]), lists([8])) == 1
    assert one.take(np.array([5]), np.array([[0, 2]])) == [None]
    assert one.put(np.array([5]), lists([5])) == 1
    assert (other.take(np.array([5]))[0] == values[5]).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("decode", ["auto", "server", "client"])
def test_image_files(feed: h5feed.Feed, folders: Iterator[Path], decode: Any) -> None:
    """Their pixels are cached, whoever decodes them, and so are the files, if these are asked for."""
    photos, folder = feed["photos"], next(folders)
    options: dict[str, Any] = {"fields": ["photo"], "batch_size": 7, "decode": decode}
    joined: dict[str, Any] = {"join": "photos:id", "fields": ["images", "photos/photo"], "decode": decode}
    for epoch in range(3):
        shuffled: dict[str, Any] = {**options, "shuffle": True, "epoch": epoch}
        all_same(photos, folder, **shuffled)
        all_same(photos, folder, **shuffled, sequence_length=2, ends="pad")
        all_same(photos, folder, **shuffled, crop=(16, 16))
        all_same(photos, folder, **shuffled, encoded=["photo"])
        all_same(feed["main"], folder, **joined, shuffle=True, epoch=epoch)
        all_same(photos, folder, **{**shuffled, "fields": ["main/images", "photo"]}, join="main:id")
        all_same(feed["main"], folder, **joined, encoded=["photos/photo"])
    both: dict[str, Any] = {**options, "fields": ["photo", "after"], "offsets": {"after": ("photo", 1)}, "ends": "pad"}
    all_same(photos, folder, **both)
    with pytest.raises(BadParameter, match="'photo' and 'after' are rows of the same field"):
        photos.batches(cache=folder, **both, encoded=["photo"])
    cache = photos.cache(folder)
    assert cache.store("photo", np.dtype(np.uint8), (40, 32, 3)).count() == PAIRS  # type: ignore[union-attr]
    assert cache.list_store("photo", np.dtype(np.uint8)).count() == PAIRS  # type: ignore[union-attr]


def test_bodies_of_row_ids(server: ServerProcess) -> None:
    """They are documented, and depend on their URL alone, like others."""
    url = f"{server.url}/v1/datasets/robot/batches/0"
    params: dict[str, Any] = {"body": "rows", "ends": "pad", "offsets": "actions:-1..2", "fields": "", "batch_size": 4}
    one, two = (httpx.get(url, params=params, timeout=60) for _ in range(2))
    assert one.status_code == 200 and one.content == two.content and one.headers["etag"] == two.headers["etag"]
    from safetensors.numpy import load

    tensors = load(one.content)
    assert tensors["__rows__"].tolist() == [0, 1, 2, 3]
    assert tensors["__episode__"].tolist() == [[0, EPISODES[0]]] * 4
    refused = httpx.get(url, params={**params, "to_row": 2}, timeout=60)
    assert refused.status_code == 400 and "leave out body=rows" in refused.text


def test_mixtures(feed: h5feed.Feed, folders: Iterator[Path]) -> None:
    """Windows of several sources, each of which has its rows in one folder; also of a dataset that is joined."""
    mixture = h5feed.mix({"one": feed["robot"], "two": feed["robot"]}, weights={"one": 0.5, "two": 0.5}, stop="all")
    options: dict[str, Any] = {"fields": ["obs.image", "actions"], "batch_size": 7, "shuffle": True}
    folder = next(folders)
    for epoch in range(2):
        for more in ({}, {"sequence_length": 2, "ends": "pad"}, {"offsets": {"actions": range(3)}}):
            count = all_same(mixture, folder, epoch=epoch, **options, **more)  # type: ignore[arg-type]
            assert count > ROBOT_ROWS
    joined = h5feed.mix({"a": feed["main"].join("deep:id=number"), "b": feed["main"].join("deep:id=number")})
    for epoch in range(2):
        fields = ["images", "deep/depth"]
        all_same(joined, folder, epoch=epoch, fields=fields, batch_size=9, shuffle=True)  # type: ignore[arg-type]
