"""Parquet, Arrow and WebDataset: files of samples."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as arrow
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
from h5feed.errors import FeedError, Unreadable
from h5feed_server.builder import BuildOptions, ImageSpec, build, decode_image
from sklearn.datasets import load_digits

from tests.support.photographs import encoded, photograph

IMAGES = [encoded(photograph(number, 60, 80)) for number in range(30)]
LABELS = [number % 3 for number in range(30)]
PIXELS = np.stack([decode_image(data, ImageSpec((32, 32))).pixels for data in IMAGES])
OPTIONS = BuildOptions((32, 32))


def _hugging_face(rows: slice) -> Any:
    """A table as Hugging Face's datasets write it."""
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    images = arrow.array([{"bytes": data, "path": None} for data in IMAGES[rows]], kind)
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = arrow.table({"image": images, "label": arrow.array(LABELS[rows], arrow.int64())})
    return table.replace_schema_metadata(about)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_images_of_hugging_face(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"pets.{ending}"
    if ending == "parquet":
        parquet.write_table(_hugging_face(slice(None)), path, row_group_size=7)
    else:
        feather.write_feather(_hugging_face(slice(None)), str(path), compression="uncompressed")
    build(path, tmp_path / "out.h5", OPTIONS)
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_array_equal(file["images"][:], PIXELS)
        assert file["labels"][:].tolist() == LABELS
        assert file["labels"].attrs["class_names"].tolist() == ["cat", "dog", "emu"]


def test_files_of_splits(tmp_path: Path) -> None:
    """``train-00000-of-00002.parquet`` and so on, in a folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    parquet.write_table(_hugging_face(slice(0, 10)), folder / "train-00000-of-00002.parquet")
    parquet.write_table(_hugging_face(slice(10, 20)), folder / "train-00001-of-00002.parquet")
    parquet.write_table(_hugging_face(slice(20, 30)), folder / "test-00000-of-00001.parquet")
    assert build(folder, tmp_path / "out.h5", OPTIONS).rows == {"train": 20, "test": 10}
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_array_equal(file["train/images"][:], PIXELS[:20])
        np.testing.assert_array_equal(file["test/images"][:], PIXELS[20:])


def test_numbers(tmp_path: Path) -> None:
    digits = load_digits()
    pixels = digits.images.astype(np.uint8)
    rows = arrow.FixedSizeListArray.from_arrays(arrow.array(pixels.reshape(-1)), 64)
    names = [f"Ziffer {label}" for label in digits.target]
    table = arrow.table(
        {"pixels": rows, "label": digits.target, "name": names, "any": [[1] * (n % 3) for n in range(len(names))]}
    )
    parquet.write_table(table, tmp_path / "digits.parquet", row_group_size=500)
    report = build(tmp_path / "digits.parquet", tmp_path / "out.h5", BuildOptions(test=0.1))
    assert list(report.left_out) == ["column any"]
    with h5py.File(tmp_path / "out.h5") as file:
        labels = file["train/label"][:]
        assert file["train/name"].asstr()[:5].tolist() == [f"Ziffer {label}" for label in labels[:5]]
        together = np.concatenate([file["train/pixels"][:], file["test/pixels"][:]])
    assert sorted(map(bytes, together)) == sorted(map(bytes, pixels.reshape(-1, 64)))


def test_what_is_no_parquet_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(Unreadable, match="cannot be read as parquet"):
        build(tmp_path / "x.parquet", tmp_path / "out.h5")


@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_webdataset(tmp_path: Path, kind: str, mode: Any) -> None:
    path = tmp_path / ("pets.tar.gz" if mode == "w:gz" else "pets.tar")
    with tarfile.open(path, mode) as archive:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for number, (data, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
            said = str(label) if kind == "cls" else json.dumps({"label": "ced"[label], "by": "me"})
            add(f"{number:06d}.jpg", data)
            add(f"{number:06d}.{kind}", said.encode())
        add("999999.jpg", IMAGES[0])
    report = build(path, tmp_path / "out.h5", OPTIONS)
    assert report.left_out == {"999999": f"it has no .{kind}"}
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_array_equal(file["images"][:], PIXELS)
        # c, d, e are numbered in their own order.
        wanted = LABELS if kind == "cls" else ["cde".index("ced"[label]) for label in LABELS]
        assert file["labels"][:].tolist() == wanted


def test_labels_that_are_not_there_are_told(tmp_path: Path) -> None:
    parquet.write_table(_hugging_face(slice(None)), tmp_path / "x.parquet")
    with pytest.raises(FeedError, match="choose from image, label"):
        build(tmp_path / "x.parquet", tmp_path / "out.h5", BuildOptions(label_column="breed"))
