"""What a label field says of each row: one class, several labels at once, or a number on a scale.

A field is read in blocks, so that a column of many millions of rows costs its codes and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..cache_folder.array_file import dump_arrays, load_arrays

Kind = Literal["classes", "one-hot", "bins", "multi-label"]

Blocks = Callable[[], Iterator[npt.NDArray[Any]]]
"""Reads the field anew, from its first row: arrays (k, *sample) that follow each other."""

MAX_DISTINCT = 1 << 21
"""Different values that may be told apart: more of them are no classes, and no groups either."""

MAX_MULTI_LABEL_BYTES = 64 << 20
"""Bytes of a table of labels, one a cell, which is held in memory as a whole."""

BINS = 10
"""Quantile bins of a number on a scale; a tenth of the rows where these are few."""


class NoClasses(ValueError):
    """A field cannot be divided into classes; says why, to follow the field's name."""


@dataclass(frozen=True)
class Labels:
    """What a field says of each row.

    Attributes
    ----------
    kind : str
        ``classes``: its values; ``one-hot``: positions of the one; ``bins``: quantile bins of numbers; ``multi-label``.
    values : tuple
        Of each class, ascending: int, float, bool or str. Of bins their edges as text, of labels their numbers.
    codes : (n,) unsigned int, or (n, labels) uint8
        Index into `values`; of several labels 1 for those that a row has.
    """

    kind: Kind
    values: tuple[Any, ...]
    codes: npt.NDArray[Any]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + 64 * len(self.values)

    @property
    def single(self) -> bool:
        """Whether a row has one class."""
        return self.kind != "multi-label"

    @cached_property
    def totals(self) -> npt.NDArray[np.int64]:
        """Rows of each class, or with each label, (values,) int64."""
        return self.count(None)

    def count(self, rows: npt.NDArray[Any] | None) -> npt.NDArray[np.int64]:
        """Of these rows (None: all), those of each class or with each label, (values,) int64."""
        total = np.zeros(len(self.values), np.int64)
        length = len(self.codes) if rows is None else len(rows)
        step = max(1, _BLOCK // max(1, math.prod(self.codes.shape[1:])))
        for start in range(0, length, step):
            # In blocks: bincount would make the whole of it int64.
            block = self.codes[start : start + step] if rows is None else self.codes[rows[start : start + step]]
            if self.single:
                total += np.bincount(block, minlength=len(self.values))
            else:
                total += block.sum(axis=0, dtype=np.int64)
        return total

    def word(self, code: int) -> str:
        """A class as messages name it."""
        return f"class {self.values[code]!r}"


@dataclass(frozen=True)
class Strata:
    """A field, and by what classes of it rows are stratified.

    Attributes
    ----------
    labels : Labels or None
    reason : str or None
        Why it has no classes, where it has none: to follow the field's name.
    """

    field: str
    labels: Labels | None
    reason: str | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.labels is None else self.labels.nbytes


_MANY = 1 << 12
"""Different values above which those of a block are sorted before they are looked up."""

_BLOCK = 1 << 17
"""Rows counted at a time."""


def read_labels(
    blocks: Blocks, rows: int, dtype: np.dtype[Any], sample_shape: tuple[int, ...], *, bins: bool
) -> Labels:
    """The classes of a field.

    Parameters
    ----------
    blocks : callable
    rows : int
    dtype, sample_shape
        Of the field.
    bins : bool
        Whether numbers on a scale may be put into quantile bins: ``np.quantile`` of all rows at equal steps.

    Raises
    ------
    NoClasses
    """
    size = math.prod(sample_shape)
    if size == 1 and dtype.kind in "biuSU":
        values, codes = encode(blocks, rows)
        return Labels("classes", values, codes)
    if size == 1 and dtype.kind == "f":
        return _read_numbers(blocks, rows, bins)
    if len(sample_shape) == 1 and size > 1 and dtype.kind in "biuf":
        return _read_vectors(blocks, rows, size)
    shape = " × ".join(map(str, sample_shape)) or "one value"
    raise NoClasses(f"holds no classes: a row is {shape} of {dtype.name}")


def encode(blocks: Blocks, rows: int) -> tuple[tuple[Any, ...], npt.NDArray[Any]]:
    """Number the different values of a field of one value a row.

    Returns
    -------
    values : tuple
        Ascending.
    codes : (rows,) uint8, uint16 or uint32
        Index of each row's value.

    Raises
    ------
    NoClasses
        There are more than `MAX_DISTINCT`.
    """
    # Values that were seen, ascending, and the number that each was given when it came.
    seen: npt.NDArray[Any] | None = None
    numbers = np.zeros(0, np.uint32)
    codes = np.empty(rows, np.uint8)
    start = 0
    for block in blocks():
        flat = block.reshape(-1)
        if not len(flat):
            continue
        if seen is None:
            seen = flat[:0].copy()
        elif seen.dtype != flat.dtype:
            # Blocks of text are as wide as their longest.
            wide = np.promote_types(seen.dtype, flat.dtype)
            seen, flat = seen.astype(wide), flat.astype(wide)
        # Among many values each look-up misses the processor's caches, unless they are looked up in order.
        wanted, back = np.unique(flat, return_inverse=True) if len(seen) > _MANY else (flat, None)
        places = np.searchsorted(seen, wanted)
        known = np.zeros(len(wanted), np.bool_)
        if len(seen):
            np.minimum(places, len(seen) - 1, out=places)
            known = seen[places] == wanted
        if not known.all():
            new = np.unique(wanted[~known])
            if len(seen) + len(new) > MAX_DISTINCT:
                raise NoClasses(f"has more than {MAX_DISTINCT} different values")
            at = np.searchsorted(seen, new)
            numbers = np.insert(numbers, at, np.arange(len(seen), len(seen) + len(new), dtype=np.uint32))
            seen = np.insert(seen, at, new) if len(seen) else new
            places = np.searchsorted(seen, wanted)
            if len(seen) > np.iinfo(codes.dtype).max:
                codes = codes.astype(np.uint16 if len(seen) <= 0xFFFF else np.uint32)
        block_codes = numbers[places]
        codes[start : start + len(flat)] = block_codes if back is None else block_codes[back]
        start += len(flat)
    if seen is None:
        return (), codes
    ranks = np.empty(len(seen), codes.dtype)
    ranks[numbers] = np.arange(len(seen))
    for first in range(0, rows, _BLOCK):
        codes[first : first + _BLOCK] = ranks[codes[first : first + _BLOCK]]
    return tuple(_plain(value) for value in seen.tolist()), codes


def dump_strata(strata: Strata) -> bytes:
    """For the cache folder."""
    about = {"field": strata.field, "reason": strata.reason}
    if strata.labels is None:
        return dump_arrays(about, {})
    kind = {"kind": strata.labels.kind, "values": strata.labels.values}
    return dump_arrays({**about, **kind}, {"codes": strata.labels.codes})


def load_strata(data: bytes) -> Strata:
    """What `dump_strata` wrote."""
    about, arrays = load_arrays(data)
    if not arrays:
        return Strata(about["field"], None, about["reason"])
    return Strata(about["field"], Labels(about["kind"], tuple(about["values"]), arrays["codes"]))


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _read_numbers(blocks: Blocks, rows: int, bins: bool) -> Labels:
    """Floats: classes where all are whole numbers, as many write 0.0 and 1.0; else bins."""
    whole = True
    for block in blocks():
        if not np.isfinite(block).all():
            raise NoClasses("holds NaN or infinite values")
        whole = whole and bool((block == np.floor(block)).all())
    if whole:
        values, codes = encode(blocks, rows)
        return Labels("classes", values, codes)
    if not bins:
        raise NoClasses("holds numbers on a scale, which only stratify=FIELD puts into quantile bins")
    every = np.concatenate([block.reshape(-1) for block in blocks()])
    steps = np.linspace(0, 1, max(2, min(BINS, rows // BINS)) + 1)
    edges = np.unique(np.quantile(every, steps, overwrite_input=True))
    del every
    # Numbers at the upper edge belong to the last bin.
    codes = np.concatenate([np.searchsorted(edges[1:-1], b.reshape(-1), "right").astype(np.uint8) for b in blocks()])
    last = len(edges) - 2
    texts = [f"[{low:.6g}, {high:.6g}{']' if i == last else ')'}" for i, (low, high) in enumerate(_pairs(edges))]
    return Labels("bins", tuple(texts), codes)


def _pairs(edges: npt.NDArray[Any]) -> list[tuple[float, float]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _read_vectors(blocks: Blocks, rows: int, size: int) -> Labels:
    """Rows of zeros and ones: one-hot where each has a single one, else several labels."""
    codes = np.empty(rows, np.uint32)
    start, single = 0, True
    for block in blocks():
        ones = block != 0
        if not (block[ones] == 1).all():
            raise NoClasses(f"holds no classes: a row is {size} numbers, not all of them 0 or 1")
        single = single and bool((np.count_nonzero(ones, axis=1) == 1).all())
        if single:
            codes[start : start + len(block)] = block.argmax(axis=1)
        start += len(block)
    if single:
        return Labels("one-hot", tuple(range(size)), codes.astype(np.min_scalar_type(size - 1)))
    if rows * size > MAX_MULTI_LABEL_BYTES:
        raise NoClasses(f"has {rows} × {size} labels, more than the {MAX_MULTI_LABEL_BYTES} that are held in memory")
    table = np.concatenate([(block != 0).astype(np.uint8) for block in blocks()])
    return Labels("multi-label", tuple(range(size)), table)
