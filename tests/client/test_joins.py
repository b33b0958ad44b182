"""Joins of datasets: the rows of several datasets in one sample, by number and by key."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import httpx
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import (
    AmbiguousKey,
    BadParameter,
    DatasetNotFound,
    FieldNotFound,
    KeysNotFound,
    RevisionChanged,
    UnsupportedField,
)
from h5feed_server.cli import main as server_main
from h5feed_server.splits.joins_spec import Join
from hypothesis import given
from hypothesis import strategies as st

from tests.support.server_process import ServerProcess

HTTP = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0))
"""Patient, and with a new connection for each request: servers are killed and started again."""

ROWS, MORE = 90, 130
GENERATOR = np.random.default_rng(0)
IDS = GENERATOR.permutation(200)[:ROWS]
"""The key of each row of `main`, of which `deep` has all, and `part` those below 120."""
OTHER_IDS = GENERATOR.permutation(np.concatenate([IDS, np.arange(1000, 1000 + MORE - ROWS)]))
PART_IDS = GENERATOR.permutation(120)
LABELS = np.arange(ROWS) % 3
WEIGHTS = GENERATOR.random(ROWS)

IMAGES = GENERATOR.integers(0, 256, (ROWS, 4, 4, 3), np.uint8)
DEPTH = GENERATOR.random((MORE, 4, 4), np.float32)
PART = GENERATOR.random((len(PART_IDS), 2))
BESIDE = GENERATOR.integers(0, 9, (ROWS, 2))


def texts(ids: npt.NDArray[Any]) -> list[str]:
    return [f"scans/ä{number}.png" for number in ids]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "main.h5", "w") as file:
        file["images"], file["labels"], file["id"], file["w"] = IMAGES, LABELS, IDS, WEIGHTS
        file["name"] = texts(IDS)
    with h5py.File(folder / "deep.h5", "w") as file:
        file.create_dataset("depth", data=DEPTH, chunks=(8, 4, 4), compression="gzip")
        file["number"], file["name"], file["labels"] = OTHER_IDS.astype(np.uint16), texts(OTHER_IDS), OTHER_IDS % 2
        file["words"] = [f"word {number}" * (number % 3) for number in OTHER_IDS]
        file["twice"] = OTHER_IDS // 2
    with h5py.File(folder / "part.h5", "w") as file:
        file["x"], file["id"] = PART, PART_IDS
    with h5py.File(folder / "beside.h5", "w") as file:
        file["x"] = BESIDE
    return folder


@pytest.fixture(scope="module")
def server(data: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    return serve_module(data, "--workers", "2")


@pytest.fixture(scope="module")
def second(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Dataset]:
    """The main dataset on another server."""
    process = ServerProcess(data, tmp_path_factory.mktemp("cache"))
    with h5feed.connect(process.url, deadline=60) as feed:
        yield feed["main"]
    assert process.stop() == 0


@pytest.fixture(scope="module")
def ds(server: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["main"]


def place_of(ids: npt.NDArray[Any], among: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Where each id is among others; -1: nowhere."""
    return np.array([next(iter(np.flatnonzero(among == one)), -1) for one in ids])


IN_DEEP, IN_PART = place_of(IDS, OTHER_IDS), place_of(IDS, PART_IDS)
JOINS: dict[str, dict[str, npt.NDArray[Any]]] = {
    "deep:id=number": {"deep/depth": DEPTH[IN_DEEP]},
    "deep:name": {"deep/depth": DEPTH[IN_DEEP], "deep/labels": OTHER_IDS[IN_DEEP] % 2},
    "beside": {"beside/x": BESIDE},
    "part:id": {"part/x": PART[IN_PART]},
}


