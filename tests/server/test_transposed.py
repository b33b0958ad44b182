"""Sparse matrices that are stored by columns: rows are those of scipy's ``tocsr``, read from a copy by rows."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5feed
import h5py
import httpx
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from h5feed.errors import DatasetCorrupt, RevisionChanged, UnsupportedField
from h5feed.stored.byte_cache import ByteCache
from h5feed.stored.column import Column, Segment
from h5feed.stored.layout import ArrayLayout
from h5feed.stored.local_file import Identity, LocalFile, OpenFiles
from h5feed_server.storage.hdf5.reader_pool import ReaderPool
from h5feed_server.storage.reader import Reader
from h5feed_server.storage.transposed import sorting
from h5feed_server.storage.transposed.by_columns import ByColumns
from h5feed_server.storage.transposed.copy_file import TransposedFile
from h5feed_server.storage.transposed.making import transpose
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.object_store import SOURCES, Answer, StoreProxy, honest, serve_folder, served_from
from tests.support.served_rows import described
from tests.support.server_process import ServerProcess
from tests.support.sparse_groups import write_sparse
from tests.support.waiting import wait_until

CELLS, GENES = 307, 90
HTTP = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0))


def _matrix(kind: str, seed: int = 0, shape: tuple[int, int] = (CELLS, GENES), density: float = 0.2) -> Any:
    """By columns, with empty rows and columns, and a row and a column without gaps."""
    random = np.random.default_rng(seed)
    dense = (random.random(shape) < density) * random.integers(1, 9, shape)
    dense[[0, -1]], dense[:, 3] = 0, 0
    dense[7], dense[:, 5] = 1, 2
    return scipy.sparse.csc_matrix(dense.astype(kind))


def _loose(kind: str = "f4") -> Any:
    """Rows of columns in no order, and several values of the same place."""
    random = np.random.default_rng(3)
    lengths = random.integers(0, 40, GENES)
    indices = random.integers(0, CELLS, lengths.sum()).astype("i4")
    data = np.arange(1, len(indices) + 1).astype(kind)
    return scipy.sparse.csc_matrix((data, indices, np.concatenate([[0], np.cumsum(lengths)])), (CELLS, GENES))


X, COUNTS, LOOSE = _matrix("f4"), _matrix("i8", 1), _loose()
TYPES = np.arange(CELLS) % 3
CSC = {"encoding-type": "csc_matrix", "encoding-version": "0.1.0"}


def _write(folder: Path) -> None:
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(np.array(["B", "NK", "T"])[TYPES])}, index=[f"c{n}" for n in range(CELLS)]
    )
    cells = anndata.AnnData(X, obs)
    cells.layers["counts"] = COUNTS
    cells.layers["by_rows"] = X.tocsr()
    cells.write_h5ad(folder / "plain.h5ad")
    cells.write_h5ad(folder / "gzip.h5ad", compression="gzip")
    with h5py.File(folder / "others.h5", "w") as file:
        file["y"] = TYPES
        old = {"h5sparse_format": "csc", "h5sparse_shape": X.shape}
        write_sparse(file, "old", X, old, chunks=(16,), compression="gzip", shuffle=True)
        write_sparse(file, "loose", LOOSE, {**CSC, "shape": LOOSE.shape}, chunks=(50,))
        group = file.create_group("big")
        group.attrs.update({**CSC, "shape": X.shape})
        group["data"], group["indices"], group["indptr"] = X.data.astype(">f8"), X.indices.astype(">i8"), X.indptr
        empty = scipy.sparse.csc_matrix((CELLS, 4), dtype="f4")
        write_sparse(file, "empty", empty, {**CSC, "shape": empty.shape})
        broken = X.copy()
        broken.indices[broken.indptr[9]] = CELLS
        write_sparse(file, "broken", broken, {**CSC, "shape": X.shape})
        write_sparse(file, "short", X, {**CSC, "shape": (CELLS, GENES + 1)})
        write_sparse(file, "backward", X, {**CSC, "shape": X.shape})
        file["backward/indptr"][3] = 1_000_000
    # As MATLAB -v7.3 stores sparse(…), and a sparse matrix of logical.
    with h5py.File(folder / "matlab.mat", "w", userblock_size=512) as file:
        for name, matrix, kind in (("S", X.astype("f8"), "double"), ("mask", X.astype("u1"), "logical")):
            matrix.indices, matrix.indptr = matrix.indices.astype("u8"), matrix.indptr.astype("u8")
            group = file.create_group(name)
            group.attrs["MATLAB_class"], group.attrs["MATLAB_sparse"] = np.bytes_(kind), np.uint64(CELLS)
            group["data"], group["ir"], group["jc"] = matrix.data, matrix.indices, matrix.indptr
        zeros = file.create_group("zeros")
        zeros.attrs["MATLAB_class"], zeros.attrs["MATLAB_sparse"] = np.bytes_("double"), np.uint64(CELLS)
        zeros["jc"] = np.zeros(GENES + 1, "u8")
        file["unsaid/data"], file["unsaid/ir"], file["unsaid/jc"] = X.data, X.indices, X.indptr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    _write(folder)
    return folder


@pytest.fixture(scope="module", params=SOURCES)
def server(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with served_from(request.param, data, tmp_path_factory.mktemp("served"), "--workers", "2") as process:
        yield process


@pytest.fixture(scope="module")
def feed(server: ServerProcess) -> Iterator[h5feed.Feed]:
    with h5feed.connect(server.url, deadline=120) as connected:
        yield connected


def _assert_same(found: Any, wanted: Any) -> None:
    """Equal, down to the order of the stored values."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found, part), getattr(wanted, part))


