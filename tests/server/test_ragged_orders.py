"""Bucketing and packing as pure functions: what each promises, against straightforward references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from h5feed.errors import BadParameter, TooLarge
from h5feed.order import BatchGrid, order_key
from h5feed_server.batches.cutting import Cut, Spans
from h5feed_server.batches.order import Order
from h5feed_server.splits.bucketing import Bucketed, window_of
from h5feed_server.splits.order_spec import OrderSpec
from h5feed_server.splits.packing import Packed, fitted
from h5feed_server.splits.resampling import Weighted
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

MEDIAN = 512
LENGTHS = st.lists(st.integers(0, 40), max_size=120).map(lambda lengths: np.array(lengths, np.int32))


def log_normal(rows: int) -> np.ndarray[Any, Any]:
    """Lengths with σ = 1, as texts have."""
    rng = np.random.default_rng(7)
    return np.maximum(1, np.exp(rng.normal(np.log(MEDIAN), 1, rows))).astype(np.int32)


def bucketed(
    lengths: np.ndarray[Any, Any], window: int, batch_size: int = 32, group: int = 1, **options: Any
) -> tuple[Order, Order]:
    """A bucketed order and the same without buckets."""
    shards = {name: options.pop(name) for name in ("shard", "shards", "last") if name in options}
    grid = BatchGrid(len(lengths), batch_size, **shards)
    step = batch_size * group
    source = Bucketed(lengths, window_of(window, step), step)
    spec = OrderSpec(bucket=window, **options)
    return Order(spec, lambda: None, grid, bucketed=lambda: source), Order(spec, lambda: None, grid)


def whole(order: Order) -> np.ndarray[Any, Any]:
    return order.rows(0, order.grid.batches)[0]


@given(
    lengths=LENGTHS.filter(len),
    window=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_a_bucketed_window_has_its_rows_sorted_and_cut(
    lengths: np.ndarray[Any, Any], window: int, batch_size: int, shuffle: bool, epoch: int
) -> None:
    order, plain = bucketed(lengths, window, batch_size, shuffle=shuffle, epoch=epoch)
    rows, before = whole(order), whole(plain)
    size = -(-window // batch_size) * batch_size
    for first in range(0, len(rows), size):
        there, came = before[first : first + size], rows[first : first + size]
        expected = sorted(there.tolist(), key=lambda row: int(lengths[row]))
        steps = [came[i : i + batch_size].tolist() for i in range(0, len(came), batch_size)]
        # The incomplete step was cut out at some place; the others are consecutive in what is left.
        rest = steps.pop() if len(came) % batch_size else []
        places = [expected.index(step[0]) for step in (*steps, *([rest] if rest else []))]
        for place, step in zip(places, (*steps, *([rest] if rest else [])), strict=True):
            assert expected[place : place + len(step)] == step
        assert sorted(came.tolist()) == sorted(expected)
        if not shuffle:
            assert came.tolist() == expected


@given(
    lengths=LENGTHS.filter(len),
    window=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    shards=st.integers(1, 3),
    last=st.sampled_from(["drop", "pad"]),
    data=st.data(),
)
def test_any_bucketed_batch_is_the_same_alone_and_by_any_number_of_shards(
    lengths: np.ndarray[Any, Any], window: int, batch_size: int, shards: int, last: str, data: st.DataObject
) -> None:
    options = {"shuffle": True, "seed": 3, "last": last}
    one, _ = bucketed(lengths, window, batch_size, shards, **options)
    together = one.rows(0, one.grid.batches)[0].reshape(-1, batch_size)
    parts = []
    for shard in range(shards):
        order, _ = bucketed(lengths, window, batch_size, shards, shard=shard, shards=shards, **options)
        of_shard = whole(order).reshape(-1, batch_size)
        parts.append(of_shard)
        if len(of_shard):
            index = data.draw(st.integers(0, len(of_shard) - 1))
            assert order.rows(index, index + 1)[0].tolist() == of_shard[index].tolist()
    dealt = np.stack(parts, 1).reshape(-1, batch_size) if parts[0].size else np.zeros((0, batch_size), int)
    count = min(len(together), len(dealt))
    assert dealt[:count].tolist() == together[:count].tolist()
    if last == "pad":
        assert set(dealt.reshape(-1).tolist()) == set(range(len(lengths)))
    else:
        assert len(set(dealt.reshape(-1).tolist())) == dealt.size


def test_buckets_follow_a_block_shuffle_and_drawn_rows() -> None:
    lengths = log_normal(500)
    grid, source = BatchGrid(500, 16), Bucketed(lengths, 128, 16)
    drawn = Weighted(None, np.cumsum(np.arange(1.0, 501.0)))
    for spec, resampled in (
        (OrderSpec(bucket=128, shuffle=True, window=64), None),
        (OrderSpec(bucket=128, shuffle=True, weights="w"), lambda: drawn),
    ):
        plain = whole(Order(spec, lambda: None, grid, resampled=resampled))
        rows = whole(Order(spec, lambda: None, grid, resampled=resampled, bucketed=lambda: source))
        for first in range(0, 500, 128):
            assert sorted(rows[first : first + 128]) == sorted(plain[first : first + 128])


def test_a_window_of_8192_rows_pads_log_normal_lengths_by_less_than_a_tenth() -> None:
    """σ = 1, batches of 32, lengths rounded up to a multiple of 8."""
    lengths = log_normal(50_000)

    def padding(window: int) -> float:
        order, _ = bucketed(lengths, window, shuffle=True, last="drop")
        own = lengths[whole(order).reshape(-1, 32)]
        return float((-(-own.max(axis=1) // 8) * 8 * 32).sum() / own.sum())

    assert padding(8192) <= 1.1
    assert padding(1) > 5


def test_dropping_the_last_step_loses_no_particular_lengths() -> None:
    lengths = np.arange(100, dtype=np.int32)
    lost = []
    for epoch in range(200):
        order, _ = bucketed(lengths, 1000, 32, shuffle=True, epoch=epoch, last="drop")
        lost.append(lengths[np.setdiff1d(np.arange(100), whole(order))].mean())
    assert 40 < np.mean(lost) < 60


def best_fit_decreasing(lengths: list[int], size: int) -> list[list[int]]:
    """One row at a time, where the least space is left."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [one for one in bins if size - sum(one) >= length]
        if fitting:
            min(fitting, key=lambda one: size - sum(one)).append(length)
        else:
            bins.append([length])
    return bins