@given(
    joins=st.lists(st.sampled_from(sorted(JOINS)), min_size=1, unique_by=lambda text: text.partition(":")[0]),
    split=st.sampled_from(["all", "train", "val"]),
    shuffle=st.booleans(),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 2),
    shards=st.sampled_from([1, 3]),
    batch_size=st.integers(1, 40),
    where=st.sampled_from([None, "labels in 0, 1"]),
    limit=st.sampled_from([None, 30]),
    draw=st.sampled_from([{}, {}, {"window": 7}, {"balance": True}, {"weights": "w", "epoch_rows": 70}]),
    decoding=st.sampled_from([{}, {"decode": "server"}, {"decode": "client"}, {"compress": "zstd"}]),
)
def test_against_numpy(
    ds: h5feed.Dataset,
    second: h5feed.Dataset,
    joins: list[str],
    split: str,
    shuffle: bool,
    seed: int,
    epoch: int,
    shards: int,
    batch_size: int,
    where: str | None,
    limit: int | None,
    draw: dict[str, Any],
    decoding: dict[str, Any],
) -> None:
    """The rows of numpy's lookup, each sample once, in any batch, in disjoint shards, from a second server, too."""
    inner = {"how": "inner"} if "part:id" in joins else {}
    rows_of: dict[str, Any] = {"split": split, "where": where, "limit": limit}
    rows_of |= {"val": 0.3} if split != "all" else {}
    options: dict[str, Any] = {**rows_of, "shuffle": shuffle, "seed": seed, "epoch": epoch, "batch_size": batch_size}
    draw = draw if shuffle or "window" not in draw else {}
    options |= {**draw, "shards": shards, "join": joins, **inner}
    fields = {name: values for join in joins for name, values in JOINS[join].items()} | {"images": IMAGES}
    seen, found = [], False
    for shard in range(shards):
        batches = [*ds.batches(**options, **decoding, shard=shard, fields=sorted(fields))]
        for batch in batches:
            found = True
            for name, values in fields.items():
                np.testing.assert_array_equal(batch[name], values[batch.rows])
                assert batch[name].dtype == values.dtype
            real = batch.rows if batch.weight is None else batch.rows[batch.weight > 0]
            seen += real.tolist()
        if batches:
            again = second.batch(len(batches) - 1, **options, shard=shard, fields=sorted(fields))
            assert again.rows.tolist() == batches[-1].rows.tolist()
            for name in fields:
                np.testing.assert_array_equal(again[name], batches[-1][name])
    if draw.keys() <= {"window"}:
        pool = ds.split_rows(split, **{name: rows_of[name] for name in ("where", "val") if name in rows_of})
        pool = pool[IN_PART[pool] >= 0] if inner else pool
        assert sorted(seen) == pool[:limit].tolist()
    elif inner:
        assert (IN_PART[seen] >= 0).all()
    assert found or not seen


def test_text_and_default_fields(ds: h5feed.Dataset) -> None:
    """Text of another dataset comes as its bytes; by default, its inputs come with those of the dataset."""
    batch = next(iter(ds.batches(batch_size=20, shuffle=True, join="deep:name", fields=["deep/words", "deep/name"])))
    assert batch.text("deep/words") == [f"word {number}" * (number % 3) for number in IDS[batch.rows]]
    joined = ds.join("deep:name", "beside")
    batch = joined.batch(0)
    assert {*batch} == {"images", "labels", "beside/x"}
    assert joined.take([3, 1]).rows.tolist() == [3, 1]
    with pytest.raises(BadParameter, match="'main' alone"):
        joined.take([1], fields=["deep/depth"])
    assert joined.splits(val=0.2)["splits"]["val"]["rows"] == 18


def test_loops(ds: h5feed.Dataset, server: ServerProcess) -> None:
    """Keras and the loader get samples of several inputs, resume in the middle, and are recorded with all revisions."""
    options: dict[str, Any] = {"batch_size": 8, "shuffle": True, "seed": 3, "join": ["deep:id=number", "part:id"]}
    options |= {"how": "inner", "x": ["images", "deep/depth", "part/x"], "y": "labels"}
    kept = np.flatnonzero(IN_PART >= 0)
    train = ds.sequence(verbose=False, **options)
    assert train.samples == len(kept) and sorted(train.row_ids.tolist()) == kept.tolist()
    assert train.class_weight.keys() == {0, 1, 2}
    rows = [batch.rows for batch in ds.batches(batch_size=8, shuffle=True, seed=3, join="part:id", how="inner")]

    def check(batches: Any, expected: list[npt.NDArray[Any]]) -> None:
        for (x, y), own in zip(batches, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(x["images"]), IMAGES[own])
            np.testing.assert_array_equal(np.asarray(x["deep/depth"]), DEPTH[IN_DEEP[own]])
            np.testing.assert_array_equal(np.asarray(x["part/x"]), PART[IN_PART[own]])
            np.testing.assert_array_equal(np.asarray(y), LABELS[own])

    check((train[index] for index in range(len(train))), rows)
    loader = ds.loader(**options)
    steps = iter(loader)
    check([next(steps), next(steps)], rows[:2])
    state = json.loads(json.dumps(loader.state_dict()))
    again = pickle.loads(pickle.dumps(ds.loader(**options)))
    again.load_state_dict(state)
    check(again, rows[2:])
    with pytest.raises(BadParameter, match="how="):
        ds.loader(**{**options, "how": None, "where": "id < 120"}).load_state_dict(state)
    record = json.loads(loader.source().json())
    assert [text.partition("@")[0] for text in record["options"]["join"]] == ["deep", "part"]
    reopened = h5feed.reopen(record, server.url)
    assert [batch.rows.tolist() for batch in reopened.batches()] == [one.tolist() for one in rows]


