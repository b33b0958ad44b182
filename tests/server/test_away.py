"""A data folder whose disk is away: 503 until it is back, and nobody's training ends."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import DatasetNotFound
from h5feed_server.catalog.discovery import walk
from h5feed_server.catalog.presence import AWAY_SECONDS, Presence

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

ROWS = 200


def _write(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["x"] = np.full((ROWS, 50), value) + np.arange(ROWS)[:, None]


class _Training(threading.Thread):
    """Reads epoch after epoch of a dataset, as a training does: every row is checked."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(daemon=True)
        self.url, self.dataset_name = url, name
        self.epochs = 0
        self.failure: Exception | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            with h5feed.connect(self.url, deadline=60) as feed:
                dataset = feed[self.dataset_name]
                while not self.ended.is_set():
                    for batch in dataset.batches(batch_size=8, shuffle=True, epoch=self.epochs):
                        assert (batch["x"][:, 0] == batch.rows).all()
                    self.epochs += 1
        except Exception as error:
            self.failure = error


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path, _Training]]:
    """One server of two workers, and a training that goes on through all that happens to its folder."""
    folder = tmp_path_factory.mktemp("served") / "data"
    _write(folder / "a.h5")
    _write(folder / "nas" / "b.h5")
    cache = tmp_path_factory.mktemp("cache")
    server = ServerProcess(folder, cache, "--workers", "2", H5FEED_CACHE_BYTES="0", H5FEED_OPEN_FILES="1")
    training = _Training(server.url, "a")
    training.start()
    wait_until(lambda: training.epochs > 0 or training.failure is not None)
    yield server, folder, training
    training.ended.set()
    training.join(60)
    assert server.stop() == 0
    assert training.failure is None


def _away(server: ServerProcess, name: str) -> None:
    """Every worker says that it is not there now, and will be."""
    for _ in range(8):
        answer = httpx.get(f"{server.url}/v1/datasets/{name}", timeout=60)
        assert (answer.status_code, answer.json()["code"]) == (503, "source_unavailable"), answer.text
        assert int(answer.headers["retry-after"]) > 0
        assert str(server.folder) not in answer.text
        ready = httpx.get(f"{server.url}/readyz", timeout=60)
        assert (ready.status_code, ready.json()["code"]) == (503, "source_unavailable"), ready.text


def _back(server: ServerProcess, training: _Training) -> None:
    epochs = training.epochs
    wait_until(lambda: training.epochs > epochs + 2 or training.failure is not None)
    assert training.failure is None
    # Each of the workers.
    wait_until(lambda: all(httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200 for _ in range(8)))


@pytest.mark.parametrize("how", ["gone", "unmounted", "emptied"])
def test_a_folder_that_is_away_ends_no_training(served: tuple[ServerProcess, Path, _Training], how: str) -> None:
    """Whether it is gone, another and empty one, or the same without its files: 503 for what was there and for what
    may be, and not ready; training goes on when it is back."""
    server, folder, training = served
    away = folder.with_name("away")
    if how == "emptied":
        away.mkdir()
        for item in list(folder.iterdir()):
            item.rename(away / item.name)
    else:
        folder.rename(away)
        if how == "unmounted":
            folder.mkdir()
    for name in ("a", "nas.b", "unheard"):
        _away(server, name)
    catalogue = httpx.get(f"{server.url}/v1/datasets", timeout=60)
    assert (catalogue.status_code, catalogue.json()["code"]) == (503, "source_unavailable")
    if how == "emptied":
        for item in list(away.iterdir()):
            item.rename(folder / item.name)
    else:
        if how == "unmounted":
            folder.rmdir()
        away.rename(folder)
    _back(server, training)
    # What is known not to be there is not there.
    assert httpx.get(f"{server.url}/v1/datasets/unheard", timeout=60).json()["code"] == "dataset_not_found"


def test_a_folder_within_that_is_away(served: tuple[ServerProcess, Path, _Training]) -> None:
    """A disk that is mounted below: what lies on it answers 503, all else is served; it comes back as it was."""
    server, folder, training = served
    with h5feed.connect(server.url, deadline=60) as feed:
        revision = feed["nas.b"].revision
        (folder / "nas").rename(folder.with_name("nas"))
        (folder / "nas").mkdir()
        _away(server, "nas.b")
        assert feed["a"].take([3])["x"][0, 0] == 3
        entries = {entry["name"]: entry["status"] for entry in feed.datasets()}
        assert entries == {"a": "ok", "nas.b": "unavailable"}
        (folder / "nas").rmdir()
        folder.with_name("nas").rename(folder / "nas")
        _back(server, training)
        assert feed["nas.b"].revision == revision


def test_a_copy_in_another_folder_is_as_good(served: tuple[ServerProcess, Path, _Training]) -> None:
    """A disk that was mounted anew has other numbers: the same files in another folder have the same revisions."""
    server, folder, training = served
    shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copy2)
    folder.rename(folder.with_name("old"))
    folder.with_name("copy").rename(folder)
    _back(server, training)


def test_what_is_deleted_is_not_there(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """404 as soon as a file is deleted, or a folder with all that is in it; and the server is ready again at once."""
    folder = tmp_path / "served"
    _write(folder / "a.h5")
    _write(folder / "nas" / "b.h5")
    server = serve(folder, "--workers", "2")
    with h5feed.connect(server.url, deadline=60) as feed:
        assert feed["nas.b"].rows == ROWS
        shutil.rmtree(folder / "nas")
        with pytest.raises(DatasetNotFound):
            feed["nas.b"]
    # A worker that looks between the removal of the file and that of its folder sees a folder that was emptied.
    wait_until(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200)


def test_another_folder_is_taken_for_good_after_a_while(tmp_path: Path) -> None:
    """A disk that was exchanged for one with other files: those before are awaited as long as clients try."""
    for name in ("a", "b"):
        _write(tmp_path / "data" / f"{name}.h5")
    presence = Presence()
    root = str(tmp_path / "data")
    assert presence.awaited(walk(root), 0.0) == {}
    os.rename(root, tmp_path / "old")
    _write(tmp_path / "data" / "b.h5")
    _write(tmp_path / "data" / "c.h5")
    assert list(presence.awaited(walk(root), 10.0)) == ["a.h5"] and presence.trouble is not None
    assert list(presence.awaited(walk(root), 9.0 + AWAY_SECONDS)) == ["a.h5"]
    assert presence.awaited(walk(root), 10.0 + AWAY_SECONDS) == {} and presence.trouble is None
    # From then on it is the folder.
    (tmp_path / "data" / "b.h5").unlink()
    assert presence.awaited(walk(root), 11.0 + AWAY_SECONDS) == {}


def test_a_folder_that_is_away_from_the_start(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Nothing is known of it: 503 for whatever is asked for, and no listing that looks complete."""
    folder = tmp_path / "data"
    _write(folder / "a.h5")
    server = serve(folder)
    folder.rename(tmp_path / "away")
    _away(server, "a")
    (tmp_path / "away").rename(folder)
    wait_until(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200)
    with h5feed.connect(server.url, deadline=60) as feed:
        assert feed["a"].rows == ROWS


def test_an_error_of_the_disk_is_told_from_one_of_the_file() -> None:
    """By the number that the system gives, in libhdf5's words too."""
    from h5feed.stored.local_file import is_away
    from h5feed_server.storage.hdf5.text import says_away

    assert is_away(OSError(5, "Input/output error")) and not is_away(OSError(13, "Permission denied"))
    assert says_away("file read failed: time = x, errno = 116, error message = 'Stale file handle'")
    assert not says_away("bad object header version number")
