"""What a client sees of a folder, when the server has looked at all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import h5feed

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until


@contextlib.contextmanager
def inspected(folder: Path, cache: Path) -> Iterator[h5feed.Feed]:
    """A server over `folder`, when no dataset is being inspected any more."""
    process = ServerProcess(folder, cache)
    with h5feed.connect(process.url, deadline=120) as connected:
        wait_until(lambda: all(entry["status"] != "preparing" for entry in connected.datasets()), 120)
        yield connected
    assert process.stop() == 0


def stored_splits(dataset: h5feed.Dataset) -> dict[str, int]:
    """Rows of each split that its files hold."""
    return {split["name"]: split["rows"] for split in dataset.info["native_splits"]}


def readable_fields(dataset: h5feed.Dataset) -> set[str]:
    return {field.name for field in dataset.fields.values() if field.readable}
