"""What pandas, PyTables, AnnData and xarray write: files of their structure and attributes, written by h5py."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.prepare import Preparation
from h5feed_server.storage.hdf5.pickled_lists import plain_list

from tests.support.inspected import inspected, stored_splits
from tests.support.server_process import ServerProcess

Array = npt.NDArray[Any]

random = np.random.default_rng(5)


def _pickled(value: Any) -> np.bytes_:
    """As PyTables writes an attribute that is no number and no text."""
    return np.bytes_(pickle.dumps(value, 0))


def _axis(group: h5py.Group, name: str, values: Array, kind: str, **options: Any) -> None:
    """An array of a frame in the fixed format."""
    is_bools = values.dtype.kind == "b"
    node = _write(group, name, values, **options) if is_bools else group.create_dataset(name, data=values, **options)
    node.attrs.update({"CLASS": np.bytes_("ARRAY"), "kind": np.bytes_(kind), "name": np.bytes_("N.")})
    node.attrs["transposed"] = np.uint8(1)


def _stored(dtype: np.dtype[Any]) -> h5py.h5t.TypeID:
    """The type that PyTables gives to numpy's: bools are bitfields."""
    if dtype.subdtype is not None:
        return h5py.h5t.array_create(_stored(dtype.base), dtype.shape)
    if dtype.names is None:
        return h5py.h5t.STD_B8LE if dtype.kind == "b" else h5py.h5t.py_create(dtype)
    kind = h5py.h5t.create(h5py.h5t.COMPOUND, dtype.itemsize)
    for name in dtype.names:
        member, offset = dtype.fields[name][:2]  # type: ignore[index]
        kind.insert(name.encode(), offset, _stored(member))
    return kind


def _write(group: h5py.Group, name: str, values: Array, chunk_shape: tuple[int, ...] | None = None) -> h5py.Dataset:
    """An array of the types that PyTables writes; chunks are compressed, and it may grow."""
    properties, most = h5py.h5p.create(h5py.h5p.DATASET_CREATE), values.shape
    if chunk_shape is not None:
        properties.set_chunk(chunk_shape)
        properties.set_deflate(4)
        most = (h5py.h5s.UNLIMITED, *values.shape[1:])
    kind = _stored(values.dtype)
    made = h5py.h5d.create(group.id, name.encode(), kind, h5py.h5s.create_simple(values.shape, most), properties)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(values), mtype=kind)
    return h5py.Dataset(made)


def _names(names: Sequence[str]) -> Array:
    return np.array([name.encode() for name in names])


def _fixed(file: h5py.File, key: str, blocks: Mapping[tuple[str, ...], Array], **options: Any) -> None:
    """``DataFrame.to_hdf(format="fixed")``: columns by block; their order in the frame is that of their names."""
    group = file.create_group(key)
    columns = sorted(name for names in blocks for name in names)
    rows = len(next(iter(blocks.values())))
    group.attrs.update({"pandas_type": np.bytes_("frame"), "pandas_version": np.bytes_("0.15.2"), "ndim": 2})
    group.attrs.update({"nblocks": len(blocks), "encoding": np.bytes_("UTF-8")})
    for axis in ("axis0", "axis1"):
        group.attrs[f"{axis}_variety"] = np.bytes_("regular")
    _axis(group, "axis0", _names(columns), "string")
    _axis(group, "axis1", np.arange(rows), "integer")
    for number, (names, values) in enumerate(blocks.items()):
        group.attrs[f"block{number}_items_variety"] = np.bytes_("regular")
        _axis(group, f"block{number}_items", _names(names), "string")
        _axis(group, f"block{number}_values", values, "", **options)


def _series(file: h5py.File, key: str, values: Array) -> None:
    group = file.create_group(key)
    group.attrs.update({"pandas_type": np.bytes_("series"), "index_variety": np.bytes_("regular")})
    _axis(group, "index", np.arange(len(values)), "integer")
    _axis(group, "values", values, "")


