"""Rows by key: the index, and requests for rows by the values of a field."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import AmbiguousKey, BadParameter, FieldNotFound, KeysNotFound, TooLarge, UnsupportedField
from h5feed_server.keys import sorted_file
from h5feed_server.keys.key_values import Integers, Texts
from h5feed_server.keys.sorted_file import Damaged, write_sorted
from h5feed_server.services import Services
from h5feed_server.settings import Settings
from hypothesis import given
from hypothesis import strategies as st

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

HTTP = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0))
"""Patient, and with a new connection for each request: servers are killed and started again."""

ROWS = 500
GENERATOR = np.random.default_rng(0)
ORDER = GENERATOR.permutation(ROWS)
NAMES = [f"images/{number:04d}.png" if number % 7 else f"ü{number}" + "x" * (number % 600) for number in ORDER]
NUMBERS = ORDER.astype(np.int64) - 250
LARGE = np.uint64(2**64 - 1) - ORDER.astype(np.uint64)
KINDS = np.arange(ROWS) % 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "a.h5", "w") as file:
        file["x"] = np.arange(ROWS, dtype=np.float32)
        file["name"] = NAMES
        file["fixed"] = np.array([f"n{number}".encode() for number in ORDER])
        file["number"], file["large"], file["kind"] = NUMBERS, LARGE, KINDS
        file["real"], file["wide"] = np.arange(ROWS) / 2, np.zeros((ROWS, 3), int)
    with h5py.File(folder / "b.h5", "w") as file:
        file["x"] = np.zeros(0)
        file["name"] = np.array([], "S4")
    return folder


@pytest.fixture(scope="module")
def server(data: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    return serve_module(data, "--workers", "2")


@pytest.fixture(scope="module")
def ds(server: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["a"]


FIELDS: dict[str, list[Any]] = {
    "name": NAMES,
    "fixed": [f"n{number}" for number in ORDER],
    "number": NUMBERS.tolist(),
    "large": LARGE.tolist(),
}


@given(field=st.sampled_from(sorted(FIELDS)), rows=st.lists(st.integers(0, ROWS - 1), max_size=20))
def test_take(ds: h5feed.Dataset, field: str, rows: list[int]) -> None:
    """The row of each key, in the order of the keys, those that repeat again; by POST and by GET."""
    keys = [FIELDS[field][row] for row in rows]
    batch = ds.take(keys=keys, key=field, fields=["x"])
    assert batch.rows.tolist() == rows
    np.testing.assert_array_equal(batch["x"], np.array(rows, np.float32))
    assert ds.take(keys=np.array(keys), key=field).rows.tolist() == rows if keys else True


@given(kinds=st.lists(st.integers(0, 8), min_size=1, max_size=5))
def test_several_rows_of_a_key(ds: h5feed.Dataset, kinds: list[int]) -> None:
    """All rows of each key, ascending; refused unless they are asked for."""
    expected = [row for kind in kinds for row in np.flatnonzero(kind == KINDS).tolist()]
    assert ds.take(keys=kinds, key="kind", duplicates="all").rows.tolist() == expected
    with pytest.raises(AmbiguousKey, match=f"'kind' {kinds[0]}: {kinds[0]}, {kinds[0] + 9},.*duplicates=all"):
        ds.take(keys=kinds, key="kind")


def test_get(server: ServerProcess) -> None:
    """``key=`` and ``value=`` in a URL, which can be cached."""
    url = f"{server.url}/v1/datasets/a/rows"
    query: list[tuple[str, str]] = [("key", "name"), ("value", NAMES[7]), ("value", NAMES[3]), ("fields", "x")]
    answer = HTTP.get(url, params=[*query, ("format", "json")])
    assert answer.status_code == 200, answer.text
    assert "etag" in answer.headers
    again = HTTP.get(url, params=[*query, ("format", "json")], headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304
    assert HTTP.get(url, params={"key": "kind", "value": "3", "duplicates": "all", "format": "npz"}).status_code == 200
    for bad, code in [
        ({"key": "name"}, "bad_parameter"),
        ({"value": "a"}, "bad_parameter"),
        ({"key": "name", "value": "a", "start": "1"}, "bad_parameter"),
        ({"key": "name", "value": "a", "where": "x > 1"}, "bad_parameter"),
        ({"duplicates": "all"}, "bad_parameter"),
        ({"key": "name", "value": "a", "duplicates": "some"}, "bad_parameter"),
        ({"key": "nam", "value": "a"}, "field_not_found"),
        ({"key": "number", "value": "one"}, "bad_parameter"),
        ({"key": "number", "value": "1.0"}, "bad_parameter"),
        ({"key": "number", "value": str(2**80)}, "keys_not_found"),
        ({"key": "kind", "value": "3"}, "ambiguous_key"),
        ({"key": "real", "value": "3"}, "unsupported_field"),
        ({"key": "wide", "value": "3"}, "unsupported_field"),
    ]:
        answer = HTTP.get(url, params=bad)
        assert answer.json()["code"] == code, (bad, answer.text)


def test_post(server: ServerProcess) -> None:
    """Rows and keys, or neither, are refused; so is what would be a million objects."""
    url = f"{server.url}/v1/datasets/a/rows"
    for body, code in [
        ({}, "bad_parameter"),
        ({"rows": [1], "keys": [1], "key": "number"}, "bad_parameter"),
        ({"keys": [1]}, "bad_parameter"),
        ({"key": "number"}, "bad_parameter"),
        ({"rows": [1], "duplicates": "all"}, "bad_parameter"),
        ({"keys": [1.5], "key": "number"}, "bad_parameter"),
        ({"keys": [True], "key": "number"}, "bad_parameter"),
        ({"keys": [None], "key": "number"}, "bad_parameter"),
        ({f"m{number}": 1 for number in range(20_000)}, "too_large"),
    ]:
        answer = HTTP.post(url, json=body)
        assert answer.json()["code"] == code, (body, answer.text)


def test_missing_keys(ds: h5feed.Dataset) -> None:
    """The first missing keys are named, with a similar one."""
    known = next(name for name in NAMES if name.startswith("images"))
    wrong = known.replace("images", "image")
    with pytest.raises(KeysNotFound, match=f"1 of 2 keys are in no row of 'name': '{wrong}': did you mean '{known}'"):
        ds.take(keys=[NAMES[0], wrong], key="name")
    with pytest.raises(KeysNotFound, match=r"7 of 7 keys .*: 1000, 1001, 1002, 1003, 1004 …"):
        ds.take(keys=range(1000, 1007), key="number")
    with pytest.raises(KeysNotFound):
        # The same modulo 2⁶⁴ as a key that is there.
        ds.take(keys=[-1], key="large")
    with pytest.raises(FieldNotFound, match="did you mean 'number'"):
        ds.take(keys=[1], key="numbers")
    with pytest.raises(UnsupportedField, match="one integer or text per row"):
        ds.take(keys=[1], key="wide")
    for wrong_use in ({}, {"keys": [1]}, {"rows": [1], "keys": [1], "key": "number"}, {"keys": "ab", "key": "name"}):
        with pytest.raises(BadParameter):
            ds.take(**wrong_use)
    with pytest.raises(BadParameter, match="UTF-8"):
        ds.take(keys=[b"\xff"], key="name")  # type: ignore[list-item]
    with pytest.raises(BadParameter, match=r"not 1\.5"):
        ds.take(keys=np.array([1.5]), key="number")


@given(
    sizes=st.lists(st.integers(0, 40), max_size=6),
    distinct=st.sampled_from([1, 3, 40, 2**40]),
    seed=st.integers(0, 1000),
)
def test_sorted_file(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], distinct: int, seed: int) -> None:
    """Merged from many runs, searched in blocks: as numpy finds the rows, however often a hash occurs."""
    generator = np.random.default_rng(seed)
    blocks = [generator.integers(0, distinct, size, np.uint64) for size in sizes]
    hashes = np.concatenate([*blocks, np.zeros(0, np.uint64)])
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("RUN", 16), ("_SAMPLED", 2), ("BLOCK", 4), ("_BLOCKS_AT_ONCE", 3)):
            patch.setattr(sorted_file, name, size)
        path = tmp_path_factory.mktemp("index") / "keys/index"
        done: list[int] = []
        index = write_sorted(path, blocks, done.append)
        assert sum(done) == 2 * len(hashes) and index.entries == len(hashes)
        assert [*path.parent.iterdir()] == [path]
        wanted = np.unique(np.concatenate([hashes, generator.integers(0, 2**63, 3, np.uint64)]))
        for some in (wanted, wanted[:: len(wanted) // 2 + 1]):
            which, rows = index.find(some, 1000)
            expected = [(number, row) for number, one in enumerate(some) for row in np.flatnonzero(hashes == one)]
            assert [*zip(which.tolist(), rows.tolist(), strict=True)] == expected
        if len(hashes):
            data = bytearray(path.read_bytes())
            data[generator.integers(len(data))] ^= 1
            path.write_bytes(data)
            with pytest.raises(Damaged):
                index.find(wanted, 1000)
            path.unlink()
            with pytest.raises(Damaged):
                index.find(wanted, 1000)
            with pytest.raises((TooLarge, Damaged)):
                index.find(wanted, 0)


@given(st.lists(st.binary(max_size=700), unique=True, max_size=20))
def test_hashes(texts: list[bytes]) -> None:
    """They depend on the text alone, not on its neighbours; and differ."""
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    hashes = Texts(np.frombuffer(b"".join(texts), np.uint8), offsets).hashes()
    alone = [Texts(np.frombuffer(one, np.uint8), np.array([0, len(one)])).hashes()[0] for one in texts]
    assert hashes.tolist() == [int(one) for one in alone]
    ends = {(len(one), one[:128], one[-128:]) for one in texts}
    assert len(set(hashes.tolist())) == len(ends) or any(len(one) <= 256 for one in texts)


def test_collisions(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all hashes are the same, each key still finds its own rows, and no other."""
    for kind in (Texts, Integers):
        monkeypatch.setattr(kind, "hashes", lambda values: np.arange(len(values), dtype=np.uint64) * np.uint64(0))
    services = Services.start(Settings(data_dir=data, cache_dir=tmp_path))
    try:
        wait_until(lambda: services.catalog.is_known())
        dataset = services.catalog.dataset("a", None)
        for field, values in FIELDS.items():
            assert services.keys.rows(dataset, field, values).tolist() == [*range(ROWS)]
            with pytest.raises(KeysNotFound):
                services.keys.rows(dataset, field, ["-99999"])
    finally:
        services.close(wait=True)


