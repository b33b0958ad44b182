"""An HDF5 file that is built of another one is served as that one is: the same rows, roles, classes and splits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5feed
import h5py
import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
from h5feed.errors import BadParameter, Unreadable
from h5feed_server.builder import BuildOptions, build, preview

from tests.support.photographs import encoded, photograph

RANDOM = np.random.default_rng(12)
IMAGES = RANDOM.integers(0, 256, (40, 3, 8, 12), np.uint8)
CLASSES = ["cat", "dog", "owl"]


def _matlab(file: h5py.File, name: str, values: np.ndarray[Any, Any]) -> None:
    """As ``save -v7.3`` writes an array of MATLAB's: its axes are in reverse for everybody else."""
    file.create_dataset(name, data=values.T).attrs["MATLAB_class"] = np.bytes_(str(values.dtype))


def _rows_are_the_last_axis(file: h5py.File) -> None:
    """MATLAB: X is 40×6 there, y a column; cells lie in #refs#."""
    _matlab(file, "X", RANDOM.normal(size=(40, 6)))
    _matlab(file, "y", (np.arange(40) % 3 + 1.0)[:, None])
    file["#refs#/a"] = np.arange(40)
    file["#refs#/b"] = RANDOM.normal(size=(40, 900))


def _rows_are_the_first_axis(file: h5py.File) -> None:
    """MATLAB: images are 12×8×3×40 there."""
    _matlab(file, "images", IMAGES.T.astype(np.uint8))
    _matlab(file, "labels", (np.arange(40) % 3).astype(np.uint8)[None])


def _splits_and_classes(file: h5py.File) -> None:
    for split, rows in (("train", slice(0, 25)), ("valid", slice(25, 30)), ("test", slice(30, 40))):
        file[f"{split}/images"] = IMAGES[rows]
        file[f"{split}/labels"] = np.arange(40)[rows] % 3
    file["list_classes"] = [name.encode() for name in CLASSES]


def _enum(file: h5py.File) -> None:
    file["x"] = RANDOM.normal(size=(40, 5)).astype(">f4")
    kinds = h5py.enum_dtype({"cat": 3, "dog": 7, "owl": 9}, "u1")
    file.create_dataset("label", data=np.array([3, 7, 9, 3] * 10, "u1"), dtype=kinds)
    file.create_dataset("other", data=np.array([9, 9, 7, 3] * 10, "u1"), dtype=kinds)


def _odd_numbers(file: h5py.File) -> None:
    file["data"] = IMAGES
    file["label"] = np.arange(40) % 2 == 0
    file["wave"] = (RANDOM.normal(size=(40, 4)) + 1j * RANDOM.normal(size=(40, 4))).astype(">c16")
    half = RANDOM.normal(size=(40, 3)).astype(ml_dtypes.bfloat16)
    kind = h5py.h5t.IEEE_F16LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_ebias(127)
    made = h5py.h5d.create(file.id, b"half", kind, h5py.h5s.create_simple((40, 3)))
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, half.view(np.uint16), mtype=kind)


def _lists_and_texts(file: h5py.File) -> None:
    file["x"] = IMAGES
    file["caption"] = [f"{'ü' * (row % 5)} {row}" for row in range(40)]
    lists = file.create_dataset("boxes", 40, dtype=h5py.vlen_dtype("<f4"))
    for row in range(40):
        lists[row] = RANDOM.normal(size=row % 4).astype("f4")
    file["tokens"] = np.arange(120, dtype=">i4")
    file["tokens.offsets"] = np.sort(np.r_[0, RANDOM.integers(0, 120, 39), 120])
    file["label"] = np.array([b"cat", b"dog"] * 20)


def _encoded_images(file: h5py.File) -> None:
    files = [encoded(photograph(number, 40, 60), quality=90) for number in range(40)]
    file["images"] = np.frombuffer(b"".join(files), np.uint8)
    file["images.offsets"] = np.cumsum([0, *map(len, files)])
    file["images"].attrs.update({"encoding": "jpeg", "shape": (32, 48, 3), "resize": "stretch", "channels": "bgr"})
    file["labels"] = np.arange(40) % 3


def _records(file: h5py.File) -> None:
    kind = np.dtype([("x", "<f4", (5,)), ("label", "<i8"), ("when", ">u4")])
    table = np.zeros(40, kind)
    table["x"], table["label"], table["when"] = RANDOM.normal(size=(40, 5)), np.arange(40) % 3, np.arange(40)
    file["table"] = table