def _table(
    file: h5py.File,
    key: str,
    blocks: Mapping[tuple[str, ...], Array],
    dtypes: Sequence[str],
    categories: Mapping[str, Array] | None = None,
) -> None:
    """``DataFrame.to_hdf(format="table")``: blocks are members of records, names of columns are pickled."""
    rows = len(next(iter(blocks.values())))
    members = [(f"values_block_{i}", v.dtype, (len(n),)) for i, (n, v) in enumerate(blocks.items())]
    records = np.zeros(rows, np.dtype([("index", "<i8"), *members]))
    records["index"] = np.arange(rows) + 100
    for name, values in zip((member[0] for member in members), blocks.values(), strict=True):
        records[name] = values.reshape(rows, -1)
    group = file.create_group(key)
    order = [name for names in blocks for name in names]
    group.attrs.update({"pandas_type": np.bytes_("frame_table"), "levels": 1, "non_index_axes": _pickled([(1, order)])})
    table = _write(group, "table", records, (16,))
    table.attrs.update({"CLASS": np.bytes_("TABLE"), "index_kind": np.bytes_("integer")})
    for (name, _, _), names, dtype in zip(members, blocks, dtypes, strict=True):
        is_category = categories is not None and name in categories
        table.attrs[f"{name}_kind"] = _pickled(list(names))
        table.attrs[f"{name}_dtype"] = np.bytes_(dtype)
        table.attrs[f"{name}_meta"] = np.bytes_("category") if is_category else np.bytes_("N.")
    group["_i_table/index/sorted"] = np.arange(7)
    for name, values in (categories or {}).items():
        known = np.zeros(len(values), np.dtype([("index", "<i8"), ("values", values.dtype)]))
        known["index"], known["values"] = np.arange(len(values)), values
        below = group.create_group(f"meta/{name}/meta")
        below.attrs["pandas_type"] = np.bytes_("series_table")
        below["table"] = known


AGE, FARE = np.arange(60), random.random(60)
SURVIVED = np.arange(60) % 2
WHEN = np.arange(60) * 86_400_000_000_000
BOOLS = np.stack([np.arange(60) % 3 == 0, np.arange(60) % 2 == 1], 1)
SEX = np.where(np.arange(60) % 3, b"male", b"female")
WIDE = random.random((50, 300)).astype("<f4")
WIDE[:, 299] = np.arange(50) % 3
PEOPLE = {
    ("when",): WHEN[:, None],
    ("fare",): FARE[:, None],
    ("age", "survived"): np.stack([AGE, SURVIVED], 1),
    ("sex",): SEX[:, None],
}


