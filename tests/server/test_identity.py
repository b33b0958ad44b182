"""Which file it is: one rewritten with its times kept is another, one that is only touched is the same."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import RevisionChanged

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS, WIDTH = 60, 200


def _values(version: int) -> npt.NDArray[np.int32]:
    return np.full((ROWS, WIDTH), version, np.int32) + np.arange(ROWS, dtype=np.int32)[:, None] * 100


def _write(path: Path, version: int) -> None:
    """A file of the same size and structure for each version."""
    with h5py.File(path, "w") as file:
        file["x"] = _values(version)
        # Decoded chunks are kept in memory. Without one that compresses, all versions have as many bytes.
        file.create_dataset("z", data=_values(version), chunks=(6, WIDTH), shuffle=True)


def _keep_times(path: Path, status: os.stat_result) -> None:
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def _in_place(path: Path, new: Path) -> None:
    """Truncated and written anew, the time of modification set back."""
    status = path.stat()
    path.write_bytes(new.read_bytes())
    _keep_times(path, status)
    assert path.stat().st_ino == status.st_ino


def _some_bytes_in_place(path: Path, new: Path) -> None:
    status = path.stat()
    with open(path, "r+b") as file:
        file.write(new.read_bytes())
    _keep_times(path, status)


def _as_rsync(path: Path, new: Path) -> None:
    """A temporary file with the times of the old one, renamed over it."""
    status = path.stat()
    temporary = path.with_name(".d.h5.Xy12")
    shutil.copyfile(new, temporary)
    _keep_times(temporary, status)
    os.replace(temporary, path)


def _over_a_deleted_one(path: Path, new: Path) -> None:
    """As ``cp -p`` does it: file systems give a new file the inode of one that was just deleted."""
    status = path.stat()
    path.unlink()
    shutil.copyfile(new, path)
    _keep_times(path, status)


@pytest.mark.parametrize("times", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_rewritten_with_its_time_kept(serve: Callable[..., ServerProcess], tmp_path: Path, times: int) -> None:
    """Same name, size and time of modification, other values: the new ones each time, under a revision of their own."""
    folder = tmp_path / "data"
    folder.mkdir()
    path, new = folder / "d.h5", tmp_path / "new.h5"
    _write(path, 1)
    seen = []
    with h5feed.connect(serve(folder).url, deadline=120) as feed:
        for version in range(2, times + 2):
            before = feed["d"]
            seen.append(before.revision)
            _write(new, version)
            (_in_place, _some_bytes_in_place, _as_rsync, _over_a_deleted_one)[version % 4](path, new)
            with pytest.raises(RevisionChanged):
                before.take([0])
            now = feed["d"].take(range(ROWS), fields=["x", "z"])
            for name in ("x", "z"):
                np.testing.assert_array_equal(now[name], _values(version))
        seen.append(feed["d"].revision)
    assert len(set(seen)) == times + 1


@pytest.mark.slow
def test_rewritten_while_no_server_ran(tmp_path: Path) -> None:
    """A cache folder knows a file only as long as it is the same one: the next server serves the new values."""
    folder, cache = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    _write(folder / "d.h5", 1)
    _write(tmp_path / "new.h5", 2)
    wait_until(lambda: time.time() - (folder / "d.h5").stat().st_ctime > 2.5)
    server = ServerProcess(folder, cache)
    try:
        with h5feed.connect(server.url, deadline=60) as feed:
            old = feed["d"].revision
        server.stop()
        assert list(cache.glob("served-*/digests/*"))
        _in_place(folder / "d.h5", tmp_path / "new.h5")
        server.start()
        with h5feed.connect(server.url, deadline=60) as feed:
            assert feed["d"].revision != old
            np.testing.assert_array_equal(feed["d"].take(range(ROWS))["x"], _values(2))
    finally:
        server.stop()


def _linked(path: Path) -> None:
    os.link(path, path.with_name(".another-name"))
    os.unlink(path.with_name(".another-name"))


def _other_rights(path: Path) -> None:
    path.chmod(path.stat().st_mode ^ 0o010)


def _away_and_back(path: Path) -> None:
    os.rename(path, path.with_name(".away"))
    os.rename(path.with_name(".away"), path)


def _touched(path: Path, touch: Callable[[Path], None], before: int) -> bool:
    """Touch it once more; whether the file system's clock has gone on since `before`."""
    touch(path)
    return path.stat().st_ctime_ns != before


