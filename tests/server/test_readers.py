"""Child processes that run libhdf5: what they hold open is never taken for what lies there now, and is bounded."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import shutil
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from h5feed.errors import DatasetCorrupt, Overloaded, ReaderCrashed, RevisionChanged, TooLarge, Unreadable
from h5feed.stored.layout import ArrayLayout, load_layout
from h5feed.stored.local_file import Identity, LocalFile, OpenFiles
from h5feed_server.cache_folder.folder import CacheFolder
from h5feed_server.catalog.digests import Digests
from h5feed_server.catalog.loading import AtOnce, FileLoader
from h5feed_server.settings import Settings
from h5feed_server.storage.hdf5.inspector import Inspector
from h5feed_server.storage.hdf5.reader_pool import ReaderPool

from tests.support.waiting import suspend, wait_until

FILES = OpenFiles(4)
TEXT = ArrayLayout("x", (100,), "|S1", by_h5py=True, ragged=True)


@pytest.fixture
def pool() -> Iterator[ReaderPool]:
    pool = ReaderPool(1, 30, 64 << 20)
    yield pool
    pool.close()
    assert not _readers()


def _readers() -> list[psutil.Process]:
    """Those of this process: servers of other tests have their own."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("h5py_reader" in word for word in child.cmdline()):
                found.append(child)
    return found


def _local(*paths: Path) -> list[LocalFile]:
    return [LocalFile(FILES, str(path), _identity(path)) for path in paths]


def _identity(path: Path) -> Identity:
    return Identity.of(path.stat())


def _write_text(path: Path, prefix: str) -> None:
    with h5py.File(path, "a") as file:
        file.pop("x", None)
        file.create_dataset("x", data=[f"{prefix}{row:03d}" for row in range(100)], dtype=h5py.string_dtype())


def _text(pool: ReaderPool, path: Path, row: int) -> str:
    items, _ = pool.read_ragged(_local(path), TEXT, np.array([row]))
    return items.tobytes().decode()


def test_a_file_of_two_names(pool: ReaderPool, tmp_path: Path) -> None:
    """A file that was read by one name, and written to in place, is read anew by the other."""
    _write_text(tmp_path / "a.h5", "old")
    (tmp_path / "b.h5").symlink_to("a.h5")
    assert _text(pool, tmp_path / "b.h5", 7) == "old007"
    _write_text(tmp_path / "a.h5", "new")
    assert _text(pool, tmp_path / "a.h5", 7) == "new007"
    assert _text(pool, tmp_path / "b.h5", 8) == "new008"


def test_a_member_that_is_another_for_a_moment(pool: ReaderPool, tmp_path: Path) -> None:
    """What a reader opened while one file of a family was another is not used when the first one is back."""
    values = np.arange(6000).reshape(1000, 6)
    with h5py.File(tmp_path / "many%d.h5", "w", driver="family", memb_size=4096) as file:
        file["x"] = values
    files = _local(*sorted(tmp_path.glob("many*.h5")))
    array = ArrayLayout("x", values.shape, "<i8", by_h5py=True)
    rows = np.arange(1000)
    member, away = tmp_path / "many5.h5", tmp_path / "away"
    assert pool.read(files[:1], array, rows[:1]).nbytes == 48
    os.rename(member, away)
    member.write_bytes(b"\x07" * 4096)
    # The reader is to see what was there when the parent looked.
    (reader,) = _readers()
    suspend(reader)
    os.rename(member, tmp_path / "other")
    os.rename(away, member)
    files = _local(*sorted(tmp_path.glob("many*.h5")))
    failures: list[Exception] = []

    def read() -> None:
        try:
            pool.read(files, array, rows)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: not pool._children._idle)
    os.rename(member, away)
    os.rename(tmp_path / "other", member)
    reader.resume()
    thread.join(60)
    assert [type(error) for error in failures] == [RevisionChanged]
    os.rename(away, member)
    # It may be another one by now: whoever asks again has looked.
    with pytest.raises(Overloaded, match="touched"):
        pool.read(files, array, rows)
    files = _local(*sorted(tmp_path.glob("many*.h5")))
    np.testing.assert_array_equal(pool.read(files, array, rows).view("<i8").reshape(1000, 6), values)


def test_the_layout_of_another_file(pool: ReaderPool, tmp_path: Path) -> None:
    """A layout is not kept for a file that was replaced before it was inspected."""
    data, folder = tmp_path / "data", CacheFolder(tmp_path / "cache", 10, 1 << 30)
    data.mkdir()
    path = data / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(10)
    before = _identity(path)
    os.rename(path, tmp_path / "away")
    with h5py.File(path, "w") as file:
        file["y"] = np.arange(20)
    with Inspector(20) as inspector:
        loader = FileLoader(data, Settings(data_dir=data), folder, Digests(folder, 1 << 30, 0), FILES, inspector, pool)
        try:
            with pytest.raises(RevisionChanged):
                loader.layout(str(path), before, (), AtOnce(1 << 30))
            os.rename(tmp_path / "away", path)
            layout, *_ = loader.layout(str(path), _identity(path), (), AtOnce(1 << 30))
        finally:
            loader.close()
    assert [array.path for array in layout.arrays] == ["x"]


def test_a_family_that_does_not_begin_here(tmp_path: Path) -> None:
    """libhdf5 reads a family from its number 0 on: a copy under another number is not taken for one."""
    for name, values in (("many%d.h5", np.zeros(2000)), ("other%d.h5", np.ones(2000))):
        with h5py.File(tmp_path / name, "w", driver="family", memb_size=4096) as file:
            file["x"] = values
    for number in range(4):
        shutil.copy(tmp_path / f"other{number}.h5", tmp_path / f"many{number + 7}.h5")
    with Inspector(20) as inspector:
        (array,) = load_layout(inspector.inspect(str(tmp_path / "many0.h5"))).arrays
        assert array.others[:3] == ("many1.h5", "many2.h5", "many3.h5")
        with pytest.raises(Unreadable, match=r"truncated|would end"):
            inspector.inspect(str(tmp_path / "many7.h5"))


