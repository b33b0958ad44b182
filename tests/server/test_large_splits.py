"""Splits of very many rows: the keyed hash against plain numpy, and sets of rows as bits against lists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import SplitImpossible
from h5feed.order import hashed
from h5feed_server.row_bits import BitPacker, RowBits, RowRuns
from h5feed_server.splits.by_hash import division_key
from h5feed_server.splits.classes import Classes, dump_classes, load_classes, read_classes
from h5feed_server.splits.compute import Splits
from h5feed_server.splits.describe import describe_splits
from h5feed_server.splits.labels import NoClasses, Strata
from h5feed_server.splits.large import HashDivision, bits_of_all
from h5feed_server.splits.split_spec import SplitSpec
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

Rows = npt.NDArray[np.int64]


def classes_of(values: npt.NDArray[Any], step: int = 7) -> Classes:
    """The classes of an array that is read in blocks of `step` rows."""

    def blocks() -> Iterator[npt.NDArray[Any]]:
        for start in range(0, len(values), step):
            yield values[start : start + step]

    return read_classes(blocks, values.dtype, values.shape[1:])


def divided(values: npt.NDArray[Any] | None, rows: int, step: int = 7, **options: Any) -> Splits[RowBits]:
    strata = None if values is None else Strata("y", classes_of(values, step))
    division = HashDivision(rows, SplitSpec(**options), strata)
    drawn = division.splits()
    found = {name: RowBits(bits.copy()) for name, bits in bits_of_all(division, dict(drawn.rows))}
    return Splits(
        {name: found[name] for name in division.names},
        drawn.method,
        drawn.stratify,
        note=drawn.note,
    )


def expected(values: npt.NDArray[Any], parts: dict[str, dict[int, range]], seed: int) -> dict[str, list[int]]:
    """Rows by the rule, in plain numpy: of each class those at some places when it is sorted by hash."""
    hashes = hashed(np.arange(len(values)), division_key(seed))
    found: dict[str, list[int]] = {}
    for name, places in parts.items():
        rows: list[int] = []
        for value, wanted in places.items():
            own = np.flatnonzero(values == value)
            rows += own[np.argsort(hashes[own])][wanted.start : wanted.stop].tolist()
        found[name] = sorted(rows)
    return found


def listed(splits: Splits[RowBits]) -> dict[str, list[int]]:
    return {name: rows[:].tolist() for name, rows in splits.rows.items()}


labels = st.lists(st.integers(0, 4), min_size=30, max_size=400).map(lambda values: np.array(values, np.uint8))
seeds = st.integers(0, 2**32 - 1)


@given(labels, st.integers(1, 12), st.integers(0, 12), seeds, st.integers(1, 500))
def test_each_row_is_in_one_split_as_plain_numpy_puts_it(
    values: npt.NDArray[np.uint8], test: int, val: int, seed: int, step: int
) -> None:
    """Of each class, as many rows as scikit-learn takes, in the order of the hash; however the labels are read."""
    options: dict[str, Any] = {"test": test, "split_seed": seed} | ({"val": val} if val else {})
    splits = divided(values, len(values), step, **options)
    found = listed(splits)
    assert list(found) == ["train", *(["val"] if val else []), "test"]
    assert sorted(row for rows in found.values() for row in rows) == list(range(len(values)))
    assert len(found["test"]) == test and len(found.get("val", ())) == val
    assert divided(values, len(values), 11, **options).rows["train"][:].tolist() == found["train"]
    of_class = {name: np.bincount(values[rows], minlength=5) for name, rows in found.items()}
    if splits.stratify is None:
        values = np.zeros_like(values)
        of_class = {name: np.array([len(rows)]) for name, rows in found.items()}
        assert splits.note is not None and "not stratified" in splits.note
    else:
        rest, held = train_test_split(np.arange(len(values)), test_size=test, stratify=values, random_state=seed)
        assert of_class["test"].tolist() == np.bincount(values[held], minlength=5).tolist()
        exact = np.bincount(values, minlength=5) * test / len(values)
        assert (np.abs(of_class["test"] - exact) <= 1).all()
        if val:
            _, held = train_test_split(rest, test_size=val, stratify=values[rest], random_state=seed)
            assert of_class["val"].tolist() == np.bincount(values[held], minlength=5).tolist()
    parts: dict[str, dict[int, range]] = {"test": {}, "val": {}, "train": {}}
    for value in np.unique(values).tolist():
        first, second = int(of_class["test"][value]), int(of_class["val"][value]) if val else 0
        parts["test"][value] = range(first)
        parts["val"][value] = range(first, first + second)
        parts["train"][value] = range(first + second, len(values))
    assert found == {name: rows for name, rows in expected(values, parts, seed).items() if name in found}


@given(labels, st.integers(2, 9), st.sampled_from([None, 5, 0.25]), seeds, st.booleans())
def test_folds_share_all_rows(
    values: npt.NDArray[np.uint8], folds: int, test: int | float | None, seed: int, stratified: bool
) -> None:
    """Each row that is not in test is in one fold; folds differ by at most one row, also of each class."""
    options: dict[str, Any] = {} if test is None else {"test": test}
    every = [
        divided(values if stratified else None, len(values), folds=folds, fold=fold, split_seed=seed, **options)
        for fold in range(folds)
    ]
    (held,) = {tuple(listed(splits).get("test", ())) for splits in every}
    assert len(held) == (0 if test is None else math.ceil(test * len(values)) if isinstance(test, float) else test)
    inside = [listed(splits)["val"] for splits in every]
    assert sorted([*held, *(row for rows in inside for row in rows)]) == list(range(len(values)))
    for splits in every:
        found = listed(splits)
        assert sorted(row for rows in found.values() for row in rows) == list(range(len(values)))
    assert max(map(len, inside)) - min(map(len, inside)) <= 1
    if all(splits.stratify for splits in every):
        counts = np.array([np.bincount(values[rows], minlength=5) for rows in inside])
        assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()


def test_without_shuffling_test_and_val_are_the_last_rows() -> None:
    found = listed(divided(None, 103, test=10, val=0.1, split_shuffle=False))
    assert found == {"train": [*range(82)], "val": [*range(82, 93)], "test": [*range(93, 103)]}
    assert listed(divided(None, 10, val=3, split_shuffle=False)) == {"train": [*range(7)], "val": [7, 8, 9]}
    assert listed(divided(None, 11, test=1, folds=5, fold=1, split_shuffle=False)) == {
        "train": [0, 1, 4, 5, 6, 7, 8, 9],
        "val": [2, 3],
        "test": [10],
    }
    values = np.array([1, 0] * 6)
    folds = divided(values, 12, folds=3, fold=2, stratify="y", split_shuffle=False)
    assert listed(folds)["val"] == [8, 9, 10, 11]
    with pytest.raises(SplitImpossible, match="by position"):
        divided(values, 12, test=2, folds=2, stratify="y", split_shuffle=False)


def test_the_rule_stays_what_it_is() -> None:
    """Golden values: if they change, `DIVISION_VERSION` and the version of the server's output must change, too."""
    values = np.arange(40) % 4
    found = listed(divided(values, 40, test=0.1, val=0.1))
    assert found["test"] == [10, 27, 28, 29] and found["val"] == [0, 6, 19, 33]
    assert listed(divided(None, 12, test=3, split_seed=7))["test"] == [7, 8, 9]


