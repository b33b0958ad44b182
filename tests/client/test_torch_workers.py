"""What DataLoader workers read, and what they tell of it."""

from __future__ import annotations

import pickle
import re
from typing import Any

import h5feed
import httpx
import pytest

from tests.support.data_folder import ROWS
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

ORDER: dict[str, Any] = {"batch_size": 50, "shuffle": True, "x": "images", "y": "lzf", "decode": "server"}


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_statistics_of_workers(feed: h5feed.Feed, context: str) -> None:
    """Steps and rows of all workers; times that add up; over several passes, and none of them before the first."""
    batches = feed["mixed"].torch(**ORDER)
    assert batches.stats().steps == 0
    loader = DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context=context)
    for number in (1, 2):
        assert sum(len(y) for _, y in loader) == ROWS
        stats = batches.stats()
        assert (stats.passes, stats.steps, stats.rows) == (number, 20 * number, ROWS * number)
        assert stats.bytes >= ROWS * number * 12 * 10 * 3
        assert stats.waits.sum() == stats.steps and stats.longest > 0
        assert 0 <= stats.waited <= stats.seconds and "rows" in repr(stats)
    own = sum(1 for _ in batches)
    assert batches.stats().steps == own + 40
    assert pickle.loads(pickle.dumps(batches)).stats().steps == 0


def sent_rows(server: ServerProcess) -> float:
    """Rows that the server has sent so far."""
    text = httpx.get(f"{server.url}/metrics").text
    return sum(float(value) for value in re.findall(r"^h5feed_batch_rows_total(?:{[^}]*})? (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_skipped_is_not_read(server: ServerProcess, feed: h5feed.Feed, workers: int) -> None:
    """A `StatefulDataLoader` that takes up a pass at its last batches makes the server send few rows."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    options = {"batch_size": None, "num_workers": workers}
    batches = feed["mixed"].torch(**ORDER, readahead=1, connections=1)
    at_first = sent_rows(server)
    passing = iter(loader := stateful(batches, **options))
    for _ in range(18):
        next(passing)
    state = loader.state_dict()
    del passing, loader
    # Workers of a server report what they have sent after it has arrived.
    wait_until(lambda: sent_rows(server) >= at_first + 900)
    before = sent_rows(server)
    rest = feed["mixed"].torch(**ORDER, readahead=1, connections=1)
    resumed = stateful(rest, **options)
    resumed.load_state_dict(state)
    assert sum(len(y) for _, y in resumed) == rest.stats().rows == 100
    wait_until(lambda: sent_rows(server) >= before + 100)
    assert sent_rows(server) < before + 400
