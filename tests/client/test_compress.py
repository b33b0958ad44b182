"""Rows that the server compresses for slow links: the same arrays in fewer bytes, by filters that HDF5 knows."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5feed
import h5py
import hdf5plugin
import httpx
import numpy as np
import pytest
from h5feed import remote_dataset
from h5feed.errors import BadParameter
from h5feed.fetching import pieces
from h5feed.wire import read_body

from tests.support.far_away import NAME, far_away
from tests.support.same_batches import assert_same_batch
from tests.support.server_process import ServerProcess

ROWS = 103

KINDS = ("?", "i1", "<u2", "<f2", "<i4", ">i4", "<f4", ">f8", "<i8", "<c8")

HASHED = str(1 << 50)
"""Files are hashed before they are served: no revision is provisional."""

LONG = (1100, 1000)
"""A row of 4.4 MB as float32: more than is compressed at once."""


def _alike(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Values that compress."""
    values = np.random.default_rng(4).integers(0, 5, shape)
    return (values > 3 if kind == "?" else values).astype(kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    random = np.random.default_rng(2)
    with h5py.File(folder / "raw.h5", "w") as file:
        for kind in KINDS:
            # One row in a chunk, several of which the last is not full, and all in one.
            for name, shape in (("wide", (300, 127)), ("middle", (31, 17)), ("small", (53,))):
                file[f"{name}-{kind.strip('<>')}{kind[:1] == '>'}"] = _alike((ROWS, *shape), kind)
        file["noise"] = random.integers(0, 256, (ROWS, 700), "u1")
        file["labels"] = np.arange(ROWS) % 3
        file["names"] = np.array([f"row {row}" for row in range(ROWS)], "S9")
        records = np.zeros(ROWS, [("a", "<i4"), ("b", ">f4", (40, 30)), ("c", "S5")])
        records["b"] = _alike((ROWS, 40, 30), "f4")
        file["records"] = records
        file.create_dataset("packed", data=_alike((ROWS, 3000), "<i4"), chunks=(1, 3000), compression="gzip")
        file.create_dataset("poorly", data=random.integers(0, 256, (ROWS, 900), "u1"), chunks=(1, 900), shuffle=True)
        file.create_dataset("chunked", data=_alike((ROWS, 50, 40), "<i2"), chunks=(10, 20, 40))
    with h5py.File(folder / "long.h5", "w") as file:
        file["x"] = np.zeros((3, *LONG), "f4")
        file["y"] = np.zeros((3, 1000, 1000), "f4")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    cache = tmp_path_factory.mktemp("cache")
    options = ("--workers", "2", "--uds", str(cache / "socket"), "--port", "0")
    process = ServerProcess(folder, cache, *options, H5FEED_ALLOWED_HOSTS=NAME, H5FEED_PROVISIONAL_BYTES=HASHED)
    yield process
    assert process.stop() == 0


@pytest.fixture
def far(server: ServerProcess) -> Iterator[h5feed.Feed]:
    with far_away(server.port) as url, h5feed.connect(url, deadline=60) as connected:
        yield connected


def _body(server: ServerProcess, fields: list[str], **more: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    params = {"fields": ",".join(fields), "batch_size": "50", "shuffle": "true", "start": "0", "stop": "2"}
    params |= {"body": "pieces", "compress": "zstd", **more}
    answer = httpx.get(f"{server.url}/v1/datasets/raw/batches", params=params, timeout=60)
    assert answer.status_code == 200, answer.text
    tensors, about, nbytes = read_body(np.frombuffer(answer.content, np.uint8))
    assert nbytes == len(answer.content)
    return json.loads(about["pieces"]), tensors


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "epoch": 2}, {"shuffle": True, "shards": 4, "shard": 3}])
def test_the_same_arrays(far: h5feed.Feed, folder: Path, options: dict[str, Any]) -> None:
    """Of every dtype, in chunks of one row, of several and of all; beside fields that are not compressed."""
    raw = far["raw"]
    order: dict[str, Any] = {"fields": [*raw.fields], "batch_size": 20, **options}
    here, there = raw.batches(compress="zstd", **order), raw.batches(decode="server", **order)
    with h5py.File(folder / "raw.h5") as file:
        for one, other in zip(here, there, strict=True):
            assert_same_batch(one, other)
            assert np.array_equal(one["wide-f8True"], file["wide-f8True"][()][one.rows])
            assert np.array_equal(one["records.b"], file["records"]["b"][one.rows])


