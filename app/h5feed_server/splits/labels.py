"""Reads the classes of a field: one class per row, several labels per row, or quantile bins of continuous values.

Fields are read in blocks, so a column of many millions of rows takes little more memory than its codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from h5feed.stored.array_file import dump_arrays, load_arrays

Kind = Literal["classes", "one-hot", "bins", "multi-label"]

Blocks = Callable[[], Iterator[npt.NDArray[Any]]]
"""Each call reads the field from its first row, and yields consecutive arrays of shape (k, *sample)."""

MAX_DISTINCT = 1 << 21
"""Maximum number of distinct values. A field with more is not treated as classes or groups."""

MAX_MULTI_LABEL_BYTES = 64 << 20
"""Limit on the table of a multi-label field, which is held in memory as a whole: one byte per row and label."""

BINS = 10
"""Number of quantile bins for continuous values. Below 100 rows there is one bin per 10 rows, and at least two."""


class NoClasses(ValueError):
    """A field has no classes. The message is a predicate: callers put the field's name in front of it."""


@dataclass(frozen=True)
class Labels:
    """The classes of a field, and the class or labels of each row.

    Attributes
    ----------
    kind : str
        ``classes``: distinct values; ``one-hot``: the position of the 1; ``bins``: quantile bins of continuous values;
        ``multi-label``: several labels per row.
    values : tuple
        Value of each class, ascending: int, float, bool or str. For ``bins``, the edges as text. For ``one-hot`` and
        ``multi-label``, the column numbers.
    codes : (n,) unsigned int, or (n, labels) uint8
        Index of each row's class in `values`. For ``multi-label``, 1 for each label that the row has.
    """

    kind: Kind
    values: tuple[Any, ...]
    codes: npt.NDArray[Any]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + 64 * len(self.values)

    @property
    def single(self) -> bool:
        """Whether each row has exactly one class."""
        return self.kind != "multi-label"

    @cached_property
    def totals(self) -> npt.NDArray[np.int64]:
        """Number of rows of each class, or with each label, (values,) int64."""
        return self.count(None)

    def count(self, rows: npt.NDArray[Any] | None) -> npt.NDArray[np.int64]:
        """Number of the given rows (None: all) of each class, or with each label, (values,) int64."""
        total = np.zeros(len(self.values), np.int64)
        length = len(self.codes) if rows is None else len(rows)
        step = max(1, _BLOCK // max(1, math.prod(self.codes.shape[1:])))
        for start in range(0, length, step):
            # Count in blocks, because bincount converts its input to int64.
            block = self.codes[start : start + step] if rows is None else self.codes[rows[start : start + step]]
            if self.single:
                total += np.bincount(block, minlength=len(self.values))
            else:
                total += block.sum(axis=0, dtype=np.int64)
        return total

    def word(self, code: int) -> str:
        """A class, as named in messages."""
        return f"class {self.values[code]!r}"


class Classed(Protocol):
    """The classes of a field, with or without a list of the class of each row."""

    @property
    def kind(self) -> Kind: ...

    @property
    def values(self) -> tuple[Any, ...]: ...

    @property
    def single(self) -> bool: ...

    @property
    def totals(self) -> npt.NDArray[np.int64]: ...

    @property
    def nbytes(self) -> int: ...

    def count(self, rows: Any) -> npt.NDArray[np.int64]: ...

    def word(self, code: int) -> str: ...


L = TypeVar("L", bound=Classed)


@dataclass(frozen=True)
class Strata(Generic[L]):
    """The classes of a field by which rows can be stratified.

    Attributes
    ----------
    field : str
        Name of the field.
    labels : Labels or Classes, or None
        None if the field has no classes.
    reason : str or None
        If it has none, why: the message of `NoClasses`.
    """

    field: str
    labels: L | None
    reason: str | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.labels is None else self.labels.nbytes


_MANY = 1 << 12
"""Number of distinct values above which the values of a block are sorted before they are looked up."""

_BLOCK = 1 << 17
"""Rows processed at a time."""


def read_labels(
    blocks: Blocks, rows: int, dtype: np.dtype[Any], sample_shape: tuple[int, ...], *, bins: bool
) -> Labels:
    """The classes of a field.

    Parameters
    ----------
    blocks : callable
        Reads the field; called once or more.
    rows : int
        Rows of the field.
    dtype, sample_shape
        Dtype and sample shape of the field.
    bins : bool
        Put continuous values into quantile bins: edges are ``np.quantile`` of all rows at equal steps.

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
    """Find the distinct values of a field with one value per row, and the index of each row's value.

    Returns
    -------
    values : tuple
        Distinct values, ascending.
    codes : (rows,) uint8, uint16 or uint32
        Index of each row's value in `values`.

    Raises
    ------
    NoClasses
        There are more than `MAX_DISTINCT` distinct values.
    """
    # The distinct values so far, ascending, and for each its number in order of appearance.
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
            # Each block of text is as wide as its longest value.
            wide = np.promote_types(seen.dtype, flat.dtype)
            seen, flat = seen.astype(wide), flat.astype(wide)
        # With many distinct values, random look-ups miss the CPU's caches; look-ups in sorted order do not.
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
    return tuple(plain(value) for value in seen.tolist()), codes


def dump_strata(strata: Strata[Labels]) -> bytes:
    """Serialise strata for the cache folder."""
    about = {"field": strata.field, "reason": strata.reason}
    if strata.labels is None:
        return dump_arrays(about, {})
    kind = {"kind": strata.labels.kind, "values": strata.labels.values}
    return dump_arrays({**about, **kind}, {"codes": strata.labels.codes})


def load_strata(data: bytes) -> Strata[Labels]:
    """Read what `dump_strata` wrote."""
    about, arrays = load_arrays(data)
    if not arrays:
        return Strata(about["field"], None, about["reason"])
    return Strata(about["field"], Labels(about["kind"], tuple(about["values"]), arrays["codes"]))


def plain(value: Any) -> Any:
    """A value for JSON."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _read_numbers(blocks: Blocks, rows: int, bins: bool) -> Labels:
    """Classes of a float field: its values if all are whole numbers (labels are often stored as 0.0, 1.0), else bins.

    Raises
    ------
    NoClasses
    """
    whole = True
    for block in blocks():
        if not np.isfinite(block).all():
            raise NoClasses("contains NaN or infinite values")
        whole = whole and bool((block == np.floor(block)).all())
    if whole:
        values, codes = encode(blocks, rows)
        return Labels("classes", values, codes)
    if not bins:
        raise NoClasses("holds continuous values, which are put into quantile bins only with stratify=FIELD")
    every = np.concatenate([block.reshape(-1) for block in blocks()])
    steps = np.linspace(0, 1, max(2, min(BINS, rows // BINS)) + 1)
    edges = np.unique(np.quantile(every, steps, overwrite_input=True))
    del every
    # Searching the inner edges only puts the greatest value into the last bin.
    codes = np.concatenate([np.searchsorted(edges[1:-1], b.reshape(-1), "right").astype(np.uint8) for b in blocks()])
    last = len(edges) - 2
    texts = [f"[{low:.6g}, {high:.6g}{']' if i == last else ')'}" for i, (low, high) in enumerate(_pairs(edges))]
    return Labels("bins", tuple(texts), codes)


def _pairs(edges: npt.NDArray[Any]) -> list[tuple[float, float]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _read_vectors(blocks: Blocks, rows: int, size: int) -> Labels:
    """Classes of a field whose rows are vectors of 0 and 1: one-hot if each row has a single 1, else multi-label.

    Raises
    ------
    NoClasses
    """
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
        raise NoClasses(f"has {rows} × {size} labels, more than the limit of {MAX_MULTI_LABEL_BYTES}")
    table = np.concatenate([(block != 0).astype(np.uint8) for block in blocks()])
    return Labels("multi-label", tuple(range(size)), table)
