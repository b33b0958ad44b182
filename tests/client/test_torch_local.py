"""torch's DataLoader over a Unix socket, of a server and of a server of one's own: forked and spawned workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import h5feed
import h5py
import numpy as np
import pytest

from tests.support.server_process import ServerProcess
from tests.support.short_folder import short_folder
from tests.support.waiting import wait_until

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402

ROWS = 200


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with short_folder() as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        monkeypatch.setenv("H5FEED_LOCAL", "1")
        yield path


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("what", ["url", "path"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*os.fork:RuntimeWarning")
def test_workers(serve: Callable[..., ServerProcess], runtime: Path, tmp_path: Path, method: str, what: str) -> None:
    """Each row once, twice over."""
    data = tmp_path / "data"
    data.mkdir()
    with h5py.File(data / "things.h5", "w") as file:
        file["x"], file["label"] = np.arange(4.0 * ROWS).reshape(ROWS, 4), np.arange(ROWS) % 3
    where = data if what == "path" else serve(data, "--workers", "2").url
    with h5feed.connect(where, deadline=60) as feed:
        things = feed["things"]
        batches = things.torch("all", batch_size=16, shuffle=True)
        loader = DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context=method)
        for _ in range(2):
            assert sorted(int(value) for x, _ in loader for value in x[:, 0]) == list(range(0, 4 * ROWS, 4))
        wait_until(lambda: things.batch(0) is not None and things.via.startswith("Unix socket "))
        del loader, batches
