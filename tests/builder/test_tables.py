"""Arrays and tables become the same rows, with their labels, splits and names."""

from __future__ import annotations

import csv
import gzip
import struct
from pathlib import Path
from typing import Any

import h5feed
import h5py
import hdf5plugin  # noqa: F401 registers the filters that the tests read back
import numpy as np
import pytest
from h5feed.errors import BadParameter, FeedError, Unreadable
from h5feed_server.builder import BuildOptions, build
from sklearn.datasets import load_digits, load_iris
from sklearn.model_selection import train_test_split

from tests.support.photographs import encoded, photograph

DIGITS = (load_digits().images * (255 / 16)).round().astype(np.uint8)
LABELS = load_digits().target


def _read(path: Path, *names: str) -> list[Any]:
    with h5py.File(path) as file:
        return [file[name][()] for name in names]


def test_npz_with_splits(tmp_path: Path) -> None:
    """``x_train, y_train, x_test, y_test`` become groups train and test."""
    source = tmp_path / "digits.npz"
    np.savez_compressed(
        source, x_train=DIGITS[:1500], y_train=LABELS[:1500], x_test=DIGITS[1500:], y_test=LABELS[1500:]
    )
    report = build(source, tmp_path / "out.h5")
    assert report.rows == {"train": 1500, "test": 297}
    x, y, z = _read(tmp_path / "out.h5", "train/x", "train/y", "test/x")
    np.testing.assert_array_equal(x, DIGITS[:1500])
    np.testing.assert_array_equal(y, LABELS[:1500])
    np.testing.assert_array_equal(z, DIGITS[1500:])
    assert x.dtype == np.uint8
    np.testing.assert_allclose(report.means["mean"], DIGITS[:1500].mean(), rtol=1e-12)
    np.testing.assert_allclose(report.means["std"], DIGITS[:1500].std(), rtol=1e-9)


def test_splits_of_arrays_are_those_of_scikit_learn(tmp_path: Path) -> None:
    source = tmp_path / "digits.npz"
    np.savez(source, x=DIGITS, y=LABELS, row=np.arange(1797))
    build(source, tmp_path / "out.h5", BuildOptions(val=180, test=180, rename={"x": "images", "y": "labels"}))
    rest, test = train_test_split(np.arange(1797), test_size=180, stratify=LABELS, random_state=42)
    train, val = train_test_split(rest, test_size=180, stratify=LABELS[rest], random_state=42)
    for split, rows in (("train", train), ("val", val), ("test", test)):
        images, labels, row = _read(tmp_path / "out.h5", f"{split}/images", f"{split}/labels", f"{split}/row")
        np.testing.assert_array_equal(row, np.sort(rows))
        np.testing.assert_array_equal(images, DIGITS[np.sort(rows)])
        np.testing.assert_array_equal(labels, LABELS[np.sort(rows)])


def test_npy_and_folders_of_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", DIGITS)
    build(tmp_path / "x.npy", tmp_path / "one.h5", BuildOptions(dtype="float32"))
    (x,) = _read(tmp_path / "one.h5", "x")
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, DIGITS)
    folder = tmp_path / "arrays"
    folder.mkdir()
    for split, rows in (("train", slice(0, 1000)), ("valid", slice(1000, 1797))):
        np.save(folder / f"images_{split}.npy", DIGITS[rows])
        np.save(folder / f"labels_{split}.npy", LABELS[rows])
    assert build(folder, tmp_path / "two.h5").rows == {"train": 1000, "val": 797}