@pytest.mark.slow
@pytest.mark.parametrize("touch", [_linked, _other_rights, _away_and_back])
def test_a_running_epoch_does_not_see_a_touch(
    serve: Callable[..., ServerProcess], tmp_path: Path, touch: Callable[[Path], None]
) -> None:
    """A hard link, another mode or a move in the middle of an epoch: the same revision, and each row once."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "d.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(ROWS)
        # What h5py reads has its own look at the file.
        lists = file.create_dataset("list", (ROWS,), h5py.vlen_dtype("i4"))
        for row in range(ROWS):
            lists[row] = np.full(row % 5, row)
    server = serve(folder, "--workers", "2", H5FEED_CACHE_BYTES="0")
    with h5feed.connect(server.url, deadline=120) as feed:
        dataset = feed["d"]
        rows: list[int] = []
        for number, batch in enumerate(dataset.batches(batch_size=4, shuffle=True, fields=["x", "list"], readahead=1)):
            np.testing.assert_array_equal(batch["x"], batch.rows)
            for row, items in zip(batch.rows.tolist(), batch.lists("list"), strict=True):
                np.testing.assert_array_equal(items, np.full(row % 5, row))
            rows += batch.rows.tolist()
            if number in (2, 7):
                wait_until(partial(_touched, path, touch, path.stat().st_ctime_ns))
        assert sorted(rows) == list(range(ROWS))
        assert feed["d"].revision == dataset.revision


def test_a_touch_is_digested_and_not_inspected_again(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Layouts belong to content: what is linked, copied or touched has the one that is known."""
    folder = tmp_path / "data"
    folder.mkdir()
    _write(folder / "d.h5", 1)
    shutil.copyfile(folder / "d.h5", folder / "copy.h5")
    server = serve(folder)
    kept = tmp_path / "cache0"

    def count(kind: str) -> int:
        return len(list(kept.glob(f"served-*/{kind}/[!.]*")))

    # Both have only just been written: nothing is kept until they are looked at again.
    with h5feed.connect(server.url, deadline=60) as feed:
        revision = feed["d"].revision
        assert feed["copy"].revision == revision
        wait_until(lambda: feed["d"].revision == revision and feed["copy"].rows > 0 and count("digests") == 2)
        # Layouts are written behind the answers.
        wait_until(lambda: count("layouts") > 0)
        assert count("layouts") == 1
        _other_rights(folder / "d.h5")
        wait_until(lambda: time.time() - (folder / "d.h5").stat().st_ctime > 2.5)
        wait_until(lambda: feed["d"].revision == revision and count("digests") == 3)
        assert count("layouts") == 1


def test_a_young_file_is_looked_at_again(tmp_path: Path) -> None:
    """A change that no time tells, of a file that has only just been written, shows when it is two seconds old."""
    from h5feed.stored import local_file
    from h5feed_server.cache_folder.folder import CacheFolder
    from h5feed_server.catalog.catalog import Catalog
    from h5feed_server.settings import Settings
    from h5feed_server.storage.hdf5.reader_pool import ReaderPool

    folder = tmp_path / "data"
    folder.mkdir()
    _write(folder / "d.h5", 1)
    _write(tmp_path / "new.h5", 2)
    wait_until(lambda: time.time() - (folder / "d.h5").stat().st_ctime > 2.5)
    real = local_file.Identity.of
    # A clock of files that stands still, at a time when they are young.
    stopped = time.time_ns() + 3600 * 10**9

    def of(status: os.stat_result) -> local_file.Identity:
        return real(status)._replace(mtime_ns=stopped, ctime_ns=stopped)

    settings = Settings(data_dir=folder, cache_dir=tmp_path / "cache")
    pool = ReaderPool(1, 60, 1 << 20)
    cache = CacheFolder(tmp_path / "cache", 10, 1 << 30)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(local_file.Identity, "of", staticmethod(of))
        # The test says when two seconds are over.
        patched.setattr("h5feed_server.catalog.entry.YOUNG_SECONDS", 1e9)
        patched.setattr("h5feed_server.catalog.folder_scan.YOUNG_SECONDS", 1e9)
        catalog = Catalog(settings, cache, pool)
        try:
            old = catalog.dataset_within(60, "d")
            _in_place(folder / "d.h5", tmp_path / "new.h5")
            assert catalog.dataset_within(60, "d").revision == old.revision
            patched.setattr("h5feed_server.catalog.entry.YOUNG_SECONDS", 0)
            patched.setattr("h5feed_server.catalog.folder_scan.YOUNG_SECONDS", 0)
            wait_until(lambda: catalog.dataset_within(60, "d").revision != old.revision)
            new = catalog.dataset_within(60, "d")
            assert new.field("x").column.key != old.field("x").column.key
            with pytest.raises(RevisionChanged):
                catalog.dataset_within(60, "d", old.revision)
            # What is looked at twice is not looked at for ever, and what was found of young files is not kept.
            assert catalog.dataset_within(60, "d") is new
            assert not list(cache.path.glob("*/*"))
        finally:
            catalog.close()
            pool.close()


def test_a_file_found_while_another_thread_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that was searched for in the entries before a scan is searched for again, not declared unknown."""
    from h5feed_server.cache_folder.folder import CacheFolder
    from h5feed_server.catalog.catalog import Catalog
    from h5feed_server.settings import Settings
    from h5feed_server.storage.hdf5.reader_pool import ReaderPool

    folder = tmp_path / "data"
    folder.mkdir()
    _write(folder / "one.h5", 1)
    settings = Settings(data_dir=folder, cache_dir=tmp_path / "cache")
    catalog = Catalog(settings, CacheFolder(tmp_path / "cache", 10, 1 << 30), ReaderPool(1, 60, 1 << 20))
    search = catalog._search
    late: list[str] = []

    def search_and_be_overtaken(name: str, asked: float) -> Any:
        try:
            return search(name, asked)
        finally:
            if not late:
                late.append(name)
                _write(folder / "two.h5", 2)
                catalog._walk()

    try:
        assert catalog.dataset_within(60, "one").rows
        # Nothing is answered from the last scan alone.
        catalog._walk_seconds = 0.0
        monkeypatch.setattr(catalog, "_search", search_and_be_overtaken)
        assert catalog.dataset_within(60, "two").rows and late == ["two"]
    finally:
        catalog.close()