def test_what_is_compressed(server: ServerProcess) -> None:
    """Raw fields that get shorter. Others come as tensors, and the reason says why."""
    with h5feed.connect(server.url, local=False, deadline=60) as feed:
        names = list(feed["raw"].fields)
    pieces, tensors = _body(server, names)
    raw = [name for name in names if name.startswith(("wide", "middle"))]
    assert set(pieces["fields"]) >= {*raw, "chunked", "records.b", "packed"}
    for name in (*raw, "chunked", "records.b"):
        (segment,) = pieces["fields"][name]["segments"]
        assert [item["id"] for item in segment["array"]["filters"]][-1] == 32015
        assert name not in tensors
    assert [item["id"] for item in pieces["fields"]["packed"]["segments"][0]["array"]["filters"]] == [1]
    reasons = pieces["reasons"]
    assert reasons["noise"] == "compression makes 70,000 bytes less than 1.2 times smaller"
    assert reasons["labels"] == "800 bytes are too few to compress"
    assert "differ in length" in reasons["names"] and "stored in chunks" in reasons["poorly"]
    assert not pieces["files"]


def test_the_filters_are_those_of_hdf5(server: ServerProcess, folder: Path, tmp_path: Path) -> None:
    """The chunks, written into a file as they came, are read by libhdf5."""
    for name, itemsize in (("wide-f4False", 4), ("middle-u2False", 2), ("wide-i1False", 1)):
        pieces, tensors = _body(server, [name])
        about = pieces["fields"][name]
        array = about["segments"][0]["array"]
        chunk, shape = tuple(array["chunk_shape"]), tuple(array["shape"])
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            made = file.create_dataset(
                "x", shape, array["dtype"], chunks=chunk, shuffle=itemsize > 1 or None, **hdf5plugin.Zstd(clevel=1)
            )
            for number, offset, size, mask in tensors[f"__pieces__/{about['segments'][0]['chunks']}"].T.tolist():
                stored = tensors["__pieces__/bytes"][offset : offset + size].tobytes()
                made.id.write_direct_chunk((number * chunk[0], *[0] * (len(chunk) - 1)), stored, mask)
        with h5py.File(tmp_path / f"{name}.h5") as file, h5py.File(folder / "raw.h5") as source:
            rows = tensors["__rows__"]
            assert np.array_equal(file["x"][()], source[name][()][rows])
        assert math.prod(chunk) * itemsize <= 256 << 10


def test_fewer_bytes_come(far: h5feed.Feed) -> None:
    raw = far["raw"]
    stats = {}
    for compress in ("zstd", None):
        loader = raw.loader(x=["wide-i4False", "noise"], y=None, batch_size=ROWS, compress=compress)
        assert sum(1 for _ in loader) == 1
        stats[compress] = loader.stats()
    assert stats["zstd"].bytes < stats[None].bytes / 3
    assert stats["zstd"].from_chunks == ROWS and stats[None].from_chunks == 0
    assert "noise: compression makes" in stats["zstd"].why and "wide" not in stats["zstd"].why
    loader = raw.loader(x="noise", y="labels", batch_size=50, compress="zstd")
    assert sum(1 for _ in loader) == 3
    assert loader.stats().from_chunks == 0 and "rows came as arrays from the server (noise: " in repr(loader.stats())