def _frames(folder: Path) -> None:
    with h5py.File(folder / "fixed.h5", "w") as file:
        _fixed(file, "titanic", {("age", "survived"): np.stack([AGE, SURVIVED], 1), ("fare",): FARE[:, None]})
        strings = file["titanic"].create_dataset(
            "block2_values", (1,), h5py.vlen_dtype(np.uint8), maxshape=(None,), chunks=(65536,)
        )
        strings[0] = np.frombuffer(pickle.dumps(SEX.tolist()), np.uint8)
        strings.attrs["PSEUDOATOM"] = np.bytes_("object")
        _axis(file["titanic"], "block2_items", _names(["sex"]), "string")
        _axis(file["titanic"], "block3_items", _names(["when"]), "string")
        _axis(file["titanic"], "block3_values", WHEN[:, None], "")
        file["titanic/block3_values"].attrs["value_type"] = np.bytes_("datetime64[ns]")
        file["titanic"].attrs["nblocks"] = 4
    with h5py.File(folder / "table.h5", "w") as file:
        codes = (np.arange(60) % 3 == 0).astype("i1")
        codes[7] = -1
        blocks = {**PEOPLE, ("sexc",): codes[:, None]}
        dtypes = ["datetime64[ns]", "float64", "int64", "bytes48", "int8"]
        _table(file, "titanic", blocks, dtypes, {"values_block_4": np.array([b"female", b"male"])})
    with h5py.File(folder / "xy.h5", "w") as file:
        for split, rows in (("train", 50), ("test", 20)):
            _fixed(file, f"X_{split}", {tuple("abc"): np.arange(rows * 3.0).reshape(rows, 3) + (split == "test")})
            _series(file, f"y_{split}", np.arange(rows) % 3)
    with h5py.File(folder / "keys.h5", "w") as file:
        for split, rows in (("train", 40), ("val", 9), ("test", 8)):
            _table(file, split, {("a",): random.random(rows)[:, None], ("target",): np.arange(rows) % 2}, ["", ""])
    with h5py.File(folder / "wide_fixed.h5", "w") as file:
        names = tuple(f"f{number:03d}" for number in range(299))
        # Cut along the columns, too, as PyTables does with wide blocks.
        _fixed(file, "df", {(*names, "label"): WIDE}, chunks=(13, 299), compression="gzip", shuffle=True)
    with h5py.File(folder / "wide_table.h5", "w") as file:
        _table(file, "df", {(*names, "label"): WIDE}, ["float32"])
    with h5py.File(folder / "narrow_chunks.h5", "w") as file:
        _fixed(file, "df", {("a", "b", "c"): WIDE[:, :3]}, chunks=(7, 2))
    with h5py.File(folder / "plain.h5", "w") as file:
        _fixed(file, "df", {("score_train", "score_test", "km/h"): WIDE[:, :3]})
    with h5py.File(folder / "other_codes.h5", "w") as file:
        for split, known in (("train", [b"cat", b"dog"]), ("test", [b"dog", b"emu"])):
            blocks = {("a",): random.random((20, 1)), ("label",): (np.arange(20) % 2).astype("i1")[:, None]}
            _table(file, split, blocks, ["float64", "int8"], {"values_block_1": np.array(known)})
    with h5py.File(folder / "evil.h5", "w") as file:
        _table(file, "df", {("a", "b"): random.random((20, 2))}, ["float64"])
        trap = b"cos\nsystem\n(S'touch " + str(folder / "owned").encode() + b"'\ntR."
        file["df/table"].attrs["values_block_0_kind"] = np.bytes_(trap)
        file["df"].attrs["non_index_axes"] = np.bytes_(trap)
    for name, tail in (("bools", ("b1", "label")), ("one_bool", ("label",))):
        with h5py.File(folder / f"{name}_fixed.h5", "w") as file:
            _fixed(file, "df", {("a",): FARE[:, None], tail: BOOLS[:, -len(tail) :]})
        with h5py.File(folder / f"{name}_chunked.h5", "w") as file:
            _fixed(file, "df", {tail: BOOLS[:, -len(tail) :]}, chunk_shape=(16, 1))
        with h5py.File(folder / f"{name}_table.h5", "w") as file:
            _table(file, "df", {("a",): FARE[:, None], tail: BOOLS[:, -len(tail) :]}, ["float64", "bool"])
    with h5py.File(folder / "wide_bools.h5", "w") as file:
        _fixed(file, "df", {tuple(f"f{number:03d}" for number in range(90)): WIDE[:, :90] > 0.5})
        _series(file, "own", BOOLS[:50, 0])
    with h5py.File(folder / "empty.h5", "w") as file:
        # pandas stores one element for an array of none, and its shape.
        _fixed(file, "df", {("a", "label"): np.zeros((1, 1))})
        for name, shape in (("axis1", (0,)), ("block0_values", (2, 0))):
            file[f"df/{name}"].attrs["shape"] = _pickled(shape)
    with h5py.File(folder / "twice.h5", "w") as file:
        _table(file, "df", {("a", "a", "b"): WIDE[:, :3]}, ["float32"])
    with h5py.File(folder / "bits.h5", "w") as file:
        _write(file, "x", np.arange(30)[:, None] % 7 > np.arange(4), (8, 4))
    with h5py.File(folder / "birds.h5", "w") as file:
        file["images"] = random.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
        kind = np.dtype([("bbox", "<f4", (4,)), ("label", "<i4"), ("species", "S12")])
        file["meta"] = np.array([((0, 0, 1, 1), i % 2, [b"wren", b"crow"][i % 2]) for i in range(60)], kind)


def _categories(group: h5py.Group, name: str, codes: Array, names: Sequence[str]) -> None:
    column = group.create_group(name)
    column.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
    column["codes"], column["categories"] = codes.astype("i1"), np.array(names, object)


CELLS = random.random((90, 50)).astype("<f4")
TYPES = np.arange(90) % 3


