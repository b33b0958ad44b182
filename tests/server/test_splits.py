"""Splits equal scikit-learn's, row by row."""

from __future__ import annotations

import math
from pathlib import Path

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.errors import SplitImpossible
from h5feed_server.sampling.spec import SplitSpec
from h5feed_server.sampling.splits import class_ids, compute_splits, dump_splits, load_splits
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split


@pytest.mark.parametrize(("test", "val"), [(0.1, 0.1), (100, 57), (0.33, None), (None, 0.25)])
@pytest.mark.parametrize("seed", [42, 7])
def test_equal_to_train_test_split_called_twice(
    feed: h5feed.Feed, folder: Path, test: float | None, val: float | None, seed: int
) -> None:
    """On an imbalanced label field, the three sets are those of two calls by hand, and stratified."""
    with h5py.File(folder / "mixed.h5") as file:
        labels = file["labels"][:]
    rest, expected = np.arange(len(labels)), {}
    for name, share in (("test", test), ("val", val)):
        if share is not None:
            count = math.ceil(share * len(labels)) if isinstance(share, float) else share
            rest, expected[name] = train_test_split(rest, test_size=count, stratify=labels[rest], random_state=seed)
    expected["train"] = rest
    options = {name: share for name, share in (("test", test), ("val", val)) if share is not None}
    report = feed["mixed"].splits(split_seed=seed, **options)
    assert report["stratify"] == "labels"
    for name, rows in expected.items():
        got = feed["mixed"].split_rows(name, split_seed=seed, **options)
        np.testing.assert_array_equal(got, np.sort(rows))
        assert report["splits"][name]["rows"] == len(rows)
        counts = {entry["value"]: entry["rows"] for entry in report["splits"][name]["classes"]}
        assert counts == dict(zip(*(a.tolist() for a in np.unique(labels[rows], return_counts=True)), strict=True))


def test_by_position(feed: h5feed.Feed) -> None:
    """Without shuffling, val and test come from the end, in that order."""
    options = {"test": 100, "val": 0.2, "split_shuffle": False}
    assert feed["mixed"].split_rows("train", **options).tolist() == list(range(700))
    assert feed["mixed"].split_rows("validation", **options).tolist() == list(range(700, 900))
    assert feed["mixed"].split_rows("test", **options).tolist() == list(range(900, 1000))


def test_a_class_too_small_is_said(feed: h5feed.Feed) -> None:
    """By default a class of one row means no stratification, with the reason; asked for by name it is an error."""
    report = feed["sub.small"].splits(test=2)
    assert report["stratify"] is None and "only 1 row" in report["note"]
    with pytest.raises(SplitImpossible, match="stratify=none"):
        feed["sub.small"].splits(test=2, stratify="y")


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=4, max_size=120).map(np.array),
    test=st.integers(1, 40),
    val=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_disjoint_and_complete(labels: np.ndarray, test: int, val: int, seed: int) -> None:
    """Whatever the labels, the splits have the sizes asked for, share no row and leave none out."""
    spec = SplitSpec(test=test, val=val, split_seed=seed)
    if test + val >= len(labels):
        with pytest.raises(SplitImpossible):
            compute_splits(np.arange(len(labels)), spec, "y", labels)
        return
    splits = compute_splits(np.arange(len(labels)), spec, "y", labels)
    assert (len(splits.rows["test"]), len(splits.rows["val"])) == (test, val)
    assert np.sort(np.concatenate(list(splits.rows.values()))).tolist() == list(range(len(labels)))
    again = load_splits(dump_splits(splits))
    assert {name: rows.tolist() for name, rows in again.rows.items()} == {
        name: rows.tolist() for name, rows in splits.rows.items()
    }


def test_one_hot_labels_are_classes() -> None:
    """One-hot rows are classes by their position; other vectors are none."""
    assert class_ids(np.eye(3)[[2, 0, 1]]).tolist() == [2, 0, 1]  # type: ignore[union-attr]
    assert class_ids(np.ones((4, 3))) is None
    assert class_ids(np.array([0.5, 1.5])) is None
