"""Batches as a `tf.data.Dataset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5feed
import numpy as np
import pytest

from tests.support.growing_log import growing_log
from tests.support.server_process import ServerProcess

tf = pytest.importorskip("tensorflow")

ORDER: dict[str, Any] = {"batch_size": 48, "shuffle": True, "seed": 2}


def made(feed: h5feed.Feed, **options: Any) -> Any:
    """The field `lzf` holds the row ids."""
    return feed["mixed"].tf_data(**{**ORDER, "x": "images", "y": "lzf", **options})


def rows_of(feed: h5feed.Feed, epoch: int, **options: Any) -> list[int]:
    batches = feed["mixed"].batches(**{**ORDER, "fields": [], "epoch": epoch, **options})
    return [row for batch in batches for row in batch.rows.tolist()]


def delivered(batches: Any) -> list[int]:
    return [row for _, y, *_ in batches for row in y.numpy().tolist()]


@pytest.mark.parametrize("options", [{}, {"last": "pad"}, {"shard": 1, "shards": 3, "last": "drop"}], ids=str)
def test_each_iteration_is_a_pass(feed: h5feed.Feed, options: dict[str, Any]) -> None:
    """Each iteration is the order of the next epoch; `repeat` and `prefetch` work as ever."""
    dataset = made(feed, **options)
    for epoch in range(2):
        assert delivered(dataset) == rows_of(feed, epoch, **options)
    repeated = delivered(dataset.repeat(2).prefetch(2))
    assert repeated == rows_of(feed, 2, **options) + rows_of(feed, 3, **options)


def test_signatures(feed: h5feed.Feed) -> None:
    """Shapes, dtypes and cardinality are known before the first batch; rows where all batches are full."""
    x, y = made(feed).element_spec
    assert (x.shape.as_list(), x.dtype) == ([None, 12, 10, 3], tf.uint8)
    assert (y.shape.as_list(), y.dtype) == ([None], tf.int64)
    assert made(feed).cardinality() == 21
    x, y, weight = made(feed, last="pad", y="labels", class_mode="categorical", rescale=1 / 255).element_spec
    assert (x.shape.as_list(), x.dtype) == ([48, 12, 10, 3], tf.float32)
    assert (y.shape.as_list(), weight.shape.as_list()) == ([48, 4], [48])
    x, y = made(feed, x=["images", "half"]).element_spec
    assert set(x) == {"images", "half"} and x["half"].dtype == tf.float16


def test_padded_rows_without_targets(feed: h5feed.Feed) -> None:
    """Weights come third, with None for the targets, as from other loops."""
    dataset = made(feed, x="lzf", y=[], last="pad")
    assert dataset.cardinality() == 21
    found = [*dataset]
    assert all(y is None for _, y, _ in found)
    assert [row for x, _, _ in found for row in x.numpy().tolist()] == rows_of(feed, 0, last="pad")
    assert sum(float(tf.reduce_sum(weight)) for _, _, weight in found) == 1000


def test_what_arrives(feed: h5feed.Feed) -> None:
    for x, y in made(feed).take(3):
        np.testing.assert_array_equal(x.numpy(), feed["mixed"].take(y.numpy(), fields=["images"])["images"])


def test_kept_tensors_stay_as_they_are(feed: h5feed.Feed) -> None:
    """TensorFlow uses the memory of large, aligned arrays. It is not recycled before the tensors are gone."""
    kept, shared = [], []
    loader = feed["mixed"].loader(batch_size=64, shuffle=True, x="images", y="lzf", readahead=1 << 20)

    def arrays() -> Any:
        for x, y in loader:
            shared.append(x.ctypes.data)
            yield x, y

    specs = (tf.TensorSpec((None, 12, 10, 3), tf.uint8), tf.TensorSpec((None,), tf.int64))
    for _ in range(3):
        batches = tf.data.Dataset.from_generator(arrays, output_signature=specs)
        kept += [(x, y) for step, (x, y) in enumerate(batches) if step % 4 == 0]
    assert {x._numpy_internal().ctypes.data for x, _ in kept} & set(shared)
    for x, y in kept:
        np.testing.assert_array_equal(x.numpy(), feed["mixed"].take(y.numpy(), fields=["images"])["images"])


def test_a_graph_trains_on_it(feed: h5feed.Feed) -> None:
    """Inside a `tf.function` too."""

    @tf.function  # type: ignore[untyped-decorator]
    def total(dataset: Any) -> Any:
        rows = tf.constant(0, tf.int64)
        for _, y in dataset:
            rows += tf.reduce_sum(y)
        return rows

    assert int(total(made(feed))) == sum(range(1000))


def test_growing_files(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """With `follow`, each iteration has the rows that there are at its begin, and no cardinality is promised."""
    with growing_log(tmp_path / "log", serve) as log:
        order: dict[str, Any] = {"batch_size": 10, "shuffle": True, "seed": 1, "x": "x", "y": "y"}
        dataset = log.grow(20).tf_data(follow=True, **order)
        assert dataset.cardinality() == tf.data.UNKNOWN_CARDINALITY
        assert dataset.element_spec[0].shape.as_list() == [None, 6]
        for epoch, rows in enumerate((20, 50, 50)):
            now = log.grow(30) if epoch == 1 else log.at_now()
            read = now.batches(batch_size=10, shuffle=True, seed=1, epoch=epoch, fields=["x"])
            expected = [batch["x"].copy() for batch in read]
            found = [x.numpy() for x, _ in dataset]
            np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))
            assert sum(map(len, found)) == rows
