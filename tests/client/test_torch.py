"""Batches for torch: whole and in order under any DataLoader, and single rows."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import h5feed
import numpy as np
import pytest
from h5feed.errors import BadParameter
from h5feed.options import SplitOptions

from tests.support.data_folder import ROWS
from tests.support.ranks import two_passes

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

ORDER: dict[str, Any] = {"batch_size": 48, "shuffle": True, "seed": 2}


def batches_of(feed: h5feed.Feed, **options: Any) -> Any:
    """The field `lzf` holds the row ids."""
    return feed["mixed"].torch(**{**ORDER, "x": "images", "y": "lzf", **options})


def rows_of(feed: h5feed.Feed, epoch: int, **options: Any) -> list[int]:
    batches = feed["mixed"].batches(**{**ORDER, "fields": [], "epoch": epoch, **options})
    return [row for batch in batches for row in batch.rows.tolist()]


def delivered(batches: Any) -> list[int]:
    return [row for _, y, *_ in batches for row in y.tolist()]


WORKERS: list[dict[str, Any]] = [
    {"num_workers": 0},
    {"num_workers": 1},
    {"num_workers": 2},
    {"num_workers": 3, "persistent_workers": True},
    {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "spawn"},
]


@pytest.mark.parametrize("workers", WORKERS, ids=lambda workers: "-".join(map(str, workers.values())))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"last": "drop"},
        {"last": "pad"},
        {"shard": 1, "shards": 3, "last": "drop"},
        {"shuffle": False, "limit": 100},
    ],
    ids=str,
)
def test_workers_restore_the_order(feed: h5feed.Feed, workers: dict[str, Any], options: dict[str, Any]) -> None:
    """With any number of workers each pass is the order of its epoch, exactly; `set_epoch` is heard by all of them."""
    batches = batches_of(feed, **options)
    loader = DataLoader(batches, batch_size=None, **workers)
    for epoch in range(2):
        assert batches.epoch == epoch
        assert delivered(loader) == rows_of(feed, epoch, **options)
    batches.set_epoch(7)
    assert delivered(loader) == rows_of(feed, 7, **options)
    assert delivered(loader) == rows_of(feed, 8, **options)
    assert len(loader) == len(batches)


def test_more_workers_than_batches(feed: h5feed.Feed) -> None:
    batches = batches_of(feed, limit=100)
    assert delivered(DataLoader(batches, batch_size=None, num_workers=4)) == rows_of(feed, 0, limit=100)


def noise(x: Any, y: Any, rng: np.random.Generator) -> Any:
    return x + rng.normal(size=x.shape), y


@pytest.mark.parametrize("workers", WORKERS[2:], ids=lambda workers: "-".join(map(str, workers.values())))
def test_equal_seeds_are_no_equal_passes(feed: h5feed.Feed, workers: dict[str, Any]) -> None:
    """Whatever torch's generators are seeded with before each epoch, each pass is the next, `set_epoch` is heard, and
    what augments differs."""
    batches = batches_of(feed, transform=noise)
    generator = torch.Generator()
    loader = DataLoader(batches, batch_size=None, generator=generator, **workers)
    drawn = []
    for epoch in (0, 1, 7):
        if epoch == 7:
            batches.set_epoch(7)
        generator.manual_seed(0)
        torch.manual_seed(0)
        passed = list(loader)
        assert delivered(passed) == rows_of(feed, epoch)
        drawn.append(float(passed[0][0].sum()))
    assert len(set(drawn)) == 3


def test_iterators_at_once(feed: h5feed.Feed) -> None:
    """Iterators of equal seeds over one dataset that run side by side, of one DataLoader or of two, have a
    pass each."""
    batches = batches_of(feed)
    loaders = [DataLoader(batches, batch_size=None, num_workers=2) for _ in range(2)]

    def iterator(loader: Any) -> Any:
        torch.manual_seed(0)
        return iter(loader)

    iterators = [iterator(loader) for loader in (*loaders, loaders[0])]
    found = [[], [], []]  # type: list[list[int]]
    for batch in zip(*iterators, strict=True):
        for rows, (_, y) in zip(found, batch, strict=True):
            rows.extend(y.tolist())
    assert sorted(found) == sorted(rows_of(feed, epoch) for epoch in range(3))


def test_a_look_costs_no_pass(feed: h5feed.Feed) -> None:
    """A pass begins with the first batch asked for; one that was begun and left has had its number."""
    batches = batches_of(feed)
    for _ in range(3):
        iter(batches), iter(DataLoader(batches, batch_size=None))
    assert batches.epoch == 0 and len(batches) == len(DataLoader(batches, batch_size=None))
    waiting = iter(batches)
    next(iter(batches))
    assert batches.epoch == 1
    assert delivered(waiting) == rows_of(feed, 1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ranks_count_for_themselves(feed: h5feed.Feed, method: str) -> None:
    """Processes that are no workers, but have workers, begin with the pass that the original was at, each of them."""
    batches = batches_of(feed)
    batches.set_epoch(3)
    context: Any = multiprocessing.get_context(method)
    told = context.Queue()
    ranks = [context.Process(target=two_passes, args=(batches, told)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    assert delivered(DataLoader(batches, batch_size=None, num_workers=2)) == rows_of(feed, 3)
    for _ in ranks:
        assert told.get(timeout=300) == [rows_of(feed, 3), rows_of(feed, 4)]
    for rank in ranks:
        rank.join()
    assert batches.epoch == 4


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"batch_size": 4, "num_workers": 1}], ids=str)
def test_batches_of_batches(feed: h5feed.Feed, options: dict[str, Any]) -> None:
    """A DataLoader that would batch batches is told what to be given; a collate_fn may make of them what it likes."""
    batches = batches_of(feed)
    with pytest.raises(BadParameter, match="pass batch_size=None to the DataLoader"):
        next(iter(DataLoader(batches, **options)))
    joined = DataLoader(
        batches_of(feed), **options, collate_fn=lambda several: [torch.cat(part) for part in zip(*several, strict=True)]
    )
    assert delivered(joined) == rows_of(feed, 0)
    assert type(next(iter(batches))) is tuple


def test_what_a_transform_may_return(feed: h5feed.Feed) -> None:
    """A flip, a read-only array, text and plain values come out of a loop and of workers with the values returned."""

    def transform(x: Any, y: Any) -> Any:
        fixed = y.copy()
        fixed.flags.writeable = False
        return {"image": x[:, :, ::-1], "ids": y}, {"ids": fixed, "names": [f"row {row}" for row in y], "count": len(y)}

    for batches in (
        batches_of(feed, transform=transform, limit=100),
        DataLoader(batches_of(feed, transform=transform, limit=100), batch_size=None, num_workers=2),
    ):
        for x, y in batches:
            rows = x["ids"].numpy()
            images = feed["mixed"].take(rows, fields=["images"])["images"]
            np.testing.assert_array_equal(x["image"], images[:, :, ::-1])
            assert torch.equal(y["ids"], x["ids"])
            assert y["names"] == [f"row {row}" for row in rows] and y["count"] == len(rows)


def test_as_it_is(feed: h5feed.Feed) -> None:
    """Without a DataLoader it is iterated over; tensors stay right while memory is recycled."""
    batches = batches_of(feed)
    held = list(batches)
    delivered(batches)
    assert delivered(held) == rows_of(feed, 0)
    for x, y in held:
        assert isinstance(x, torch.Tensor) and x.dtype == torch.uint8
        np.testing.assert_array_equal(x, feed["mixed"].take(y.numpy(), fields=["images"])["images"])


def test_a_pass_left_early(feed: h5feed.Feed) -> None:
    """Workers of a dropped iterator do not disturb the next pass."""
    batches = batches_of(feed)
    for workers in ({"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}):
        loader = DataLoader(batches, batch_size=None, **workers)
        for _ in range(2):
            iterator = iter(loader)
            next(iterator)
            del iterator
            gc.collect()
        assert delivered(loader) in [rows_of(feed, epoch) for epoch in range(2, 8)]


def test_augmentation_does_not_depend_on_workers(feed: h5feed.Feed) -> None:
    """What `rng` gives a transform is the batch's own, whichever worker makes it."""
    alone = list(batches_of(feed, transform=noise))
    shared = list(DataLoader(batches_of(feed, transform=noise), batch_size=None, num_workers=2))
    for (x, _), (other, _) in zip(alone, shared, strict=True):
        assert torch.equal(x, other)


