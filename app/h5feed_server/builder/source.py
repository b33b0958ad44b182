"""The interface of all sources of rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter
from h5feed.wire import OFFSETS

from ..catalog.split_record import SplitRecord
from .moments import channels_of, moments

ROW = np.dtype(
    [
        ("broken", "u1"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("digest", "V16"),
        ("sums", "<f8", (4,)),
        ("squares", "<f8", (4,)),
        ("missing", "<i8", (4,)),
    ]
)
"""What is remembered of each finished row: all that must not be done again after an interruption."""


@dataclass(frozen=True)
class FieldSpec:
    """A field whose rows are written one by one.

    Attributes
    ----------
    shape : tuple of int
        Of a sample.
    attributes : mapping
        Of the HDF5 dataset.
    lengths : (rows of the source,) int64 or None
        Rows are lists of so many items each, such as the bytes of image files, which are written one after the other;
        `shape` is then that of the pixels, if any.
    enum_names : mapping of str to int, optional
        Names of the numbers, as HDF5's enums have them.
    is_bfloat16 : bool
        Two bytes that numpy has no number for.
    columns : int or None
        Rows are those of a sparse matrix of so many columns. The field has its values, ``NAME/data``, or its column
        indices, ``NAME/indices``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    lengths: npt.NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    enum_names: Mapping[str, int] | None = None
    is_bfloat16: bool = False
    columns: int | None = None

    @property
    def offsets_name(self) -> str:
        """Name of the field with `offsets`, if rows are lists; both parts of a sparse matrix share it."""
        return self.name + OFFSETS if self.columns is None else f"{self.name.rpartition('/')[0]}/indptr"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; the mean if rows differ in length."""
        if self.lengths is not None:
            return int(self.lengths.sum()) * self.dtype.itemsize // max(1, len(self.lengths)) + 1
        return self.values * self.dtype.itemsize

    @property
    def values(self) -> int:
        """Number of values per sample."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        return channels_of(self.shape)

    def stored_shape(self, rows: npt.NDArray[np.int64]) -> tuple[int, ...]:
        """Of the HDF5 dataset that holds those rows of the source."""
        return (len(rows), *self.shape) if self.lengths is None else (int(self.lengths[rows].sum()),)

    def begins(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where each of those rows, and the one after the last, begins in it, in bytes, (n + 1,) int64."""
        if self.lengths is None:
            return np.arange(len(rows) + 1, dtype=np.int64) * self.row_bytes
        return self.offsets(rows) * self.dtype.itemsize

    def offsets(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The same of lists, in items."""
        assert self.lengths is not None
        return np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64)


@dataclass(frozen=True)
class Column:
    """A small field in memory: one value per row."""

    values: npt.NDArray[Any]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Block:
    """Rows produced by a source.

    Attributes
    ----------
    rows : (n,) int64
        Of the source; broken ones too.
    arrays : dict of str to (n, *shape), or list of n bytes, those of lists
        Of each field; whatever it may be for broken rows.
    details : (n,) `ROW`
    broken : dict of int to str
        Row of the source to the reason.
    """

    rows: npt.NDArray[np.int64]
    arrays: Mapping[str, npt.NDArray[Any] | list[bytes]]
    details: npt.NDArray[np.void]
    broken: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, first: int, arrays: Mapping[str, npt.NDArray[Any] | list[bytes]], *main: str) -> Block:
        """Consecutive rows without broken ones; moments are those of the field `main`. Of a sparse one, `main` has both
        parts: rows are alike if both are."""
        own = arrays[main[0]]
        if len(main) > 1:
            own = [b"".join(parts) for parts in zip(*(arrays[name] for name in main), strict=True)]
        count = len(own)
        details = np.zeros(count, ROW)
        if not isinstance(own, list) and own.dtype.kind in "biuf":
            details["sums"], details["squares"], details["missing"] = moments(own)
        for index, row in enumerate(own):
            content = row if isinstance(row, bytes) else row.tobytes()
            details[index]["digest"] = np.void(hashlib.blake2b(content, digest_size=16).digest())
        return cls(np.arange(first, first + count), arrays, details)


Work = Callable[[], Block]
"""Makes rows; called in one of several threads."""


class Source(Protocol):
    """Rows to build.

    Attributes
    ----------
    rows : int
    fields : tuple of FieldSpec
        The first one is the main one: images, features.
    columns : dict of str to Column
    splits : (rows,) uint8 or None
        Index into `split_names.SPLITS`, where the source says it.
    split_record : SplitRecord or None
        How these splits were drawn, where a build did.
    label : str or None
        Name of the column that is stratified by.
    names : callable
        Name of a row in messages.
    images : bool
        Whether rows are image files, of which size and digest are kept.
    may_break : bool
        Whether a row may turn out to be broken when it is made.
    left_out : dict of str to str
        What of the source is no row, and why.
    notes : list of str
        What one might not expect.
    digest : str
        Of what the source says of its content.
    """

    rows: int
    fields: tuple[FieldSpec, ...]
    columns: dict[str, Column]
    splits: npt.NDArray[np.uint8] | None
    split_record: SplitRecord | None
    label: str | None
    images: bool
    may_break: bool
    left_out: dict[str, str]
    notes: list[str]
    digest: str

    def name(self, row: int) -> str: ...

    def work(self, done: npt.NDArray[np.bool_]) -> Iterator[Work]:
        """Tasks for rows that are not `done`; data that must be read in order is read by the caller's thread."""

    def close(self) -> None: ...


def digest_of(parts: Iterable[object]) -> str:
    """Of anything that has a stable text."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = str(part).encode("utf-8", "surrogateescape")
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def text_column(values: list[str]) -> Column:
    """Fixed-length UTF-8 strings."""
    encoded = [value.encode("utf-8", "surrogateescape") for value in values]
    return Column(np.array(encoded, dtype=f"S{max(1, max(map(len, encoded), default=1))}"))


def label_column(values: list[Any], classes: list[str] | None = None) -> Column:
    """Labels as integers: integers as they are, texts as indices into the sorted class names.

    Raises
    ------
    BadParameter
    """
    if classes is None and all(isinstance(value, int | np.integer) for value in values):
        return Column(np.array(values, np.int64))
    texts = [str(value) for value in values]
    known = classes if classes is not None else sorted(set(texts))
    if len(known) > 1 << 16:
        raise BadParameter(f"the labels have {len(known)} different values: they are not classes")
    number = {name: index for index, name in enumerate(known)}
    return Column(np.array([number[text] for text in texts], np.int64), {"class_names": known})