def _virtual(file: h5py.File) -> None:
    """Its rows lie in the file beside it."""
    with h5py.File(Path(file.filename).with_name("part.bin"), "w") as part:
        part["x"] = IMAGES
    layout = h5py.VirtualLayout(IMAGES.shape, IMAGES.dtype)
    layout[:] = h5py.VirtualSource("part.bin", "x", IMAGES.shape)
    file.create_virtual_dataset("x", layout)
    file["linked"] = h5py.ExternalLink("part.bin", "x")
    file["y"] = np.arange(40) % 3


def _no_values(file: h5py.File) -> None:
    file["x"], file["none"], file["y"] = IMAGES, np.zeros((40, 0), "f4"), np.arange(40) % 3


def _observations(file: h5py.File) -> None:
    """AnnData says what its arrays are for, where their names do not."""
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    file["X"], file["obsm/X_pca"] = RANDOM.normal(size=(40, 6)), RANDOM.normal(size=(40, 2))
    obs = file.create_group("obs")
    obs.attrs.update({"encoding-type": "dataframe", "_index": "_index"})
    obs["_index"], obs["n_genes"] = np.array([f"c{row}" for row in range(40)], "S"), np.arange(40)
    for name, names in (("batch", ["a", "b"]), ("cell_type", ["B", "NK", "T"])):
        column = obs.create_group(name)
        column.attrs.update({"encoding-type": "categorical", "ordered": False})
        column["codes"], column["categories"] = (np.arange(40) % len(names)).astype("i1"), np.array(names, "S")


def _sparse(file: h5py.File, kind: str) -> None:
    """AnnData with matrices by rows or columns, in which rows and columns without values occur."""
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    dense = RANDOM.integers(0, 9, (40, 30)) * (RANDOM.random((40, 30)) < 0.2)
    dense[[0, 7, 39]], dense[:, 4] = 0, 0
    for name, values in (("X", dense.astype("f4")), ("layers/counts", dense.T.reshape(40, 30).astype("u2"))):
        matrix = scipy.sparse.csr_matrix(values).asformat(kind)
        group = file.create_group(name)
        group.attrs.update({"encoding-type": f"{kind}_matrix", "encoding-version": "0.1.0", "shape": matrix.shape})
        group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
    file["obs/_index"] = np.array([f"c{row}" for row in range(40)], "S")
    file["obs/cell_type"] = np.arange(40) % 3


def _sparse_by_rows(file: h5py.File) -> None:
    _sparse(file, "csr")


def _sparse_by_columns(file: h5py.File) -> None:
    _sparse(file, "csc")


WRITERS: list[Callable[[h5py.File], None]] = [
    _rows_are_the_last_axis,
    _rows_are_the_first_axis,
    _splits_and_classes,
    _enum,
    _odd_numbers,
    _lists_and_texts,
    _encoded_images,
    _records,
    _virtual,
    _observations,
    _no_values,
    _sparse_by_rows,
    _sparse_by_columns,
]


def _seen(feed: h5feed.Feed) -> tuple[Any, dict[str, Any]]:
    """What a client sees of the dataset ``a``, and all of its rows."""
    dataset = feed["a"]
    fields = {name: (f.role, f.shape, f.dtype) for name, f in dataset.fields.items() if f.readable}
    splits = sorted((split["name"], split["rows"]) for split in dataset.info["native_splits"])
    # Of the label and others; the enum's names among them.
    enums = {field["name"]: field["enum"] for field in dataset.info["fields"] if field["readable"]}
    batch = dataset.take(np.arange(dataset.rows), fields=list(fields))
    # Of sparse fields, these are their parts.
    return (fields, dataset.class_names, splits, enums, dataset.rows), dict(batch)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__.strip("_"))
