"""NumPy's archives, CIFAR's batches, encrypted zips: arrays keep their values, classes their names."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5feed.errors import Unreadable
from h5feed_server.builder import BuildOptions, build
from h5feed_server.builder.naming import read_names

from tests.support.photographs import encoded, photograph

RANDOM = np.random.default_rng(16)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
        found["classes"] = [item.attrs["class_names"].tolist() for item in file.values() if "class_names" in item.attrs]
    return found


def test_texts_and_names_of_classes_in_npz(tmp_path: Path) -> None:
    x, names = RANDOM.normal(size=(10, 5)), np.array(["Zoë", "bb"] * 5)
    np.savez(tmp_path / "a.npz", X=x, names=names, y=np.arange(10) % 2, class_names=np.array(["cat", "dög"]))
    report = build(tmp_path / "a.npz", tmp_path / "a.h5")
    found = _read(tmp_path / "a.h5")
    assert not report.left_out and found["classes"] == [["cat", "dög"]]
    np.testing.assert_array_equal(found["X"], x)
    assert [name.decode() for name in found["names"]] == names.tolist()
    np.savez(tmp_path / "b.npz", X=x, y=names)
    build(tmp_path / "b.npz", tmp_path / "b.h5")
    found = _read(tmp_path / "b.h5")
    assert found["y"].tolist() == [0, 1] * 5 and found["classes"] == [["Zoë", "bb"]]


def test_numbers_that_are_not_served_are_left_out(tmp_path: Path) -> None:
    """longdouble is another number on each kind of machine."""
    np.savez(tmp_path / "a.npz", x=np.ones((12, 3)), wide=np.ones((12, 2), np.longdouble), y=np.arange(12) % 2)
    report = build(tmp_path / "a.npz", tmp_path / "a.h5")
    assert list(report.left_out) == ["wide"] and "float64" in report.left_out["wide"]
    with h5py.File(tmp_path / "a.h5") as file:
        assert sorted(file) == ["x", "y"]


@pytest.mark.parametrize("ending", ["npz", "npy"])
def test_arrays_in_fortran_order_and_of_other_kinds(tmp_path: Path, ending: str) -> None:
    """``DataFrame.values`` is in Fortran's order."""
    x = np.asfortranarray(RANDOM.normal(size=(3000, 7)).astype(">f8"))
    if ending == "npy":
        np.save(tmp_path / "x.npy", x)
    else:
        record = np.zeros(3000, [("a", ">i4"), ("b", "<f4", (2,))])
        record["a"] = np.arange(3000)
        np.savez_compressed(
            tmp_path / "x.npz", x=x, record=record, half=x.astype("f2"), ok=x[:, 0] > 0, one=np.array(3)
        )
    report = build(tmp_path / f"x.{ending}", tmp_path / "x.h5")
    found = _read(tmp_path / "x.h5")
    np.testing.assert_array_equal(found["x"], x)
    if ending == "npz":
        assert found["record"]["a"].tolist() == list(range(3000))
        np.testing.assert_array_equal(found["ok"], x[:, 0] > 0)
        np.testing.assert_array_equal(found["half"], x.astype("f2"))
        assert report.left_out == {"one": "it is a single value, not rows"}


def _batches(folder: Path, protocol: int) -> tuple[Any, Any]:
    """As they are handed out: rows of 3072 bytes, planes of red, green and blue; keys are bytes."""
    images = RANDOM.integers(0, 256, (60, 32, 32, 3), np.uint8)
    labels = [int(number) for number in RANDOM.integers(0, 10, 60)]
    folder.mkdir()
    rows = images.transpose(0, 3, 1, 2).reshape(60, 3072).copy()
    for number in range(6):
        own = slice(10 * number, 10 * number + 10)
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        names = [f"{row}.png".encode() for row in range(10)]
        about = {b"batch_label": b"of 6", b"labels": labels[own], b"data": rows[own], b"filenames": names}
        (folder / name).write_bytes(pickle.dumps(about, protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"c%d" % n for n in range(10)]}, protocol))
    (folder / "readme.html").write_text("<html>")
    return images, labels


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar_10_as_it_is_handed_out(tmp_path: Path, protocol: int, packed: bool) -> None:
    images, labels = _batches(tmp_path / "cifar-10-batches-py", protocol)
    source = tmp_path / "cifar-10-batches-py"
    if packed:
        source = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(source, "w:gz") as archive:
            archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    assert build(source, tmp_path / "out.h5").rows == {"train": 50, "test": 10}
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_array_equal(file["train/images"][:], images[:50])
        np.testing.assert_array_equal(file["test/images"][:], images[50:])
        assert [*file["train/labels"][:], *file["test/labels"][:]] == labels
        assert file["train/labels"].attrs["class_names"].tolist() == [f"c{n}" for n in range(10)]


