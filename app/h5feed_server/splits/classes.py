"""The classes of a field of very many rows: the distinct values and their numbers of rows. No list of rows is kept.

The class of each row is found when it is needed, by reading the field again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.stored.array_file import dump_arrays, load_arrays

from ..row_bits import LISTED_ROWS, RowBits, RowRuns
from .as_sklearn import Codes
from .by_hash import MAX_CLASSES
from .labels import Blocks, Kind, NoClasses, Strata, plain


@dataclass(frozen=True)
class Classes:
    """The classes of a field, and how many rows each has.

    Attributes
    ----------
    kind, values
        See `Labels`.
    totals : (values,) int64
        Number of rows of each class.
    known : (values,) array
        The values as they are stored, ascending.
    blocks : callable
        Reads the field.
    """

    kind: Kind
    values: tuple[Any, ...]
    totals: npt.NDArray[np.int64]
    known: npt.NDArray[Any] = field(repr=False)
    blocks: Blocks = field(repr=False, compare=False)

    single = True

    @property
    def nbytes(self) -> int:
        return 128 * len(self.values)

    def codes(self) -> Iterator[Codes]:
        """Read the field: the class of each row, as its position in `values`, in consecutive arrays.

        Raises
        ------
        RuntimeError
            A value is not one of `values`.
        """
        for block in self.blocks():
            values = _one_per_row(block, self.kind)
            places = _looked_up(self.known, values)
            if places is None:
                raise RuntimeError("the classes of rows have changed while they were read")
            yield places

    def count(self, rows: RowBits | RowRuns | None) -> npt.NDArray[np.int64]:
        """Number of the given rows (None: all) of each class, (values,) int64. Reads the field if rows are given."""
        if rows is None:
            return self.totals
        counts, start = np.zeros(len(self.values), np.int64), 0
        for codes in self.codes():
            counts += np.bincount(codes[rows.mask(start, start + len(codes))], minlength=len(counts))
            start += len(codes)
        return counts

    def word(self, code: int) -> str:
        """A class, as named in messages."""
        return f"class {self.values[code]!r}"


def read_classes(blocks: Blocks, dtype: np.dtype[Any], sample_shape: tuple[int, ...]) -> Classes:
    """The classes of a field, from one pass over it.

    Raises
    ------
    NoClasses
    """
    size = int(np.prod(sample_shape, dtype=np.int64))
    if size == 1 and dtype.kind in "biufS":
        kind: Kind = "classes"
    elif len(sample_shape) == 1 and size > 1 and dtype.kind in "biuf":
        kind = "one-hot"
    else:
        shape = " × ".join(map(str, sample_shape)) or "one value"
        raise NoClasses(f"holds no classes: a row is {shape} of {dtype.name}")
    known: npt.NDArray[Any] | None = None
    totals = np.zeros(0, np.int64)
    for block in blocks():
        of_rows = _one_per_row(block, kind)
        places = None if known is None or not len(known) else _looked_up(known, of_rows)
        if known is not None and places is not None:
            totals += np.bincount(places, minlength=len(known))
            continue
        values, counts = np.unique(of_rows, return_counts=True)
        if known is None:
            known, totals = values, counts.astype(np.int64)
            continue
        both, where = np.unique(np.concatenate([known, values]), return_inverse=True)
        totals = np.bincount(where, np.concatenate([totals, counts])).astype(np.int64)
        known = both
        if len(known) > MAX_CLASSES:
            raise NoClasses(f"has more than {MAX_CLASSES} different values, the limit for more than {LISTED_ROWS} rows")
    if known is None:
        known = np.zeros(0, dtype)
    return Classes(kind, tuple(plain(value) for value in known.tolist()), totals, known, blocks)


def dump_classes(strata: Strata[Classes]) -> bytes:
    """Serialise the classes of a field for the cache folder."""
    about = {"field": strata.field, "reason": strata.reason}
    if strata.labels is None:
        return dump_arrays(about, {})
    labels = strata.labels
    # safetensors has no text.
    raw = np.ascontiguousarray(labels.known).view(np.uint8)
    stored = {"kind": labels.kind, "values": labels.values, "dtype": labels.known.dtype.str}
    return dump_arrays({**about, **stored}, {"totals": labels.totals, "known": raw})


def load_classes(data: bytes, blocks: Blocks) -> Strata[Classes]:
    """Read what `dump_classes` wrote.

    Parameters
    ----------
    blocks : callable
        Reads the field.
    """
    about, arrays = load_arrays(data)
    if not arrays:
        return Strata(about["field"], None, about["reason"])
    known = arrays["known"].view(about["dtype"])
    return Strata(
        about["field"], Classes(about["kind"], tuple(about["values"]), arrays["totals"], known, blocks), about["reason"]
    )


def _one_per_row(block: npt.NDArray[Any], kind: Kind) -> npt.NDArray[Any]:
    """The value of each row, (rows,).

    Raises
    ------
    NoClasses
    """
    if kind == "one-hot":
        ones = block != 0
        if not (block[ones] == 1).all():
            raise NoClasses(f"holds no classes: a row is {block.shape[1]} numbers, not all of them 0 or 1")
        if not (np.count_nonzero(ones, axis=1) == 1).all():
            raise NoClasses(f"has several labels for a row, which are not read of more than {LISTED_ROWS} rows")
        return np.asarray(block.argmax(axis=1))
    values = block.reshape(-1)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise NoClasses("contains NaN or infinite values")
        if not (values == np.floor(values)).all():
            raise NoClasses(f"holds continuous values, which are not put into bins for more than {LISTED_ROWS} rows")
    return values


def _looked_up(known: npt.NDArray[Any], values: npt.NDArray[Any]) -> Codes | None:
    """The place of each value among the known ones, of which there is at least one; None if one is not there."""
    if values.dtype.itemsize == 1 and values.dtype.kind in "iu" and known.dtype == values.dtype and len(known) < 256:
        table = np.full(256, 255, np.uint8)
        table[known.view(np.uint8)] = np.arange(len(known))
        codes = table[values.view(np.uint8)]
        return None if len(codes) and codes.max() == 255 else codes
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return places.view(np.uint64) if np.array_equal(known[places], values) else None
