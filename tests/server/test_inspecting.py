"""``h5feed-server inspect FILE`` looks at that file and what is served with it; whatever is looked at ends in time."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5feed.errors import Unreadable
from h5feed_server.cache_folder.folder import CacheFolder
from h5feed_server.catalog.loading import FileLoader
from h5feed_server.catalog.single_file import files_of_family
from h5feed_server.catalog.watching import notice
from h5feed_server.services import Services
from h5feed_server.settings import Settings

from tests.support.fork_server import COMMANDS


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(10)


def _inspect(path: Path) -> subprocess.CompletedProcess[str]:
    return COMMANDS.run(["inspect", str(path)])


def test_inspect_looks_at_no_other_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may lie in somebody's home: nothing below is walked through, but where it is declared."""
    _write(tmp_path / "one.h5")
    _write(tmp_path / "deep" / "er" / "two.h5")
    listed: list[str] = []
    real = os.scandir

    def scandir(path: str) -> object:
        listed.append(os.path.relpath(path, tmp_path))
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr("h5feed_server.catalog.discovery.os.scandir", scandir)
        assert files_of_family(tmp_path, "one.h5") == ["one.h5"]
    assert listed == ["."]
    (tmp_path / "h5feed.toml").write_text('[datasets.both]\nfiles = ["one.h5", "deep/er/*.h5"]\n')
    done = _inspect(tmp_path / "one.h5")
    assert (done.returncode, done.stderr) == (0, "") and "20 rows" in done.stdout


def test_inspecting_what_fails_ends_without_a_traceback(tmp_path: Path) -> None:
    """One sentence, though other files are still being looked at."""
    for number in range(20):
        _write(tmp_path / f"part{number:02}.h5")
    (tmp_path / "part07.h5").write_bytes(b"no HDF5 at all")
    done = _inspect(tmp_path / "part07.h5")
    assert done.returncode == 1 and "part07.h5" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_files_that_lead_to_others_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may take its time; all together may not: the file is unreadable, and not `preparing` for ever."""
    for number in range(3):
        _write(tmp_path / "data" / "parts" / f"{number}.h5")
    with h5py.File(tmp_path / "data" / "linked.h5", "w") as file:
        for number in range(3):
            file[f"x{number}"] = h5py.ExternalLink(f"parts/{number}.h5", "x")
    monkeypatch.setattr("h5feed_server.catalog.loading.PATIENCE", 0)
    settings = Settings.model_validate({"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"})
    services = Services.start(settings)
    try:
        with pytest.raises(Unreadable, match="H5FEED_INSPECT_TIMEOUT"):
            services.catalog.dataset_within(60, "linked")
        assert services.catalog.dataset_within(60, "parts").rows == 30
    finally:
        services.close(wait=True)


def test_what_cannot_be_read_is_inspected_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many names lead to it: each time costs what an inspection may take."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.h5").write_bytes(b"no HDF5 at all")
    with h5py.File(tmp_path / "data" / "linked.h5", "w") as file:
        file["x"] = np.arange(10)
        for number in range(50):
            file[f"x{number}"] = h5py.ExternalLink("bad.h5", f"x{number}")
    asked: list[str] = []
    real = FileLoader.layout

    def layout(self: FileLoader, path: str, *rest: Any) -> object:
        asked.append(path)
        return real(self, path, *rest)

    monkeypatch.setattr(FileLoader, "layout", layout)
    settings = Settings.model_validate({"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"})
    services = Services.start(settings)
    try:
        assert services.catalog.dataset_within(60, "linked").rows == 10
        # Once as a file of the folder, and once by the links, for each time that the young file is looked at.
        assert sum(path.endswith("bad.h5") for path in asked) <= 4
    finally:
        services.close(wait=True)


def test_a_reason_without_words_of_the_system(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log never says that the cache folder cannot be used for no reason."""
    folder = CacheFolder(tmp_path, 1, 1 << 20)
    folder._warn(TimeoutError("it took too long"))
    folder.close()
    assert "(it took too long)" in caplog.text and "None" not in caplog.text


def test_the_watch_goes_on_when_a_disk_is_mounted_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder under the same name is watched as the one before was; one that is not there is waited for."""
    monkeypatch.setattr("h5feed_server.catalog.watching.SETTLED_SECONDS", 0.0)
    monkeypatch.setattr("h5feed_server.catalog.watching._LOOK_SECONDS", 0.05)
    root = tmp_path / "data"
    root.mkdir()
    looked, stop = threading.Semaphore(0), threading.Event()
    arguments = (root, lambda _: True, lambda: False, looked.release, stop)
    watch = threading.Thread(target=notice, args=arguments, daemon=True)
    watch.start()
    try:
        for _ in range(2):
            root.rename(tmp_path / "old")
            # It is looked for while it is not there.
            assert looked.acquire(timeout=60)
            root.mkdir()
            (tmp_path / "old").rmdir()
            (root / "new.h5").write_bytes(b"x")
            assert looked.acquire(timeout=60)
            (root / "new.h5").unlink()
    finally:
        stop.set()
        watch.join(60)
    assert not watch.is_alive()
