"""Files of one dataset are inspected in groups: as each by itself, and whatever is wrong with one of them."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from h5feed.errors import Unreadable
from h5feed.stored.layout import FileLayout, load_layout
from h5feed.stored.local_file import YOUNG_SECONDS, Identity
from h5feed_server.catalog.known_files import MANY
from h5feed_server.catalog.together import Together
from h5feed_server.services import Services
from h5feed_server.settings import Settings
from h5feed_server.storage.hdf5.inspector import Inspector

from tests.support.matrix import FILTERS, write_matrix
from tests.support.slow_file import write_slow

ROWS = 24


def _write_shard(path: Path, number: int, rows: int = ROWS, row: tuple[int, ...] = (6,)) -> None:
    """A shard whose values tell its number, in chunks of other sizes than those of other shards."""
    values = np.random.default_rng(number).integers(0, 2 + number, (rows, *row)).astype("<i4")
    values[:, 0] = number
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, chunks=(8, *row), compression="gzip")


def _shards(folder: Path, count: int = 8) -> list[str]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"part{number:03}.h5" for number in range(count)]
    for number, path in enumerate(paths):
        _write_shard(path, number)
    return [*map(str, paths)]


def _old(path: str) -> tuple[str, Identity]:
    """A file that was not changed lately."""
    return path, Identity(0, 0, 0, 0, 0)


def _found(inspect: Callable[[str], bytes], path: str) -> bytes | str:
    """A layout, or the reason that there is none."""
    try:
        return inspect(path)
    except Unreadable as error:
        return error.detail


def _each_alone(paths: Sequence[str]) -> list[bytes | str]:
    with Inspector(60) as inspector:
        return [_found(inspector.inspect, path) for path in paths]


class _Counting(Inspector):
    """Notes what is asked of it."""

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        self.groups: list[tuple[str, ...]] = []
        self.alone: list[str] = []

    def inspect(self, path: str) -> bytes:
        self.alone.append(path)
        return super().inspect(path)

    def inspect_together(
        self, paths: Sequence[str], load: Callable[[bytes], FileLayout] = load_layout
    ) -> dict[str, bytes] | None:
        self.groups.append(tuple(paths))
        return super().inspect_together(paths, load)


def _each_filter(folder: Path) -> Iterator[Path]:
    """The cells of the storage matrix, in a file for each filter."""
    write_matrix(folder / "matrix")
    with h5py.File(folder / "matrix") as cells:
        for name in FILTERS:
            yield folder / f"{name}.h5"
            with h5py.File(folder / f"{name}.h5", "w") as file:
                for field in cells:
                    if field.startswith(f"{name}-"):
                        cells.copy(field, file)


def _other_kinds(folder: Path) -> Iterator[Path]:
    """What is not stored as numbers in chunks of the file itself."""
    for version in ("earliest", "latest"):
        yield (path := folder / f"kinds-{version}.h5")
        with h5py.File(path, "w", libver=version) as file:
            file["text"] = ["one", "two", "three"]
            file.create_dataset("list", (3,), h5py.vlen_dtype("<i4"))[:] = [np.arange(n) for n in (3, 0, 2)]
            file["records"] = np.zeros(5, [("a", "<i4"), ("b", "S3")])
            file["group/scalar"] = 7.0
            file.attrs["about"] = "all kinds"
            file["link"] = h5py.ExternalLink("gzip.h5", "/")
            file.create_dataset("outside", (10,), "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
            layout = h5py.VirtualLayout((53, 6, 5), "<f4")
            layout[:] = h5py.VirtualSource("gzip.h5", "gzip-rows-f4", (53, 6, 5))
            file.create_virtual_dataset("virtual", layout)


def test_layouts_are_those_of_single_inspections(tmp_path: Path) -> None:
    """For all filters, layouts, types and kinds of storage, in another order."""
    paths = [*map(str, (*_each_filter(tmp_path), *_other_kinds(tmp_path)))]
    expected = dict(zip(paths, _each_alone(paths), strict=True))
    assert all(isinstance(layout, bytes) for layout in expected.values())
    with Inspector(60) as inspector:
        layouts: dict[str, bytes] = {}
        # There may not be time for all of them at once.
        while left := [path for path in paths[::-1] if path not in layouts]:
            found = inspector.inspect_together(left)
            assert found
            layouts |= found
    assert layouts == expected


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


def _garbage(path: Path) -> None:
    path.write_bytes(b"no HDF5 at all" * 100)


def _garbage_inside(path: Path) -> None:
    """The superblock is fine, and leads to nonsense."""
    content = bytearray(path.read_bytes())
    content[96:] = np.random.default_rng(0).bytes(len(content) - 96)
    path.write_bytes(content)


def _without_arrays(path: Path) -> None:
    h5py.File(path, "w").close()


def _missing(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "at"),
    [(_truncated, 0), (_garbage, 3), (_garbage_inside, 7), (_without_arrays, 4), (_missing, 1), (_folder, 5)],
)
def test_one_of_a_group_is_damaged(tmp_path: Path, damage: Callable[[Path], None], at: int) -> None:
    """It has its own reason, and the others have the layouts of single inspections, which these are."""
    paths = _shards(tmp_path)
    damage(Path(paths[at]))
    expected = _each_alone(paths)
    assert [isinstance(one, str) for one in expected] == [number == at for number in range(8)]
    with _Counting(60) as inspector:
        together = Together(inspector, load_layout, map(_old, paths))
        assert [_found(together.inspect, path) for path in paths] == expected
        assert inspector.alone == paths, "nothing of the group was used"


@contextmanager
def _killing(what: str, number: int) -> Iterator[None]:
    """Send a signal to every process that inspects a file of this name."""
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.02):
            for child in psutil.Process().children():
                # They come and go while they are looked at.
                with contextlib.suppress(psutil.Error):
                    for fork in child.children():
                        if any(what in file.path for file in fork.open_files()):
                            fork.send_signal(number)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_one_of_a_group_crashes_libhdf5(tmp_path: Path) -> None:
    """The reason names the signal, for this file only."""
    paths = _shards(tmp_path)
    expected: list[bytes | str] = _each_alone(paths)
    write_slow(tmp_path / "crashing.h5")
    paths.insert(4, str(tmp_path / "crashing.h5"))
    expected.insert(4, "inspecting it crashed libhdf5 (SIGSEGV)")
    with _killing("crashing", signal.SIGSEGV), _Counting(60) as inspector:
        together = Together(inspector, load_layout, map(_old, paths))
        assert [_found(together.inspect, path) for path in paths] == expected
        assert inspector.alone == paths


def test_one_of_a_group_hangs(tmp_path: Path) -> None:
    """It ends in time. The reason is the limit, for this file only."""
    paths = _shards(tmp_path)
    expected: list[bytes | str] = _each_alone(paths)
    write_slow(tmp_path / "slow.h5")
    paths.append(str(tmp_path / "slow.h5"))
    expected.append("inspecting it took more than 5 s (H5FEED_INSPECT_TIMEOUT)")
    with _Counting(5) as inspector:
        together = Together(inspector, load_layout, map(_old, paths))
        assert [_found(together.inspect, path) for path in paths] == expected
        assert inspector.alone == paths


def test_a_response_that_is_not_valid(tmp_path: Path) -> None:
    """What the parent's checks reject is treated like damage of a file: none of the group is used."""
    paths = _shards(tmp_path)
    expected = _each_alone(paths)

    def load(layout: bytes) -> FileLayout:
        if layout == expected[5]:
            raise ValueError("this is not a layout")
        return load_layout(layout)

    with _Counting(60) as inspector:
        together = Together(inspector, load, map(_old, paths))
        assert [together.inspect(path) for path in paths] == expected
        assert inspector.alone == paths