def test_workers_share_a_cache(feed: h5feed.Feed, tmp_path: Path) -> None:
    """All workers fill one folder and read what the others have stored."""
    batches = batches_of(feed, cache=tmp_path)
    loader = DataLoader(batches, batch_size=None, num_workers=2)
    for epoch in range(3):
        assert delivered(loader) == rows_of(feed, epoch)
    cache = feed["mixed"].cache(tmp_path)
    store = cache.store("images", np.dtype(np.uint8), (12, 10, 3))
    assert store is not None and store.count() == ROWS


def test_trees_and_targets(feed: h5feed.Feed) -> None:
    """Several inputs are a dict or a tuple of tensors, targets what class_mode says."""
    x, y, weight = next(iter(batches_of(feed, x=["images", "half"], y="labels", class_mode="categorical", last="pad")))
    assert set(x) == {"images", "half"} and x["half"].dtype == torch.float16
    assert y.shape == (48, 4) and weight.dtype == torch.float32
    first, second = next(iter(batches_of(feed, x=("images", "half"), y=None, class_mode=None)))[0]
    assert first.shape[0] == second.shape[0] == 48


def test_copies(feed: h5feed.Feed) -> None:
    """A pickled copy counts its passes for itself."""
    batches = batches_of(feed)
    delivered(batches)
    copy = pickle.loads(pickle.dumps(batches))
    assert copy.epoch == 1
    assert delivered(copy) == delivered(batches) == rows_of(feed, 1)


def test_single_rows(feed: h5feed.Feed) -> None:
    """Rows by their place in the split, one by one or a batch at a time, by any sampler."""
    options: SplitOptions = {"val": 0.2, "test": 0.1}
    dataset = feed["mixed"].torch_map("val", x="images", y="lzf", **options)
    assert dataset.row_ids.tolist() == feed["mixed"].split_rows("val", **options).tolist()
    x, y = dataset[3]
    assert y == dataset.row_ids[3] and x.shape == (12, 10, 3)
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_size=32, shuffle=True, num_workers=workers)
        assert sorted(delivered(loader)) == dataset.row_ids.tolist()
    with pytest.raises(IndexError, match="out of range for 200 rows"):
        dataset[200]
    with pytest.raises(BadParameter, match="sampler determines"):
        feed["mixed"].torch_map(shuffle=True)  # type: ignore[call-arg]
    with pytest.raises(BadParameter, match="collate_fn"):
        feed["mixed"].torch_map(transform=lambda x, y: (x, y))


def test_a_model_learns(feed: h5feed.Feed) -> None:
    """A loop as people write it, with workers."""
    batches = batches_of(feed, y="labels", rescale=1 / 255)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(360, 4))
    optimizer = torch.optim.Adam(model.parameters())
    seen = 0
    for _ in range(2):
        for x, y in DataLoader(batches, batch_size=None, num_workers=2):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(y)
    assert seen == 2 * ROWS and torch.isfinite(loss)