def _anndata(folder: Path) -> None:
    for name in ("dense", "sparse"):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            obs = file.create_group("obs")
            obs.attrs.update({"encoding-type": "dataframe", "_index": "_index"})
            obs["_index"] = np.array([f"c{number}" for number in range(90)], object)
            obs["n_genes"] = np.arange(90)
            whole = obs.create_group("age")
            whole.attrs.update({"encoding-type": "nullable-integer", "encoding-version": "0.1.0"})
            whole["values"], whole["mask"] = np.arange(90) % 7, np.arange(90) % 7 == 0
            # By their names, foreign names of classes come first.
            _categories(obs, "batch", np.arange(90) % 2, ["a", "b"])
            _categories(obs, "cell_type", TYPES, ["B", "NK", "T"])
            file["obsm/X_pca"], file["layers/counts"] = CELLS[:, :10], (CELLS * 9).astype(int)
            file["var/_index"] = np.array([f"g{number}" for number in range(50)], object)
            file["var/hv"], file["uns/k/p"] = np.arange(50) % 2 == 0, np.arange(90)
            if name == "dense":
                file.create_dataset("X", data=CELLS, chunks=(45, 50), compression="gzip")
                continue
            matrix = file.create_group("X")
            matrix.attrs.update({"encoding-type": "csr_matrix", "shape": np.array([90, 50])})
            matrix["data"], matrix["indices"] = random.random(1022), random.integers(0, 50, 1022).astype("i4")
            matrix["indptr"] = np.linspace(0, 1022, 91).astype("i4")
    with h5py.File(folder / "old.h5", "w") as file:
        file["X"], file["obs/_index"] = CELLS, np.array([f"c{number}" for number in range(90)], object)
        file["obs/cell_type"], file["var/_index"] = TYPES.astype("i1"), np.array(["g"] * 50, object)
        file["obs/__categories/cell_type"] = np.array(["B", "NK", "T"], object)
    with h5py.File(folder / "tenx.h5", "w") as file:
        file["matrix/data"], file["matrix/indices"] = np.arange(500), np.arange(500) % 40
        file["matrix/indptr"], file["matrix/shape"] = np.linspace(0, 500, 31).astype(int), np.array([40, 30])
        file["matrix/barcodes"] = np.array([f"b{number}".encode() for number in range(30)])
    with h5py.File(folder / "matlab_sparse.h5", "w") as file:
        group = file.create_group("S")
        group.attrs["MATLAB_sparse"] = np.uint64(40)
        group["data"], group["ir"], group["jc"] = random.random(500), np.arange(500) % 40, np.arange(31) * 16
        file["x"], file["y"] = random.random((30, 4)), np.arange(30) % 2


def _netcdf(folder: Path) -> None:
    with h5py.File(folder / "era5.h5", "w") as file:
        for name, values in (
            ("time", np.arange(48)),
            ("latitude", np.linspace(60, 50, 21)),
            ("longitude", np.arange(30.0)),
        ):
            file[name] = values
            file[name].make_scale(name)
        for name in ("t2m", "tp"):
            file[name] = random.integers(-99, 99, (48, 21, 30)).astype("i2")
            for axis, scale in enumerate(("time", "latitude", "longitude")):
                file[name].dims[axis].attach_scale(file[scale])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for write in (_frames, _anndata, _netcdf):
        write(folder)
    return folder


@pytest.fixture(scope="module")
def feed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Feed]:
    with inspected(data, tmp_path_factory.mktemp("cache")) as connected:
        yield connected


def _roles(dataset: h5feed.Dataset) -> dict[str, str]:
    return {field.name: field.role for field in dataset.fields.values() if field.readable}


def _note(dataset: h5feed.Dataset, name: str) -> str:
    return next(field["note"] or "" for field in dataset.info["fields"] if field["name"] == name)


ROWS = [3, 59, 7, 7, 0]


def test_fixed_format_by_column(feed: h5feed.Feed) -> None:
    """Columns have their own names and values; the index is no label, and pickled text is refused, never loaded."""
    dataset = feed["fixed"]
    assert dataset.rows == 60
    assert _roles(dataset) == {"age": "input", "fare": "input", "survived": "input", "when": "other", "index": "other"}
    batch = dataset.take(ROWS, fields=["age", "fare", "survived", "when", "index"])
    for name, values in (("age", AGE), ("fare", FARE), ("survived", SURVIVED), ("when", WHEN), ("index", AGE)):
        np.testing.assert_array_equal(batch[name], values[ROWS])
    assert "datetime64" in _note(dataset, "when")
    assert "format='table'" in str(dataset.fields["sex"].reason)


