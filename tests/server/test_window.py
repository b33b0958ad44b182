"""Shuffling in windows: every row once, a new order each epoch, chunks decoded about once, and nearly as well mixed."""

from __future__ import annotations

from typing import Any

import h5feed
import numpy as np
import pytest
from h5feed.errors import BadParameter
from h5feed.order import BatchGrid
from h5feed_server.batches.order import Order
from h5feed_server.splits.order_spec import OrderSpec


def order_of(rows: int, window: int | None, block: int, batch_size: int = 16, **options: Any) -> Order:
    spec = OrderSpec(shuffle=True, window=window, **options)
    return Order(spec, lambda: None, BatchGrid(rows, batch_size), block)


def whole(order: Order) -> np.ndarray:
    return order.rows(0, order.grid.batches)[0]


@pytest.mark.parametrize(("rows", "window", "block"), [(1000, 128, 32), (1000, 1, 7), (5, 100, 2), (97, 16, 100)])
def test_every_row_once(rows: int, window: int, block: int) -> None:
    """Over an epoch every row comes exactly once, each epoch in another order, any batch alike when asked for alone."""
    order = order_of(rows, window, block)
    assert (np.bincount(whole(order), minlength=rows) == 1).all()
    if rows > 10:
        assert whole(order).tolist() != whole(order_of(rows, window, block, epoch=1)).tolist()
    for index in range(order.grid.batches):
        np.testing.assert_array_equal(order.rows(index, index + 1)[0], whole(order)[16 * index : 16 * index + 16])


def test_golden_values() -> None:
    """A change of these values needs a new `ORDER_VERSION`."""
    assert whole(order_of(24, 8, 4, batch_size=24)).tolist() == [
        2,
        6,
        3,
        7,
        4,
        1,
        5,
        0,
        20,
        21,
        23,
        13,
        22,
        14,
        15,
        12,
        8,
        16,
        11,
        17,
        10,
        19,
        18,
        9,
    ]


def test_rows_come_from_few_blocks() -> None:
    """All rows of a block come within its window: a cache of two windows decodes each once."""
    window, block = 256, 32
    blocks = whole(order_of(4096, window, block)) // block
    for start in range(0, 4096, window):
        assert len(set(blocks[start : start + window].tolist())) == window // block


def test_mixing() -> None:
    """Of rows sorted by class, batches hold nearly as many classes as those of a full shuffle."""
    classes = np.arange(8000) // 80

    def distinct(window: int | None) -> float:
        batches = classes[whole(order_of(8000, window, 32, batch_size=32))].reshape(-1, 32)
        return float(np.mean([len(set(batch.tolist())) for batch in batches]))

    full = distinct(None)
    assert distinct(2048) > 0.8 * full
    assert distinct(2048) > distinct(256) > distinct(64)


def test_over_http(feed: h5feed.Feed) -> None:
    """A window over a split of a chunked field; without shuffling it is refused."""
    dataset = feed["mixed"]
    options: dict[str, Any] = {"test": 0.2, "batch_size": 50, "shuffle": True, "window": 200, "fields": ["shuffled"]}
    rows = np.concatenate([batch.rows for batch in dataset.batches("train", **options)])
    assert sorted(rows.tolist()) == dataset.split_rows("train", test=0.2).tolist()
    full = np.concatenate([batch.rows for batch in dataset.batches("train", **{**options, "window": None})])
    assert rows.tolist() != full.tolist()
    with pytest.raises(BadParameter, match="shuffle=true"):
        dataset.batch(0, window=100)


def test_the_order_is_the_same_for_all_fields(feed: h5feed.Feed) -> None:
    """What is asked for of a row does not change when its turn comes."""
    for fields in (["x"], ["y"], [], ["w", "z"]):
        batches = feed["tall"].batches(batch_size=8, shuffle=True, window=14, fields=fields)
        rows = [row for batch in batches for row in batch.rows.tolist()]
        if fields == ["x"]:
            expected = rows
        assert rows == expected
