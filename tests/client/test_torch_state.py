"""Passes of torch loops that are left, and taken up again, with any number of workers."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import h5feed
import pytest
from h5feed.errors import BadParameter, FeedError

from tests.support.data_folder import ROWS

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

ORDER: dict[str, Any] = {"batch_size": 48, "shuffle": True, "seed": 2}
WORKERS = [0, 2, 3]


def batches_of(feed: h5feed.Feed, **options: Any) -> Any:
    """The field `lzf` holds the row ids."""
    return feed["mixed"].torch(**{**ORDER, "x": "images", "y": "lzf", **options})


def rows_of(feed: h5feed.Feed, epoch: int, **options: Any) -> list[list[int]]:
    batches = feed["mixed"].batches(**{**ORDER, "fields": [], "epoch": epoch, **options})
    return [batch.rows.tolist() for batch in batches]


def delivered(batches: Any) -> list[list[int]]:
    return [y.tolist() for _, y, *_ in batches]


def head_of(batches: Any, count: int) -> list[list[int]]:
    """The first batches of a pass, which is then left."""
    iterator = iter(batches)
    return [next(iterator)[1].tolist() for _ in range(count)]


@pytest.mark.parametrize("after", WORKERS)
@pytest.mark.parametrize("before", WORKERS)
@pytest.mark.parametrize("options", [{}, {"shard": 1, "shards": 3, "last": "pad", "batch_size": 16}], ids=str)
def test_a_pass_is_taken_up(feed: h5feed.Feed, before: int, after: int, options: dict[str, Any]) -> None:
    """With other workers than before, each batch comes once; the pass that follows is whole."""
    batches, expected = batches_of(feed, **options), rows_of(feed, 0, **options)
    untouched = batches_of(feed, **options)
    untouched.load_state_dict(batches.state_dict())
    assert delivered(DataLoader(untouched, batch_size=None, num_workers=after)) == expected
    for count in (1, 4, len(expected)):
        batches.set_epoch(0)
        head = head_of(DataLoader(batches, batch_size=None, num_workers=before), count)
        state = json.loads(json.dumps(batches.state_after(count)))
        resumed = batches_of(feed, **options)
        resumed.load_state_dict(state)
        loader = DataLoader(resumed, batch_size=None, num_workers=after)
        rest = delivered(loader) if count < len(expected) else []
        assert head + rest == expected
        assert resumed.epoch == 1
        assert delivered(loader) == rows_of(feed, 1, **options)


@pytest.mark.parametrize("kind", [copy.copy, lambda batches: pickle.loads(pickle.dumps(batches))])
def test_a_copy_goes_on(feed: h5feed.Feed, kind: Any) -> None:
    """As from the state of the original, which goes on too."""
    batches, expected = batches_of(feed), rows_of(feed, 0)
    iterator = iter(batches)
    head = [next(iterator)[1].tolist() for _ in range(3)]
    assert batches.state_dict()["delivered"] == 3
    other = kind(batches)
    assert head + delivered(other) == head + delivered(iterator) == expected
    assert batches.epoch == other.epoch == 1


def test_states_of_other_loops(feed: h5feed.Feed) -> None:
    """The state of a loader is one of torch, and the other way round."""
    loader = feed["mixed"].loader(**ORDER, x="images", y="lzf")
    passing = iter(loader)
    for _ in range(5):
        next(passing)
    batches = batches_of(feed)
    batches.load_state_dict(loader.state_dict())
    assert delivered(batches) == rows_of(feed, 0)[5:]
    head_of(batches, 2)
    loader.load_state_dict(batches.state_dict())
    assert [y.tolist() for _, y in loader] == rows_of(feed, 1)[2:]


def test_what_is_refused(feed: h5feed.Feed) -> None:
    """Where it is not known, and where it is another's."""
    batches = batches_of(feed)
    head_of(DataLoader(batches, batch_size=None, num_workers=2), 1)
    with pytest.raises(FeedError, match=r"state_after\(batches\)"):
        batches.state_dict()
    with pytest.raises(BadParameter, match="batches=99 must be from 0 to"):
        batches.state_after(99)
    with pytest.raises(BadParameter, match="seed"):
        batches_of(feed, seed=3).load_state_dict(batches.state_after(1))
    with pytest.raises(BadParameter, match="worker 1 of 2, but this process is not a worker"):
        batches.load_state_dict({**batches.state_after(1), "worker": 1, "workers": 2, "first": 0})


def test_closed_and_described(feed: h5feed.Feed) -> None:
    """It ends by itself or by hand, and says where it is."""
    with batches_of(feed) as batches:
        assert repr(batches).startswith("<TorchBatches of 'all' of 'mixed'") and "batch 0 of pass 0" in repr(batches)
        iterator = iter(batches)
        next(iterator)
        assert "batch 1 of pass 0" in repr(batches)
        assert batches.samples == ROWS and batches.batch_size == 48
    assert len(delivered(batches)) == len(batches)


@pytest.mark.parametrize("workers", WORKERS)
def test_stateful_data_loader(feed: h5feed.Feed, workers: int) -> None:
    """torchdata asks each worker where it is, and tells it again."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    expected = rows_of(feed, 0)
    for count in (1, 4, len(expected)):
        loader = stateful(batches_of(feed), batch_size=None, num_workers=workers)
        iterator = iter(loader)
        head = [next(iterator)[1].tolist() for _ in range(count)]
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        resumed = stateful(batches_of(feed), batch_size=None, num_workers=workers)
        resumed.load_state_dict(state)
        rest = delivered(resumed)
        if count < len(expected):
            assert head + rest == expected
            rest = delivered(resumed)
        assert rest in ([], rows_of(feed, 1))
