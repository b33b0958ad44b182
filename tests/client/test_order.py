"""The order of an epoch is a permutation, keyed, well shuffled, and never changes."""

from __future__ import annotations

import numpy as np
import pytest
from h5feed.errors import BadParameter, BatchOutOfRange
from h5feed.order import BatchGrid, order_key, permute, permute_each, uniform
from hypothesis import given
from hypothesis import strategies as st


def whole(n: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(n), n, order_key(seed, epoch, "train"))


@pytest.mark.parametrize("n", [*range(1, 70), 97, 255, 256, 257, 1000, 4096, 65537, 200_000])
def test_every_row_once(n: int) -> None:
    """Over all positions every value comes exactly once."""
    assert (np.bincount(whole(n), minlength=n) == 1).all()


@given(n=st.integers(1, 2**61), seed=st.integers(0, 2**63 - 1), positions=st.lists(st.integers(0), max_size=20))
def test_any_few_positions_of_any_size(n: int, seed: int, positions: list[int]) -> None:
    """A few positions of a huge domain stay in it, differ where they differ, and are what they are when asked alone."""
    chosen = np.array(sorted({position % n for position in positions}), np.int64)
    key = order_key(seed, 0, "all")
    values = permute(chosen, n, key)
    assert len(set(values.tolist())) == len(chosen)
    assert all(0 <= value < n for value in values.tolist())
    for position, value in zip(chosen, values, strict=True):
        assert permute(np.array([position]), n, key)[0] == value


def test_golden_values() -> None:
    """These values are what clients in the field rely on: a change of them needs a new `ORDER_VERSION`."""
    assert order_key(0, 0, "train").hex()[:32] == "e3764586bb4c644aa19cf3438721e443"
    assert whole(10).tolist() == [4, 6, 3, 5, 7, 2, 0, 9, 8, 1]
    assert permute(np.arange(6), 10**9, order_key(7, 3, "train")).tolist() == [
        812476173,
        473484,
        963324049,
        912387463,
        40384234,
        287526236,
    ]
    assert permute(np.arange(4), 2**61, order_key(-1, 0, "val")).tolist() == [
        381586380347853558,
        1099458249897833877,
        459355737321592615,
        2046435796424917295,
    ]