def test_what_is_built_is_served_as_its_source_is(
    tmp_path: Path, serve: Any, writer: Callable[[h5py.File], None], compression: Any
) -> None:
    """Rows, roles, names of classes and of numbers, splits."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    with h5py.File(old / "a.h5", "w") as file:
        writer(file)
    report = build(old / "a.h5", new / "a.h5", BuildOptions(compression=compression))
    assert not report.left_out
    with h5feed.connect(serve(old).url, deadline=60) as one, h5feed.connect(serve(new).url, deadline=60) as other:
        (said, rows), (said_now, rows_now) = _seen(one), _seen(other)
    assert said_now == said
    for name, values in rows.items():
        assert rows_now[name].dtype == values.dtype
        np.testing.assert_array_equal(np.asarray(rows_now[name]), np.asarray(values), err_msg=name)


def test_sparse_rows_of_splits(tmp_path: Path, serve: Any) -> None:
    """Each split has a matrix that scipy and anndata read; a file with one split has all of its rows in order."""
    matrix = scipy.sparse.csr_matrix(np.arange(40)[:, None] * (RANDOM.random((40, 9)) < 0.4).astype("f8"))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("x")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": matrix.shape})
        group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
        file["row"] = np.arange(40)
    (tmp_path / "new").mkdir()
    report = build(tmp_path / "a.h5", tmp_path / "new" / "b.h5", BuildOptions(test=0.25))
    assert report.rows == {"train": 30, "test": 10} and not report.left_out
    seen = []
    with h5py.File(tmp_path / "new" / "b.h5") as file:
        for split in ("train", "test"):
            read, rows = anndata.io.read_elem(file[f"{split}/x"]), file[f"{split}/row"][()]
            np.testing.assert_array_equal(read.toarray(), matrix[rows].toarray())
            seen += rows.tolist()
    assert sorted(seen) == list(range(40))
    with h5feed.connect(serve(tmp_path / "new").url, deadline=60) as feed:
        for batch in feed["b"].batches("test", batch_size=4, fields=["x", "row"]):
            np.testing.assert_array_equal(batch.dense("x"), matrix[batch["row"]].toarray())


def test_matrices_of_matlab_have_the_rows_that_matlab_shows(tmp_path: Path) -> None:
    """``X(i, :)`` and ``y(i)`` there are row i here; what MATLAB keeps in #refs# is not listed."""
    x, y = RANDOM.normal(size=(40, 6)), np.arange(40) % 3 + 1.0
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        _matlab(file, "X", x)
        _matlab(file, "y", y[:, None])
        file["#refs#/a"] = np.arange(5)
    report = build(tmp_path / "a.mat", tmp_path / "b.h5", BuildOptions(test=0.2))
    assert report.rows == {"train": 32, "test": 8} and not report.left_out
    with h5py.File(tmp_path / "b.h5") as file:
        assert sorted(file["train"]) == ["X", "y"] and "#refs#" not in file
        together = np.concatenate([np.c_[file[split]["X"][:], file[split]["y"][:].ravel()] for split in file])
        assert not [name for name in file["train/X"].attrs if name.startswith("MATLAB")]
    np.testing.assert_array_equal(np.sort(together, axis=0), np.sort(np.c_[x, y], axis=0))


