"""Which source each sample of a mixture comes from: counts, order and ranges, without a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from h5feed.mixing import BLOCK, Mixing, Shares, parts_of, tempered, units_of
from hypothesis import given
from hypothesis import strategies as st

WEIGHTS = st.lists(
    st.one_of(st.integers(1, 1000), st.floats(1e-9, 1.0), st.sampled_from([1e-9, 1 / 3, 0.001, 0.0009999])),
    min_size=1,
    max_size=8,
)


@given(weights=WEIGHTS, blocks=st.integers(1, 60), more=st.integers(1, BLOCK - 1))
def test_counts_follow_the_weights(weights: list[float], blocks: int, more: int) -> None:
    """At each multiple of 1,000, and at the end of an epoch, within one of the quota; and they never decrease."""
    parts = parts_of(weights)
    whole, shares = sum(parts), Shares(parts)
    before = (0,) * len(parts)
    totals = [(number * BLOCK, shares.before(number)) for number in range(1, blocks + 1)]
    totals.append((blocks * BLOCK + more, shares.at(blocks * BLOCK + more)))
    for total, counts in totals:
        assert sum(counts) == total
        assert all(count >= had for count, had in zip(counts, before, strict=True))
        assert all(abs(count * whole - total * part) < whole for count, part in zip(counts, parts, strict=True))
        before = counts


def test_weights_are_held_over_many_batches() -> None:
    """Over 100,000 batches of 64 samples: the counts of each source, and in what it is handed out."""
    weights = [0.55, 0.3, 0.1499, 0.0001]
    mixing = Mixing((10**9,) * 4, 64 * 100_000, 1, parts_of(weights), None, seed=3)
    done = np.zeros(4, np.int64)
    for begin in range(0, mixing.units, 64_000):
        sources, places = mixing.assigned(0, np.arange(begin, begin + 64_000))
        for source in range(4):
            own = places[sources == source]
            assert np.array_equal(own, done[source] + np.arange(len(own)))
        # (blocks, sources): samples of each source before the end of each block
        counts = done + np.cumsum([np.bincount(part, minlength=4) for part in sources.reshape(-1, BLOCK)], axis=0)
        totals = begin + BLOCK * np.arange(1, len(counts) + 1)
        assert np.abs(counts - totals[:, None] * np.array(weights)).max() < 1
        done = counts[-1]


def test_sources_are_shuffled() -> None:
    """No two blocks, epochs or seeds have the same pattern, and neighbours are as independent as if drawn."""
    mixing = Mixing((10**6,) * 2, 100 * BLOCK, 1, (7, 3), None, seed=0)
    first, _ = mixing.assigned(0, np.arange(mixing.units))
    later, _ = mixing.assigned(1, np.arange(mixing.units))
    other, _ = Mixing((10**6,) * 2, 100 * BLOCK, 1, (7, 3), None, seed=1).assigned(0, np.arange(mixing.units))
    blocks = np.concatenate([part.reshape(-1, BLOCK) for part in (first, later, other)])
    assert len(np.unique(blocks, axis=0)) == 300
    for lag in (1, 2, 3, 7, 10):
        alike = np.mean(first[lag:] == first[:-lag])
        assert abs(alike - (0.7**2 + 0.3**2)) < 0.01


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
    how=st.sampled_from(["weights", "rows", "turns", "changing"]),
    unit=st.sampled_from([1, 3]),
    ends=st.sampled_from(["first", "all", 70]),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_any_part_by_itself(
    sizes: list[int], weights: list[float], how: str, unit: int, ends: Any, seed: int, data: st.DataObject
) -> None:
    """Samples of a source are its places in order, whatever part is asked for; epochs begin where they should."""
    parts: Any = {"weights": parts_of(weights[: len(sizes)]), "rows": tempered(sizes, 1), "turns": None}.get(how)
    if how == "changing":
        table = [parts_of(weights[: len(sizes)]), parts_of(weights[-len(sizes) :])]
        parts, ends = lambda epoch: table[epoch % 2], 70
    stop = None if isinstance(ends, int) else ends
    units = ends // unit if isinstance(ends, int) else units_of(tuple(sizes), parts, unit, ends)
    if not units:
        assert stop == "first"
        return
    mixing = Mixing(tuple(sizes), units, unit, parts, stop, seed)
    everything = np.arange(mixing.rows)
    begins = np.zeros(len(sizes), np.int64)
    for epoch in range(3):
        sources, places = mixing.assigned(epoch, everything)
        ends_of = begins.copy()
        for source, size in enumerate(sizes):
            own = places[sources == source]
            if stop is not None:
                begins[source] = epoch * -(-len(own) // size) * size
            assert np.array_equal(own, begins[source] + np.arange(len(own)))
            ends_of[source] = begins[source] + len(own)
            if stop == "first":
                assert len(own) <= size
            if stop == "all" and how == "rows" and unit == 1:
                assert len(own) == size
        if stop == "first":
            # Not one unit more would have fitted, or the sum of the weights would have been exceeded.
            counts = np.bincount(sources, minlength=len(sizes))
            if how == "turns":
                following = int(units % len(sizes))
                assert counts[following] + unit > sizes[following]
        if stop == "all":
            assert any(size <= len(places[sources == source]) for source, size in enumerate(sizes))
            assert len({*zip(sources.tolist(), (places % np.array(sizes)[sources]).tolist(), strict=True)}) == sum(
                sizes
            )
        assert unit == 1 or (sources.reshape(-1, unit) == sources[::unit, None]).all()
        some = np.array(data.draw(st.lists(st.integers(0, mixing.rows - 1), min_size=1, max_size=20)), np.int64)
        for one, whole in zip(mixing.assigned(epoch, some), (sources, places), strict=True):
            assert np.array_equal(one, whole[some])
        begins = ends_of


@pytest.mark.parametrize(("temperature", "expected"), [(1, (3, 1)), (2, (3**0.5, 1)), (1e9, (1, 1))])
def test_temperature(temperature: float, expected: tuple[float, float]) -> None:
    """Weights are rows to the power of 1 / temperature."""
    first, second = tempered((3000, 1000), temperature)
    assert first / second == pytest.approx(expected[0] / expected[1], rel=1e-6)
