"""Folders and archives of images become files that are whole, the same each time, and served as they should be."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import PIL
import pytest
from h5feed.errors import BadParameter, Unreadable
from h5feed_server.builder import BuildOptions, ImageSpec, build, decode_image, preview
from h5feed_server.builder.options import read_options
from PIL import Image
from sklearn.model_selection import train_test_split

from tests.support.photographs import encoded, photograph

SMALL = BuildOptions(size=(48, 48))
SPEC = ImageSpec((48, 48))


def _images(root: Path) -> list[Path]:
    return sorted(root.rglob("*.jpg"))


def _expected(root: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels and classes of the images below a folder, in the order of their names."""
    files = _images(root)
    classes = sorted({file.parent.name for file in files})
    pixels = np.stack([decode_image(file.read_bytes(), SPEC).pixels for file in files])
    return pixels, np.array([classes.index(file.parent.name) for file in files])


def _left_behind(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.name.startswith("."))


def test_a_folder_becomes_rows_with_all_that_is_known_of_them(pets: Path, tmp_path: Path) -> None:
    report = build(pets, tmp_path / "pets.h5", SMALL)
    pixels, labels = _expected(pets)
    with h5py.File(tmp_path / "pets.h5") as file:
        np.testing.assert_array_equal(file["images"][:], pixels)
        np.testing.assert_array_equal(file["labels"][:], labels)
        assert file["images"].chunks is None and file["images"].attrs["channels"] == "rgb"
        assert file["labels"].attrs["class_names"].tolist() == ["cat", "dog", "emu"]
        assert file["filenames"].asstr()[0] == "cat/000.jpg"
        with Image.open(pets / "cat" / "000.jpg") as first:
            assert (file["widths"][0], file["heights"][0]) == first.size
        assert len({*file["digests"][:].tolist()}) == 120
        np.testing.assert_allclose(file["images"].attrs["mean"], pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(file["images"].attrs["std"], pixels.std(axis=(0, 1, 2)), rtol=1e-9)
        assert json.loads(file.attrs["h5feed_options"])["size"] == [48, 48]
    assert report.rows == {"": 120} and not report.left_out
    assert sorted(item.name for item in tmp_path.iterdir()) == ["pets.h5"]


@pytest.mark.parametrize("installed", [True, False])
def test_the_file_says_what_has_resized_its_images(
    pets: Path, tmp_path: Path, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow, if it is asked for or nothing else is installed; then pixels are the same on all machines."""
    pytest.importorskip("cykooz_resizer")
    if not installed:
        monkeypatch.setattr("h5feed.decode._simd", lambda: None)
    files = {True: tmp_path / "exact.h5", False: tmp_path / "fast.h5"}
    for exact, path in files.items():
        build(pets, path, BuildOptions(size=(48, 48), exact=exact, limit=12))
    with h5py.File(files[True]) as exact_file, h5py.File(files[False]) as fast_file:
        for row, name in enumerate(exact_file["filenames"].asstr()):
            pixels = decode_image((pets / name).read_bytes(), SPEC, exact=True).pixels
            np.testing.assert_array_equal(exact_file["images"][row], pixels)
        assert exact_file["images"].attrs["resizer"] == f"Pillow {PIL.__version__}"
        by_simd = fast_file["images"].attrs["resizer"].startswith("cykooz.resizer ")
        difference = np.abs(exact_file["images"][:].astype(int) - fast_file["images"][:]).max()
    assert by_simd is installed and difference == int(installed)


def test_exact_needs_what_pillow_does() -> None:
    with pytest.raises(BadParameter, match="interpolation=linear, which OpenCV computes"):
        BuildOptions(exact=True, interpolation="linear")
    with pytest.raises(BadParameter, match="interpolation=linear"):
        BuildOptions(exact=True, store="encoded")
    assert BuildOptions(exact=True, store="encoded", interpolation="area").exact


def test_a_build_of_images_loads_no_more_than_it_needs(pets: Path, tmp_path: Path) -> None:
    """Half of what a short build would take is to load what serves."""
    code = (
        "import sys; from h5feed_server.builder import build\n"
        f"build({str(pets)!r}, {str(tmp_path / 'pets.h5')!r})\n"
        "print([name for name in ('h5feed_server.services', 'httpx', 'fastapi', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"


def test_splits_are_stored_and_are_those_of_scikit_learn(pets: Path, tmp_path: Path) -> None:
    report = build(pets, tmp_path / "pets.h5", BuildOptions(size=(48, 48), val=0.1, test=0.2))
    pixels, labels = _expected(pets)
    rest, test = train_test_split(np.arange(120), test_size=24, stratify=labels, random_state=42)
    train, val = train_test_split(rest, test_size=12, stratify=labels[rest], random_state=42)
    with h5py.File(tmp_path / "pets.h5") as file:
        for split, rows in (("train", train), ("val", val), ("test", test)):
            np.testing.assert_array_equal(file[split]["images"][:], pixels[np.sort(rows)])
            np.testing.assert_array_equal(file[split]["labels"][:], labels[np.sort(rows)])
    np.testing.assert_allclose(report.means["mean"], pixels[train].mean(axis=(0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_archives_are_read_in_place(pets: Path, tmp_path: Path, kind: str) -> None:
    """With a folder around everything, as archives often have; the rows are those of the folder."""
    source = tmp_path / f"pets.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            for file in reversed(_images(pets)):
                archive.write(file, Path("download/pets") / file.relative_to(pets))
    else:
        with tarfile.open(source, "w:gz" if kind == "tar.gz" else "w") as tar:
            tar.add(pets, "download/pets")
    build(source, tmp_path / "out.h5", SMALL)
    pixels, labels = _expected(pets)
    with h5py.File(tmp_path / "out.h5") as file:
        # A tar that is compressed is read from its beginning to its end: rows are in its order.
        order = np.argsort(file["filenames"][:])
        np.testing.assert_array_equal(file["images"][:][order], pixels)
        np.testing.assert_array_equal(file["labels"][:][order], labels)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out.h5", source.name]


@pytest.mark.parametrize("word", ["val", "validation", "valid"])
def test_folders_of_splits(pets: Path, tmp_path: Path, word: str) -> None:
    source = tmp_path / "source"
    for number, file in enumerate(_images(pets)):
        split = ("train", "train", word, "test")[number % 4]
        where = source / split / file.parent.name / file.name
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(file.read_bytes())
    assert build(source, tmp_path / "a.h5", SMALL).rows == {"train": 60, "val": 30, "test": 30}
    # val= alone is carved out of what is stored for training, as the server does it; test= divides all anew.
    assert build(source, tmp_path / "b.h5", BuildOptions((48, 48), val=10)).rows == {"train": 80, "val": 10, "test": 30}
    assert build(source, tmp_path / "c.h5", BuildOptions((48, 48), test=12)).rows == {"train": 108, "test": 12}


def test_classes_in_the_names_of_files(tmp_path: Path) -> None:
    """As Kaggle's cats and dogs have them; by a pattern where they are otherwise."""
    source = tmp_path / "train"
    source.mkdir()
    for number in range(20):
        data = encoded(photograph(number, 50, 50))
        (source / f"{'cat' if number % 2 else 'dog'}.{number}.jpg").write_bytes(data)
    build(source, tmp_path / "a.h5", SMALL)
    build(source, tmp_path / "b.h5", BuildOptions((48, 48), label_pattern=r"\.(\d)\d*\.jpg$"))
    with h5py.File(tmp_path / "a.h5") as one, h5py.File(tmp_path / "b.h5") as other:
        assert one["labels"].attrs["class_names"].tolist() == ["cat", "dog"]
        assert one["labels"][:].tolist() == [0] * 10 + [1] * 10
        assert other["labels"].attrs["class_names"].tolist() == [str(digit) for digit in range(10)]
    with pytest.raises(BadParameter, match=r"does not match 'cat\.1\.jpg'"):
        build(source, tmp_path / "c.h5", BuildOptions(label_pattern=r"(bird)"))


def test_the_same_source_gives_the_same_bytes(pets: Path, tmp_path: Path) -> None:
    """At another time, with other threads, from a copy of the source."""
    options = BuildOptions(size=(48, 48), val=0.1, test=0.1)
    build(pets, tmp_path / "one" / "pets.h5", replace(options, threads=1))
    copy = tmp_path / "elsewhere" / "pets"
    for file in _images(pets):
        (copy / file.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / file.parent.name / file.name).write_bytes(file.read_bytes())
    time.sleep(1.1)
    build(copy, tmp_path / "two" / "pets.h5", replace(options, threads=3))
    assert (tmp_path / "one" / "pets.h5").read_bytes() == (tmp_path / "two" / "pets.h5").read_bytes()


def test_shards_are_served_as_one_dataset(pets: Path, tmp_path: Path, serve: Any) -> None:
    build(pets, tmp_path / "data" / "pets.h5", BuildOptions((48, 48), test=24, shards=3))
    names = sorted(item.name for item in (tmp_path / "data").iterdir())
    assert names == [f"pets-{number:05d}-of-00003.h5" for number in range(3)]
    whole = build(pets, tmp_path / "whole.h5", BuildOptions((48, 48), test=24))
    with h5feed.connect(serve(tmp_path / "data").url, deadline=20) as feed, h5py.File(tmp_path / "whole.h5") as file:
        for split, rows in whole.rows.items():
            batches = list(feed["pets"].batches(split, batch_size=50))
            np.testing.assert_array_equal(np.concatenate([b["images"] for b in batches]), file[split]["images"][:])
            np.testing.assert_array_equal(np.concatenate([b["labels"] for b in batches]), file[split]["labels"][:])
            assert sum(map(len, (b.rows for b in batches))) == rows


def test_a_file_a_split_and_the_means_as_json(pets: Path, tmp_path: Path, serve: Any) -> None:
    """As the well-known recipe leaves them; also served as one dataset with native splits."""
    out = tmp_path / "data" / "pets"
    options = BuildOptions((48, 48), val=12, test=24, colour="bgr", split_files=True, mean_json=out / "mean.json")
    report = build(pets, out, options)
    assert sorted(item.name for item in out.iterdir()) == ["mean.json", "test.hdf5", "train.hdf5", "val.hdf5"]
    with h5py.File(out / "train.hdf5") as file:
        means = file["images"][:].mean(axis=(0, 1, 2))
        assert len(file["labels"]) == 84
    found = json.loads((out / "mean.json").read_text())
    np.testing.assert_allclose([found["B"], found["G"], found["R"]], means, rtol=1e-12)
    assert report.rows == {"train": 84, "val": 12, "test": 24}
    with h5feed.connect(serve(tmp_path / "data").url, deadline=20) as feed:
        assert len(feed["pets"].batch(0, split="test", batch_size=24).rows) == 24
        assert feed["pets"].class_names == ["cat", "dog", "emu"]


def test_images_that_are_there_twice_are_told(pets: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for file in _images(pets)[::10]:
        for name in ("a.jpg", "b.jpg"):
            where = source / file.parent.name / f"{file.stem}{name}"
            where.parent.mkdir(parents=True, exist_ok=True)
            where.write_bytes(file.read_bytes())
    report = build(source, tmp_path / "out.h5", BuildOptions((48, 48), test=0.5))
    (note,) = [note for note in report.notes if "identical" in note]
    assert note.startswith("12 images are identical to another image") and "in another split" in note


def test_a_file_that_is_there_is_replaced_only_when_asked(pets: Path, tmp_path: Path) -> None:
    build(pets, tmp_path / "pets.h5", SMALL)
    before = (tmp_path / "pets.h5").read_bytes()
    with pytest.raises(BadParameter, match="already exists"):
        build(pets, tmp_path / "pets.h5", BuildOptions((32, 32)))
    assert (tmp_path / "pets.h5").read_bytes() == before
    build(pets, tmp_path / "pets.h5", BuildOptions((32, 32), overwrite=True))
    assert (tmp_path / "pets.h5").read_bytes() != before
    assert not _left_behind(tmp_path)


def test_a_limit_takes_from_every_class(pets: Path, tmp_path: Path) -> None:
    build(pets, tmp_path / "few.h5", BuildOptions((48, 48), limit=30))
    with h5py.File(tmp_path / "few.h5") as file:
        assert np.bincount(file["labels"][:]).tolist() == [10, 10, 10]


def test_hostile_archives(tmp_path: Path) -> None:
    """Names that lead elsewhere, bombs, and names that are there twice: told, left out, nothing lies anywhere."""
    source = tmp_path / "in" / "pets.zip"
    source.parent.mkdir()
    first, second = (encoded(photograph(number, 60, 60)) for number in (1, 2))
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/1.jpg", first)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("cat/1.jpg", second)
        archive.writestr("dog/1.jpg", first)
        archive.writestr("../../evil.jpg", first)
        archive.writestr("/etc/evil.jpg", first)
        archive.writestr("cat/bomb.jpg", bytes(50 << 20))
        archive.writestr("fox/", "")
    out = tmp_path / "out" / "pets.h5"
    report = build(source, out, SMALL)
    assert report.rows == {"": 2}
    assert {name: reason.split(":")[0] for name, reason in report.left_out.items()} == {
        "../../evil.jpg": "its name leads out of the archive",
        "/etc/evil.jpg": "its name leads out of the archive",
        "cat/bomb.jpg": report.left_out["cat/bomb.jpg"].split(":")[0],
        "cat/1.jpg (the first)": "its name occurs twice",
    }
    assert "decompression bomb" in report.left_out["cat/bomb.jpg"]
    assert any("class 'fox' has no images" in note for note in report.notes)
    with h5py.File(out) as file:
        np.testing.assert_array_equal(file["images"][0], decode_image(second, SPEC).pixels)
        assert file["labels"].attrs["class_names"].tolist() == ["cat", "dog", "fox"]
        assert file["labels"][:].tolist() == [0, 1]
    assert sorted(str(item.relative_to(tmp_path)) for item in tmp_path.rglob("*") if item.is_file()) == [
        "in/pets.zip",
        "out/pets.h5",
        "out/pets.h5.left-out.tsv",
    ]


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_hostile_tars(tmp_path: Path, ending: str) -> None:
    """Members that are links, devices or pipes, and names that lead out: told and left out, and nothing is followed."""
    canary = tmp_path / "canary.jpg"
    canary.write_bytes(encoded(photograph(7, 60, 60)))
    source = tmp_path / "in" / f"pets.{ending}"
    source.parent.mkdir()
    first = encoded(photograph(1, 60, 60))
    outside = ("../../evil.jpg", "/etc/evil.jpg", "cat/../../evil.jpg", "..\\evil.jpg", "C:\\evil.jpg")
    links = {
        "cat/absolute.jpg": (tarfile.SYMTYPE, str(canary)),
        "cat/up.jpg": (tarfile.SYMTYPE, "../../canary.jpg"),
        "cat/hard.jpg": (tarfile.LNKTYPE, str(canary)),
        "cat/hard_up.jpg": (tarfile.LNKTYPE, "../canary.jpg"),
        "cat/to_a_member.jpg": (tarfile.SYMTYPE, "1.jpg"),
        "cat/device.jpg": (tarfile.CHRTYPE, ""),
        "cat/disk.jpg": (tarfile.BLKTYPE, ""),
        "cat/pipe.jpg": (tarfile.FIFOTYPE, ""),
        "folder": (tarfile.SYMTYPE, str(tmp_path)),
    }
    mode: Any = f"w:{ending.partition('.')[2]}"
    with tarfile.open(source, mode) as archive:
        for name in ("cat/1.jpg", "dog/1.jpg", "folder/canary.jpg", *outside):
            info = tarfile.TarInfo(name)
            info.size = len(first)
            archive.addfile(info, io.BytesIO(first))
        for name, (kind, target) in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.devmajor, info.devminor = kind, target, 1, 5
            archive.addfile(info)
    out = tmp_path / "out" / "pets.h5"
    report = build(source, out, SMALL)
    assert report.rows == {"": 3}
    assert dict(report.left_out) == {
        **dict.fromkeys(outside, "its name leads out of the archive"),
        **dict.fromkeys(links, "it is a link or a device, not a file"),
    }
    with h5py.File(out) as file:
        for pixels in file["images"]:
            np.testing.assert_array_equal(pixels, decode_image(first, SPEC).pixels)
    written = sorted(str(item.relative_to(tmp_path)) for item in tmp_path.rglob("*") if item.is_file())
    assert written == ["canary.jpg", f"in/pets.{ending}", "out/pets.h5", "out/pets.h5.left-out.tsv"]


def test_links_in_a_zip(tmp_path: Path) -> None:
    """What a zip says is a link is bytes that are no image, whatever they name."""
    canary = tmp_path / "canary.jpg"
    canary.write_bytes(encoded(photograph(7, 60, 60)))
    first = encoded(photograph(1, 60, 60))
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        archive.writestr("cat/1.jpg", first)
        link = zipfile.ZipInfo("cat/link.jpg")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(canary))
    report = build(tmp_path / "pets.zip", tmp_path / "out.h5", SMALL)
    assert report.rows == {"": 1} and set(report.left_out) == {"cat/link.jpg"}
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_array_equal(file["images"][0], decode_image(first, SPEC).pixels)


@pytest.mark.parametrize("content", [b"size = " + b"[" * 100_000, b"size = " + b"9" * 10_000, b"size = '\xff'"])
def test_options_that_are_no_options(tmp_path: Path, content: bytes) -> None:
    """Nested without end, a number without end, and no text: told with the name of the file."""
    (tmp_path / "options.toml").write_bytes(content)
    with pytest.raises(BadParameter, match=r"options\.toml"):
        read_options(tmp_path / "options.toml")


def test_labels_that_are_nested_without_end(tmp_path: Path) -> None:
    """JSON in a WebDataset is told by its key."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("0.jpg", encoded(photograph(1, 48, 48))), ("0.json", b'{"label": ' + b"[" * 100_000)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises((BadParameter, Unreadable), match="nested too deeply"):
        build(tmp_path / "a.tar", tmp_path / "out.h5", SMALL)


def test_a_tar_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("cat/1.jpg")
        info.size = 300 << 20
        with open("/dev/zero", "rb") as zeros:
            archive.addfile(info, zeros)
    with pytest.raises(Unreadable, match="decompression bomb"):
        build(tmp_path / "bomb.tar.gz", tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_images_of_other_shapes_need_a_size(pets: Path, tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="rows need one shape, so pass a size"):
        build(pets, tmp_path / "out.h5", BuildOptions(resize="none"))
    assert not list(tmp_path.iterdir())


def test_a_preview_says_what_a_build_makes(pets: Path, tmp_path: Path) -> None:
    options = BuildOptions((48, 48), val=0.1, test=0.1)
    found = preview(pets, tmp_path / "pets.h5", options)
    assert not list(tmp_path.iterdir())
    report = build(pets, tmp_path / "pets.h5", options)
    assert found.rows == report.rows
    assert found.classes["train"] == {"cat": 48, "dog": 32, "emu": 16}
    assert abs(found.nbytes - report.nbytes) < 40_000
    assert [one.compression for one in found.tried] == ["lz4", "zstd", "gzip"]


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """400 MB of rows are built within 150 MB more than none: what is in flight is bounded, whatever the source."""
    np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.uint8, (400, 1000, 1000)).flush()
    program = f"""
import resource
from h5feed_server.builder import BuildOptions, build
import numpy as np
np.save({str(tmp_path / "none.npy")!r}, np.zeros((4, 8, 8), np.uint8))
build({str(tmp_path / "none.npy")!r}, {str(tmp_path / "none.h5")!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
build({str(tmp_path / "big.npy")!r}, {str(tmp_path / "big.h5")!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert int(ended.stdout) < 150_000, ended.stderr