def test_matrices_that_are_too_large_to_be_served_transposed_are_built(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server says to build them; then each row lies together."""
    x = RANDOM.normal(size=(900, 10_000))
    (tmp_path / "new").mkdir()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        _matlab(file, "X", x)
        _matlab(file, "y", (np.arange(900) % 3.0)[:, None])
    monkeypatch.setattr("h5feed_server.builder.stored_fields._SCATTERED_BYTES", 10_000 * 8 * 100)
    report = build(tmp_path / "a.h5", tmp_path / "new" / "b.h5")
    assert not report.left_out
    with h5py.File(tmp_path / "new" / "b.h5") as file:
        np.testing.assert_array_equal(file["X"][:], x)
        np.testing.assert_array_equal(file["y"][:].ravel(), np.arange(900) % 3)


def test_what_h5feed_toml_declares_holds_for_a_build(tmp_path: Path) -> None:
    """Fields, roles, names of classes and splits."""
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file["a"] = IMAGES
        file["b"] = np.arange(40) % 3
        file["c"] = RANDOM.normal(size=(40, 900))
    (tmp_path / "h5feed.toml").write_text(
        '[datasets.pets]\nfiles = ["raw.h5"]\nfields = { image = "a", kind = "b" }\nroles = { kind = "label" }\n'
        'class_names = ["cat", "dog", "owl"]\nsplits = { train = [0, 20], test = [30, 40], extra = [20, 25] }\n'
    )
    report = build(tmp_path / "raw.h5", tmp_path / "out" / "pets.h5")
    assert report.rows == {"train": 20, "test": 10}
    (lost,) = report.left_out.values()
    assert "10 rows are in none of train, val, test" in lost
    with h5py.File(tmp_path / "out" / "pets.h5") as file:
        np.testing.assert_array_equal(file["test/image"][:], IMAGES[30:])
        assert file["test/kind"][:].tolist() == (np.arange(30, 40) % 3).tolist()
        assert {name: file["test"][name].attrs["role"] for name in file["test"]} == {"image": "input", "kind": "label"}
        assert file["train/kind"].attrs["class_names"].tolist() == CLASSES
        assert sorted(file["train"]) == ["image", "kind"]


def test_of_several_datasets_one_is_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, rows in (("cats", 30), ("dogs", 20)):
            file[f"{name}/images"] = IMAGES[:rows]
            file[f"{name}/depth_of_{name}"] = IMAGES[:rows, 0].astype(np.float32)
    with pytest.raises(BadParameter, match=r"holds 2 datasets.*'a.cats' \(30 rows\), 'a.dogs' \(20 rows\)"):
        build(tmp_path / "a.h5", tmp_path / "b.h5")
    with pytest.raises(BadParameter, match="dataset='mice' is not in"):
        build(tmp_path / "a.h5", tmp_path / "b.h5", BuildOptions(dataset="mice"))
    for name in ("dogs", "a.dogs"):
        options = BuildOptions(dataset=name, overwrite=True)
        assert preview(tmp_path / "a.h5", tmp_path / "b.h5", options).rows == {"": 20}
        assert build(tmp_path / "a.h5", tmp_path / "b.h5", options).rows == {"": 20}
    with h5py.File(tmp_path / "b.h5") as file:
        np.testing.assert_array_equal(file["images"][:], IMAGES[:20])


def test_fields_that_are_not_served_are_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = IMAGES
        file["labels"] = np.arange(40) % 3
        file["version"] = 3
    report = build(tmp_path / "a.h5", tmp_path / "b.h5")
    assert report.left_out == {"field version": "it is a scalar: it has no rows"}


def test_other_files_of_the_folder_are_not_looked_at(tmp_path: Path) -> None:
    """One file of a dataset of several is built of its own rows."""
    for split, rows in (("train", slice(0, 30)), ("test", slice(30, 40))):
        with h5py.File(tmp_path / f"{split}.h5", "w") as file:
            file["images"] = IMAGES[rows]
            file["labels"] = np.arange(40)[rows] % 3
    (tmp_path / "broken.h5").write_bytes(b"no HDF5")
    assert build(tmp_path / "test.h5", tmp_path / "out.h5").rows == {"": 10}
    with pytest.raises(Unreadable, match="is not supported"):
        build(tmp_path / "broken.h5", tmp_path / "out2.h5")


def test_a_folder_is_built_as_it_is_served(tmp_path: Path) -> None:
    """Files of splits are one dataset; files that have nothing to do with each other are named."""
    folder = tmp_path / "pcam"
    folder.mkdir()
    for split, rows in (("train", slice(0, 20)), ("valid", slice(20, 30)), ("test", slice(30, 40))):
        with h5py.File(folder / f"{split}.h5", "w") as file:
            file["x"] = IMAGES[rows]
            file["y"] = np.arange(40)[rows] % 2
    assert build(folder, tmp_path / "out.h5").rows == {"train": 20, "val": 10, "test": 10}
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_array_equal(file["val/x"][:], IMAGES[20:30])
        assert file["test/y"][:].tolist() == (np.arange(30, 40) % 2).tolist()
    with h5py.File(folder / "other.h5", "w") as file:
        file["z"] = np.zeros((5, 2))
    with pytest.raises(BadParameter, match=r"holds 2 datasets.*'other' \(5 rows\)"):
        build(folder, tmp_path / "out2.h5")


def test_a_folder_of_one_sample_a_file_is_stacked(tmp_path: Path) -> None:
    """BraTS' slices: a file is a row."""
    folder = tmp_path / "brats"
    folder.mkdir()
    images, masks = RANDOM.normal(size=(12, 24, 24, 4)), RANDOM.integers(0, 2, (12, 24, 24, 3), np.uint8)
    for row in range(12):
        with h5py.File(folder / f"volume_1_slice_{row}.h5", "w") as file:
            file["image"], file["mask"] = images[row], masks[row]
    with pytest.raises(BadParameter, match="one of 12 files with one sample each: build their folder"):
        build(folder / "volume_1_slice_3.h5", tmp_path / "out.h5")
    assert build(folder, tmp_path / "out.h5").rows == {"": 12}
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_array_equal(file["image"][:], images)
        np.testing.assert_array_equal(file["mask"][:], masks)
