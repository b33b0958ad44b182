"""``weights=array``: drawn like a field of the same numbers, given once to each server that lacks it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import BadParameter, TooLarge, WeightsUnknown
from h5feed.weights import GivenWeights, class_balanced
from h5feed_server.cli import main as server_main
from h5feed_server.splits.weights_folder import WeightsFolder
from hypothesis import given
from hypothesis import strategies as st

from tests.support.server_process import ServerProcess

HTTP = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0))
"""Patient, and with a new connection for each request: servers are killed and started again."""

ROWS = 60
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [40, 15, 5]))
WEIGHTS = np.random.default_rng(1).random(ROWS)
BINARY = {"content-type": "application/octet-stream"}


def write(path: Path, rows: int = ROWS) -> None:
    with h5py.File(path, "w") as file:
        file["x"], file["labels"] = np.arange(rows, dtype=np.float32), LABELS[:rows]
        file["w"], file["narrow"] = WEIGHTS[:rows], WEIGHTS[:rows].astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "a.h5")
    write(folder / "b.h5", 50)
    return folder


@pytest.fixture(scope="module")
def server(data: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    return serve_module(data, "--workers", "2")


@pytest.fixture(scope="module")
def ds(server: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["a"]


def drawn(ds: h5feed.Dataset, **options: Any) -> list[list[int]]:
    return [batch.rows.tolist() for batch in ds.batches(batch_size=8, **options)]


def rows_of(loop: Any) -> list[int]:
    """The rows of what a loop delivers, by their inputs."""
    inputs = [np.asarray(item[0] if isinstance(item, (tuple, list)) else item) for item in loop]
    return [int(x) for one in inputs for x in one]


@given(
    split=st.sampled_from(["all", "train"]),
    shuffle=st.booleans(),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    epoch_rows=st.sampled_from([None, 1, 37, 200]),
    shards=st.sampled_from([1, 3]),
    narrow=st.booleans(),
    where=st.sampled_from([None, "x >= 20"]),
)
def test_draws_like_a_field(
    ds: h5feed.Dataset,
    split: str,
    shuffle: bool,
    seed: int,
    epoch: int,
    epoch_rows: int | None,
    shards: int,
    narrow: bool,
    where: str | None,
) -> None:
    """The same rows as from a field of the same numbers, with all other parameters, in any batch, in each shard."""
    options: dict[str, Any] = {"shuffle": shuffle, "seed": seed, "epoch": epoch, "where": where, "shards": shards}
    options |= {"epoch_rows": epoch_rows, "test": 0.2 if split == "train" else None, "split": split}
    field, array = ("narrow", WEIGHTS.astype(np.float32)) if narrow else ("w", WEIGHTS)
    for shard in range(shards):
        expected = drawn(ds, **options, shard=shard, weights=field)
        assert drawn(ds, **options, shard=shard, weights=array) == expected
        last = len(expected) - 1
        batch = ds.batch(last, batch_size=8, **options, shard=shard, weights=array)
        assert batch.rows.tolist() == expected[last]
        np.testing.assert_array_equal(batch["x"], batch.rows.astype(np.float32))


def test_every_loop(ds: h5feed.Dataset, server: ServerProcess) -> None:
    """The loops take an array, and draw by it; the state is resumed, and the record names the array by its digest."""
    options: dict[str, Any] = {"batch_size": 8, "shuffle": True, "seed": 3, "weights": WEIGHTS}
    expected = [row for batch in drawn(ds, shuffle=True, seed=3, weights="w") for row in batch]
    kinds: list[Callable[..., Any]] = [ds.sequence, ds.loader]
    if importlib.util.find_spec("torch"):
        kinds.append(ds.torch)
    for kind in kinds:
        more = {"verbose": False} if kind == ds.sequence else {}
        loop = kind(x="x", y=None, class_mode="raw", **options, **more)
        assert rows_of(loop) == expected, kind
    loader = ds.loader(x="x", y=None, class_mode="raw", **options)
    steps = iter(loader)
    next(steps), next(steps)
    state = json.loads(json.dumps(loader.state_dict()))
    again = pickle.loads(pickle.dumps(ds.loader(x="x", y=None, class_mode="raw", **options)))
    again.load_state_dict(state)
    rest = np.concatenate([np.asarray(item[0] if isinstance(item, (tuple, list)) else item) for item in again]).astype(
        int
    )
    assert rest.tolist() == expected[16:]
    reopened = h5feed.reopen(loader.source().json(), server.url, deadline=60)
    assert [row for batch in reopened.batches() for row in batch.rows.tolist()] == expected
    other = ds.loader(x="x", y=None, class_mode="raw", **{**options, "weights": WEIGHTS + 1})
    with pytest.raises(BadParameter, match="weights=digest:"):
        other.load_state_dict(state)


def test_new_weights_every_epoch(ds: h5feed.Dataset) -> None:
    """An array that the caller changes afterwards is another array: what was planned goes on as it was."""
    array = WEIGHTS.copy()
    loader = ds.loader(x="x", y=None, class_mode="raw", batch_size=8, weights=array, shuffle=True)
    array[:] = 0
    array[7] = 1
    assert len({int(x) for batch in loader for x in np.asarray(batch).reshape(-1)}) > 20
    assert {row for rows in drawn(ds, weights=array, shuffle=True) for row in rows} == {7}


def test_class_balanced(ds: h5feed.Dataset) -> None:
    """Each class is drawn equally often."""
    weights = class_balanced(LABELS)
    assert weights.mean() == pytest.approx(1)
    rows = np.concatenate(drawn(ds, weights=weights, shuffle=True, epoch_rows=600))
    assert np.abs(np.bincount(LABELS[rows]) - 200).max() <= 2 * 40
    with pytest.raises(BadParameter, match="flat"):
        class_balanced([[1, 2]])


def test_bad_arrays(ds: h5feed.Dataset, server: ServerProcess) -> None:
    """Wrong length, NaN, negative, infinite, all 0, another shape: refused by client and server, with the reason."""
    wrong: list[tuple[Any, str]] = [
        (WEIGHTS[:-1], "59 weights do not match the 60 rows"),
        (np.where(np.arange(ROWS) == 4, np.nan, WEIGHTS), "row 4 has nan"),
        (np.where(np.arange(ROWS) == 5, -1, WEIGHTS), "row 5 has -1"),
        (np.where(np.arange(ROWS) == 6, np.inf, WEIGHTS), "row 6 has inf"),
        (np.zeros(ROWS), "all are 0"),
        (WEIGHTS.reshape(6, 10), "flat array"),
        (["a"] * ROWS, "flat array"),
    ]
    for array, why in wrong:
        with pytest.raises(BadParameter, match=why):
            ds.batch(0, weights=array)
    url = f"{server.url}/v1/datasets/a/weights"
    for values, why in [(array, why) for array, why in wrong[1:5]]:
        answer = HTTP.post(url, content=np.asarray(values, "<f8").tobytes(), headers=BINARY)
        assert answer.status_code == 400 and why in answer.json()["detail"], answer.text
    for body in (b"", bytes(479), bytes(481), bytes(8 * 61)):
        answer = HTTP.post(url, content=body, headers=BINARY)
        assert answer.status_code == 400 and "480 bytes" in answer.json()["detail"], answer.text
        # The same without an announced length.
        answer = HTTP.post(url, content=iter([body]), headers=BINARY)
        assert answer.status_code == 400 and "480 bytes" in answer.json()["detail"], answer.text
    answer = HTTP.post(url, content=WEIGHTS.tobytes(), params={"dtype": "int8"}, headers=BINARY)
    assert answer.json()["code"] == "bad_parameter"
    answer = HTTP.post(url, content=WEIGHTS.tobytes(), headers={"content-type": "text/plain"})
    assert answer.status_code == 400 and "application/octet-stream" in answer.json()["detail"]
    assert HTTP.post(url.replace("/a/", "/none/"), content=b"", headers=BINARY).status_code == 404
    plan = f"{server.url}/v1/datasets/a/plan"
    for value, code in [
        ("digest:" + 32 * "0", "weights_unknown"),
        ("digest:123", "bad_parameter"),
        ("digest:" + 32 * "G", "bad_parameter"),
        ("digest", "field_not_found"),
    ]:
        assert HTTP.get(plan, params={"weights": value}).json()["code"] == code
    with pytest.raises(WeightsUnknown, match="POST /v1/datasets/a/weights"):
        ds.batch(0, weights="digest:" + 32 * "0")
    # A split in which all weights are 0.
    only = np.where(np.arange(ROWS) < 30, 1.0, 0.0)
    with pytest.raises(h5feed.UnsupportedField, match="nothing to draw"):
        ds.batch(0, weights=only, where="x >= 30")


def test_over_http(server: ServerProcess) -> None:
    """An array that is posted is answered with the value of the parameter; another dataset does not have it."""
    for dtype in ("float32", "float64"):
        body = WEIGHTS.astype(dtype).tobytes()
        answer = HTTP.post(f"{server.url}/v1/datasets/a/weights?dtype={dtype}", content=body, headers=BINARY)
        assert answer.status_code == 200
        told = answer.json()
        assert told["rows"] == ROWS and told["dtype"] == dtype and told["expires_in"] == 7 * 24 * 3600
        assert told["weights"] == GivenWeights.of(WEIGHTS.astype(dtype), ROWS, "")
        url = f"{server.url}/v1/datasets/a/batches/0"
        one = HTTP.get(url, params={"weights": told["weights"]})
        other = HTTP.get(url, params={"weights": "w" if dtype == "float64" else "narrow"})
        assert one.status_code == 200 and one.content == other.content and one.headers["etag"] != other.headers["etag"]
        unknown = HTTP.get(url.replace("/a/", "/b/"), params={"weights": told["weights"]})
        assert unknown.status_code == 404 and unknown.json()["code"] == "weights_unknown"


def test_a_field_of_this_name_comes_first(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """Even a field whose name looks like a digest can be named."""
    name = "digest:" + 32 * "a"
    with h5py.File(tmp_path / "odd.h5", "w") as file:
        file["x"], file[name] = np.arange(4.0), np.array([0.0, 0, 1, 0])
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        assert {row for rows in drawn(feed["odd"], weights=name) for row in rows} == {2}


def test_replicas_and_restarts(data: Path, serve: Callable[..., ServerProcess]) -> None:
    """SIGKILL to the server that was given the array: the other gets it and goes on; after a restart, it is there."""
    first, second = serve(data, "--workers", "2"), serve(data)
    with h5feed.connect(f"{first.url},{second.url}", deadline=60) as feed, h5feed.connect(second.url) as alone:
        ds = feed["a"]
        expected = drawn(alone["a"], weights="w", shuffle=True, epoch_rows=400)
        batches = ds.batches(batch_size=8, weights=WEIGHTS, shuffle=True, epoch_rows=400, readahead=1)
        seen = [next(batches).rows.tolist()]
        first.kill()
        seen += [batch.rows.tolist() for batch in batches]
        assert seen == expected
        second.kill()
        first.start()
        second.start()
        asked = {"weights": str(GivenWeights.of(WEIGHTS, ROWS, "")), "shuffle": True, "epoch_rows": 400}
        assert drawn(alone["a"], **asked) == expected
    # What was damaged, or cut off, is not used, but given anew.
    for file in second.cache_dir.glob("served-*/weights/*"):
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    second.kill()
    second.start()
    with h5feed.connect(second.url, deadline=60) as feed:
        with pytest.raises(WeightsUnknown):
            drawn(feed["a"], **asked)
        assert drawn(feed["a"], **{**asked, "weights": WEIGHTS}) == expected


def test_killed_while_an_array_arrives(data: Path, serve: Callable[..., ServerProcess]) -> None:
    """SIGKILL in the middle of a body: nothing of it counts as an array."""
    server = serve(data)

    def body() -> Iterator[bytes]:
        yield WEIGHTS.tobytes()[:240]
        server.kill()
        yield WEIGHTS.tobytes()[240:]

    url = f"{server.url}/v1/datasets/a/weights"
    with pytest.raises(httpx.TransportError):
        HTTP.post(url, content=body(), headers={**BINARY, "content-length": "480"}, timeout=60)
    server.start()
    with h5feed.connect(server.url, deadline=60) as feed:
        with pytest.raises(WeightsUnknown):
            feed["a"].batch(0, weights=str(GivenWeights.of(WEIGHTS, ROWS, "")))
        assert drawn(feed["a"], weights=WEIGHTS) == drawn(feed["a"], weights="w")


def test_tokens(data: Path, serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Whoever may read a dataset may draw by its weights; another token has neither."""
    file = tmp_path / "tokens"
    tokens = {}
    for name, scope in (("one", "a"), ("same", "a"), ("other", "b")):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            assert server_main(["token", "create", name, "--datasets", scope, "--token-file", str(file)]) == 0
        tokens[name] = out.getvalue().strip()
    server = serve(data, "--token-file", str(file), "--workers", "2")
    with h5feed.connect(server.url, token=tokens["one"], deadline=60) as feed:
        expected = drawn(feed["a"], weights=WEIGHTS, shuffle=True)
    named = str(GivenWeights.of(WEIGHTS, ROWS, ""))
    with h5feed.connect(server.url, token=tokens["same"], deadline=60) as feed:
        assert drawn(feed["a"], weights=named, shuffle=True) == expected
    headers = {**BINARY, "authorization": f"Bearer {tokens['other']}"}
    with httpx.Client(base_url=f"{server.url}/v1/datasets", headers=headers, timeout=60) as http:
        answers = [
            http.post("/a/weights", content=WEIGHTS.tobytes()),
            http.get("/a/batches/0", params={"weights": named}),
        ]
        assert {answer.json()["code"] for answer in answers} == {"dataset_not_found"}
        unknown = http.get("/b/batches/0", params={"weights": named})
        assert unknown.json()["code"] == "weights_unknown"
    del headers["authorization"]
    assert HTTP.post(f"{server.url}/v1/datasets/a/weights", content=b"", headers=headers).status_code == 401