@given(lengths=st.lists(st.integers(1, 20), max_size=80), size=st.integers(20, 50))
def test_patterns_are_those_of_best_fit_decreasing(lengths: list[int], size: int) -> None:
    found, counts = np.unique(np.array(lengths, int), return_counts=True)
    patterns = fitted(found.tolist(), counts.tolist(), size)
    ours = [
        [length for length, count in pattern for _ in range(count)] for pattern, times in patterns for _ in range(times)
    ]
    assert sorted(length for one in ours for length in one) == sorted(lengths)
    assert all(sum(one) <= size for one in ours)
    assert len(ours) == len(best_fit_decreasing(lengths, size))


@given(
    lengths=LENGTHS,
    size=st.integers(1, 50),
    overlong=st.sampled_from(["truncate", "split"]),
    shuffle=st.booleans(),
    limited=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_packed_rows_have_each_item_once_and_fit(
    lengths: np.ndarray[Any, Any], size: int, overlong: str, shuffle: bool, limited: bool, epoch: int
) -> None:
    rows = np.arange(0, len(lengths), 2, dtype=np.int32) if limited else None
    packed = Packed.of(rows, lengths, size, overlong, "tokens")
    key = order_key(0, epoch, "all") if shuffle else None
    came = packed.draw(np.arange(packed.count), key)
    wanted = np.arange(len(lengths)) if rows is None else rows
    items = np.zeros((len(lengths), 41), int)
    for row, begin, length in zip(came.rows, came.begins, came.lengths, strict=True):
        items[row, begin : begin + length] += 1
    expected = np.zeros_like(items)
    for row in wanted:
        expected[row, : min(lengths[row], size) if overlong == "truncate" else lengths[row]] = 1
    assert (items == expected).all()
    used = [int(came.lengths[a:b].sum()) for a, b in zip(came.offsets[:-1], came.offsets[1:], strict=True)]
    assert all(0 < one <= size for one in used)
    assert packed.items == sum(used) and packed.samples + packed.empty == len(wanted)
    assert packed.fill == (sum(used) / (packed.count * size) if packed.count else 1.0)
    # Any of them alone.
    for number in range(0, packed.count, 3):
        one = packed.draw(np.array([number]), key)
        own = slice(came.offsets[number], came.offsets[number + 1])
        assert one.rows.tolist() == came.rows[own].tolist()
        assert one.begins.tolist() == came.begins[own].tolist()


def test_epochs_differ_in_company_and_not_in_number() -> None:
    lengths = log_normal(5000)
    packed = Packed.of(None, lengths, 8 * MEDIAN, "split", "tokens")
    partners = []
    for epoch in range(2):
        came = packed.draw(np.arange(packed.count), order_key(0, epoch, "all"))
        owner = np.repeat(np.arange(packed.count), np.diff(came.offsets))
        pairs = {
            tuple(sorted((int(a), int(b))))
            for a, b, same in zip(came.rows[:-1], came.rows[1:], owner[:-1] == owner[1:], strict=True)
            if same
        }
        partners.append(pairs)
    assert len(partners[0] & partners[1]) < 0.05 * len(partners[0])
    assert packed.fill > 0.98


@pytest.mark.parametrize(("rows", "fill"), [(300, 0.95), (1000, 0.98), (20_000, 0.99)])
def test_log_normal_lengths_fill_packed_rows(rows: int, fill: float) -> None:
    """σ = 1, packed rows of 8 medians. All rows of a split are packed together: there are no blocks to choose."""
    assert Packed.of(None, log_normal(rows), 8 * MEDIAN, "split", "tokens").fill >= fill


def test_overlong_rows_and_too_many_pieces_are_refused() -> None:
    lengths = np.array([3, 9, 2], np.int32)
    with pytest.raises(BadParameter, match="row 1 of 'tokens' has 9 items, more than pack=4"):
        Packed.of(None, lengths, 4, None, "tokens")
    assert Packed.of(np.array([0, 2], np.int32), lengths, 4, None, "tokens").count == 2
    with pytest.raises(TooLarge, match="packing 14 rows"):
        Packed.of(None, lengths, 1, "split", "tokens", most=10)


@given(lengths=LENGTHS, most=st.integers(1, 45), keep=st.sampled_from(["start", "end"]))
def test_cut_rows_keep_their_start_or_end(lengths: np.ndarray[Any, Any], most: int, keep: Any) -> None:
    items = np.arange(int(lengths.sum()))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    lists = np.split(items, offsets[1:-1]) if len(lengths) else []
    spans = Cut(most, keep).spans(lengths.astype(np.int64))
    expected = [one[:most] if keep == "start" else one[max(0, len(one) - most) :] for one in lists]
    assert spans.taken(items, offsets).tolist() == [item for one in expected for item in one.tolist()]
    assert np.diff(spans.offsets).tolist() == [len(one) for one in expected]
    assert isinstance(spans, Spans)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": "8"}, "max_length needs pad"),
        ({"pad": "t"}, "pad needs max_length"),
        ({"pad": "t", "max_length": "0"}, "pattern"),
        ({"truncate": "start"}, "truncate needs max_length"),
        ({"bucket_by": "t"}, "bucket_by needs bucket"),
        ({"bucket": 8, "pack": 8}, "pack and bucket are two ways"),
        ({"pack": 8, "balance": True}, "pack cannot be used with balance"),
        ({"pack": 8, "window": 8, "shuffle": True}, "pack cannot be used with"),
        ({"overlong": "split"}, "overlong needs pack"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        OrderSpec(**options)
