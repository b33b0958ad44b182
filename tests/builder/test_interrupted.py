"""Builds that are killed, run out of space, or meet what cannot be decoded: nothing is half-written, and they go on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5feed.errors import TooLarge, Unreadable
from h5feed_server.builder import BuildOptions, Progress, build

from tests.support.photographs import encoded, endless_bmp, photograph


def _left_behind(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.name.startswith("."))


def _interrupt(source: Path, out: Path, options: dict[str, Any], *, how: str) -> None:
    """A build in a process of its own, ended when some rows are on disk, and most are not made yet."""
    program = f"""
import os, signal, struct, time, zlib
from pathlib import Path
from h5feed_server.builder import BuildOptions, build
import h5feed_server.builder.image_source as image_source
import h5feed_server.builder.row_maker as row_maker
row_maker.COMMIT_SECONDS = 0.0
image_source._UNIT_IMAGES = 4
journal = Path({str(out.with_name(f".{out.name}.journal"))!r})
calls = 0

def noted():
    frames = journal.read_bytes().partition(b"\\n")[2]
    length, checksum = struct.unpack("<II", frames[:8]) if len(frames) >= 8 else (0, 0)
    return length > 0 and zlib.crc32(frames[8 : 8 + length]) == checksum

def stop(progress):
    # What is finished when this is called for the first time is noted between that call and the next one, elsewhere.
    global calls
    calls += 1
    if calls < 2:
        return
    deadline = time.monotonic() + 60
    while not noted() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.{how})
    time.sleep(60)

