"""torch and its DataLoader over a file that grows: each pass has the rows that there are when it begins."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.growing_log import GrowingLog, growing_log
from tests.support.hdf5_writer import values
from tests.support.server_process import ServerProcess

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402

ORDER: dict[str, Any] = {"batch_size": 8, "shuffle": True, "seed": 5, "x": "x", "y": "y", "follow": True}


@pytest.fixture
def log(tmp_path: Path, serve: Callable[..., ServerProcess]) -> Iterator[GrowingLog]:
    with growing_log(tmp_path / "log", serve) as made:
        yield made


def rows_of(batches: Any) -> list[int]:
    """The rows that were delivered, in order."""
    return [(int(value) - 1) // 42 for x, _ in batches for value in x[:, 0]]


def rows_in(dataset: Any, epoch: int) -> list[int]:
    """The rows of an epoch of a dataset as it was, in order."""
    read = dataset.batches(batch_size=8, shuffle=True, seed=5, epoch=epoch, fields=[])
    return [row for batch in read for row in batch.rows.tolist()]


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("persistent", [False, True], ids=["new", "persistent"])
def test_workers_agree_on_the_rows(log: GrowingLog, persistent: bool, context: str) -> None:
    """Two workers deliver every row of each pass once, in the order of the pass, also while rows are added."""
    now = log.grow(50)
    batches = now.torch(**ORDER)
    options: dict[str, Any] = {"num_workers": 2, "persistent_workers": persistent, "multiprocessing_context": context}
    loader = DataLoader(batches, batch_size=None, timeout=120, **options)
    for epoch, growth in enumerate((0, 30, 0, 60)):
        now = log.grow(growth) if growth else now
        passed = iter(loader)
        first = next(passed)
        # The pass has begun: these are rows of the next one.
        later = log.grow(20) if epoch == 1 else now
        assert rows_of(itertools.chain([first], passed)) == rows_in(now, epoch)
        assert (len(batches), batches.samples) == (-(-len(now) // 8), len(now))
        state = batches.state_after(3)
        assert (state["revision"], state["epoch"], state["delivered"]) == (now.revision, epoch, 3)
        now = later


def test_workers_that_start_at_different_times(log: GrowingLog) -> None:
    """A worker that begins a pass late has the rows that the first one has found."""
    before = log.grow(40)
    batches = before.torch(**ORDER)
    passes, late = batches._passes, before.torch(**ORDER)
    late._passes = passes
    called = (0, 0, 1)
    early = batches._batches(called, 0, 2)
    first = next(early)
    log.grow(40)
    found = [first, *early, *late._batches(called, 1, 2)]
    assert sorted(rows_of(found)) == list(range(40))
    following = [*late._batches((0, 0, 2), 1, 2), *batches._batches((0, 0, 2), 0, 2)]
    assert sorted(rows_of(following)) == list(range(80))


@pytest.mark.parametrize("workers", [0, 2])
def test_states_of_passes_that_grow(log: GrowingLog, workers: int) -> None:
    """The rest of a pass is resumed with the rows that the pass had, by any number of workers."""
    first = log.grow(60)
    batches = first.torch(**ORDER)
    loader = DataLoader(batches, batch_size=None, num_workers=2, timeout=120)
    begun = rows_of(itertools.islice(loader, 3))
    state = batches.state_after(3)
    second = log.grow(40)
    resumed = second.torch(**ORDER)
    resumed.load_state_dict(state)
    rest = DataLoader(resumed, batch_size=None, num_workers=workers, timeout=120 if workers else 0)
    assert begun + rows_of(rest) == rows_in(first, 0)
    assert rows_of(rest) == rows_in(second, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader(log: GrowingLog, workers: int) -> None:
    """torchdata's StatefulDataLoader resumes a pass with its rows, and goes on with those of now."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    first = log.grow(60)
    options: dict[str, Any] = {"batch_size": None, "num_workers": workers}
    loader = stateful(first.torch(**ORDER), **options)
    second = log.grow(20)
    passed = iter(loader)
    begun = rows_of(itertools.islice(passed, 3))
    state = loader.state_dict()
    third = log.grow(40)
    resumed = stateful(first.torch(**ORDER), **options)
    resumed.load_state_dict(state)
    assert begun + rows_of(resumed) == rows_in(second, 0)
    assert rows_of(resumed) == rows_in(third, 1)


def test_without_workers(log: GrowingLog) -> None:
    """A loop of its own: each pass has all rows there are, and `first` batches of a resumed pass have theirs."""
    batches = log.grow(30).torch(**ORDER)
    assert sorted(rows_of(batches)) == list(range(30))
    log.grow(10)
    found = np.concatenate([x.numpy() for x, _ in batches])
    np.testing.assert_array_equal(np.sort(found[:, 0]), values(0, 40)[:, 0])