@given(
    rows=st.lists(st.integers(0, CELLS - 1), max_size=80),
    place=st.sampled_from(
        [
            ("plain", "X", X),
            ("plain", "layers.counts", COUNTS),
            ("gzip", "X", X),
            ("gzip", "layers.by_rows", X),
            ("others", "old", X),
            ("others", "loose", LOOSE),
            ("others", "big", X.astype("f8")),
            ("others", "empty", scipy.sparse.csc_matrix((CELLS, 4), dtype="f4")),
            ("matlab", "S", X.astype("f8")),
            ("matlab", "mask", X.astype("u1")),
        ]
    ),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_those_of_scipy(feed: h5feed.Feed, rows: list[int], place: tuple[str, str, Any]) -> None:
    """In any order, with rows that repeat; from two workers, of which one has made the copy."""
    name, field, matrix = place
    _assert_same(feed[name].take(rows, fields=[field]).sparse(field), matrix.tocsr()[rows])


def test_rows_are_those_of_anndata(feed: h5feed.Feed, data: Path) -> None:
    """Of the whole file in order, next to other fields, sparse and dense."""
    dataset = feed["gzip"]
    stored = anndata.read_h5ad(data / "gzip.h5ad")
    assert isinstance(stored.X, scipy.sparse.csc_matrix)
    revision = dataset.revision
    seen = []
    for batch in dataset.batches(batch_size=50, shuffle=True, fields=["X", "layers.counts", "obs.cell_type"]):
        _assert_same(batch.sparse("X"), stored.X[batch.rows].tocsr())
        _assert_same(batch.sparse("layers.counts"), stored.layers["counts"].tocsr()[batch.rows])
        np.testing.assert_array_equal(batch.dense("X"), stored.X[batch.rows].toarray())
        np.testing.assert_array_equal(batch["obs.cell_type"], TYPES[batch.rows])
        seen.append(batch.rows)
    assert sorted(np.concatenate(seen).tolist()) == list(range(CELLS))
    assert feed.dataset("gzip").revision == revision
    stats = dataset.stats(field="X")
    assert stats.mean == pytest.approx(X.toarray().mean())
    assert stats["lengths"]["mean"] == pytest.approx(X.nnz / CELLS)


def test_joined_cells(data: Path, serve: Callable[..., ServerProcess]) -> None:
    """The copy of a joined dataset is made before the first batch, and one offset takes other rows of it."""
    with h5feed.connect(serve(data).url, deadline=120) as fresh:
        joined = fresh["plain"].join("gzip:obs._index")
        fields = ["gzip/X", "later"]
        batch = joined.batch(0, batch_size=20, fields=fields, offsets={"later": ("gzip/X", 2)}, sparse="dense")
        np.testing.assert_array_equal(batch["gzip/X"], X.toarray()[:20])
        np.testing.assert_array_equal(batch["later"], X.toarray()[2:22])
        found = joined.stats(field="gzip/X")
        assert found.mean == pytest.approx(X.mean(), rel=1e-5)


def test_description(feed: h5feed.Feed) -> None:
    dataset = feed["plain"]
    x = dataset.fields["X"]
    assert (x.role, x.shape, x.dtype, x.index_dtype) == ("input", (GENES,), "float32", "int32")
    about = next(field for field in dataset.info["fields"] if field["name"] == "X")
    assert about["sparse"] == {"format": "csr", "index_dtype": "int32", "stored_values": X.nnz}
    assert about["role_reason"] == "the matrix X of AnnData"
    notes = {field["name"]: field["note"] for name in ("plain", "matlab") for field in feed[name].info["fields"]}
    assert "stored by columns" in str(notes["X"]) and "stored by columns" in str(notes["S"])
    assert notes["layers.by_rows"] is None


def test_what_is_wrong_is_refused(feed: h5feed.Feed) -> None:
    """Before, as far as the offsets tell; else by the job that looks at the indices."""
    dataset = feed["others"]
    assert f"not those of {GENES + 1} columns" in str(dataset.fields["short"].reason)
    assert "its indptr do not ascend" in str(dataset.fields["backward"].reason)
    listed = HTTP.get(f"{feed.url}/v1/datasets").json()
    assert "all of its values are 0, and MATLAB has stored none" in str(listed) and "zeros.jc" not in str(listed)
    assert "unsaid" not in feed["matlab"].fields or not feed["matlab"].fields["unsaid"].readable
    with pytest.raises(DatasetCorrupt, match=f"column 9 of 'broken/data' has a row index .* its {CELLS} rows"):
        dataset.take([0], fields=["broken"])
    _assert_same(dataset.take([5], fields=["old"]).sparse("old"), X.tocsr()[[5]])


@pytest.mark.parametrize("source", SOURCES)
def test_too_large_to_copy(data: Path, tmp_path: Path, source: str) -> None:
    """A matrix whose copy is larger than all copies may be is listed with the reason; the others are served."""
    with (
        served_from(source, data, tmp_path, H5FEED_TRANSPOSED_BYTES="20000") as small,
        h5feed.connect(small.url, deadline=60) as feed,
    ):
        assert "(H5FEED_TRANSPOSED_BYTES)" in str(feed["plain"].fields["X"].reason)
        with pytest.raises(UnsupportedField, match="of 49152 bytes, would be larger than the 20000 bytes"):
            feed["plain"].take([0], fields=["X"])
        _assert_same(feed["plain"].take([1], fields=["layers.by_rows"]).sparse("layers.by_rows"), X.tocsr()[[1]])
        _assert_same(feed["others"].take([1], fields=["loose"]).sparse("loose"), LOOSE.tocsr()[[1]])


def test_a_file_that_is_inspected_again(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """As all are that were just written, while there is no copy yet: the next request is told the same as the first."""
    folder = tmp_path / "data"
    folder.mkdir()
    server = serve(folder)
    broken = X.copy()
    broken.indices[broken.indptr[9]] = CELLS
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_sparse(file, "X", broken, {**CSC, "shape": X.shape})
    (tmp_path / "a.h5").replace(folder / "a.h5")
    described(server, "a")
    for _ in range(5):
        answer = HTTP.get(f"{server.url}/v1/datasets/a/plan")
        assert answer.json()["code"] == "dataset_corrupt", answer.text
        time.sleep(1)


def _copies(server: ServerProcess, suffix: str = "rows") -> list[Path]:
    return sorted((server.cache_dir / "by-rows").glob(f"*.{suffix}"))


@pytest.mark.parametrize("source", SOURCES)
def test_copies_have_a_bound(data: Path, tmp_path: Path, source: str) -> None:
    """The ones that were used least recently are removed, and are made again when they are needed."""
    with (
        served_from(source, data, tmp_path, "--workers", "2", H5FEED_TRANSPOSED_BYTES="100000") as small,
        h5feed.connect(small.url, deadline=120) as feed,
    ):
        for _ in range(2):
            for name, field, matrix in (("plain", "X", X), ("gzip", "X", X), ("others", "old", X)):
                _assert_same(feed[name].take([3, 1], fields=[field]).sparse(field), matrix.tocsr()[[3, 1]])
                assert sum(path.stat().st_size for path in _copies(small)) <= 100_000


@pytest.mark.parametrize("damage", ["changed", "cut", "removed", "table"])
def test_damage(data: Path, serve: Callable[..., ServerProcess], damage: str) -> None:
    """Whatever happens to a copy, before or after it was opened, rows are never other ones; it is made again."""
    own = serve(data, "--workers", "2", H5FEED_CACHE_BYTES="0")
    rows = np.random.default_rng(1).permutation(CELLS)
    for is_started_again in (False, True):
        if is_started_again and damage == "removed":
            # The workers may still have the removed copy open: only new ones are sure to miss it.
            own.stop()
            own.start()
        with h5feed.connect(own.url, deadline=120) as feed:
            _assert_same(feed["plain"].take(rows, fields=["X"]).sparse("X"), X.tocsr()[rows])
        ((copy,), (table,)) = _copies(own), _copies(own, "table")
        content = bytearray(copy.read_bytes())
        if is_started_again:
            own.stop()
        if damage == "changed":
            content[::5000] = bytes(byte ^ 1 for byte in content[::5000])
            copy.write_bytes(content)
        elif damage == "cut":
            os.truncate(copy, 5000)
        elif damage == "removed":
            copy.unlink()
        else:
            table.write_bytes(table.read_bytes()[:-1] + b"!")
        if is_started_again:
            own.start()
        with h5feed.connect(own.url, deadline=120) as feed:
            for _ in range(3):
                _assert_same(feed["plain"].take(rows, fields=["X"]).sparse("X"), X.tocsr()[rows])
                batches = list(feed["plain"].batches(batch_size=100, fields=["X"]))
                _assert_same(scipy.sparse.vstack([batch.sparse("X") for batch in batches], "csr"), X.tocsr())


def test_killed_while_a_copy_is_made(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """After SIGKILL, the copy is made from the beginning, and nothing is left over of the first one."""
    matrix = _matrix("f4", 5, (20_000, 400), 0.3)
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "a.h5", "w") as file:
        write_sparse(file, "X", matrix, {**CSC, "shape": matrix.shape}, chunks=True)
    server = serve(folder, "--workers", "2")
    url = f"{server.url}/v1/datasets/a/plan"
    with contextlib.suppress(httpx.ReadTimeout):
        HTTP.get(url, timeout=0.1)
    wait_until(lambda: bool(_copies(server, "part")) or bool(_copies(server)), seconds=60)
    assert {*server.unfinished_jobs()} <= {"transpose"}
    server.kill()
    server.start()
    rows = np.random.default_rng(1).integers(0, 20_000, 200)
    with h5feed.connect(server.url, deadline=240) as feed:
        _assert_same(feed["a"].take(rows, fields=["X"]).sparse("X"), matrix.tocsr()[rows])
    assert (len(_copies(server)), _copies(server, "part")) == (1, [])


@given(drawn=st.data())
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_parts_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: st.DataObject) -> None:
    """However few values are divided and sorted at a time, whatever the matrix: the same as of scipy."""
    rows, columns = drawn.draw(st.integers(1, 12)), drawn.draw(st.integers(1, 9))
    lengths = drawn.draw(st.lists(st.integers(0, 8), min_size=columns, max_size=columns))
    count = sum(lengths)
    kind = drawn.draw(st.sampled_from(["<f4", ">f8", "|i1", "<u2", "|b1", "<f2"]))
    values = np.arange(count).astype(kind)
    indices = np.array(drawn.draw(st.lists(st.integers(0, rows - 1), min_size=count, max_size=count)), ">u8")
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    path = tmp_path / "stored"
    path.write_bytes(indices.tobytes() + values.tobytes())
    source = LocalFile(OpenFiles(2), str(path), Identity.of(path.stat()), os.urandom(8))
    stored = ArrayLayout("ir", (count,), ">u8", indices.nbytes, offset=0)
    lists = ArrayLayout("data", (count,), kind, values.nbytes, offset=indices.nbytes)
    matrix = ByColumns(Segment(source, lists, offsets=indptr), Segment(source, stored), rows, columns)
    copy = TransposedFile(matrix, tmp_path / "copies")
    hdf5 = ReaderPool(1, 60, 1 << 20)
    reader = Reader(1, ByteCache(0, 60), 0, 60, hdf5)
    monkeypatch.setattr(sorting, "_ENTRIES", drawn.draw(st.integers(1, 20)))
    done: list[int] = []
    try:
        transpose(copy, reader, 1 << 20, done.append)
        wanted = np.array(drawn.draw(st.lists(st.integers(0, rows - 1), max_size=20)), np.int64)
        found = reader.read_sparse(Column((copy.segment(),)), wanted)
    finally:
        reader.close()
        hdf5.close()
    assert sum(done) == sorting.work_bytes(matrix)
    # scipy has no matrices of some of these types, so it sorts the numbers of the values.
    order = scipy.sparse.csc_matrix((np.arange(count), indices.astype("i4"), indptr), (rows, columns)).tocsr()[wanted]
    np.testing.assert_array_equal(found.data, values[order.data])
    np.testing.assert_array_equal(found.indices, order.indices)
    np.testing.assert_array_equal(found.indptr, order.indptr)
    assert [each.suffix for each in sorted((tmp_path / "copies").glob(f"{copy.name}*"))] == [".rows", ".table"]


LARGE = _matrix("f4", 5, (20_000, 400), 0.3)
"""Of several blocks, each of which takes several ranges."""


def _write_large(path: Path, factor: float = 1.0) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs.update({**CSC, "shape": LARGE.shape})
        group.create_dataset("data", data=LARGE.data * np.float32(factor), chunks=(1 << 15,))
        group.create_dataset("indices", data=LARGE.indices, chunks=(1 << 15,))
        group["indptr"] = LARGE.indptr


@pytest.fixture
def away(tmp_path: Path) -> Iterator[tuple[Path, StoreProxy]]:
    """An object with `LARGE`, and the store that it is in."""
    path = tmp_path / "buckets" / "data" / "a.h5"
    path.parent.mkdir(parents=True)
    _write_large(path)
    store = serve_folder(tmp_path / "buckets")
    between = StoreProxy(store)
    yield path, between
    between.stop()
    store.stop()


SOME = np.random.default_rng(1).integers(0, LARGE.shape[0], 200)


def _some_of(server: ServerProcess, factor: float = 1.0) -> None:
    """Hold rows of `LARGE` against scipy's."""
    with h5feed.connect(server.url, deadline=120) as feed:
        wanted = LARGE.tocsr()[SOME] * np.float32(factor)
        _assert_same(feed["a"].take(SOME, fields=["X"]).sparse("X"), wanted)


def _job_of(server: ServerProcess) -> str:
    """The URL of the job that makes the copy of `LARGE`, which this begins if it does not run."""
    with contextlib.suppress(httpx.ReadTimeout):
        HTTP.get(f"{server.url}/v1/datasets/a/plan", timeout=5)
    files: list[Path] = []

    def is_there() -> bool:
        files[:] = server.cache_dir.glob("served-*/jobs/*.json")
        return bool(files)

    wait_until(is_there)
    (file,) = files
    return f"{server.url}/v1/jobs/{file.stem}"


def test_a_copy_of_an_object_is_kept(away: tuple[Path, StoreProxy], serve: Callable[..., ServerProcess]) -> None:
    """Also one that was made just after the object had been found. No other worker makes another one, and a restarted
    server neither makes one nor asks the store."""
    _, proxy = away
    server = serve("s3://data", "--workers", "2", **proxy.environment, H5FEED_STORE_CACHE_BYTES="0")
    for _ in range(3):
        _some_of(server)
    (copy,) = _copies(server)
    made = copy.stat().st_ino
    time.sleep(2.5)
    for _ in range(2):
        server.stop()
        asked = proxy.nbytes
        server.start()
        for _ in range(3):
            _some_of(server)
        (copy,) = _copies(server)
        assert copy.stat().st_ino == made
        assert proxy.nbytes - asked < LARGE.data.nbytes / 10


@pytest.mark.parametrize("fault", ["status", "cut"])
def test_passing_faults_of_a_store(
    away: tuple[Path, StoreProxy], serve: Callable[..., ServerProcess], fault: str
) -> None:
    """503, and connections that end early, while a copy is made: no value is missing."""
    _, proxy = away
    server = serve("s3://data", **proxy.environment)
    described(server, "a")
    numbers = itertools.count()
    bad: list[int] = []

    def fail(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        status, headers, body = ask()
        if ranged is None or (number := next(numbers)) % 3:
            return status, headers, body
        bad.append(number)
        return (503, {"content-length": "0"}, b"") if fault == "status" else (status, headers, body[: len(body) // 2])

    proxy.behave = fail
    _some_of(server)
    assert len(bad) >= 2


def test_a_store_that_goes_away(away: tuple[Path, StoreProxy], serve: Callable[..., ServerProcess]) -> None:
    """In the middle of a copy: the job fails with the reason, nothing is left over, and the next request begins again.
    The job tells how far it is."""
    _, proxy = away
    server = serve("s3://data", "--workers", "2", **proxy.environment, H5FEED_READ_TIMEOUT="6")
    described(server, "a")
    numbers = itertools.count()

    def fail(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        return ask() if ranged is None or next(numbers) < 3 else (503, {"content-length": "0"}, b"")

    proxy.behave = fail
    url = _job_of(server)
    states: list[dict[str, Any]] = []

    def is_over() -> bool:
        states.append(HTTP.get(url).json())
        return states[-1]["status"] in ("done", "failed")

    wait_until(is_over, seconds=60)
    last = states[-1]
    assert (last["status"], last["code"], last["unit"]) == ("failed", "source_unavailable", "bytes")
    assert "status 503" in last["detail"] and last["done"] < last["total"]
    assert not [path for path in (server.cache_dir / "by-rows").iterdir() if path.suffix != ".lock"]
    # Each request begins again, and is told the same.
    wait_until(lambda: HTTP.get(f"{server.url}/v1/datasets/a/plan").json()["code"] == "source_unavailable", seconds=60)
    proxy.behave = honest
    _some_of(server)
    last = HTTP.get(url).json()
    assert last["status"] == "done" and last["done"] == last["total"] > 0


def test_a_store_that_hangs(away: tuple[Path, StoreProxy], serve: Callable[..., ServerProcess]) -> None:
    """In the middle of a copy: the server stops in time all the same, and makes the copy when it is started again."""
    _, proxy = away
    server = serve("s3://data", "--workers", "2", **proxy.environment, H5FEED_READ_TIMEOUT="60")
    described(server, "a")
    over, hangs = threading.Event(), threading.Event()
    numbers = itertools.count()

    def hang(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if ranged is not None and next(numbers) >= 3:
            hangs.set()
            over.wait(120)
        return ask()

    proxy.behave = hang
    try:
        url = _job_of(server)
        assert hangs.wait(60)
        assert HTTP.get(url).json()["status"] == "running"
        assert server.stop() == 0
    finally:
        over.set()
    proxy.behave = honest
    server.start()
    _some_of(server)
    assert (len(_copies(server)), _copies(server, "part")) == (1, [])


@pytest.mark.parametrize("heeds_conditions", [False, True])
@pytest.mark.parametrize("moment", ["counting", "dividing", "later"])
def test_an_object_that_is_replaced(
    away: tuple[Path, StoreProxy],
    serve: Callable[..., ServerProcess],
    tmp_path: Path,
    moment: str,
    heeds_conditions: bool,
) -> None:
    """While its copy is made, in either pass, or afterwards: whoever reads on is told or gets the old rows, and never a
    mixture. Then the new version is served."""
    path, proxy = away
    proxy.conditional = heeds_conditions
    # Nothing is kept on the disk: each pass asks the store.
    server = serve("s3://data", **proxy.environment, H5FEED_STORE_CACHE_BYTES="0", H5FEED_CACHE_BYTES="0")
    before = described(server, "a")["revision"]
    new = tmp_path / "new.h5"
    _write_large(new, 2)
    assert new.stat().st_size == path.stat().st_size
    begins: list[int] = []

    def replace(path_: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if ranged is not None:
            begins.append(int(ranged.removeprefix("bytes=").split("-")[0]))
            # The first pass reads the indices, which are behind the values in the file.
            is_counting = len(begins) == 2
            is_dividing = LARGE.data.nbytes / 4 < begins[-1] < LARGE.data.nbytes / 2
            if new.exists() and (is_counting if moment == "counting" else is_dividing and moment == "dividing"):
                new.replace(path)
        return ask()

    with h5feed.connect(server.url, deadline=60) as feed:
        dataset = feed["a"]
        proxy.behave = replace
        if moment == "later":
            _some_of(server)
            new.replace(path)
            with contextlib.suppress(RevisionChanged):
                _assert_same(dataset.take(SOME, fields=["X"]).sparse("X"), LARGE.tocsr()[SOME])
        else:
            with pytest.raises(RevisionChanged):
                dataset.take(SOME, fields=["X"])
        assert not new.exists()
    wait_until(lambda: described(server, "a")["revision"] != before)
    _some_of(server, 2)
