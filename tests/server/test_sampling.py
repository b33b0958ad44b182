"""Balanced and weighted epochs: what each promises is measured, and any batch is what it is when asked for alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.errors import BadParameter, SplitNotFound, UnsupportedField
from h5feed.order import BatchGrid
from h5feed_server.batches.order import Order
from h5feed_server.splits.order_spec import OrderSpec
from h5feed_server.splits.resampling import Balanced, Weighted
from hypothesis import given
from hypothesis import strategies as st

from tests.support.server_process import ServerProcess

ROWS = 2000
CLASSES = np.random.default_rng(1).choice(4, ROWS, p=[0.7, 0.2, 0.07, 0.03]).astype(np.uint8)
WEIGHTS = np.where(CLASSES == 3, 5.0, 1.0)
WEIGHTS[:200] = 0.0


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[h5feed.Dataset]:
    """A dataset of four uneven classes with weights, behind two workers."""
    folder = tmp_path_factory.mktemp("imbalanced")
    with h5py.File(folder / "d.h5", "w") as file:
        file["x"] = np.arange(ROWS, dtype="<f4")[:, None].repeat(2, axis=1)
        file["y"], file["weight"], file["kind"] = CLASSES, WEIGHTS, CLASSES > 0
        file["negative"] = np.where(np.arange(ROWS) == 7, -1.0, 1.0)
        file["nothing"], file["vector"] = np.zeros(ROWS), np.ones((ROWS, 3))
        file["many"] = (np.random.default_rng(0).random((ROWS, 3)) < 0.5).astype("u1")
    server = ServerProcess(folder, tmp_path_factory.mktemp("cache"), "--workers", "2")
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["d"]
    assert server.stop() == 0


def balanced(classes: np.ndarray[Any, Any], rows: int, batch_size: int = 32, **options: Any) -> Order:
    source = Balanced.of(None, classes)
    spec = OrderSpec(balance=True, **({"shuffle": True} | options))
    return Order(spec, lambda: None, BatchGrid(rows, batch_size), resampled=lambda: source)


def weighted(weights: np.ndarray[Any, Any], rows: int, batch_size: int = 32, **options: Any) -> Order:
    source = Weighted(None, np.cumsum(weights))
    spec = OrderSpec(weights="w", **({"shuffle": True} | options))
    return Order(spec, lambda: None, BatchGrid(rows, batch_size), resampled=lambda: source)


def plain(rows: int, batch_size: int = 32, **options: Any) -> Order:
    return Order(OrderSpec(**({"shuffle": True} | options)), lambda: None, BatchGrid(rows, batch_size))


def whole(order: Order) -> np.ndarray[Any, Any]:
    return order.rows(0, order.grid.batches)[0]


def chi_square(rows: np.ndarray[Any, Any], classes: np.ndarray[Any, Any], shares: Any, batch_size: int = 32) -> float:
    """Pearson's, of the classes in batches against their shares, per degree of freedom: 1 for independent draws."""
    batches = classes[rows[: len(rows) // batch_size * batch_size]].reshape(-1, batch_size)
    counts = np.stack([(batches == value).sum(axis=1) for value in range(len(shares))], axis=1)
    expected = batch_size * np.asarray(shares)
    return float(((counts - expected) ** 2 / expected).sum() / (len(batches) * (len(shares) - 1)))


def displacement(rows: np.ndarray[Any, Any]) -> float:
    """Mean distance of a row from where it lies, as a share of all rows: 1/3 for a random order."""
    return float(np.abs(rows - np.arange(len(rows))).mean() / len(rows))


@given(
    classes=st.lists(st.integers(0, 5), min_size=1, max_size=60).map(lambda values: np.array(values, np.uint8)),
    rows=st.integers(1, 300),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
def test_each_class_equally_often(classes: np.ndarray[Any, Any], rows: int, seed: int, shuffle: bool) -> None:
    """Of an epoch of any length each class has its share within one, and each row of a class is drawn as often as the
    others within one; any batch is the same when asked for alone."""
    order = balanced(classes, rows, 7, seed=seed, shuffle=shuffle)
    drawn = whole(order)
    present = np.unique(classes)
    per_class = np.bincount(classes[drawn], minlength=6)[present]
    assert len(drawn) == rows and per_class.max() - per_class.min() <= 1
    per_row = np.bincount(drawn, minlength=len(classes))
    for value in present:
        own = per_row[classes == value]
        assert own.max() - own.min() <= 1
    for index in range(order.grid.batches):
        np.testing.assert_array_equal(order.rows(index, index + 1)[0], drawn[7 * index : 7 * index + 7])


@given(
    weights=st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.5]), min_size=1, max_size=60).filter(any).map(np.array),
    rows=st.integers(1, 300),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
def test_each_row_by_its_weight(weights: np.ndarray[Any, Any], rows: int, seed: int, shuffle: bool) -> None:
    """A row comes as often as its weight says, within less than two; one of weight 0 never."""
    order = weighted(weights, rows, 7, seed=seed, shuffle=shuffle)
    drawn = whole(order)
    counts = np.bincount(drawn, minlength=len(weights))
    assert len(drawn) == rows and not counts[weights == 0].any()
    assert (np.abs(counts - rows * weights / weights.sum()) < 2).all()
    for index in range(order.grid.batches):
        np.testing.assert_array_equal(order.rows(index, index + 1)[0], drawn[7 * index : 7 * index + 7])


def test_golden_values() -> None:
    """A change of these values needs a new `ORDER_VERSION`."""
    classes = np.array([0, 1, 0, 0, 2, 0, 1, 0], np.uint8)
    assert whole(balanced(classes, 12, seed=3)).tolist() == [7, 1, 4, 2, 6, 4, 6, 4, 0, 1, 4, 5]
    assert whole(balanced(classes, 12, shuffle=False)).tolist() == [0, 1, 4, 2, 6, 4, 3, 1, 4, 5, 6, 4]
    weights = np.array([1.0, 0.0, 2.0, 0.5, 4.0])
    assert whole(weighted(weights, 12, seed=3)).tolist() == [3, 4, 4, 2, 4, 2, 0, 4, 2, 4, 3, 4]
    assert whole(weighted(weights, 12, shuffle=False)).tolist() == [0, 0, 2, 2, 2, 3, 4, 4, 4, 4, 4, 4]
    billion = weighted(weights, 10**12, 4, seed=3)
    assert billion.rows(10**11, 10**11 + 1)[0].tolist() == [2, 2, 0, 2]


def test_quality_of_each_order() -> None:
    """Classes per batch: as independent draws in a full shuffle, far more even in a balanced epoch, and of their
    weighted shares in a weighted one. Rows go far from where they lie."""
    shares = np.bincount(CLASSES) / ROWS
    by_weight = np.bincount(CLASSES, WEIGHTS) / WEIGHTS.sum()
    epochs = range(8)
    full = np.mean([chi_square(whole(plain(ROWS, epoch=e)), CLASSES, shares) for e in epochs])
    even = np.mean([chi_square(whole(balanced(CLASSES, ROWS, epoch=e)), CLASSES, [0.25] * 4) for e in epochs])
    heavy = np.mean([chi_square(whole(weighted(WEIGHTS, ROWS, epoch=e)), CLASSES, by_weight) for e in epochs])
    # 8 epochs of 62 batches: the mean of chi-square per degree of freedom is off by 0.04 at most in 2 of 3 cases.
    assert 0.85 < full < 1.15 and 0.85 < heavy < 1.15
    # A batch of 32 is eight turns of four classes.
    assert even == 0
    odd = np.mean([chi_square(whole(balanced(CLASSES, ROWS, 31, epoch=e)), CLASSES, [0.25] * 4, 31) for e in epochs])
    # 7 or 8 of each class; 1 would be independent draws.
    assert odd < 0.1
    for order in (plain(ROWS), balanced(np.zeros(ROWS, np.uint8), ROWS), weighted(np.ones(ROWS), ROWS)):
        assert abs(displacement(whole(order)) - 1 / 3) < 0.02
    # Blocks are put in a new order as a whole, rows among few of them: nearly as far.
    window = Order(OrderSpec(shuffle=True, window=256), lambda: None, BatchGrid(ROWS, 32), block=16)
    assert abs(displacement(whole(window)) - 1 / 3) < 0.05


def test_epochs_differ() -> None:
    """Seeds and epochs give unrelated draws; over epochs all rows of a large class come."""
    drawn = {
        (seed, epoch): tuple(whole(balanced(CLASSES, ROWS, seed=seed, epoch=epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(drawn.values())) == 4
    large = set(np.flatnonzero(CLASSES == 0).tolist())
    seen: set[int] = set()
    for epoch in range(20):
        seen |= large & set(whole(balanced(CLASSES, ROWS, epoch=epoch)).tolist())
    # Each epoch draws 500 of 1,400: of 20 that leave none out, one in 6,500 rows would be missed.
    assert len(seen) >= len(large) - 2


def test_balanced_over_http(imbalanced: h5feed.Dataset) -> None:
    """Batches hold each class equally often; an epoch is as long as the split, or as asked; both workers agree."""
    options: dict[str, Any] = {"balance": True, "shuffle": True, "batch_size": 40, "test": 0.2}
    batches = list(imbalanced.batches("train", **options))
    assert sum(len(batch.rows) for batch in batches) == 1600
    train = set(imbalanced.split_rows("train", test=0.2).tolist())
    for batch in batches:
        assert np.bincount(batch["y"], minlength=4).tolist() == [10] * 4
        assert set(batch.rows.tolist()) <= train
        np.testing.assert_array_equal(batch["y"], CLASSES[batch.rows])
    short = imbalanced.plan("train", **options, epoch_rows=100)
    assert (short.rows, short.batches) == (100, 3)
    alone = [imbalanced.batch(3, split="train", **options).rows.tolist() for _ in range(8)]
    assert alone == [batches[3].rows.tolist()] * 8
    by_kind = imbalanced.batch(0, balance=True, shuffle=True, stratify="kind", batch_size=40)
    assert (CLASSES[by_kind.rows] > 0).sum() == 20
    few = imbalanced.batch(0, balance=True, limit=50, batch_size=8)
    assert few.rows.max() < 50


def test_shards_of_a_balanced_epoch(imbalanced: h5feed.Dataset) -> None:
    """Shards take their runs of one and the same draw."""
    options: dict[str, Any] = {"balance": True, "shuffle": True, "last": "drop", "fields": ["y"]}
    one = [batch.rows.tolist() for batch in imbalanced.batches("all", batch_size=40, **options)]
    two = [
        [row for shard in range(2) for row in _rows_of(imbalanced, i, shard=shard, shards=2, batch_size=20, **options)]
        for i in range(len(one))
    ]
    assert one == two


def _rows_of(dataset: h5feed.Dataset, index: int, **options: Any) -> list[int]:
    rows: list[int] = dataset.batch(index, **options).rows.tolist()
    return rows


def test_weighted_over_http(imbalanced: h5feed.Dataset) -> None:
    """Rows of weight 0 never come, others by their weight; epoch_rows makes an epoch longer than the split."""
    rows = np.concatenate(
        [b.rows.copy() for b in imbalanced.batches(weights="weight", shuffle=True, epoch_rows=6000, fields=["y"])]
    )
    counts = np.bincount(rows, minlength=ROWS)
    assert len(rows) == 6000 and (np.abs(counts - 6000 * WEIGHTS / WEIGHTS.sum()) < 2).all()
    part = imbalanced.batch(0, split="val", val=0.3, weights="weight", shuffle=True, batch_size=100).rows
    assert set(part.tolist()) <= set(imbalanced.split_rows("val", val=0.3).tolist())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"balance": True, "weights": "weight"}, BadParameter, "one of them"),
        ({"balance": True, "shuffle": True, "window": 8}, BadParameter, "window cannot be used"),
        ({"epoch_rows": 8}, BadParameter, "needs balance or weights"),
        ({"balance": True, "stratify": "x"}, BadParameter, "balance=true: 'x' holds no classes"),
        ({"balance": True, "stratify": "many"}, BadParameter, "several labels"),
        ({"weights": "negative"}, UnsupportedField, "row 7 has -1.0"),
        ({"weights": "nothing"}, UnsupportedField, "add up to 0"),
        ({"weights": "vector"}, UnsupportedField, "one number per row"),
        ({"balance": True, "split": "test"}, SplitNotFound, "there is no split 'test'"),
    ],
)
def test_what_cannot_be_drawn(
    imbalanced: h5feed.Dataset, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    """It is refused before the first batch, with what would be right."""
    with pytest.raises(error, match=says):
        imbalanced.plan(**{"split": "all"} | options)


def test_in_a_sequence(imbalanced: h5feed.Dataset) -> None:
    """A Keras Sequence trains on balanced passes and evaluates on ascending rows of each class in turn."""
    pytest.importorskip("keras")
    sequence = imbalanced.sequence("all", x="x", y="y", batch_size=40, shuffle=True, balance=True, epoch_rows=400)
    assert len(sequence) == 10
    for index in range(len(sequence)):
        assert np.bincount(np.asarray(sequence[index][1]), minlength=4).tolist() == [10] * 4
    sequence.close()


def test_memory_is_bounded(tmp_path: Path) -> None:
    """What an epoch is drawn from costs 4 bytes a row, or 8 with weights, however long the epoch is."""
    classes = np.zeros(100_000, np.uint8)
    assert Balanced.of(None, classes).nbytes < 4 * 100_000 + 100
    assert Weighted(None, np.cumsum(np.ones(100_000))).nbytes == 8 * 100_000
    assert len(balanced(classes, 2**60).rows(2**50, 2**50 + 2)[0]) == 64
