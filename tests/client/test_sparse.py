"""Sparse matrices: rows are those of anndata and scipy, in every order, through every way that rows take."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5feed
import h5py
import httpx
import keras
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from h5feed.csr import SparseRows
from h5feed.errors import BadAnswer, BadParameter, DatasetCorrupt, UnsupportedField
from h5feed.frames import Field, Frame
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.server_process import ServerProcess
from tests.support.sparse_groups import write_sparse

CELLS, GENES = 211, 803


def _matrix(kind: str = "f4", seed: int = 0) -> scipy.sparse.csr_matrix:
    """Cells × genes, with empty cells, and one that has all genes."""
    random = np.random.default_rng(seed)
    dense = (random.random((CELLS, GENES)) < 0.2) * random.integers(1, 9, (CELLS, GENES))
    dense[[0, 5, CELLS - 1]] = 0
    dense[7] = np.arange(1, GENES + 1)
    return scipy.sparse.csr_matrix(dense.astype(kind))


X, COUNTS = _matrix(), _matrix("i8", 1)
TYPES = np.arange(CELLS) % 3


def _write(folder: Path) -> None:
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(np.array(["B", "NK", "T"])[TYPES])}, index=[f"c{n}" for n in range(CELLS)]
    )
    cells = anndata.AnnData(X, obs)
    cells.layers["counts"], cells.layers["by_genes"] = COUNTS, X.tocsc()
    cells.raw = cells
    cells.obsp["near"] = scipy.sparse.random(CELLS, CELLS, 0.1, "csr")
    for name, options in (("plain", {}), ("gzip", {"compression": "gzip"}), ("lzf", {"compression": "lzf"})):
        cells.write_h5ad(folder / f"{name}.h5ad", **options)
    csr = {"encoding-type": "csr_matrix", "shape": X.shape}
    with h5py.File(folder / "chunks.h5", "w") as file:
        write_sparse(file, "X", X, csr, chunks=(16,), compression="gzip")
        file["y"] = TYPES
    with h5py.File(folder / "contiguous.h5", "w") as file:
        write_sparse(file, "X", X, csr)
        del file["X/data"], file["X/indices"]
        file["X/data"], file["X/indices"] = X.data.astype(">f8"), X.indices.astype(">i8")
        file["y"] = TYPES
    with h5py.File(folder / "old.h5", "w") as file:
        write_sparse(file, "X", X, {"h5sparse_format": "csr", "h5sparse_shape": X.shape})
        file["y"] = TYPES
    with h5py.File(folder / "tenx.h5", "w") as file:
        write_sparse(file, "matrix", COUNTS.astype("i4"), {})
        file["matrix/shape"] = np.array([GENES, CELLS])
        file["matrix/barcodes"] = np.array([f"b{n}".encode() for n in range(CELLS)])
    # Not in scipy's canonical form: indices in no order, and several values of the same cell and gene.
    loose = X.copy()
    loose.indices, loose.data = loose.indices[::-1].copy() % 11, loose.data[::-1].copy()
    with h5py.File(folder / "loose.h5", "w") as file:
        write_sparse(file, "X", loose, csr, chunks=(50,))
        file["y"] = TYPES
    with h5py.File(folder / "wrong.h5", "w") as file:
        broken = X.copy()
        broken.indices[broken.indptr[9]] = GENES
        write_sparse(file, "X", broken, csr)
        file["y"] = TYPES
        for name in ("backward", "beyond", "short", "lengths", "shapeless", "unsaid", "negative"):
            write_sparse(file, name, X, {} if name == "unsaid" else {"encoding-type": "csr_matrix"})
            if name not in ("shapeless", "unsaid"):
                file[name].attrs["shape"] = X.shape
        file["backward/indptr"][3] = 1_000_000
        file["beyond/indptr"][-1] += 1
        file["short"].attrs["shape"] = (CELLS + 1, GENES)
        file["negative"].attrs["shape"] = (CELLS, -GENES)
        del file["lengths/indices"]
        file["lengths/indices"] = X.indices[:-1]
        group = file.create_group("pairs")
        group.attrs["encoding-type"] = "coo_matrix"
        coo = X.tocoo()
        group["data"], group["row"], group["col"] = coo.data, coo.row, coo.col


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]
) -> tuple[ServerProcess, ServerProcess]:
    """Two servers of the same files; the responses of the second are small."""
    folder = tmp_path_factory.mktemp("data")
    _write(folder)
    return serve_module(folder), serve_module(folder, H5FEED_MAX_BODY_BYTES=str(1 << 16))


@pytest.fixture(scope="module")
def feed(servers: tuple[ServerProcess, ServerProcess]) -> Iterator[h5feed.Feed]:
    with h5feed.connect(servers[0].url, deadline=60) as connected:
        yield connected


@pytest.fixture(scope="module")
def small(servers: tuple[ServerProcess, ServerProcess]) -> Iterator[h5feed.Feed]:
    with h5feed.connect(servers[1].url, deadline=60) as connected:
        yield connected


@pytest.mark.parametrize("name", ["plain", "gzip", "lzf"])
def test_rows_are_those_of_anndata(feed: h5feed.Feed, servers: tuple[ServerProcess, ...], name: str) -> None:
    """X and layers, as matrices of scipy and as dense arrays, in any order and with rows that repeat."""
    dataset = feed[name]
    stored = anndata.read_h5ad(servers[0].folder / f"{name}.h5ad")
    rows = np.random.default_rng(2).integers(0, CELLS, 60)
    batch = dataset.take(rows, fields=["X", "layers.counts", "obs.cell_type"])
    for field, matrix in (("X", stored.X), ("layers.counts", stored.layers["counts"])):
        found, wanted = batch.sparse(field), matrix[rows]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(found, part), getattr(wanted, part))
        dense = batch.dense(field)
        assert dense.dtype == wanted.dtype
        np.testing.assert_array_equal(dense, wanted.toarray())
    assert dataset.class_names == ["B", "NK", "T"]
    np.testing.assert_array_equal(batch["obs.cell_type"], TYPES[rows])


def test_description(feed: h5feed.Feed) -> None:
    """X is the input, and its rows are as long as there are genes; so are those of a matrix by columns."""
    dataset = feed["plain"]
    x = dataset.fields["X"]
    assert (x.role, x.shape, x.dtype, x.ragged, x.index_dtype) == ("input", (GENES,), "float32", False, "int32")
    about = next(field for field in dataset.info["fields"] if field["name"] == "X")
    assert about["sparse"] == {"format": "csr", "index_dtype": "int32", "stored_values": X.nnz}
    assert dataset.fields["layers.by_genes"].shape == (GENES,)
    for name in ("obsp.near", "raw.X"):
        assert not dataset.fields[name.replace("obsp.", "obsp.")].readable
    assert dataset.shape["X"] == (CELLS, GENES)


@pytest.mark.parametrize(
    ("name", "field", "matrix"),
    [
        ("chunks", "X", X),
        ("contiguous", "X", X.astype("f8")),
        ("old", "X", X),
        ("tenx", "matrix", COUNTS.astype("i4")),
    ],
)
def test_other_ways_to_store_it(feed: h5feed.Feed, name: str, field: str, matrix: scipy.sparse.csr_matrix) -> None:
    """Small compressed chunks, big-endian numbers, what AnnData wrote before 0.7, and 10x Genomics'."""
    (found,) = [entry["name"] for entry in feed.datasets() if entry["name"].split(".")[0] == name]
    rows = np.random.default_rng(3).permutation(CELLS)
    batch = feed[found].take(rows, fields=[field])
    np.testing.assert_array_equal(batch.dense(field), matrix[rows].toarray())
    assert batch.dense(field).dtype == matrix.dtype