def test_keys_that_repeat_are_bounded(data: Path, tmp_path: Path) -> None:
    """Many equal keys, each with many rows, are refused before their product takes memory; so are joins by them."""
    services = Services.start(Settings(data_dir=data, cache_dir=tmp_path))
    try:
        wait_until(lambda: services.catalog.is_known())
        dataset = services.catalog.dataset("a", None)
        several = len(np.flatnonzero(KINDS == 0))
        rows = services.keys.rows(dataset, "kind", [0] * 10, several=True, limit=10 * several)
        assert rows.tolist() == 10 * np.flatnonzero(KINDS == 0).tolist()
        for is_several in (True, False):
            with pytest.raises(TooLarge, match=f"more than {10 * several - 1} rows"):
                services.keys.rows(dataset, "kind", [0] * 10, several=is_several, limit=10 * several - 1)
    finally:
        services.close(wait=True)


def test_joins_by_a_key_of_few_values_are_bounded(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """Two datasets with the same key in all rows have a product of rows that no memory holds."""
    folder = tmp_path / "alike"
    folder.mkdir()
    for name in ("one", "two"):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["x"], file["kind"] = np.zeros(20_000, np.int8), np.zeros(20_000, np.int8)
    server = serve(folder)
    answer = HTTP.get(f"{server.url}/v1/datasets/one/batches/0", params={"join": "two:kind"})
    assert answer.json()["code"] == "too_large" and "join by a key that is unique there" in answer.text
    assert HTTP.get(f"{server.url}/v1/datasets/one/batches/0", params={"join": "two"}).status_code == 200


def test_no_rows(server: ServerProcess) -> None:
    with h5feed.connect(server.url, deadline=60) as feed, pytest.raises(KeysNotFound):
        feed["b"].take(keys=["a"], key="name")


def test_a_job_builds_the_index(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """Of many rows, by a job that all workers share; after SIGKILL, or if the index is damaged, it is built again."""
    rows = (1 << 18) + 5
    order = GENERATOR.permutation(rows)
    folder = tmp_path / "many"
    folder.mkdir()
    with h5py.File(folder / "many.h5", "w") as file:
        file["x"], file["id"] = np.zeros(rows, np.int8), order
    wanted = [0, rows - 1, 77_777]
    keys = order[wanted]
    server = serve(folder, "--workers", "2")
    url = f"{server.url}/v1/datasets/many/rows"
    answer = HTTP.get(url, params={"key": "id", "value": "5"}, headers={"prefer": "wait=0"})
    assert answer.status_code in (200, 202)
    server.kill()
    server.start()
    with h5feed.connect(server.url, deadline=120) as feed:
        assert feed["many"].take(keys=keys, key="id").rows.tolist() == wanted
        (index,) = server.cache_dir.glob("served-*/keys/*.sorted")
        content = bytearray(index.read_bytes())
        content[::1000] = bytes(len(content[::1000]))
        index.write_bytes(content)
        assert feed["many"].take(keys=keys, key="id").rows.tolist() == wanted
        os.unlink(index)
        assert feed["many"].take(keys=keys, key="id").rows.tolist() == wanted