def test_table_format_by_column(feed: h5feed.Feed) -> None:
    """Columns of blocks have their own names and values; categories are the names of their codes."""
    dataset = feed["table"]
    assert list(_roles(dataset)) == ["when", "fare", "age", "survived", "sex", "sexc", "index"]
    batch = dataset.take(ROWS, fields=list(_roles(dataset)))
    expected = {"when": WHEN, "fare": FARE, "age": AGE, "survived": SURVIVED, "index": AGE + 100}
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name], values[ROWS])
    assert batch.text("sex") == [SEX[row].decode() for row in ROWS]
    assert batch["sexc"].tolist() == [1, 0, -1, -1, 1]
    assert dataset.fields["sexc"].class_names == ("female", "male")
    assert _roles(dataset)["index"] == "other" and "label" not in _roles(dataset).values()


@pytest.mark.parametrize("kind", ["fixed", "chunked", "table"])
def test_bools(feed: h5feed.Feed, kind: str) -> None:
    """Bools, which PyTables writes as bitfields, are bools of a column each, however many lie in a block."""
    many, one = feed[f"bools_{kind}"], feed[f"one_bool_{kind}"]
    for dataset, roles in ((many, {"b1": "input", "label": "label"}), (one, {"label": "label"})):
        assert _roles(dataset).items() >= roles.items()
        for number, name in enumerate(roles, 2 - len(roles)):
            batch = dataset.take(ROWS, fields=[name])
            assert batch[name].dtype == bool
            np.testing.assert_array_equal(batch[name], BOOLS[ROWS, number])
    classes = one.splits()["splits"]["all"]["classes"]
    assert [(entry["value"], entry["rows"]) for entry in classes] == [(False, 30), (True, 30)]


def test_matrices_and_series_of_bools(feed: h5feed.Feed) -> None:
    """Many columns of bools stay a matrix of bools; a bitfield that is not pandas' is what h5py makes of it."""
    names = [entry["name"] for entry in feed.datasets() if entry["name"].startswith("wide_bools")]
    fields = {name: dataset for dataset in map(feed.__getitem__, names) for name in dataset.fields}
    wide = next(name for name in fields if name.endswith("values"))
    np.testing.assert_array_equal(fields[wide].take(ROWS[::2], fields=[wide])[wide], (WIDE[:, :90] > 0.5)[ROWS[::2]])
    series = next(name for name in fields if name.endswith("own"))
    assert fields[series].take([0, 1], fields=[series])[series].tolist() == [True, False]
    bits = feed["bits"].take([29, 0])["x"]
    assert bits.dtype == np.uint8 and bits.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


def test_columns_of_one_name(feed: h5feed.Feed) -> None:
    """Both are served, numbered."""
    batch = feed["twice"].take([7, 0], fields=["a", "a.1", "b"])
    for number, name in enumerate(("a", "a.1", "b")):
        np.testing.assert_array_equal(batch[name], WIDE[[7, 0], number])


def test_a_frame_without_rows(feed: h5feed.Feed) -> None:
    """What pandas stores in place of no rows is none."""
    with pytest.raises(h5feed.errors.Unreadable, match="the frame has no rows"):
        feed["empty"]


def test_store_of_x_and_y(feed: h5feed.Feed) -> None:
    """Keys X_train, y_train, X_test, y_test are splits of one dataset with y as its label."""
    dataset = feed["xy"]
    assert stored_splits(dataset) == {"train": 50, "test": 20}
    assert [name for name, role in _roles(dataset).items() if role == "label"] == ["y"]
    assert [name for name, role in _roles(dataset).items() if role == "input"] == ["X.a", "X.b", "X.c"]
    assert {_roles(dataset)[name] for name in ("X.index", "y.index")} == {"other"}
    batch = dataset.batch(0, split="test", batch_size=20)
    np.testing.assert_array_equal(batch["X.b"], np.arange(60.0).reshape(20, 3)[:, 1] + 1)
    np.testing.assert_array_equal(batch["y"], np.arange(20) % 3)