def test_small_blocks_are_no_reason_to_give_up(far: h5feed.Feed) -> None:
    """The first block of a loop is one batch, which may be too short; later ones are not."""
    loader = far["raw"].loader(x="middle-u2False", y=None, batch_size=5, shuffle=True, compress="zstd", connections=1)
    for _ in range(3):
        for _ in loader:
            pass
    assert loader.stats().from_chunks > ROWS


def test_a_body_depends_on_its_url_alone(folder: Path, server: ServerProcess, serve: Callable[..., Any]) -> None:
    """Two workers and another server return the same bytes and the same ETag."""
    url = "/v1/datasets/raw/batches?fields=wide-f4False,middle-i8False,noise&batch_size=50&shuffle=true&start=0&stop=2"
    others = [server, server, server, serve(folder, H5FEED_PROVISIONAL_BYTES=HASHED)]
    answers = [httpx.get(f"{one.url}{url}&body=pieces&compress=zstd", timeout=60) for one in others]
    assert len({answer.content for answer in answers}) == len({answer.headers["etag"] for answer in answers}) == 1
    plain = httpx.get(f"{server.url}{url}&body=pieces", timeout=60)
    assert plain.headers["etag"] != answers[0].headers["etag"] and len(plain.content) > 2 * len(answers[0].content)
    known = {"If-None-Match": answers[0].headers["etag"]}
    assert httpx.get(f"{server.url}{url}&body=pieces&compress=zstd", headers=known).status_code == 304


def test_not_on_the_same_machine(server: ServerProcess) -> None:
    """Over the loopback and over the Unix socket, nothing is compressed, and the reason says so."""
    field, nbytes = "wide-i4False", ROWS * 300 * 127 * 4
    for url in (server.url, f"unix://{server.socket}"):
        for decode in ("auto", "client"):
            with h5feed.connect(url, local=False, deadline=60) as feed:
                loader = feed["raw"].loader(x=field, y=None, batch_size=20, compress="zstd", decode=decode)
                assert sum(len(batch[0]) for batch in loader) == ROWS
                stats = loader.stats()
                assert "compress='zstd' is ignored: the server is on this machine" in stats.why
                assert stats.from_chunks == 0 and stats.bytes >= nbytes