def test_values_of_the_same_place_are_added(feed: h5feed.Feed) -> None:
    """As in scipy's toarray."""
    batch = feed["loose"].take(np.arange(CELLS))
    wanted = batch.sparse("X")
    assert not wanted.has_canonical_format
    np.testing.assert_array_equal(batch.dense("X"), wanted.toarray())
    report = feed["loose"].stats(field="X")
    assert report.mean == pytest.approx(wanted.toarray().mean())
    assert report.std == pytest.approx(wanted.toarray().std())


def test_what_is_wrong_is_refused(feed: h5feed.Feed) -> None:
    """A matrix that contradicts itself is not served, a row with an index beyond the columns fails; others do not."""
    dataset = feed[next(entry["name"] for entry in feed.datasets() if entry["name"].split(".")[0] == "wrong")]
    reasons = {name: str(field.reason) for name, field in dataset.fields.items() if not field.readable}
    assert "its indptr do not ascend from 0" in reasons["backward"]
    assert "its indptr do not ascend from 0" in reasons["beyond"]
    assert f"not those of {CELLS + 1} rows" in reasons["short"]
    assert f"{X.nnz} values, but {X.nnz - 1} column indices" in reasons["lengths"]
    assert "its shape is missing" in reasons["shapeless"]
    assert "two integers, 0 or more" in reasons["negative"]
    assert "does not say whether it is stored by rows" in reasons["unsaid"]
    assert "stored as coordinates" in reasons["pairs"]
    with pytest.raises(UnsupportedField, match="coordinates"):
        dataset.take([0], fields=["pairs"])
    with pytest.raises(DatasetCorrupt, match=f"row 9 .* column index {GENES}, but the matrix has {GENES} columns"):
        dataset.take([3, 9], fields=["X"])
    np.testing.assert_array_equal(dataset.take([3, 8], fields=["X"]).dense("X"), X[[3, 8]].toarray())