def _write_idx(path: Path, array: np.ndarray[Any, Any], *, packed: bool) -> None:
    kinds = {"u1": 0x08, "i4": 0x0C, "f4": 0x0D}
    data = struct.pack(f">HBB{array.ndim}I", 0, kinds[array.dtype.str[1:]], array.ndim, *array.shape)
    data += array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(data) if packed else data)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_of_mnist(tmp_path: Path, packed: bool) -> None:
    ending = ".gz" if packed else ""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for word, rows in (("train", slice(0, 1500)), ("t10k", slice(1500, 1797))):
        _write_idx(folder / f"{word}-images-idx3-ubyte{ending}", DIGITS[rows], packed=packed)
        _write_idx(folder / f"{word}-labels-idx1-ubyte{ending}", LABELS[rows].astype(np.uint8), packed=packed)
    assert build(folder, tmp_path / "out.h5").rows == {"train": 1500, "test": 297}
    images, labels = _read(tmp_path / "out.h5", "test/images", "test/labels")
    np.testing.assert_array_equal(images, DIGITS[1500:])
    np.testing.assert_array_equal(labels, LABELS[1500:])


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".tsv"])
@pytest.mark.parametrize("header", [True, False])
def test_pixels_in_a_table(tmp_path: Path, ending: str, header: bool) -> None:
    """As MNIST is passed on: a label and the pixels of a square."""
    source = tmp_path / f"digits{ending}"
    opener: Any = gzip.open if ending.endswith("gz") else open
    with opener(source, "wt") as stream:
        table = csv.writer(stream, delimiter="\t" if ending == ".tsv" else ",")
        if header:
            table.writerow(["label", *(f"pixel{number}" for number in range(64))])
        table.writerows([label, *pixels] for label, pixels in zip(LABELS, DIGITS.reshape(-1, 64).tolist(), strict=True))
    report = build(source, tmp_path / "out.h5", BuildOptions(test=0.2))
    assert report.rows == {"train": 1437, "test": 360}
    images, labels = _read(tmp_path / "out.h5", "train/images", "train/labels")
    rows = np.sort(train_test_split(np.arange(1797), test_size=360, stratify=LABELS, random_state=42)[0])
    np.testing.assert_array_equal(images, DIGITS[rows])
    np.testing.assert_array_equal(labels, LABELS[rows])


def test_features_and_names_of_classes_in_a_table(tmp_path: Path) -> None:
    iris = load_iris()
    source = tmp_path / "iris.csv"
    with open(source, "w") as stream:
        stream.write("sepal length,sepal width,petal length,petal width,species\n")
        for row, label in zip(iris.data, iris.target, strict=True):
            stream.write(",".join(map(str, row)) + f",{iris.target_names[label]}\n")
    build(source, tmp_path / "out.h5")
    features, labels = _read(tmp_path / "out.h5", "features", "labels")
    np.testing.assert_array_equal(features, iris.data.astype(np.float32))
    np.testing.assert_array_equal(labels, iris.target)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["labels"].attrs["class_names"].tolist() == sorted(iris.target_names)


def test_paths_of_images_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    lines = ["path,label,split,photographer"]
    for number in range(12):
        (tmp_path / "photos" / f"{number}.png").write_bytes(encoded(photograph(number, 40, 40), "PNG"))
        lines.append(f"photos/{number}.png,{'cat' if number % 3 else 'dog'},{'test' if number > 8 else 'train'},me")
    lines.append("photos/missing.png,cat,train,me")
    (tmp_path / "photos.csv").write_text("\n".join(lines) + "\n")
    report = build(tmp_path / "photos.csv", tmp_path / "out.h5", BuildOptions(resize="none"))
    assert report.rows == {"train": 9, "test": 3}
    assert report.left_out == {"photos/missing.png": "there is no such file"}
    images, labels = _read(tmp_path / "out.h5", "test/images", "test/labels")
    np.testing.assert_array_equal(images[0], photograph(9, 40, 40))
    assert labels.tolist() == [1, 0, 0]


