"""Mixed batches take rows of the same batches of their sources, which are fetched once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.batch import Batch
from h5feed.fetching import mixed
from h5feed.fetching.shared import SharedBatches
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

NAMES = [f"of_{letter}" for letter in "abcdefghijkl"]
ROWS, SHAPE = 60, (80, 80, 3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of images, each of the number that is its label."""
    folder = tmp_path_factory.mktemp("data")
    for source, name in enumerate(NAMES):
        labels = source * ROWS + np.arange(ROWS)
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["images"] = np.broadcast_to(labels[:, None, None, None].astype(np.uint16), (ROWS, *SHAPE))
            file["labels"] = labels
    return folder


def _rows_sent(server: ServerProcess) -> float:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return sum(
        sample.value for family in families for sample in family.samples if sample.name == "h5feed_batch_rows_total"
    )


def _check_epoch(mixture: h5feed.Mixture, connections: int) -> None:
    labels = []
    # Blocks of one batch, of which each needs one or two rows of a source.
    for batch in mixture.batches(batch_size=16, shuffle=True, readahead=8 << 20, connections=connections):
        assert (batch["images"] == batch["labels"][:, None, None, None]).all()
        labels += batch["labels"].tolist()
    assert sorted(labels) == list(range(len(NAMES) * ROWS))


@pytest.mark.parametrize("connections", [1, 4])
def test_each_row_is_sent_once(images: Path, serve: Callable[..., ServerProcess], connections: int) -> None:
    server = serve(images)
    with h5feed.connect(server.url, deadline=60, local=False) as feed:
        mixture = feed.mix(NAMES, temperature=1)
        before = _rows_sent(server)
        _check_epoch(mixture, connections)
        wait_until(lambda: _rows_sent(server) - before >= len(NAMES) * ROWS)
        assert _rows_sent(server) - before == len(NAMES) * ROWS


def test_what_is_dropped_is_fetched_again(
    images: Path, serve: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the batches in use are more than may be kept, rows are sent again, but no batch changes."""
    server = serve(images)
    with h5feed.connect(server.url, deadline=60, local=False) as feed:
        mixture = feed.mix(NAMES, temperature=1)
        # After the mixture has chosen the size of batches.
        plan = mixture.plan(batch_size=16, shuffle=True)
        monkeypatch.setattr(mixed, "SHARED_BYTES", 1 << 20)
        before = _rows_sent(server)
        reading = mixture.read_passes(plan, 0, 0, plan.batches, connections=4, readahead=8 << 20)
        labels = [label for batch in reading for label in batch["labels"].tolist()]
        assert sorted(labels) == list(range(len(NAMES) * ROWS))
        wait_until(lambda: _rows_sent(server) - before > len(NAMES) * ROWS)


def batch_of(*rows: int) -> Batch:
    return Batch({}, np.array(rows), None, index=0, epoch=0, revision="")


def test_others_wait_for_who_has_claimed() -> None:
    shared, cancelled = SharedBatches(1000), threading.Event()
    assert shared.claim("a") and not shared.claim("a")
    got: list[Batch | None] = []
    waiting = threading.Thread(target=lambda: got.append(shared.get("a", 1, cancelled)))
    waiting.start()
    batch = batch_of(0, 1, 2)
    shared.deliver("a", batch, 100, 1)
    waiting.join(60)
    assert got == [batch] and shared.get("a", 1, cancelled) is batch
    # All rows were used: nothing is kept.
    assert shared.get("a", 1, cancelled) is None and shared.claim("a")


def test_what_was_given_up_is_claimed_by_others() -> None:
    shared, cancelled = SharedBatches(1000), threading.Event()
    assert shared.claim("a")
    got: list[Batch | None] = []
    waiting = threading.Thread(target=lambda: got.append(shared.get("a", 1, cancelled)))
    waiting.start()
    shared.give_up("a")
    waiting.join(60)
    assert got == [None] and shared.claim("a")
    # Nobody delivers it any more.
    cancelled.set()
    assert shared.get("a", 1, cancelled) is None


def test_the_oldest_are_dropped() -> None:
    shared, cancelled = SharedBatches(250), threading.Event()
    for key in "abc":
        assert shared.claim(key)
        shared.deliver(key, batch_of(0, 1), 100, 1)
    assert shared.claim("a") and not shared.claim("b") and not shared.claim("c")
    # What is larger than the limit is handed to those that wait, but not kept.
    assert shared.claim("d")
    shared.deliver("d", batch_of(0, 1), 1000, 1)
    assert shared.claim("b") and shared.claim("c") and shared.claim("d")
    assert shared.get("b", 1, _set(cancelled)) is None


def _set(event: threading.Event) -> threading.Event:
    event.set()
    return event


def test_a_child_claims_what_its_parent_fetches() -> None:
    shared = SharedBatches(1000)
    assert shared.claim("a")
    pid = os.fork()
    if not pid:
        os._exit(0 if shared.claim("a") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