ORDERS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 70),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 5),
        "epoch": st.integers(0, 3),
        "shards": st.sampled_from([None, 2, 3]),
        "window": st.sampled_from([None, 40]),
        "last": st.sampled_from([None, "drop", "pad"]),
    }
)


@given(order=ORDERS, name=st.sampled_from(["plain", "gzip", "chunks"]), sparse=st.sampled_from(["dense", "csr"]))
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_order(feed: h5feed.Feed, small: h5feed.Feed, order: dict[str, Any], name: str, sparse: Any) -> None:
    """Each row once, with its values; the same from any batch on, and on a server that sends batches in parts."""
    label = "y" if name == "chunks" else "obs.cell_type"
    shards = order.pop("shards")
    seen = []
    for shard in range(shards or 1):
        options = {**order, "sparse": sparse} | ({"shard": shard, "shards": shards} if shards else {})
        if not order["shuffle"]:
            options.pop("window")
        batches = list(feed[name].batches("all", fields=["X", label], **options))
        for batch, other in zip(batches, small[name].batches("all", fields=["X", label], **options), strict=True):
            np.testing.assert_array_equal(batch.dense("X"), X[batch.rows].toarray())
            np.testing.assert_array_equal(batch[label], TYPES[batch.rows])
            np.testing.assert_array_equal(other.rows, batch.rows)
            np.testing.assert_array_equal(other.dense("X"), batch.dense("X"))
            real = slice(None) if batch.weight is None else batch.weight > 0
            seen.append(batch.rows[real])
        if batches:
            middle = len(batches) // 2
            again = feed[name].batch(middle, fields=["X", label], **options)
            np.testing.assert_array_equal(again.rows, batches[middle].rows)
            np.testing.assert_array_equal(again.dense("X"), batches[middle].dense("X"))
    rows = np.concatenate(seen) if seen else np.zeros(0, int)
    assert len(np.unique(rows)) == len(rows)
    if order["last"] != "drop":
        assert len(rows) == CELLS


def test_through_the_cache_and_from_owners(
    feed: h5feed.Feed,
    servers: tuple[ServerProcess, ServerProcess],
    serve: Callable[..., ServerProcess],
    tmp_path: Path,
) -> None:
    """With a row cache, rows that are not cached are fetched again; from owners of rows, they are put together."""
    options: dict[str, Any] = {"batch_size": 32, "shuffle": True, "fields": ["X", "obs.cell_type"]}
    second = serve(servers[0].folder)
    with h5feed.connect(f"{servers[0].url},{second.url}", placement="cache", deadline=60) as placed:
        for _ in range(2):
            for dataset, cached in ((feed["plain"], tmp_path), (placed["plain"], None)):
                for sparse in ("dense", "csr"):
                    batches = list(dataset.batches("all", cache=cached, sparse=sparse, **options))
                    assert sum(len(batch.rows) for batch in batches) == CELLS
                    for batch in batches:
                        np.testing.assert_array_equal(batch.dense("X"), X[batch.rows].toarray())
                        np.testing.assert_array_equal(batch["obs.cell_type"], TYPES[batch.rows])


