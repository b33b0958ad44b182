"""Describes splits for the API: row counts, classes and their shares, deviations from all rows, balanced weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..row_bits import RowBits, RowRuns, RowSet, as_list, within
from .compute import Splits
from .labels import Classed, Labels

MAX_CLASSES = 10_000
"""Maximum number of classes listed per split."""

_BLOCK = 1 << 17
"""Rows hashed at a time."""


def describe_splits(
    splits: Splits[RowSet],
    rows: int,
    labels: Classed | None,
    groups: Labels | None,
    names: Mapping[int, str],
    kept: RowSet | None = None,
    digests: Mapping[str, str] | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """The result of `describe_split` for each split, ``all`` first, and whether the split is as stored in the files.

    Parameters
    ----------
    rows : int
        Rows of the dataset.
    labels : Classed or None
        Classes to count; None: no classes are listed.
    groups : Labels or None
        Groups to count.
    names : mapping of int to str
        Class names by value.
    kept : (k,) int32, RowBits or RowRuns, optional
        Ascending ids of the rows that meet a filter; the other rows are left out of all splits. Default: all rows.
    digests : mapping of str to str, optional
        Digests of splits that are known.
    advance : callable
        Called with `rows` after each split.
    """
    counts = None if labels is None else labels.count(kept)
    described = {"all": describe_split(kept, rows, labels, groups, names, kept, counts)}
    advance(rows)
    for name, own in splits.rows.items():
        left = own if kept is None else _both(own, kept, rows)
        known = None if digests is None or kept is not None else digests.get(name)
        report = describe_split(left, rows, labels, groups, names, kept, counts, known)
        described[name] = {**report, "stored": name in splits.stored}
        advance(rows)
    return described


def describe_split(
    rows: RowSet | None,
    total: int,
    labels: Classed | None,
    groups: Labels | None,
    names: Mapping[int, str],
    kept: RowSet | None = None,
    kept_counts: npt.NDArray[np.int64] | None = None,
    digest: str | None = None,
) -> dict[str, Any]:
    """Describe one split: its rows, and for each class its rows, share and balanced weight.

    The weight is scikit-learn's ``class_weight="balanced"``, rows / (classes · rows of the class), from King and Zeng
    (2001). It is None for multi-label fields. ``max_deviation`` is the largest difference between a class's share in
    this split and in all rows.

    Parameters
    ----------
    rows : (k,) int32, RowBits, RowRuns or None
        Ascending row ids. None: all rows.
    total : int
        Rows of the dataset.
    labels, groups, names, kept
        See `describe_splits`.
    kept_counts : (values,) int64
        Rows of each class of all rows that are kept; None without labels.
    digest : str, optional
        The digest of the row ids, if it is known.
    """
    length = total if rows is None else len(rows)
    everything = total if kept is None else len(kept)
    report: dict[str, Any] = {
        "rows": length,
        "share": length / everything if everything else 0.0,
        "digest": digest_of(rows, total) if digest is None else digest,
    }
    if groups is not None:
        assert rows is None or isinstance(rows, np.ndarray)
        report["groups"] = int(np.count_nonzero(groups.count(rows)))
    if labels is None or kept_counts is None:
        return report
    counts = kept_counts if rows is kept else labels.count(rows)
    shares = counts / max(1, length)
    if len(counts) <= MAX_CLASSES:
        present = int(np.count_nonzero(counts))
        report["classes"] = [
            {
                "value": value,
                "name": names.get(value) if isinstance(value, int) else None,
                "rows": count,
                "share": count / length,
                "weight": length / (present * count) if labels.single else None,
            }
            for value, count in zip(labels.values, counts.tolist(), strict=True)
            if count
        ]
    else:
        report["classes_total"] = len(counts)
    expected = kept_counts / max(1, everything)
    report["max_deviation"] = float(np.abs(shares - expected).max(initial=0.0))
    return report


def digest_of(rows: RowSet | None, total: int) -> str:
    """Digest of the row ids as little-endian int64, in hexadecimal. None: all `total` rows."""
    digest = hashlib.blake2b(digest_size=8)
    for block in _blocks(rows, total):
        digest.update(block.astype("<i8", copy=False).data)
    return digest.hexdigest()


def _blocks(rows: RowSet | None, total: int) -> Iterator[npt.NDArray[Any]]:
    if isinstance(rows, RowBits | RowRuns):
        yield from rows.blocks()
        return
    for start in range(0, total if rows is None else len(rows), _BLOCK):
        yield np.arange(start, min(start + _BLOCK, total)) if rows is None else rows[start : start + _BLOCK]


def _both(own: RowSet, kept: RowSet, total: int) -> RowSet:
    """The rows of two sets, both lists or both not."""
    if isinstance(kept, RowBits):
        return within(own, kept.bits)
    passes = np.zeros(total, np.bool_)
    passes[as_list(kept)] = True
    listed = as_list(own)
    return listed[passes[listed]]