class _Hasty(_Counting):
    """Has time for two files of a group."""

    def inspect_together(
        self, paths: Sequence[str], load: Callable[[bytes], FileLayout] = load_layout
    ) -> dict[str, bytes] | None:
        return super().inspect_together(paths[:2], load)


def test_files_that_there_was_no_time_for(tmp_path: Path) -> None:
    """They are in the next group. Files whose layouts are known already are in none."""
    paths = _shards(tmp_path)
    expected = _each_alone(paths)
    with _Hasty(60) as inspector:
        together = Together(inspector, load_layout, map(_old, paths))
        assert [together.inspect(paths[number]) for number in (0, 1, 4, 5, 7)] == [
            expected[number] for number in (0, 1, 4, 5, 7)
        ]
        assert inspector.groups == [tuple(paths[:2]), tuple(paths[4:6])]
        assert inspector.alone == paths[7:]


def test_a_young_file_is_in_no_group(tmp_path: Path) -> None:
    """It could change without another identity before the result is used."""
    paths = _shards(tmp_path)
    young = Identity(0, 0, 0, 0, 1 << 62)
    files = [(path, young if number in (0, 3) else _old(path)[1]) for number, path in enumerate(paths)]
    with _Counting(60) as inspector:
        together = Together(inspector, load_layout, files)
        assert [together.inspect(path) for path in paths] == _each_alone(paths)
        assert not {paths[0], paths[3]} & {path for group in inspector.groups for path in group}
        assert {paths[0], paths[3]} <= {*inspector.alone}