def test_store_of_splits(feed: h5feed.Feed) -> None:
    """Keys train, val, test are splits."""
    dataset = feed["keys"]
    assert stored_splits(dataset) == {"train": 40, "val": 9, "test": 8}
    assert _roles(dataset) == {"a": "input", "target": "label", "index": "other"}


@pytest.mark.parametrize("name", ["wide_fixed", "wide_table"])
def test_wide_frames_stay_matrices(feed: h5feed.Feed, name: str) -> None:
    """Of hundreds of columns the label is a field, the others one matrix with their names."""
    dataset = feed[name]
    assert _roles(dataset) == {"values": "input", "label": "label", "index": "other"}
    batch = dataset.take([49, 0, 13, 14])
    np.testing.assert_array_equal(batch["values"], WIDE[[49, 0, 13, 14], :299])
    np.testing.assert_array_equal(batch["label"], WIDE[[49, 0, 13, 14], 299])
    about = next(field for field in dataset.info["fields"] if field["name"] == "values")
    assert about["attributes"]["columns"] == [f"f{number:03d}" for number in range(299)]


def test_columns_of_several_chunks(feed: h5feed.Feed) -> None:
    """Each column is read from the chunk that it lies in."""
    batch = feed["narrow_chunks"].take([49, 0, 6, 7], fields=["a", "b", "c"])
    for number, name in enumerate("abc"):
        np.testing.assert_array_equal(batch[name], WIDE[[49, 0, 6, 7], number])


def test_columns_are_no_splits(feed: h5feed.Feed) -> None:
    """Columns that are called after splits have the same rows; a slash in a name is no group."""
    dataset = feed["plain"]
    assert stored_splits(dataset) == {} and dataset.rows == 50
    assert [name for name, role in _roles(dataset).items() if role == "input"] == ["km.h", "score_test", "score_train"]


def test_codes_that_mean_other_classes(feed: h5feed.Feed) -> None:
    """The same code of other categories in train and test is refused: no class would be right in both."""
    field = feed["other_codes"].fields["label"]
    assert not field.readable and "different classes" in str(field.reason)


def test_pickles_are_not_run(feed: h5feed.Feed, data: Path) -> None:
    """Names that are no plain list are not loaded: the block keeps the name that the table gives it."""
    dataset = feed["evil"]
    assert not (data / "owned").exists()
    assert dataset.fields["values_block_0"].shape == (2,)


@pytest.mark.parametrize("protocol", range(6))
def test_lists_are_read_like_pickle_does(protocol: int) -> None:
    """Names of columns in every protocol, with those that Python 2 wrote as bytes."""
    names = [(1, ["é", "a", "a", 3, 2.5, None, True, 10**12])]
    assert plain_list(pickle.dumps(names, protocol)) == [[1, ["é", "a", "a", 3, 2.5, None, True, 10**12]]]
    assert plain_list(b"(lp1\nS'E_0'\np2\naS'PX_0'\np3\na.") == ["E_0", "PX_0"]


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(lp0\ncos\nsystem\n(S'true'\ntRa.",
        pickle.dumps([print], 2),
        b"(lp0\nVa\np1\na",
        b"(lp0\ng0\na.",
        b"(l(a.",
        b"]a.",
        b"\x80\x04\x95",
        b"(lp0\n" + b"V" + b"x" * 9000 + b"\np1\na" + b"g1\na" * 9000 + b".",
    ],
)
def test_pickles_that_are_more_than_lists(data: bytes) -> None:
    """Calls, objects, lists in themselves, and what is cut off or blown up are no lists of names."""
    assert plain_list(data) is None


def test_pytables(feed: h5feed.Feed) -> None:
    """An array of images and a table of records: boxes are no input, and the label is a member."""
    roles = _roles(feed["birds"])
    assert roles == {"images": "input", "meta.bbox": "other", "meta.label": "label", "meta.species": "other"}