def test_loops(feed: h5feed.Feed) -> None:
    """Loops get dense arrays of equal shape; a loader gets matrices of scipy where they are asked for."""
    dataset, rows = feed["gzip"], feed["gzip"].split_rows("train", val=0.2)
    order: dict[str, Any] = {"batch_size": 16, "val": 0.2}
    dense = list(dataset.loader("train", **order))
    np.testing.assert_array_equal(np.concatenate([x for x, _ in dense]), X[rows].toarray())
    sparse = list(dataset.loader("train", sparse="csr", **order))
    assert (scipy.sparse.vstack([x for x, _ in sparse]) != X[rows]).nnz == 0
    scaled, _ = next(iter(dataset.loader("train", mean="server", std="server", **order)))
    whole = X[rows].toarray()
    np.testing.assert_allclose(scaled, (whole[:16] - whole.mean()) / whole.std(), rtol=1e-4, atol=1e-5)
    model = keras.Sequential([keras.Input((GENES,)), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(dataset.sequence("train", shuffle=True, **order), verbose=0)
    np.testing.assert_array_equal(dataset[7]["X"], X[7].toarray()[0])


def test_rows_under_another_name(feed: h5feed.Feed) -> None:
    """A later cell of each sample, as dense rows, as a matrix, and not scaled in silence."""
    dataset = feed["plain"]
    options: dict[str, Any] = {"x": "later", "y": [], "offsets": {"later": ("X", 3)}, "batch_size": 16}
    (dense,), (sparse,) = next(iter(dataset.loader(**options))), next(iter(dataset.loader(sparse="csr", **options)))
    np.testing.assert_array_equal(dense, X[3:19].toarray())
    assert (sparse != X[3:19]).nnz == 0
    with pytest.raises(BadParameter, match="without rescale"):
        dataset.loader(sparse="csr", rescale=2.0, **options)


def test_options_that_contradict_each_other(feed: h5feed.Feed) -> None:
    """Keras takes no sparse matrices, and nothing may be subtracted from one."""
    dataset = feed["plain"]
    with pytest.raises(BadParameter, match="Keras takes dense arrays"):
        dataset.sequence(sparse="csr")
    with pytest.raises(BadParameter, match="without rescale"):
        dataset.loader(sparse="csr", mean=1.0)
    with pytest.raises(BadParameter, match="must be 'dense' or 'csr'"):
        dataset.batches(sparse="coo")  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match="has shape 803"):
        dataset.plan("all", where="X > 1")


def test_statistics_are_of_all_cells(feed: h5feed.Feed) -> None:
    """Zeros count, although they are not stored; lengths are the numbers of stored values."""
    report, dense = feed["plain"].stats(field="X"), X.toarray()
    assert report.mean == pytest.approx(dense.mean())
    assert report.std == pytest.approx(dense.std())
    assert (report["min"], report["max"]) == (dense.min(), dense.max())
    assert report["lengths"]["mean"] == pytest.approx(X.nnz / CELLS)


@given(data=st.data())
@settings(deadline=None)
def test_dense_rows_are_those_of_scipy(data: st.DataObject) -> None:
    """Of any indices: in order or not, once or several times."""
    rows, columns = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 9))
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=rows, max_size=rows))
    indptr = np.cumsum([0, *lengths])
    count = int(indptr[-1])
    indices = np.array(data.draw(st.lists(st.integers(0, columns - 1), min_size=count, max_size=count)), "i4")
    kind = data.draw(st.sampled_from(["f4", "f8", "i1", "u2", "i8", "?"]))
    values = np.array(data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))).astype(kind)
    sparse = SparseRows(values, indices, indptr, columns)
    dense = sparse.dense()
    np.testing.assert_array_equal(dense, sparse.scipy().toarray())
    assert dense.dtype == values.dtype
    assert sparse.summed().sum() == pytest.approx(dense.sum())


def test_indices_of_a_server_are_checked() -> None:
    """Column indices that are not below the number of columns would be written to another row."""
    frame = Frame.of(5, [Field("X", "input", (3,), "float32", True, None, index_dtype="int32")], (), weighted=False)
    body = {"__rows__": np.zeros((1, 1), "i8"), "X.data": np.ones((1, 2), "f4"), "X.indptr": np.array([[0, 2]])}
    frame.check({**body, "X.indices": np.array([[0, 2]], "i4")})
    for wrong in (3, -1):
        with pytest.raises(BadAnswer, match="column indices of 'X'"):
            frame.check({**body, "X.indices": np.array([[0, wrong]], "i4")})


def test_pages_and_formats(servers: tuple[ServerProcess, ServerProcess]) -> None:
    """The explorer shows dense rows; npz and JSON have the parts of the matrix."""
    with httpx.Client(base_url=servers[0].url, timeout=60) as http:
        for path in ("", "/rows", "/rows/7", "/tree", "/splits"):
            for name in ("plain", "tenx"):
                assert http.get(f"/datasets/{name}{path}", headers={"accept": "text/html"}).status_code == 200
        assert "float32 803, sparse" in http.get("/datasets/plain/rows/7", headers={"accept": "text/html"}).text
        assert http.get("/datasets/plain/rows/7/view?field=X&side=300").headers["content-type"].startswith("image/")
        rows = "/v1/datasets/plain/rows?start=3&stop=9&fields=X"
        arrays = np.load(io.BytesIO(http.get(f"{rows}&format=npz").content))
        np.testing.assert_array_equal(arrays["X.data"], X[3:9].data)
        np.testing.assert_array_equal(arrays["X.indptr"], X[3:9].indptr)
        assert http.get(f"{rows}&format=json").json()["tensors"]["X.indices"]["dtype"] == "int32"
        assert http.get(f"{rows}&format=npy").status_code == 400
