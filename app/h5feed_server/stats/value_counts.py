"""How often each value is there: labels, other integers that are few, and texts."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_DISTINCT = 1 << 16
"""Distinct values that are kept apart."""

MAX_TEXT_BYTES = 256
"""Bytes: longer texts are told apart by so many."""

MAX_INDICATORS = 1 << 14
"""Columns of labels that are 0 or 1."""


class Values:
    """Counts distinct values, ints or bytes.

    Attributes
    ----------
    counts : Counter
    complete : bool
        False where there are more than `MAX_DISTINCT`: the rarest were dropped on the way, and counts are lower bounds.
    """

    def __init__(self) -> None:
        self.counts: Counter[int | bytes] = Counter()
        self.complete = True

    def add(self, values: npt.NDArray[Any] | list[bytes]) -> None:
        """Add (n,) integers or texts."""
        if isinstance(values, list):
            self.counts.update(values)
        else:
            distinct, often = np.unique(values, return_counts=True)
            if len(distinct) > MAX_DISTINCT:
                most = np.argsort(-often, kind="stable")[:MAX_DISTINCT]
                distinct, often = distinct[most], often[most]
                self.complete = False
            for value, count in zip(distinct.tolist(), often.tolist(), strict=True):
                self.counts[int(value)] += count
        self._bound()

    def merge(self, other: Values) -> None:
        self.counts.update(other.counts)
        self.complete = self.complete and other.complete
        self._bound()

    def _bound(self) -> None:
        if len(self.counts) > MAX_DISTINCT:
            self.complete = False
            self.counts = Counter(dict(self.counts.most_common(MAX_DISTINCT // 2)))


class Indicators:
    """Looks whether samples are one-hot rows, or 0 and 1 for each of several labels, and counts the ones.

    Attributes
    ----------
    ones : (columns,) int64
    """

    def __init__(self, columns: int) -> None:
        self.ones = np.zeros(columns, np.int64)
        self._only_bits = True
        self._one_each = True

    @property
    def kind(self) -> str | None:
        """``one_hot``, ``multi_label`` or, where other numbers are there too, None."""
        return None if not self._only_bits else "one_hot" if self._one_each else "multi_label"

    def add(self, block: npt.NDArray[Any]) -> None:
        """Add (rows, columns)."""
        if not self._only_bits:
            return
        ones = block == 1
        self._only_bits = bool((ones | (block == 0)).all())
        self._one_each = self._one_each and bool((np.count_nonzero(ones, axis=1) == 1).all())
        self.ones += np.count_nonzero(ones, axis=0)

    def merge(self, other: Indicators) -> None:
        self.ones += other.ones
        self._only_bits = self._only_bits and other._only_bits
        self._one_each = self._one_each and other._one_each


def strings_of(items: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> list[bytes]:
    """Texts from their bytes, flat, and where each begins."""
    flat = items.tobytes()
    return [flat[begin : min(end, begin + MAX_TEXT_BYTES)] for begin, end in pairwise(offsets.tolist())]