def test_what_cannot_be_stratified_is_refused_or_noted() -> None:
    lonely = np.array([0] * 20 + [1])
    assert (
        divided(lonely, 21, test=3).note == "not stratified by 'y': class 1 has only 1 row, and needs at least 2, "
        "one for each side"
    )
    with pytest.raises(SplitImpossible, match="class 1 has only 1 row"):
        divided(lonely, 21, test=3, stratify="y")
    with pytest.raises(SplitImpossible, match="leaves none for train"):
        divided(lonely, 21, test=21)
    assert "fewer than there are folds" in str(divided(lonely, 21, folds=3).note)


@pytest.mark.parametrize(
    "values",
    [
        np.array([3, -7, 0, 3, -7, 3], np.int8),
        np.array([5, 300, 5, 70000, 300, 5], ">i4"),
        np.array([0.0, 2.0, 1.0, 2.0, 0.0, 2.0], "<f4"),
        np.array([True, False, True, True, False, True]),
        np.array([b"dog", b"a long name", b"dog", b"cat", b"cat", b"dog"]),
        np.eye(4)[[2, 0, 2, 1, 1, 2]],
        np.array([[1], [2], [1], [9], [9], [1]], np.uint8),
    ],
    ids=["int8", "big-endian", "float", "bool", "text", "one-hot", "column"],
)
@pytest.mark.parametrize("step", [1, 2, 6])
def test_classes_of_every_kind(values: npt.NDArray[Any], step: int) -> None:
    """Distinct values and their numbers of rows, without a list of the class of each row."""
    flat = values.argmax(axis=1) if values.shape[1:] == (4,) else values.reshape(-1)
    distinct, codes, counts = np.unique(flat, return_inverse=True, return_counts=True)
    found = classes_of(values, step)
    assert found.kind == ("one-hot" if values.shape[1:] == (4,) else "classes")
    assert [value.encode() if isinstance(value, str) else value for value in found.values] == distinct.tolist()
    assert found.totals.tolist() == counts.tolist()
    assert np.concatenate([*found.codes()]).tolist() == codes.tolist()
    again = load_classes(dump_classes(Strata("y", found)), found.blocks)
    assert again.labels is not None and again.labels.values == found.values
    assert np.concatenate([*again.labels.codes()]).tolist() == codes.tolist()
    rows = RowBits(np.packbits(np.arange(6) % 2 == 0))
    assert found.count(rows).tolist() == np.bincount(codes[::2], minlength=len(counts)).tolist()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([0.5, 1.0]), "continuous"),
        (np.array([np.nan, 1.0]), "NaN"),
        (np.array([[1, 1], [0, 1]]), "several labels"),
        (np.array([[1, 3], [0, 1]]), "not all of them 0 or 1"),
        (np.zeros((2, 3, 3)), "holds no classes"),
        (np.arange(10_001), "more than 10000"),
    ],
)
def test_no_classes(values: npt.NDArray[Any], reason: str) -> None:
    with pytest.raises(NoClasses, match=reason):
        classes_of(values)