def test_bounds(data: Path, serve: Callable[..., ServerProcess]) -> None:
    """Too large is refused; of too many, the least recently used goes, and is given again when it is needed."""
    server = serve(data, H5FEED_WEIGHTS_ARRAYS="2", H5FEED_WEIGHTS_BYTES="1000")
    with h5feed.connect(server.url, deadline=60) as feed:
        ds = feed["a"]
        arrays = [WEIGHTS + number for number in range(4)]
        expected = [drawn(ds, weights=array, shuffle=True) for array in arrays]
        kept = [*server.cache_dir.glob("served-*/weights/*")]
        assert len(kept) == 2 and not any(path.name.endswith(".part") for path in kept)
        server.stop()
        server.start()
        with pytest.raises(WeightsUnknown):
            ds.plan(weights=str(GivenWeights.of(arrays[0], ROWS, "")))
        assert [drawn(ds, weights=array, shuffle=True) for array in arrays] == expected
    small = serve(data, H5FEED_WEIGHTS_BYTES="400")
    with h5feed.connect(small.url, deadline=60) as feed, pytest.raises(TooLarge, match="H5FEED_WEIGHTS_BYTES = 400"):
        feed["a"].batch(0, weights=WEIGHTS)


def test_who_has_most_loses_first(tmp_path: Path) -> None:
    """Of too many arrays, the caller with most of them loses the one it used least recently, whoever adds the last."""
    folder = WeightsFolder(tmp_path / "weights", 4 * 80, 100, 60)
    values = np.ones(10)

    def give(caller: str, number: int) -> str:
        with folder.receive("a", caller, values.dtype) as arriving:
            arriving.write((values * number).tobytes())
            return arriving.finish()

    digests = []
    for number in range(1, 4):
        digests.append(give("many", number))
        for file in (tmp_path / "weights").iterdir():
            # Used one after the other, whatever the resolution of the clock.
            os.utime(file, (file.stat().st_mtime - 1, file.stat().st_mtime - 1))
    few = give("few", 4)
    assert folder.find("a", digests[0]) is not None
    last = give("few", 5)
    there = [digest for digest in [*digests, few, last] if folder.find("a", digest) is not None]
    assert there == [digests[0], digests[2], few, last]
    assert folder.find("b", few) is None


def test_expiry(data: Path, serve: Callable[..., ServerProcess]) -> None:
    """What was not used for a week is forgotten, and removed when the next array arrives."""
    server = serve(data)
    with h5feed.connect(server.url, deadline=60) as feed:
        expected = drawn(feed["a"], weights=WEIGHTS, shuffle=True)
        server.stop()
        (old,) = server.cache_dir.glob("served-*/weights/*")
        long_ago = time.time() - 8 * 24 * 3600
        os.utime(old, (long_ago, long_ago))
        server.start()
        with pytest.raises(WeightsUnknown):
            feed["a"].batch(0, weights=str(GivenWeights.of(WEIGHTS, ROWS, "")))
        feed["a"].batch(0, weights=WEIGHTS + 1)
        assert not old.exists()
        assert drawn(feed["a"], weights=WEIGHTS, shuffle=True) == expected