def test_cifar_in_binary(tmp_path: Path) -> None:
    """CIFAR-100: a coarse and a fine label before the pixels."""
    images = RANDOM.integers(0, 256, (20, 32, 32, 3), np.uint8)
    rows = np.c_[np.arange(20) % 4, np.arange(20), images.transpose(0, 3, 1, 2).reshape(20, 3072)].astype(np.uint8)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "train.bin").write_bytes(rows[:15].tobytes())
    (tmp_path / "c" / "test.bin").write_bytes(rows[15:].tobytes())
    (tmp_path / "c" / "fine_label_names.txt").write_text("".join(f"f{n}\n" for n in range(100)))
    build(tmp_path / "c", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_array_equal(file["test/images"][:], images[15:])
        assert file["test/labels"][:].tolist() == list(range(15, 20))
        assert file["test/coarse_labels"][:].tolist() == [n % 4 for n in range(15, 20)]
        assert file["test/labels"].attrs["class_names"][7] == "f7"


class _Evil:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self._made = (call, arguments)

    def __reduce__(self) -> Any:
        return self._made


@pytest.mark.parametrize("what", ["system", "eval", "object", "damaged"])
def test_pickles_run_no_code(tmp_path: Path, what: str) -> None:
    """Whatever is named in one that is none of NumPy's is refused before it is looked up."""
    _batches(tmp_path / "c", 4)
    mark = tmp_path / "mark"
    evil = {
        "system": pickle.dumps({b"data": _Evil(os.system, f"touch {mark}")}),
        "eval": pickle.dumps({b"data": _Evil(eval, f"open({str(mark)!r}, 'w')")}),
        "object": pickle.dumps({b"data": np.array([_Evil(os.system, f"touch {mark}")], object)}),
        "damaged": pickle.dumps({b"data": 3})[:-3],
    }[what]
    (tmp_path / "c" / "data_batch_3").write_bytes(evil)
    with pytest.raises(Unreadable, match="data_batch_3 is not a pickle file of CIFAR"):
        build(tmp_path / "c", tmp_path / "out.h5")
    assert not mark.exists() and not (tmp_path / "out.h5").exists()


def test_other_pickles_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(Unreadable, match=r"runs code when it is read: save its arrays with numpy\.savez"):
        build(tmp_path / "a.pkl", tmp_path / "out.h5")


def test_encrypted_zips_are_told_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat/1.jpg", encoded(photograph(0, 20, 20)))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    for sign, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(sign) + place
        data[at : at + 2] = struct.pack("<H", struct.unpack_from("<H", data, at)[0] | 1)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(Unreadable, match=r"a\.zip is encrypted: unpack it first"):
        build(tmp_path / "a.zip", tmp_path / "out.h5")


def test_names_of_files_are_looked_at_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders around all of them are counted once, and not once for every name."""
    calls: list[int] = []
    from h5feed_server.builder import naming

    own = naming._shared

    def counted(names: Sequence[Sequence[str]]) -> int:
        calls.append(len(names))
        return own(names)

    monkeypatch.setattr(naming, "_shared", counted)
    names = [f"data/train/{row % 7}/{row}.jpg" for row in range(2000)]
    said = read_names(names, set(), None)
    assert calls == [2000] and said.labels == [str(row % 7) for row in range(2000)]


def test_what_is_left_out_is_said_and_ends_with_3(tmp_path: Path) -> None:
    """With the file there all the same; ``--allow-missing`` ends with 0, and a dry run ends as the build does."""
    folder = tmp_path / "pets"
    for number in range(8):
        (folder / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"c{number % 2}" / f"{number}.jpg").write_bytes(encoded(photograph(number, 20, 20)))
    (folder / "c0" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "c0" / "cut.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    out = tmp_path / "out.h5"
    command = [sys.executable, "-m", "h5feed_server.cli", "build", str(folder), "-o", str(out), "--size", "16"]
    for words, code in ((["--dry-run"], 3), ([], 3), (["--allow-missing", "--overwrite"], 0)):
        ran = subprocess.run([*command, *words], capture_output=True, text=True, timeout=180)
        assert ran.returncode == code, ran.stderr
        assert "left out: 2" in ran.stdout and "c0/photo.heic: its format is not supported" in ran.stdout
        assert "c0/cut.jpg: it is empty" in ran.stdout and "notes.txt" in ran.stdout
        assert ("--allow-missing" in ran.stderr) == (code == 3)
        assert out.exists() == ("--dry-run" not in words)
    with h5py.File(out) as file:
        assert len(file["images"]) == 8


def test_labels_in_a_table_beside_images_are_pointed_to(tmp_path: Path) -> None:
    (tmp_path / "dogs" / "train").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (tmp_path / "dogs" / "train" / f"{name}.jpg").write_bytes(encoded(photograph(0, 20, 20)))
    (tmp_path / "dogs" / "labels.csv").write_text("id,breed\na,x\nb,y\nc,x\n")
    report = build(tmp_path / "dogs", tmp_path / "out.h5", BuildOptions((16, 16)))
    assert any("labels may be in labels.csv" in note for note in report.notes)