@pytest.mark.parametrize("options", [{}, {"max_length": 12}, {"max_length": 4, "truncate": "end"}], ids=str)
@pytest.mark.parametrize("pad", [True, "other/tokens", ["tokens", "other/tokens"]], ids=str)
def test_padded_lists(tmp_path: Path, pad: Any, options: dict[str, Any]) -> None:
    """Lists of joined datasets are padded and cut like those of the dataset itself, also if no fields are named."""
    lists = [np.arange(row + 1, dtype=np.int32) for row in range(10)]
    for name in ("one", "other"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"], file["label"] = np.arange(20).reshape(10, 2), np.arange(10) % 2
            tokens = file.create_dataset("tokens", (10,), h5py.vlen_dtype(np.int32))
            for row in range(10):
                tokens[row] = lists[row if name == "one" else 9 - row]
    with h5feed.connect(tmp_path) as feed:
        one, joined = feed["one"], feed["one"].join("other")
        padded = [f"{whose}tokens" for whose in ("", "other/")][not isinstance(pad, list) :]
        for fields in (None, ["x", "tokens", "other/tokens"]):
            if fields is not None and pad == "other/tokens":
                fields = ["x", "other/tokens"]
            batch = joined.batch(0, batch_size=10, pad=pad, fields=fields, **options)
            own = one.batch(0, batch_size=10, pad="tokens", fields=["tokens"], **options)
            for name in padded:
                expected = own["tokens"] if name == "tokens" else own["tokens"][::-1]
                np.testing.assert_array_equal(batch[name], expected)
                np.testing.assert_array_equal(
                    batch[f"{name}.lengths"], own["tokens.lengths"][:: 1 if name == "tokens" else -1]
                )
        if options.get("max_length") == 4:
            with pytest.raises(BadParameter, match="row 0 of 'other/tokens' has 10 items"):
                joined.batch(0, batch_size=10, pad="other/tokens", max_length=4, fields=["other/tokens"])


def test_labels_of_a_joined_dataset(ds: h5feed.Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """A Sequence counts their classes, and has the weights of those that are in the split."""
    train = ds.sequence(join="deep:id=number", x="images", y="deep/labels", batch_size=8)
    assert "Found 90 images belonging to 2 classes" in capsys.readouterr().out
    own = IDS % 2
    assert train.class_weight == pytest.approx({label: 90 / 2 / np.sum(own == label) for label in (0, 1)})
    np.testing.assert_array_equal(train.classes, own)
    assert ds.join("deep:id=number").stats(field="deep/labels").class_weight == pytest.approx(train.class_weight)
    with pytest.raises(BadParameter, match="how='outer' must be 'inner'"):
        ds.join("deep:id=number", how="outer")  # type: ignore[arg-type]


def test_errors(ds: h5feed.Dataset) -> None:
    """What cannot be joined is refused, with the reason and what would be right."""
    few = int((IN_PART < 0).sum())
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"join": "part:id"}, KeysNotFound, f"{few} of 90 rows have a 'id' that no row of 'part'.*how=inner"),
        ({"join": "part"}, BadParameter, "'part' has 120 rows, but 'main' has 90"),
        ({"join": "prt:id"}, DatasetNotFound, "prt"),
        ({"join": "deep:id"}, FieldNotFound, "id"),
        ({"join": "deep:id=name"}, BadParameter, "both must be text, or both integers"),
        ({"join": "deep:id=twice"}, AmbiguousKey, "several rows of 'deep' have 'twice'"),
        ({"join": "deep:id=depth"}, UnsupportedField, "one integer or text per row"),
        ({"join": "deep:id=number=x"}, BadParameter, "is no join"),
        ({"join": ["deep:name", "deep:id=number"]}, BadParameter, "joined twice"),
        ({"join": "beside", "how": "inner"}, BadParameter, "how=inner needs"),
        ({"how": "inner"}, BadParameter, "how=inner needs"),
        ({"join": "beside", "how": "outer"}, BadParameter, "how"),
        ({"join": "beside@0123456789abcdef"}, RevisionChanged, "beside"),
        ({"join": "beside", "fields": ["beside/y"]}, FieldNotFound, "'beside/y'|'y'"),
        ({"fields": ["beside/x"]}, FieldNotFound, "beside/x"),
    ]
    for options, kind, why in cases:
        with pytest.raises(kind, match=why):
            ds.batch(0, **options)
    # Rows without a partner that are not in the split do no harm.
    batch = ds.batch(0, join="part:id", where="id < 120", fields=["part/x"])
    np.testing.assert_array_equal(batch["part/x"], PART[IN_PART[batch.rows]])


