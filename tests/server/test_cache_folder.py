"""The cache folder: what is damaged there is absent, and what another version has written is never served."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed_server.cache_folder.folder import CacheFolder
from h5feed_server.cache_folder.sealed import read_sealed, write_sealed
from h5feed_server.served_version import SERVED_VERSION

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS = 400
VALUES = np.arange(ROWS * 50, dtype="<i4").reshape(ROWS, 50)
LABELS = np.arange(ROWS) % 5
SPLITS: dict[str, Any] = {"test": 0.2, "val": 0.1}


def _write(path: Path, values: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["x"], file["label"] = values, LABELS


def _damages() -> dict[str, Callable[[Path], None]]:
    def flipped(place: float) -> Callable[[Path], None]:
        def damage(path: Path) -> None:
            data = bytearray(path.read_bytes())
            data[min(len(data) - 1, int(place * len(data)))] ^= 1
            path.write_bytes(data)

        return damage

    def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def damage(path: Path) -> None:
            path.unlink()
            make(path)

        return damage

    def other_entry(path: Path) -> None:
        others = sorted(other for other in path.parent.iterdir() if other != path)
        if others:
            shutil.copyfile(others[0], path)

    def full_folder(path: Path) -> None:
        path.mkdir()
        (path / "inner").write_bytes(b"")

    return {
        "empty": lambda path: os.truncate(path, 0),
        "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
        "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        **{f"a bit flipped at {place}": flipped(place) for place in (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)},
        "random bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(1000)),
        "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "that of another": other_entry,
        "a folder": replaced(Path.mkdir),
        "a full folder": replaced(full_folder),
        "a FIFO": replaced(os.mkfifo),
        "a dangling link": replaced(lambda path: path.symlink_to("/nowhere/at/all")),
        "not to be read": lambda path: path.chmod(0),
    }


DAMAGES = _damages()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_absent_and_mended(tmp_path: Path, damage: str) -> None:
    """Whatever has become of an entry, what was computed is answered, computed anew once, and kept again."""
    folder = CacheFolder(tmp_path, 5, 1 << 30)
    content = {name: np.random.default_rng(number).bytes(3000) for number, name in enumerate(("a/one", "a/two"))}
    computed: list[str] = []

    def get(name: str) -> bytes:
        return folder.get(name, lambda: computed.append(name) or content[name])  # type: ignore[func-returns-value]

    assert [get(name) for name in content] == list(content.values())
    computed.clear()
    assert get("a/one") == content["a/one"] and not computed
    DAMAGES[damage](folder.path / "a/one")
    if damage != "not to be read" or os.geteuid():
        assert "a/one" not in folder and folder.find("a/one") is None
        assert get("a/one") == content["a/one"] and computed == ["a/one"]
    assert get("a/one") == content["a/one"] and len(computed) <= 1
    assert get("a/two") == content["a/two"]
    assert read_sealed(folder.path / "a/one") == content["a/one"]
    assert not [path for path in folder.path.rglob("*") if path.name.startswith(".")]


def test_every_bit(tmp_path: Path) -> None:
    """No single flipped bit, in the header or after it, goes unnoticed."""
    path = tmp_path / "entry"
    write_sealed(path, b"what was computed")
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert read_sealed(path) is None, bit
    path.write_bytes(whole)
    assert read_sealed(path) == b"what was computed"


class _Answers:
    """What a server says of everything that its cache folder has something to do with."""

    def __init__(self, server: ServerProcess) -> None:
        with h5feed.connect(server.url, deadline=60) as feed:
            dataset = feed["d"]
            self.revision = dataset.revision
            self.values = dataset.take(range(ROWS), fields=["x", "label"])["x"].copy()
            self.splits = dict(dataset.splits(**SPLITS))
            self.rows = dataset.split_rows("train", **SPLITS)
            self.mean = dataset.stats("train", **SPLITS)["x"]["mean"]

    def check(self, values: np.ndarray, other: _Answers | None = None) -> None:
        np.testing.assert_array_equal(self.values, values)
        assert self.mean == pytest.approx(values[self.rows].mean(), rel=1e-9)
        if other is not None:
            assert (self.revision, self.splits) == (other.revision, other.splits)
            np.testing.assert_array_equal(self.rows, other.rows)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, _Answers]:
    """A data folder, the cache folder of a server that has answered all of it, and its answers."""
    folder, cache = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("cache")
    _write(folder / "d.h5", VALUES)
    past = time.time() - 3600
    os.utime(folder / "d.h5", (past, past))
    # Nothing is kept of a file that has only just been written.
    wait_until(lambda: time.time() - (folder / "d.h5").stat().st_ctime > 2.5)
    server = ServerProcess(folder, cache)
    try:
        answers = _Answers(server)
    finally:
        server.stop()
    answers.check(VALUES)
    return folder, cache, answers


@pytest.mark.parametrize("damage", ["empty", "random bytes", "a bit flipped at 0.9", "that of another", "a FIFO"])
def test_a_server_over_damaged_files(kept: tuple[Path, Path, _Answers], tmp_path: Path, damage: str) -> None:
    """Every file of its cache folder damaged: the same revision, values, splits and statistics, and no error."""
    folder, cache, before = kept
    shutil.copytree(cache, tmp_path / "cache")
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    kinds = {path.parent.name for path in files}
    assert kinds == {"layouts", "digests", "splits", "reports", "classes", "stats", "jobs"}
    for path in files:
        DAMAGES[damage](path)
    server = ServerProcess(folder, tmp_path / "cache")
    try:
        _Answers(server).check(VALUES, before)
        jobs = [path.stem for path in files if path.parent.name == "jobs"]
        for job in jobs:
            assert httpx.get(f"{server.url}/v1/jobs/{job}", timeout=60).status_code in (200, 404)
    finally:
        server.stop()


def _as_before_versions(folder: Path, cache: Path) -> str:
    """What a server of the time before versions would have kept of ``d.h5``, every part of it wrong now.

    Returns
    -------
    str
        The revision that it said.
    """
    status = (folder / "d.h5").stat()
    key = f"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"
    digest = hashlib.blake2b(b"its content").digest()
    revision = hashlib.blake2b(b"1 0 " + digest, digest_size=8).hexdigest()
    for name in (f"layouts/6-{key}", f"digests/{8 << 30:x}-{key}"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(digest)
    for kind, name in (("splits", "3"), ("reports", "1"), ("classes", "1"), ("stats", "1")):
        of = hashlib.blake2b(f"d {revision} {{}}".encode(), digest_size=16).hexdigest()
        (cache / kind).mkdir()
        (cache / kind / f"{name}-{of}").write_bytes(b"what was right then")
    (cache / "jobs").mkdir()
    state = {"id": "0" * 32, "kind": "stats", "request": {}, "result": "/", "status": "done"}
    (cache / "jobs" / f"{'0' * 32}.json").write_text(json.dumps(state))
    return revision


def test_what_another_version_has_written_is_not_served(kept: tuple[Path, Path, _Answers], tmp_path: Path) -> None:
    """Entries from before versions and from another version: nothing of them is read; each version keeps its own."""
    folder, _, before = kept
    cache = tmp_path / "cache"
    cache.mkdir()
    old = _as_before_versions(folder, cache)
    other = cache / f"served-{SERVED_VERSION - 1}"
    shutil.copytree(cache / "layouts", other / "layouts")
    left = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    server = ServerProcess(folder, cache)
    try:
        answers = _Answers(server)
        answers.check(VALUES, before)
        assert answers.revision != old
        assert httpx.get(f"{server.url}/v1/jobs/{'0' * 32}", timeout=60).status_code == 404
        # A server that is still running, or is gone back to, finds its own.
        assert {path: path.read_bytes() for path in left} == left
        params = {"revision": old}
        refused = httpx.get(f"{server.url}/v1/datasets/d/rows", params=params, timeout=60)
        assert refused.status_code == 409
    finally:
        server.stop()


def test_what_nobody_uses_is_deleted_in_time(tmp_path: Path) -> None:
    """Entries of other versions go after a week without use; the bound holds over all; what others keep there stays."""
    week = 7 * 24 * 3600
    cache = tmp_path / "cache"
    ages = {
        "splits/mine.csv": 10 * week,
        "served-models/mine.keras": 10 * week,
        f"served-{SERVED_VERSION - 1}/splits/old": week + 3600,
        f"served-{SERVED_VERSION}/splits/own": week + 3600,
        "token": 10 * week,
        "mine/notes.txt": 10 * week,
    }
    for name, age in ages.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(bytes(1000))
        os.utime(cache / name, (time.time() - age,) * 2)
    others = {"splits/mine.csv", "served-models/mine.keras", "token", "mine/notes.txt"}
    CacheFolder(cache, 5, 1 << 20)
    there = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert there == {f"served-{SERVED_VERSION}/splits/own", *others}
    assert not (cache / f"served-{SERVED_VERSION - 1}").exists()
    CacheFolder(cache, 5, 999)
    there = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert there == others


@pytest.mark.parametrize("behind", [False, True])
def test_a_folder_that_is_deleted_meanwhile(tmp_path: Path, caplog: pytest.LogCaptureFixture, behind: bool) -> None:
    """It may be at any time: it is made again, and nobody is told that it cannot be used."""
    folder = CacheFolder(tmp_path / "cache", 5, 1 << 30)

    def compute() -> bytes:
        shutil.rmtree(tmp_path / "cache")
        return b"what was computed"

    for name in ("a/one", "a/two"):
        assert folder.get(name, compute, behind=behind) == b"what was computed"
    folder.close()
    assert read_sealed(folder.path / "a/two") == b"what was computed" and not caplog.records


def test_an_error_of_the_work_is_none_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Time that is up is an error of the system's kind, too: it is raised, once, and the folder is still used."""
    folder = CacheFolder(tmp_path, 5, 1 << 30)
    begun: list[int] = []

    def compute() -> bytes:
        begun.append(1)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        folder.get("a/one", compute)
    assert len(begun) == 1 and not caplog.records
    assert folder.get("a/one", lambda: b"what was computed") == b"what was computed" and "a/one" in folder
