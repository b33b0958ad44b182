"""What is said of splits: rows, classes, how far the shares are off, and weights that even them out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .compute import Splits
from .labels import Labels

MAX_CLASSES = 10_000
"""Classes that are listed for each split."""

_BLOCK = 1 << 17


def describe_splits(
    splits: Splits, rows: int, labels: Labels | None, groups: Labels | None, names: Mapping[int, str]
) -> dict[str, Any]:
    """Per split, ``all`` first: what `describe_split` says, and whether its rows are those that are stored."""
    described = {"all": describe_split(None, rows, labels, groups, names)}
    for name, own in splits.rows.items():
        described[name] = {**describe_split(own, rows, labels, groups, names), "stored": name in splits.stored}
    return described


def describe_split(
    rows: npt.NDArray[np.int32] | None,
    total: int,
    labels: Labels | None,
    groups: Labels | None,
    names: Mapping[int, str],
) -> dict[str, Any]:
    """Of one split its rows, and per class its rows, share and balanced weight.

    The weight is scikit-learn's "balanced" one, rows / (classes · rows of the class), King and Zeng (2001); rows of
    several labels have none. ``max_deviation`` is the largest difference between a class's share here and in all rows.

    Parameters
    ----------
    rows : (k,) int32 or None
        Ascending; None: all `total` rows.
    """
    length = total if rows is None else len(rows)
    report: dict[str, Any] = {
        "rows": length,
        "share": length / total if total else 0.0,
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
    report["max_deviation"] = float(np.abs(shares - labels.totals / max(1, total)).max(initial=0.0))
    return report


def _digest(rows: npt.NDArray[np.int32] | None, total: int) -> str:
    """Of the row ids as little-endian int64."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, total if rows is None else len(rows), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, total)) if rows is None else rows[start : start + _BLOCK]
        digest.update(block.astype("<i8").data)
    return digest.hexdigest()