@given(
    st.text(min_size=1, max_size=8),
    st.none() | st.text(min_size=1, max_size=4),
    st.none() | st.tuples(st.text(min_size=1), st.text(min_size=1)),
)
def test_any_name_can_be_joined(name: str, revision: str | None, keys: tuple[str, str] | None) -> None:
    """The parameter has one meaning, whatever characters names have."""
    with contextlib.suppress(UnicodeEncodeError):
        join = Join(name, revision, *(keys or (None, None)))
        assert Join.parse(str(join)) == join


def test_revisions(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """Another revision of a joined dataset is 409 where the URL names it, and another ETag where it does not."""
    for name, values in (("a", np.arange(6)), ("b", np.arange(6) * 2)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"] = values
    server = serve(tmp_path)
    with h5feed.connect(server.url, deadline=60) as feed:
        joined = feed["a"].join("b")
        np.testing.assert_array_equal(joined.batch(0, fields=["b/x"])["b/x"], np.arange(6) * 2)
        url = f"{server.url}/v1/datasets/a/batches/0"
        loose = {"join": "b", "fields": "b/x", "revision": joined.revision}
        (pin,) = joined.join_options["join"]
        before, pinned = HTTP.get(url, params=loose), HTTP.get(url, params=loose | {"join": pin})
        assert before.headers["cache-control"] == "no-cache" and "immutable" in pinned.headers["cache-control"]
        assert HTTP.get(f"{server.url}/v1/datasets/a/plan", params=loose).json()["joined"] == {
            "b": pin.partition("@")[2]
        }
        os.unlink(tmp_path / "b.h5")
        with h5py.File(tmp_path / "b.h5", "w") as file:
            file["x"] = np.arange(6) * 3
        with pytest.raises(RevisionChanged):
            joined.batch(1, fields=["b/x"], batch_size=3)
        after = HTTP.get(url, params=loose, headers={"if-none-match": before.headers["etag"]})
        assert after.status_code == 200 and after.headers["etag"] != before.headers["etag"]
        np.testing.assert_array_equal(feed["a"].batch(0, join="b", fields=["b/x"])["b/x"], np.arange(6) * 3)


def test_tokens(data: Path, serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A token has to cover all datasets that are joined, also where another caller has just joined them."""
    file = tmp_path / "tokens"
    tokens = {}
    for name, scope in (("both", ["main", "beside"]), ("one", ["main"])):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            more = [word for one in scope for word in ("--datasets", one)]
            assert server_main(["token", "create", name, *more, "--token-file", str(file)]) == 0
        tokens[name] = out.getvalue().strip()
    server = serve(data, "--token-file", str(file))
    query = {"join": "beside", "fields": "beside/x"}
    url = f"{server.url}/v1/datasets/main/batches/0"
    statuses = [
        HTTP.get(url, params=query, headers={"authorization": f"Bearer {tokens[name]}"}).status_code
        for name in ("both", "one", "both", "one")
    ]
    assert statuses == [200, 404, 200, 404]


def test_a_job_joins_many_rows(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """Of many rows, by a job; after SIGKILL, it is done again."""
    rows = (1 << 18) + 3
    order = GENERATOR.permutation(rows)
    for name, ids in (("a", np.arange(rows)), ("b", order)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"], file["id"] = ids, ids
    server = serve(tmp_path, "--workers", "2")
    url = f"{server.url}/v1/datasets/a/plan"
    with contextlib.suppress(httpx.TransportError):
        HTTP.get(url, params={"join": "b:id"}, timeout=0.5)
    server.kill()
    server.start()
    with h5feed.connect(server.url, deadline=120) as feed:
        batch = feed["a"].batch(5, join="b:id", fields=["x", "b/x"], shuffle=True, batch_size=1000)
        np.testing.assert_array_equal(batch["b/x"], batch["x"])