def test_lines_that_are_ragged_or_no_numbers_are_left_out_by_their_number(tmp_path: Path) -> None:
    source = tmp_path / "table.csv"
    source.write_text("a,b,label\n1,2,0\n3,4\n5,six,1\n7,8,9,1\n,10,0\n11,12,1\n")
    report = build(source, tmp_path / "out.h5", BuildOptions(dtype="int32"))
    assert report.left_out == {
        "line 3": "it has 2 values, but the first line has 3",
        "line 5": "it has 4 values, but the first line has 3",
        "line 4": "'six' is not a number",
        "line 6": "a value is missing, which int32 cannot represent",
    }
    features, labels = _read(tmp_path / "out.h5", "features", "labels")
    assert features.tolist() == [[1, 2], [11, 12]] and labels.tolist() == [0, 1]
    assert (tmp_path / "out.h5.left-out.tsv").read_text().count("\n") == 4
    with pytest.raises(Unreadable, match="line 3: it has 2 values"):
        build(source, tmp_path / "strict.h5", BuildOptions(strict=True))
    assert not (tmp_path / "strict.h5").exists()


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd", "gzip"])
def test_a_file_that_is_dear_to_shuffle_is_repacked(tmp_path: Path, compression: Any) -> None:
    """Fields, dtypes, names of classes and splits stay; chunks of many rows become cheap ones."""
    source = tmp_path / "old.h5"
    random = np.random.default_rng(0)
    values = random.normal(size=(500, 6)).astype(">f8")
    with h5py.File(source, "w") as file:
        for split, rows in (("train", slice(0, 400)), ("test", slice(400, 500))):
            group = file.create_group(split)
            images = photograph(0, 300, 500).reshape(500, 10, 30, 3)[rows]
            group.create_dataset("images", data=images, chunks=(50, 10, 30, 3), compression="gzip")
            labels = group.create_dataset("labels", data=np.arange(500)[rows] % 3)
            labels.attrs["class_names"] = ["a", "b", "c"]
            group.create_dataset("values", data=values[rows])
            group.create_dataset("names", data=[f"Bild {n} ü" for n in range(500)][rows])
        file["version"] = 7
    report = build(source, tmp_path / "new.h5", BuildOptions(compression=compression))
    assert report.rows == {"train": 400, "test": 100}
    assert report.left_out == {"field version": "it is a scalar: it has no rows"}
    with h5py.File(source) as old, h5py.File(tmp_path / "new.h5") as new:
        for split in ("train", "test"):
            for name in ("images", "labels", "values"):
                np.testing.assert_array_equal(old[split][name][:], new[split][name][:])
            assert old[split]["names"].asstr()[:].tolist() == new[split]["names"].asstr()[:].tolist()
        assert new["test/values"].dtype == "<f8"
        assert new["test/labels"].attrs["class_names"].tolist() == ["a", "b", "c"]
        chunks = new["train/images"].chunks
        assert chunks is None if compression == "none" else chunks == (36, 10, 30, 3)


def test_dtypes_that_values_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[1.5, 300.0]]))
    with pytest.raises(BadParameter, match=r"values such as 1.5, which do not fit uint8"):
        build(tmp_path / "x.npy", tmp_path / "out.h5", BuildOptions(dtype="uint8"))
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.npz", b"PK\x03\x04 no zip", "not an npz file"),
        ("x.npy", b"\x93NUMPY\x01\x00", "not a NumPy array"),
        ("train-images-idx3-ubyte", b"\x00\x00\x08\x03\x00", "not an IDX file"),
        ("x.csv", b"", "empty"),
        ("x.csv.gz", b"\x1f\x8b\x08\x00broken", "x.csv.gz"),
        ("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "cannot be opened"),
        ("x.jpg", b"", "is a single image"),
        ("x.bin", b"?", "is not supported"),
        ("x.zip", b"PK", "damaged or not an archive"),
        ("x.tar.gz", gzip.compress(b"no tar at all" * 100, mtime=0), "damaged or not an archive"),
    ],
)
def test_what_is_no_source_is_told_so(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FeedError, match=reason):
        build(tmp_path / name, tmp_path / "out.h5")
    assert sorted(item.name for item in tmp_path.iterdir()) == [name]


def test_pickles_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(Unreadable, match="pickled Python objects"):
        build(tmp_path / "x.npy", tmp_path / "out.h5")


def test_built_tables_are_served(tmp_path: Path, serve: Any) -> None:
    """Compressed in chunks of several rows, with a native split: the client gets every row, and knows the label."""
    np.savez(
        tmp_path / "digits.npz",
        x_train=DIGITS[:1500],
        y_train=LABELS[:1500],
        x_test=DIGITS[1500:],
        y_test=LABELS[1500:],
    )
    (tmp_path / "data").mkdir()
    build(tmp_path / "digits.npz", tmp_path / "data" / "digits.h5", BuildOptions(compression="zstd"))
    server = serve(tmp_path / "data")
    with h5feed.connect(server.url, deadline=60) as feed:
        digits = feed["digits"]
        assert {name: field.role for name, field in digits.fields.items()} == {"x": "input", "y": "label"}
        for batch in digits.batches("test", batch_size=100):
            np.testing.assert_array_equal(batch["x"], DIGITS[batch.rows])
            np.testing.assert_array_equal(batch["y"], LABELS[batch.rows])