build({str(source)!r}, {str(out)!r}, BuildOptions(**{options!r}), on_progress=stop)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -getattr(signal, how), ended.stderr


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("more", [{}, {"compression": "lz4"}, {"shards": 2}])
def test_a_build_that_is_killed_goes_on(pets: Path, tmp_path: Path, how: str, more: dict[str, Any]) -> None:
    """To the same bytes; what is unfinished is never taken for whole, and what is finished is not done again."""
    options = {"size": (48, 48), "val": 0.1, "threads": 2, **more}
    undisturbed = build(pets, tmp_path / "whole" / "pets.h5", BuildOptions(**options))
    out = tmp_path / "killed" / "pets.h5"
    out.parent.mkdir()
    _interrupt(pets, out, options, how=how)
    assert all(name.startswith(".") for name in os.listdir(out.parent))
    seen: list[Progress] = []
    report = build(pets, out, BuildOptions(**options), on_progress=seen.append)
    assert 4 <= report.resumed < 120 and seen[0].rows > report.resumed
    for one, other in zip(undisturbed.files, report.files, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert not _left_behind(out.parent)


def test_a_stream_that_is_killed_goes_on(pets: Path, tmp_path: Path) -> None:
    """What was finished is passed over, where a source can only be read from its beginning."""
    with tarfile.open(tmp_path / "pets.tar.gz", "w:gz") as archive:
        archive.add(pets, "pets")
    build(tmp_path / "pets.tar.gz", tmp_path / "whole.h5", BuildOptions((48, 48), test=12))
    out = tmp_path / "killed" / "whole.h5"
    out.parent.mkdir()
    _interrupt(tmp_path / "pets.tar.gz", out, {"size": (48, 48), "test": 12, "threads": 2}, how="SIGKILL")
    report = build(tmp_path / "pets.tar.gz", out, BuildOptions((48, 48), test=12))
    assert report.resumed >= 4
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_build_of_other_options_begins_anew(pets: Path, tmp_path: Path) -> None:
    _interrupt(pets, tmp_path / "pets.h5", {"size": (48, 48), "threads": 2}, how="SIGKILL")
    assert build(pets, tmp_path / "pets.h5", BuildOptions((32, 32))).resumed == 0
    with h5py.File(tmp_path / "pets.h5") as file:
        assert file["images"].shape == (120, 32, 32, 3)
    assert not _left_behind(tmp_path)


@pytest.fixture(scope="module")
def mostly_whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """300 files of two classes, of which three are no images; and the same folder without those three."""
    root = tmp_path_factory.mktemp("mostly")
    broken = {40: b"", 155: b"<html>404</html>", 290: encoded(photograph(290, 60, 60))[:700]}
    for number in range(300):
        name = f"{'cat' if number % 3 else 'dog'}/{number:03d}.jpg"
        for folder in ("all", "whole"):
            if folder == "whole" and number in broken:
                continue
            where = root / folder / "pets" / name
            where.parent.mkdir(parents=True, exist_ok=True)
            where.write_bytes(broken.get(number) or (b"" if number in broken else encoded(photograph(number, 60, 60))))
    return root / "all" / "pets", root / "whole" / "pets"


LEFT_OUT = {"cat/040.jpg", "cat/155.jpg", "cat/290.jpg"}


@pytest.mark.parametrize("more", [{}, {"compression": "zstd"}, {"store": "encoded"}])
def test_three_broken_images_in_three_hundred(
    mostly_whole: tuple[Path, Path], tmp_path: Path, more: dict[str, Any]
) -> None:
    """Splits, means and rows are those of a source without them, after ``kill -9`` too, and so is the report."""
    source, whole = mostly_whole
    options: dict[str, Any] = {"size": (48, 48), "val": 0.1, "test": 0.1, "threads": 2, **more}
    build(whole, tmp_path / "clean" / "pets.h5", BuildOptions(**options))
    report = build(source, tmp_path / "pets.h5", BuildOptions(**options))
    assert set(report.left_out) == LEFT_OUT and sum(report.rows.values()) == 297
    assert (tmp_path / "pets.h5").read_bytes() == (tmp_path / "clean" / "pets.h5").read_bytes()
    lines = (tmp_path / "pets.h5.left-out.tsv").read_text()
    assert lines.startswith("cat/040.jpg\tit is empty\n") and lines.count("\n") == 3
    killed = tmp_path / "killed" / "pets.h5"
    killed.parent.mkdir()
    _interrupt(source, killed, options, how="SIGKILL")
    again = build(source, killed, BuildOptions(**options))
    assert 4 <= again.resumed < 300
    assert again.left_out == report.left_out and again.rows == report.rows and again.means == report.means
    assert killed.read_bytes() == (tmp_path / "pets.h5").read_bytes()
    assert (killed.parent / "pets.h5.left-out.tsv").read_text() == lines
    assert not _left_behind(tmp_path) and not _left_behind(killed.parent)


def test_a_strict_build_stops_at_the_first_broken_image(mostly_whole: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=r"(040|155|290)\.jpg: "):
        build(mostly_whole[0], tmp_path / "strict.h5", BuildOptions((48, 48), strict=True))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_stops_the_build_and_room_lets_it_go_on(pets: Path, tmp_path: Path) -> None:
    """The limit on the size of files stands for the disk."""
    program = f"""
import resource
from h5feed_server.builder import BuildOptions, build
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
build({str(pets)!r}, {str(tmp_path / "pets.h5")!r}, BuildOptions((48, 48), threads=1))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "still needs" in ended.stderr and "to resume" in ended.stderr
    assert not (tmp_path / "pets.h5").exists()
    build(pets, tmp_path / "pets.h5", BuildOptions((48, 48)))
    build(pets, tmp_path / "again" / "pets.h5", BuildOptions((48, 48)))
    assert (tmp_path / "pets.h5").read_bytes() == (tmp_path / "again" / "pets.h5").read_bytes()


def test_space_is_looked_at_before_anything_is_written(tmp_path: Path) -> None:
    """An array that says to have four terabytes."""
    with open(tmp_path / "huge.npy", "wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (4000, 1_000_000_000)}
        np.lib.format.write_array_header_1_0(stream, header)
    with pytest.raises(TooLarge, match=r"needs 4,000,\d\d\d,\d\d\d,\d\d\d bytes"):
        build(tmp_path / "huge.npy", tmp_path / "out.h5")
    assert not list(tmp_path.glob("*.h5"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    where = tmp_path / "disk"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(where)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, timeout=20).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True, timeout=20)


def _fill(ballast: Path) -> None:
    """Take all that is left of a disk."""
    with open(ballast, "wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))


@pytest.mark.parametrize("phase", ["rows", "layout"])
def test_a_disk_that_fills_up_stops_the_build_and_room_lets_it_go_on(
    pets: Path, tmp_path: Path, small_disk: Path, phase: str
) -> None:
    options = BuildOptions((48, 48), val=0.1, threads=2, compression="lz4" if phase == "layout" else "none")
    build(pets, tmp_path / "whole" / "pets.h5", options)
    ballast = small_disk / "ballast"

    def fill(progress: Progress) -> None:
        if progress.phase != phase or ballast.exists():
            return
        _fill(ballast)

    out = small_disk / "pets.h5"
    for _ in range(2):
        # The second time it is full from the beginning.
        with pytest.raises(TooLarge, match=r"pets\.h5.* needs [\d,]+ bytes.* has [\d,]+ left") as caught:
            build(pets, out, options, on_progress=fill)
        assert "free some space" in str(caught.value)
        assert not out.exists() and all(name.startswith(".") for name in os.listdir(small_disk) if name != "ballast")
    ballast.unlink()
    report = build(pets, out, options)
    assert out.read_bytes() == (tmp_path / "whole" / "pets.h5").read_bytes()
    assert report.resumed >= (16 if phase == "rows" else 120)
    assert not _left_behind(small_disk)


def test_a_disk_without_room_for_the_journal(pets: Path, small_disk: Path) -> None:
    _fill(small_disk / "ballast")
    with pytest.raises(TooLarge, match=r"needs [\d,]+ bytes"):
        build(pets, small_disk / "pets.h5", BuildOptions((48, 48)))
    assert os.listdir(small_disk) == ["ballast"]


def test_an_image_that_takes_too_long_is_broken(tmp_path: Path) -> None:
    """A zip of 100 kB whose one image would be decoded for minutes."""
    source = tmp_path / "pets.zip"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(20):
            archive.writestr(f"{'dog' if number % 2 else 'cat'}/{number:02d}.jpg", encoded(photograph(number, 60, 60)))
        # Less at once than what is taken for a decompression bomb.
        archive.writestr(zipfile.ZipInfo("cat/slow.bmp"), endless_bmp(8000, 8000), zipfile.ZIP_STORED)
    report = build(source, tmp_path / "pets.h5", BuildOptions((48, 48), image_seconds=1.0))
    assert report.left_out == {"cat/slow.bmp": "decoding it took more than 1 s"}
    assert report.rows == {"": 20}


def test_an_image_that_is_not_plain_is_decoded_all_the_same(tmp_path: Path) -> None:
    """In a process of its own, to the same pixels."""
    pixels = [photograph(number, 48, 48) for number in range(4)]
    for number, kind in enumerate(("TIFF", "BMP", "PNG", "WEBP")):
        more: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        file = tmp_path / "source" / "cat" / f"{number}.{kind.lower()}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(pixels[number], kind, **more))
    for options in (BuildOptions((48, 48)), BuildOptions(resize="none")):
        build(tmp_path / "source", tmp_path / "out.h5", options)
        with h5py.File(tmp_path / "out.h5") as file:
            np.testing.assert_array_equal(file["images"][:], np.stack(pixels))
        (tmp_path / "out.h5").unlink()