def test_many_open_files(pool: ReaderPool, tmp_path: Path) -> None:
    """Children are heard on descriptors above 1,023; where there are none left, it is for another time."""
    _write_text(tmp_path / "a.h5", "row")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 1200:
        pytest.skip("the system does not allow so many")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with Inspector(20) as inspector:
            resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 1, most))
            with pytest.raises(Overloaded):
                inspector.inspect(str(tmp_path / "a.h5"))
            with pytest.raises(Overloaded):
                _text(pool, tmp_path / "a.h5", 7)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            assert load_layout(inspector.inspect(str(tmp_path / "a.h5"))).arrays[0].path == "x"
            assert _text(pool, tmp_path / "a.h5", 7) == "row007"
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_parts_than_descriptors(tmp_path: Path) -> None:
    """A virtual array may have more parts than a process may have files open when it starts."""
    count = 120
    whole = h5py.VirtualLayout((count,), "i8")
    paths = [tmp_path / f"{number}.h5" for number in range(count)]
    for number, path in enumerate(paths):
        with h5py.File(path, "w") as file:
            file["x"] = np.array([number])
        whole[number : number + 1] = h5py.VirtualSource(path.name, "x", (1,))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("x", whole)
    array = ArrayLayout("x", (count,), "<i8", by_h5py=True)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    pool = ReaderPool(1, 30, 1 << 20)
    try:
        rows = np.random.default_rng(0).permutation(count)
        found = pool.read(_local(tmp_path / "virtual.h5", *paths), array, rows).view("<i8")
        np.testing.assert_array_equal(found, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        pool.close()


def test_arrays_held_open(pool: ReaderPool, tmp_path: Path) -> None:
    """A reader's memory does not grow with the arrays that it has read from: libhdf5 keeps chunks of each."""
    with h5py.File(tmp_path / "many.h5", "w") as file:
        for number in range(150):
            kind = h5py.vlen_dtype(np.uint8)
            lists = file.create_dataset(f"f{number}", (400_000,), kind, chunks=(400_000,), compression="gzip")
            lists[0] = [number]
    files = _local(tmp_path / "many.h5")
    for number in range(150):
        array = ArrayLayout(f"f{number}", (400_000,), "|u1", by_h5py=True, ragged=True)
        assert pool.read_ragged(files, array, np.array([0]))[0].tolist() == [number]
    (reader,) = _readers()
    # Each of these chunks has 6.4 MB.
    assert reader.memory_info().rss < 500 << 20


def test_rows_larger_than_an_answer(pool: ReaderPool, tmp_path: Path) -> None:
    """A row that no answer can hold is refused, and not by the death of a reader."""
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        whole = h5py.VirtualLayout((10, 1 << 30), "u1")
        whole[:, :3] = h5py.VirtualSource(".", "y", (10, 3))
        file["y"] = np.zeros((10, 3), "u1")
        file.create_virtual_dataset("x", whole)
    array = ArrayLayout("x", (10, 1 << 30), "|u1", by_h5py=True)
    with pytest.raises(TooLarge):
        pool.read(_local(tmp_path / "wide.h5"), array, np.array([0]))


@pytest.mark.parametrize("forged", [1, 100_000, (1 << 31) - 1])
def test_forged_lengths(pool: ReaderPool, tmp_path: Path, forged: int) -> None:
    """A list that claims another length than its bytes have is refused, and its reader is not used again."""
    with h5py.File(tmp_path / "evil.h5", "w") as file:
        lists = file.create_dataset("v", (5,), h5py.vlen_dtype(np.uint8))
        for row in range(5):
            lists[row] = np.full(3000, row, np.uint8)
        begin = lists.id.get_offset()
    data = bytearray((tmp_path / "evil.h5").read_bytes())
    struct.pack_into("<I", data, begin, forged)
    (tmp_path / "evil.h5").write_bytes(data)
    _write_text(tmp_path / "good.h5", "row")
    array = ArrayLayout("v", (5,), "|u1", by_h5py=True, ragged=True)
    assert _text(pool, tmp_path / "good.h5", 7) == "row007"
    (reader,) = _readers()
    with pytest.raises((DatasetCorrupt, ReaderCrashed, TooLarge)):
        pool.read_ragged(_local(tmp_path / "evil.h5"), array, np.array([0]))
    assert not reader.is_running()
    assert _text(pool, tmp_path / "good.h5", 7) == "row007"
    assert pool.read_ragged(_local(tmp_path / "evil.h5"), array, np.array([3]))[0].tolist() == [3] * 3000


def test_closed_while_at_work(tmp_path: Path) -> None:
    """Who waits for a reader when the pool is closed is told so at once; no reader is left, nor a descriptor."""
    _write_text(tmp_path / "a.h5", "row")
    pool = ReaderPool(1, 30, 1 << 20)
    # What earlier tests have dropped is not to be taken for what this one gives back.
    gc.collect()
    before = psutil.Process().num_fds()
    assert _text(pool, tmp_path / "a.h5", 7) == "row007"
    suspend(*_readers())
    failures: list[Exception] = []

    def read() -> None:
        try:
            _text(pool, tmp_path / "a.h5", 8)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: not pool._children._idle)
    pool.close()
    for thread in threads:
        thread.join(60)
    assert [type(error) for error in failures] == [Overloaded] * 4
    assert not _readers() and psutil.Process().num_fds() <= before