def test_many_classes() -> None:
    """As many classes as there may be, each with a few rows; more cells than are counted at once."""
    values = np.random.default_rng(1).permutation(np.arange(40_000) % 10_000)
    found = listed(divided(values, 40_000, step=1 << 18, test=0.25))
    assert np.bincount(values[found["test"]]).tolist() == [1] * 10_000


@given(
    st.integers(1, 20_000),
    st.sampled_from([0.0, 0.001, 0.5, 0.999, 1.0]),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 3000), max_size=5),
)
def test_bits_are_a_list(rows: int, share: float, seed: int, steps: list[int]) -> None:
    """A set of rows as bits is indexed, cut, listed and searched like an array of its rows."""
    random = np.random.default_rng(seed)
    inside = random.random(rows) < share
    packer, start = BitPacker(rows), 0
    for step in [*steps, rows]:
        packer.add(inside[start : start + step])
        start += step
    assert packer.bits().tolist() == np.packbits(inside).tolist()
    bits, plain = RowBits(packer.bits()), np.flatnonzero(inside)
    assert len(bits) == len(plain)
    assert np.concatenate([np.zeros(0, int), *bits.blocks()]).tolist() == plain.tolist()
    if len(plain):
        wanted = random.integers(0, len(plain), 300)
        assert bits[wanted].tolist() == plain[wanted].tolist()
        first, stop = sorted(random.integers(0, len(plain) + 1, 2).tolist())
        for cut in (slice(first, stop), slice(first, None, 3), slice(None), slice(stop, first, -1)):
            assert bits[cut].tolist() == plain[cut].tolist()
        assert bits.first(stop).tolist() == plain[:stop].tolist()
        assert bits.place(int(plain[first % len(plain)])) == first % len(plain)
    for row in np.flatnonzero(~inside)[:3].tolist():
        assert bits.place(row) is None
    begin, end = sorted(random.integers(0, rows + 1, 2).tolist())
    assert bits.mask(begin, end).tolist() == inside[begin:end].tolist()
    other = random.random(rows) < 0.5
    assert (bits & np.packbits(other))[:].tolist() == np.flatnonzero(inside & other).tolist()


@given(st.lists(st.integers(0, 5000), max_size=8, unique=True).map(sorted))
def test_ranges_are_a_list(bounds: list[int]) -> None:
    """Ranges of rows, too."""
    runs = list(zip(bounds[::2], bounds[1::2], strict=False))
    plain = np.concatenate([np.zeros(0, int), *(np.arange(*run) for run in runs)])
    rows = RowRuns(runs)
    assert len(rows) == len(plain) and rows[:].tolist() == plain.tolist()
    assert np.concatenate([np.zeros(0, int), *rows.blocks()]).tolist() == plain.tolist()
    inside = np.zeros(5000, bool)
    inside[plain[plain < 5000]] = True
    assert rows.mask(17, 4000).tolist() == inside[17:4000].tolist()
    assert rows.first(len(plain) // 2).tolist() == plain[: len(plain) // 2].tolist()
    other = np.arange(5000) % 3 == 0
    assert (rows & np.packbits(other))[:].tolist() == np.flatnonzero(inside & other).tolist()
    for row in (0, 2500, *bounds):
        assert rows.place(row) == (plain.tolist().index(row) if row in plain else None)


def test_the_report_is_that_of_lists() -> None:
    """Counts, shares, weights and digests are the same from bits as from lists, with a filter, too."""
    values = np.random.default_rng(3).choice(3, 5000, p=[0.7, 0.2, 0.1])
    splits = divided(values, 5000, step=999, test=0.2, val=0.1)
    lists = Splits({name: rows[:].astype(np.int32) for name, rows in splits.rows.items()}, stratify="y")
    from tests.server.test_splits import labels_of

    one_in_two = np.arange(5000) % 2 == 0
    for kept in (None, one_in_two):
        of_bits = describe_splits(
            splits, 5000, classes_of(values, 100), None, {}, None if kept is None else RowBits(np.packbits(kept))
        )
        of_lists = describe_splits(
            lists, 5000, labels_of(values), None, {}, None if kept is None else np.flatnonzero(kept).astype(np.int32)
        )
        assert of_bits == of_lists
