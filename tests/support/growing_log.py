"""A server of a file that grows, for tests of loops that follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5feed
from h5feed.errors import Transient

from tests.support.hdf5_writer import Hdf5Writer
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

HEIGHT = 10
"""Rows of a chunk of both fields."""


class GrowingLog:
    """The dataset ``log`` of fields `x` and `y`, see `Hdf5Writer`, which a SWMR writer adds rows to."""

    def __init__(self, feed: h5feed.Feed, writer: Hdf5Writer) -> None:
        self._feed, self._writer, self._rows = feed, writer, 0

    def grow(self, rows: int) -> h5feed.Dataset:
        """Add rows, full chunks of them; returns the dataset when the server has them."""
        assert rows % HEIGHT == 0
        self._writer(f"append {rows}", "flush")
        self._rows += rows
        wait_until(self._has_grown)
        return self._feed["log"]

    def at_now(self) -> h5feed.Dataset:
        """The dataset as it is now."""
        return self._feed["log"]

    def at(self, revision: str) -> h5feed.Dataset:
        """The dataset as it was then."""
        return self._feed.dataset("log", revision)

    def _has_grown(self) -> bool:
        try:
            return len(self._feed["log"]) == self._rows
        except Transient:
            return False


@contextmanager
def growing_log(folder: Path, serve: Callable[..., ServerProcess]) -> Iterator[GrowingLog]:
    """A writer and a server of `folder`, which end with the context."""
    folder.mkdir()
    (folder / "h5feed.toml").write_text('[datasets.log]\nfiles = ["log.h5"]\ngrowing = true\n')
    writer = Hdf5Writer(folder / "log.h5", height=HEIGHT, height_of_y=HEIGHT)
    try:
        with h5feed.connect(serve(folder).url, deadline=60) as feed:
            yield GrowingLog(feed, writer)
    finally:
        writer.kill()