def test_anndata(feed: h5feed.Feed) -> None:
    """Rows are the observations: X is the input, obs are fields, and categories are the names of their own codes."""
    dataset = feed["dense"]
    assert dataset.rows == 90 and dataset.class_names == ["B", "NK", "T"]
    roles = _roles(dataset)
    assert [name for name, role in roles.items() if role == "input"] == ["X"]
    assert [name for name, role in roles.items() if role == "label"] == ["obs.cell_type"]
    assert dataset.fields["obs.batch"].class_names == ("a", "b")
    batch = dataset.take(
        [89, 0, 44], fields=["X", "obs.cell_type", "obs.batch", "obs.n_genes", "obsm.X_pca", "obs._index"]
    )
    np.testing.assert_array_equal(batch["X"], CELLS[[89, 0, 44]])
    np.testing.assert_array_equal(batch["obs.cell_type"], TYPES[[89, 0, 44]])
    np.testing.assert_array_equal(batch["obsm.X_pca"], CELLS[[89, 0, 44], :10])
    assert batch.text("obs._index") == ["c89", "c0", "c44"]
    assert "missing where obs.age.mask is true" in _note(dataset, "obs.age.values")
    for name in ("var.hv", "var._index", "uns.k.p"):
        assert not dataset.fields[name].readable, name
    for y, classes in (("obs.cell_type", {"B": 0, "NK": 1, "T": 2}), ("obs.batch", {"a": 0, "b": 1})):
        labels = Preparation(dataset, y=y).labels
        assert labels is not None and labels.class_indices == classes
    assert [entry["name"] for entry in dataset.splits(classes="obs.batch")["splits"]["all"]["classes"]] == ["a", "b"]


def test_anndata_of_a_sparse_matrix(feed: h5feed.Feed) -> None:
    """Its rows are the observations as well: see tests/client/test_sparse.py for their values."""
    dataset = feed["sparse"]
    assert dataset.rows == 90 and dataset.class_names == ["B", "NK", "T"]
    assert _roles(dataset)["X"] == "input" and dataset.fields["X"].shape == (50,)
    np.testing.assert_array_equal(dataset.take(range(90), fields=["obs.cell_type"])["obs.cell_type"], TYPES)
    assert not [name for name in dataset.fields if name.startswith("X.")]


def test_anndata_of_old(feed: h5feed.Feed) -> None:
    """Before there were groups of codes, categories lay beside all columns."""
    dataset = feed["old"]
    assert dataset.class_names == ["B", "NK", "T"] and _roles(dataset)["obs.cell_type"] == "label"


def test_other_sparse_matrices(feed: h5feed.Feed) -> None:
    """10x Genomics' are by cells, and so by rows; MATLAB's with a wrong jc is refused, what is beside it is not."""
    names = {entry["name"] for entry in feed.datasets()}
    matrices = {name: feed[name] for name in names if name.startswith(("tenx", "matlab_sparse"))}
    reasons = [str(field.reason) for one in matrices.values() for field in one.fields.values() if not field.readable]
    assert sum("sparse matrix" in reason for reason in reasons) == 1
    assert next(one for name, one in matrices.items() if name.startswith("tenx")).fields["matrix"].shape == (40,)
    assert _roles(matrices["matlab_sparse"]) == {"x": "input", "y": "label"}
    assert all(one.rows != 500 for one in matrices.values())


def test_netcdf_coordinates(feed: h5feed.Feed) -> None:
    """Variables share their first dimension; its coordinates are no label, and those of other axes no rows."""
    dataset = feed["era5"]
    assert dataset.rows == 48
    assert _roles(dataset) == {"t2m": "input", "tp": "input", "time": "other"}
    assert "coordinates" in str(dataset.fields["latitude"].reason)


def test_each_column_says_its_own_blocks_rows(data: Path, tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """h5feed.toml names a block by its path in the file, or a column by its name."""
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "fixed.h5").write_bytes((data / "fixed.h5").read_bytes())
    (tmp_path / "frames" / "h5feed.toml").write_text(
        '[datasets.both]\nfiles = ["fixed.h5"]\nfields = { x = "titanic/block0_values", y = "titanic/survived" }\n'
    )
    server = serve(tmp_path / "frames")
    with h5feed.connect(server.url, deadline=60) as connected:
        batch = connected["both"].take(ROWS)
    np.testing.assert_array_equal(batch["x"], np.stack([AGE, SURVIVED], 1)[ROWS])
    np.testing.assert_array_equal(batch["y"], SURVIVED[ROWS])
