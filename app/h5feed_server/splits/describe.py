"""Describes splits for the API: row counts, classes and their shares, deviations from all rows, balanced weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .compute import Splits
from .labels import Labels

MAX_CLASSES = 10_000
"""Maximum number of classes listed per split."""

_BLOCK = 1 << 17
"""Rows hashed at a time."""


def describe_splits(
    splits: Splits,
    rows: int,
    labels: Labels | None,
    groups: Labels | None,
    names: Mapping[int, str],
    kept: npt.NDArray[np.int32] | None = None,
) -> dict[str, Any]:
    """The result of `describe_split` for each split, ``all`` first, and whether the split is as stored in the files.

    Parameters
    ----------
    rows : int
        Rows of the dataset.
    labels : Labels or None
        Classes to count; None: no classes are listed.
    groups : Labels or None
        Groups to count.
    names : mapping of int to str
        Class names by value.
    kept : (k,) int32, optional
        Ascending ids of the rows that meet a filter; the other rows are left out of all splits. Default: all rows.
    """
    described = {"all": describe_split(kept, rows, labels, groups, names, kept)}
    passes = None
    if kept is not None:
        passes = np.zeros(rows, np.bool_)
        passes[kept] = True
    for name, own in splits.rows.items():
        left = own if passes is None else own[passes[own]]
        described[name] = {**describe_split(left, rows, labels, groups, names, kept), "stored": name in splits.stored}
    return described


def describe_split(
    rows: npt.NDArray[np.int32] | None,
    total: int,
    labels: Labels | None,
    groups: Labels | None,
    names: Mapping[int, str],
    kept: npt.NDArray[np.int32] | None = None,
) -> dict[str, Any]:
    """Describe one split: its rows, and for each class its rows, share and balanced weight.

    The weight is scikit-learn's ``class_weight="balanced"``, rows / (classes · rows of the class), from King and Zeng
    (2001). It is None for multi-label fields. ``max_deviation`` is the largest difference between a class's share in
    this split and in all rows.

    Parameters
    ----------
    rows : (k,) int32 or None
        Ascending row ids. None: all rows.
    total : int
        Rows of the dataset.
    labels, groups, names, kept
        See `describe_splits`.
    """
    length = total if rows is None else len(rows)
    everything = total if kept is None else len(kept)
    report: dict[str, Any] = {
        "rows": length,
        "share": length / everything if everything else 0.0,
        "digest": _digest(rows, total),
    }
    if groups is not None:
        report["groups"] = int(np.count_nonzero(groups.count(rows)))
    if labels is None:
        return report
    counts = labels.totals if rows is None else labels.count(rows)
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
    expected = (labels.totals if kept is None else labels.count(kept)) / max(1, everything)
    report["max_deviation"] = float(np.abs(shares - expected).max(initial=0.0))
    return report


def _digest(rows: npt.NDArray[np.int32] | None, total: int) -> str:
    """Digest of the row ids as little-endian int64, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, total if rows is None else len(rows), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, total)) if rows is None else rows[start : start + _BLOCK]
        digest.update(block.astype("<i8").data)
    return digest.hexdigest()