def _inspected(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[_Counting, list[int]]:
    """Serve datasets of a folder: what was inspected, and their rows."""
    inspectors: list[_Counting] = []

    def counting(timeout: float) -> _Counting:
        inspectors.append(_Counting(timeout))
        return inspectors[-1]

    monkeypatch.setattr("h5feed_server.catalog.indexer.Inspector", counting)
    services = Services.start(Settings.model_validate({"data_dir": folder, "cache_dir": cache}))
    try:
        rows = [services.catalog.dataset_within(60, name).rows for name in names]
    finally:
        services.close(wait=True)
    (inspector,) = inspectors
    return inspector, rows


def test_files_of_two_datasets_share_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are a few files inspected together, which costs little."""
    folder = tmp_path / "data"
    for name, count in (("a", 2 * MANY), ("b", 2 * MANY), ("few", 3)):
        folder.mkdir(exist_ok=True)
        _shards(folder / name, count)
    time.sleep(YOUNG_SECONDS)
    inspector, rows = _inspected(folder, tmp_path / "cache", monkeypatch, "a", "b", "few")
    assert rows == [2 * MANY * ROWS, 2 * MANY * ROWS, 3 * ROWS]
    assert inspector.groups and all(len({Path(path).parent for path in group}) == 1 for group in inspector.groups)
    grouped = {path for group in inspector.groups for path in group}
    assert {Path(path).parent.name for path in grouped} == {"a", "b"}
    assert {Path(path).parent.name for path in inspector.alone} >= {"few"}


def test_files_that_are_no_dataset_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served of each is what an inspection of its own has found, though their names are those of shards."""
    folder = tmp_path / "data"
    paths = _shards(folder, MANY)
    _write_shard(Path(paths[2]), 2, row=(3, 3))
    time.sleep(YOUNG_SECONDS)
    inspector, rows = _inspected(folder, tmp_path / "cache", monkeypatch, "part001", "part002")
    assert rows == [ROWS, ROWS]
    assert inspector.groups and {*inspector.alone} == {*paths}
    # When the server starts again, all of this is known.
    inspector, rows = _inspected(folder, tmp_path / "cache", monkeypatch, "part001", "part002")
    assert (inspector.groups, inspector.alone, rows) == ([], [], [ROWS, ROWS])