@pytest.mark.parametrize(
    "options", [{"decode": "client"}, {"compress": "zstd"}, {"decode": "client", "compress": "zstd"}]
)
def test_what_is_not_installed(far: h5feed.Feed, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """An option that needs a package is refused without it, and the default does without, and says so."""
    monkeypatch.setattr(pieces, "NEEDED", ("cv2", "no_such_package"))
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_package: `pip install 'h5feed\[decode\]'`"):
        far["raw"].batches(**options)
    loader = far["raw"].loader(x="packed", y=None)
    assert sum(len(batch[0]) for batch in loader) == ROWS
    assert loader.stats().from_chunks == 0 and "no_such_package not installed" in loader.stats().why


@pytest.mark.parametrize(("loop", "package"), [("torch", "torch"), ("torch_map", "torch"), ("tf_data", "tensorflow")])
def test_frameworks_that_are_not_installed(
    far: h5feed.Feed, monkeypatch: pytest.MonkeyPatch, loop: str, package: str
) -> None:
    for name in [name for name in sys.modules if name in ("h5feed.torch", "h5feed.tf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"{loop}.. needs .*, but '{package}' is not installed: `pip install"):
        getattr(far["raw"], loop)(batch_size=4)


def test_values_that_cannot_be(far: h5feed.Feed, server: ServerProcess) -> None:
    raw = far["raw"]
    with pytest.raises(BadParameter, match="compress='zst' is not known: did you mean 'zstd'"):
        raw.batches(compress="zst")  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match="needs decode='auto' or 'client'"):
        raw.loader(compress="zstd", decode="server")
    url = f"{server.url}/v1/datasets/raw/batches/0?batch_size=5"
    for query in ("compress=zstd", "compress=zstd&body=places", "compress=lz4&body=pieces"):
        answer = httpx.get(f"{url}&{query}", timeout=60)
        assert answer.status_code == 400 and "compress" in answer.json()["detail"], answer.text


def test_a_server_that_does_not_know_the_codec(far: h5feed.Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one refuses the parameter: then pieces come as without it."""
    monkeypatch.setattr(remote_dataset, "CODECS", ("zstd", "newer"))
    options: dict[str, Any] = {"x": ["packed", "wide-i4False"], "y": None, "batch_size": 20}
    loader = far["raw"].loader(compress="newer", **options)  # type: ignore[arg-type]
    for one, other in zip(loader, far["raw"].loader(**options), strict=True):
        for name in options["x"]:
            assert np.array_equal(one[0][name], other[0][name])
    assert loader.stats().from_chunks == ROWS and "compress='newer' is ignored" in loader.stats().why


def test_rows_that_are_too_long(far: h5feed.Feed) -> None:
    """They come as they are; shorter ones, of which each is a chunk of several megabytes, are compressed."""
    loader = far["long"].loader(x=["x", "y"], y=None, batch_size=2, compress="zstd")
    for x, *_ in loader:
        assert not x["x"].any() and not x["y"].any()
    stats = loader.stats()
    assert "x: rows of 4,400,000 bytes are larger" in stats.why and "y:" not in stats.why
    assert stats.from_chunks == 3 and 3 * 4_400_000 < stats.bytes < 3 * 4_400_000 + 100_000


def test_batches_that_are_longer_than_a_response(far: h5feed.Feed, folder: Path, serve: Callable[..., Any]) -> None:
    """They come in parts, which are not compressed."""
    server = serve(folder, H5FEED_MAX_BODY_BYTES=str(1 << 20), H5FEED_ALLOWED_HOSTS=NAME)
    fields = ["wide-i4False", "labels"]
    there = list(far["raw"].batches(batch_size=40, fields=fields, decode="server"))
    with far_away(server.port) as url, h5feed.connect(url, deadline=60) as small:
        for one, other in zip(small["raw"].batches(batch_size=40, fields=fields, compress="zstd"), there, strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in fields)


def test_compressing_takes_no_more_memory(folder: Path, serve: Callable[..., Any]) -> None:
    """Several clients of a server whose pool has room for one body: each gets its rows, none is refused in the end."""
    body = 50 * 300 * 127 * 4
    server = serve(folder, H5FEED_INFLIGHT_BYTES=str(body + (8 << 20)), H5FEED_PROVISIONAL_BYTES=HASHED)
    with h5feed.connect(server.url, local=False, deadline=60) as feed:
        assert feed["raw"].rows == ROWS
    url = f"{server.url}/v1/datasets/raw/batches?fields=wide-i4False&batch_size=50&start=0&stop=1&body=pieces"
    expected = httpx.get(f"{url}&compress=zstd", timeout=60).content
    assert len(expected) < body / 2

    def fetch(_: int) -> bytes:
        return httpx.get(f"{url}&compress=zstd", timeout=60).content

    with ThreadPoolExecutor(6) as threads:
        assert set(threads.map(fetch, range(18))) == {expected}


def test_the_cache_and_saved_states(far: h5feed.Feed, tmp_path: Path) -> None:
    """Both are those of loops without compression."""
    raw = far["raw"]
    options: dict[str, Any] = {"x": ["wide-i4False", "middle-f8True"], "y": "labels", "batch_size": 9, "shuffle": True}
    with raw.loader(compress="zstd", cache=tmp_path, **options) as one, raw.loader(**options) as other:
        first = iter(one)
        for _ in range(4):
            next(first)
        other.load_state_dict(one.state_dict())
        for left, right in zip(first, other, strict=True):
            for name in options["x"]:
                assert left[0][name].tobytes() == right[0][name].tobytes()
    with raw.loader(cache=tmp_path, **options) as again, raw.loader(**options) as other:
        for left, right in zip(again, other, strict=True):
            for name in options["x"]:
                assert left[0][name].tobytes() == right[0][name].tobytes()
        assert again.stats().cached > 0
