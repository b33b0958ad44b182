"""Counts distinct values of integers and text, and the ones of one-hot and multi-label vectors."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_DISTINCT = 1 << 16
"""Maximum number of distinct values counted."""

MAX_TEXT_BYTES = 256
"""Text is distinguished by its first bytes, up to this many."""

MAX_INDICATORS = 1 << 14
"""Maximum length of one-hot and multi-label vectors."""


class Values:
    """Counts distinct values.

    Attributes
    ----------
    counts : Counter of int or bytes
        How often each value occurs.
    complete : bool
        False if there were more than `MAX_DISTINCT` distinct values. The rarest were then dropped along the way, and
        `counts` are lower bounds.
    """

    def __init__(self) -> None:
        self.counts: Counter[int | bytes] = Counter()
        self.complete = True

    def add(self, values: npt.NDArray[Any] | list[bytes]) -> None:
        """Add integers, (n,), or a list of text in bytes."""
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
    """Checks whether samples are one-hot or multi-label vectors of 0 and 1, and counts the ones.

    Parameters
    ----------
    columns : int
        Length of a sample.

    Attributes
    ----------
    ones : (columns,) int64
        Number of ones in each column. Meaningless if `kind` is None.
    """

    def __init__(self, columns: int) -> None:
        self.ones = np.zeros(columns, np.int64)
        self._only_bits = True
        self._one_each = True

    @property
    def kind(self) -> str | None:
        """``one_hot`` or ``multi_label``; None if there are numbers other than 0 and 1."""
        return None if not self._only_bits else "one_hot" if self._one_each else "multi_label"

    def add(self, block: npt.NDArray[Any]) -> None:
        """Add samples, (rows, columns)."""
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
    """Split flat bytes into texts, each cut to `MAX_TEXT_BYTES`.

    Parameters
    ----------
    items : (n,) array
        The bytes of all texts, back to back.
    offsets : (texts + 1,) int64
        Start of each text in bytes, and the end of the last.
    """
    flat = items.tobytes()
    return [flat[begin : min(end, begin + MAX_TEXT_BYTES)] for begin, end in pairwise(offsets.tolist())]