def test_seed_plus_one_is_not_the_next_epoch() -> None:
    """Seed, epoch and split each give an order unrelated to all others."""
    orders = {(seed, epoch): tuple(whole(500, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(set(orders.values())) == 25
    assert order_key(0, 0, "train") != order_key(0, 0, "val")


def test_well_shuffled() -> None:
    """Where rows go over many keys is uniform, and neighbours do not stay together."""
    n, keys = 12, 6000
    counts = np.zeros((n, n))
    for seed in range(keys):
        counts[np.arange(n), whole(n, seed)] += 1
    chi_square = ((counts - keys / n) ** 2 / (keys / n)).sum()
    # (n-1)² = 121 degrees of freedom: mean 121, standard deviation 15.6; fixed keys, so this never flickers.
    assert 75 < chi_square < 170
    order = whole(100_000)
    displacement = np.abs(order - np.arange(100_000)).mean() / 100_000
    assert abs(displacement - 1 / 3) < 0.01
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01


@given(rows=st.integers(0, 500), batch=st.integers(1, 40), shards=st.integers(1, 6))
def test_shards_are_equal_and_disjoint(rows: int, batch: int, shards: int) -> None:
    """Every shard has as many full batches; together they have each row once, but for a dropped or padded tail."""
    for last in ("drop", "pad"):
        positions, weights = [], []
        for shard in range(shards):
            grid = BatchGrid(rows, batch, shard, shards, last)
            got, real = grid.positions(0, grid.batches)
            assert len(got) == grid.batches * batch
            positions += got[real].tolist()
            weights += real.tolist()
        assert len(set(positions)) == len(positions)
        if last == "pad":
            assert sorted(positions) == list(range(rows))
        else:
            assert sorted(positions) == list(range(rows // (batch * shards) * batch * shards))


def test_steps_are_runs_of_the_global_order() -> None:
    """Step i covers order[i·b·S : (i+1)·b·S], and shard s gets its s-th run of b."""
    grids = [BatchGrid(24, 3, shard, 4, "drop") for shard in range(4)]
    step = [position for grid in grids for position in grid.positions(1, 2)[0].tolist()]
    assert step == list(range(12, 24))


def test_tail() -> None:
    """keep makes a smaller last batch, drop leaves it out, pad fills it with weightless rows from the start."""
    keep, drop, pad = (BatchGrid(10, 4, last=last) for last in ("keep", "drop", "pad"))
    assert [grid.batches for grid in (keep, drop, pad)] == [3, 2, 3]
    assert keep.positions(2, 3)[0].tolist() == [8, 9] and keep.size(2) == 2
    positions, real = pad.positions(2, 3)
    assert (positions.tolist(), real.tolist()) == ([8, 9, 0, 1], [True, True, False, False])


def test_errors_name_the_value() -> None:
    """What cannot be is an error that names it."""
    with pytest.raises(BadParameter, match="batch_size=0"):
        BatchGrid(10, 0)
    with pytest.raises(BadParameter, match="shard=3"):
        BatchGrid(10, 1, 3, 3, "drop")
    with pytest.raises(BadParameter, match="last=drop or last=pad"):
        BatchGrid(10, 1, 0, 2, "keep")
    with pytest.raises(BatchOutOfRange, match="valid: 0 to 2"):
        BatchGrid(10, 4).size(3)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    seed=st.integers(0, 2**63 - 1),
)
def test_many_permutations_at_once(sizes: list[int], seed: int) -> None:
    """Each name has a permutation of its own, whatever it is computed together with."""
    names = np.repeat(np.arange(len(sizes)), sizes)
    positions = np.concatenate([np.arange(size) for size in sizes])
    domains = np.repeat(sizes, sizes)
    key = order_key(seed, 0, "all")
    values = permute_each(positions, domains, key, names)
    for name, size in enumerate(sizes):
        own = values[names == name]
        assert np.sort(own).tolist() == list(range(size))
        alone = permute_each(np.arange(size), np.full(size, size), key, np.full(size, name))
        assert own.tolist() == alone.tolist()


def test_golden_values_of_many() -> None:
    """A change of these values needs a new `ORDER_VERSION`."""
    key = order_key(0, 0, "train")
    assert permute_each(np.arange(10), np.full(10, 10), key, np.zeros(10, np.int64)).tolist() == [
        9,
        8,
        7,
        1,
        6,
        3,
        5,
        2,
        4,
        0,
    ]
    assert permute_each(np.arange(4), np.full(4, 2**51), key, np.array([-1, 0, 1, 2**40])).tolist() == [
        1889234118368820,
        1735810316587846,
        938541902692233,
        1861846085021754,
    ]
    assert [number.hex() for number in uniform(np.arange(3), key).tolist()] == [
        "0x1.f649b187b4160p-2",
        "0x1.cb8a7abe420dcp-1",
        "0x1.49077079b6174p-3",
    ]


def test_small_permutations_are_even() -> None:
    """Over names, each value of a small domain comes nearly equally often at each position, and all orders come."""
    many = 20_000
    for size in (2, 3, 4, 5, 7, 12):
        names = np.arange(many).repeat(size)
        values = permute_each(np.tile(np.arange(size), many), np.full(len(names), size), order_key(1, 1, "t"), names)
        orders = values.reshape(many, size)
        shares = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)]) / many * size
        # Of independent draws the largest of so many would be off by four standard deviations: 4·sqrt(size / many).
        assert np.abs(shares - 1).max() < 4 * np.sqrt(size / many) + 0.02
        if size <= 5:
            assert len(np.unique(orders, axis=0)) == np.prod(np.arange(1, size + 1))


def test_uniform_numbers() -> None:
    """They fill 0 ≤ u < 1 evenly, neighbours being unrelated."""
    numbers = uniform(np.arange(100_000), order_key(5, 0, "u"))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.bincount((numbers * 50).astype(int), minlength=50)
    assert ((counts - 2000) ** 2 / 2000).sum() < 49 + 4 * np.sqrt(98)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
