"""Loops that follow a dataset with joined ones: these stay at the revision that they had, and a line says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.errors import BadParameter, RevisionChanged, Transient

from tests.support.hdf5_writer import Hdf5Writer, values
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

HEIGHT = 10
"""Rows of a chunk."""


class Logs:
    """The growing datasets ``log`` and ``more``, and ``notes``, which does not grow."""

    def __init__(self, folder: Path, feed: h5feed.Feed) -> None:
        self.folder, self.feed = folder, feed
        names = ("log", "more")
        self.writers = {name: Hdf5Writer(folder / f"{name}.h5", height=HEIGHT, height_of_y=HEIGHT) for name in names}

    def grow(self, name: str, rows: int) -> None:
        """Add rows, and wait until there are `rows`."""

        def has_grown() -> bool:
            try:
                return len(self.feed[name]) == rows
            except Transient:
                return False

        have = len(self.feed[name]) if rows > HEIGHT else 0
        self.writers[name](f"append {rows - have}", "flush")
        wait_until(has_grown)


@pytest.fixture
def logs(tmp_path: Path, serve: Callable[..., ServerProcess]) -> Iterator[Logs]:
    folder = tmp_path / "logs"
    folder.mkdir()
    growing = [f'[datasets.{name}]\nfiles = ["{name}.h5"]\ngrowing = true\n' for name in ("log", "more")]
    (folder / "h5feed.toml").write_text("".join(growing))
    write_notes(folder, np.arange(5.0))
    with h5feed.connect(serve(folder).url, deadline=60) as feed:
        made = Logs(folder, feed)
        try:
            made.grow("log", HEIGHT)
            made.grow("more", HEIGHT)
            yield made
        finally:
            for writer in made.writers.values():
                writer.kill()


def write_notes(folder: Path, weights: Any) -> None:
    with h5py.File(folder / "new", "w") as file:
        file["weight"], file["id"] = weights, np.arange(len(weights))
    (folder / "new").replace(folder / "notes.h5")


def loop_over(kind: str, dataset: h5feed.Dataset, **options: Any) -> Any:
    if kind == "torch":
        pytest.importorskip("torch")
    if kind == "sequence":
        pytest.importorskip("keras")
        options["verbose"] = False
    return getattr(dataset, kind)(batch_size=4, follow=True, **options)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "joined to" in record.getMessage()]


@pytest.mark.parametrize("kind", ["loader", "torch"])
def test_the_other_dataset_stays_and_a_line_says_so(logs: Logs, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    caplog.set_level(logging.WARNING, "h5feed")
    more = logs.feed["more"]
    train = loop_over(kind, logs.feed["log"], join="more", x="more/x", y=[])

    def read() -> np.ndarray[Any, Any]:
        return np.concatenate([np.asarray(x) for x, *_ in train])

    for _ in range(2):
        np.testing.assert_array_equal(read(), values(0, HEIGHT))
    assert not lines(caplog)
    logs.grow("more", 2 * HEIGHT)
    now = logs.feed["more"].revision
    for _ in range(2):
        np.testing.assert_array_equal(read(), values(0, HEIGHT))
    (line,) = lines(caplog)
    assert "'more', which is joined to 'log'" in line and now in line and more.revision in line
    assert train.plan.params["join"] == (f"more@{more.revision}",)
    # Joined by number, both have equally many rows.
    logs.grow("log", 2 * HEIGHT)
    with pytest.raises(BadParameter, match=f"'more' has {HEIGHT} rows, but 'log' has {2 * HEIGHT}"):
        read()
    train = loop_over(kind, logs.feed["log"], join="more", x="more/x", y=[])
    np.testing.assert_array_equal(read(), values(0, 2 * HEIGHT))


def test_new_rows_have_partners_in_what_stays(logs: Logs) -> None:
    """Also in Keras, and a dataset that does not grow ends the loop when it changes, as without follow."""
    train = loop_over("sequence", logs.feed["log"], join="notes:y=id", x="notes/weight", y=[])

    def read() -> list[float]:
        return [float(weight) for (x,) in train for weight in x]

    assert read() == [float(row % 5) for row in range(HEIGHT)]
    logs.grow("log", 3 * HEIGHT)
    train._begin_pass()
    assert read() == [float(row % 5) for row in range(3 * HEIGHT)]
    revision = logs.feed["notes"].revision
    write_notes(logs.folder, np.arange(5.0) + 9)

    def has_changed() -> bool:
        try:
            return logs.feed["notes"].settle() != revision
        except Transient:
            return False

    wait_until(has_changed)
    loader = logs.feed["log"].loader(join="notes:y=id", x="notes/weight", y=[], follow=True)
    assert float(next(iter(loader))[0][0]) == 9.0
    with pytest.raises(RevisionChanged):
        logs.feed["log"].batch(0, join=f"notes@{revision}:y=id", fields=["notes/weight"])
