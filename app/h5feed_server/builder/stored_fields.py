"""Fields of a dataset as they will be written: in their stored dtype, with rows first."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt
from h5feed.errors import Unreadable
from h5feed.stored.crop_reader import MAX_WHOLE_BYTES
from h5feed.stored.packing import PACKING

from ..catalog.dataset import Field
from ..storage.reader import Reader
from .source import Column, FieldSpec

_MEASURED_BYTES = 4 << 20
"""Bytes that are read at a time to learn how long lists and texts are."""

_SCATTERED_BYTES = 256 << 20
"""Bytes of rows that lie along the last axis that are read at a time: each time, the whole file is gone through."""

_OF_ITS_FILE = ("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME", "DIMENSION_LABELS", "mean", "std")
"""Attributes that lead to other places of their file, or that a build computes anew."""

_OF_ITS_WRITER = ("MATLAB_", "H5PATH")
"""Beginnings of attributes that say how the rows lay in the file that was read: in the new one they are in order."""

Int64s = npt.NDArray[np.int64]


class StoredField(Protocol):
    """A field to copy."""

    field: Field

    def spec(self, name: str, attributes: Mapping[str, Any]) -> FieldSpec: ...

    def read(self, rows: Int64s) -> npt.NDArray[Any] | list[bytes]:
        """These rows, ascending: (n, *sample), or the bytes of n lists."""


class Numbers:
    """Rows of equal shape."""

    def __init__(self, field: Field, reader: Reader) -> None:
        self.field, self._reader = field, reader
        self._all: npt.NDArray[Any] | None = None

    def spec(self, name: str, attributes: Mapping[str, Any]) -> FieldSpec:
        shape, dtype = self.field.sample_shape, self.field.dtype
        if np.dtype(self.field.array.dtype).kind == "c":
            # They travel as two numbers each.
            return FieldSpec(name, shape[:-1], np.dtype(f"<c{2 * dtype.itemsize}"), attributes)
        return FieldSpec(
            name,
            shape,
            dtype,
            attributes,
            enum_names=self.field.array.enum_names or None,
            is_bfloat16=self.field.column.is_bfloat16,
        )

    def read(self, rows: Int64s) -> npt.NDArray[Any]:
        column = self.field.column
        values = np.empty((len(rows), *column.sample_shape), column.dtype)
        if any(segment.transposed for segment in column.segments) and column.stored_nbytes <= MAX_WHOLE_BYTES:
            # Each of its rows is everywhere in the file: they are read all at once, and kept.
            if self._all is None:
                self._all = self._reader.read_all(column)
            np.take(self._all, rows, axis=0, out=values, mode="clip")
        else:
            self._reader.read_from_source(column, rows, values)
        return values


class Scattered:
    """Rows along another axis than the first of arrays too large to be served that way; a build transposes them."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self._held: tuple[int, int] | None = None

    @staticmethod
    def is_one(field: Field, rows: int) -> bool:
        """Whether the position of its rows is the field's only problem."""
        segments = field.column.segments
        alike = all(
            one.transposed and one.array.unreadable is None and one.wire == segments[0].wire for one in segments
        )
        return alike and field.column.rows == rows and np.dtype(field.array.dtype).kind in "biuf"

    def spec(self, name: str, attributes: Mapping[str, Any]) -> FieldSpec:
        return FieldSpec(name, self.field.sample_shape, self.field.dtype, attributes)

    def read(self, rows: Int64s) -> npt.NDArray[Any]:
        values = np.empty((len(rows), *self.field.sample_shape), self.field.dtype)
        for segment, places, local in self.field.column.divide(rows):
            where = np.arange(len(rows)) if places is None else places
            with h5py.File(segment.file.path) as file:
                try:
                    array = file[segment.array.path]
                    step = max(1, _SCATTERED_BYTES // max(1, self.field.row_bytes))
                    for place, row in zip(where.tolist(), local.tolist(), strict=True):
                        begin = row - row % step
                        if self._held != (id(segment), begin):
                            before = (slice(None),) * segment.axis
                            self._block = np.moveaxis(array[(*before, slice(begin, begin + step))], segment.axis, 0)
                            self._held = id(segment), begin
                        values[place] = self._block[row - begin]
                except OSError as error:
                    raise Unreadable(f"{self.field.name}: its rows cannot be read: {error}") from None
        return values


class Texts:
    """Texts, padded to the longest."""

    def __init__(self, field: Field, reader: Reader, rows: Int64s) -> None:
        self.field, self._reader = field, reader
        self.longest = max(1, int(lengths_of(field, reader, rows).max(initial=1)))

    def spec(self, name: str, attributes: Mapping[str, Any]) -> FieldSpec:
        return FieldSpec(name, (), np.dtype(f"S{self.longest}"), attributes)

    def read(self, rows: Int64s) -> npt.NDArray[Any]:
        items, offsets = self._reader.read_ragged(self.field.column, rows)
        padded = np.zeros((len(rows), self.longest), np.uint8)
        padded[np.arange(self.longest) < np.diff(offsets)[:, None]] = items
        return padded.reshape(-1).view(f"S{self.longest}")


class Lists:
    """Lists of different lengths, including encoded images."""

    def __init__(self, field: Field, reader: Reader, rows: Int64s) -> None:
        self.field, self._reader, self._column = field, reader, field.column.encoded
        self._lengths = lengths_of(field, reader, rows)

    def spec(self, name: str, attributes: Mapping[str, Any]) -> FieldSpec:
        images = self.field.images
        said = {} if images is None else {"encoding": "mixed", **attributes, **_decoding(self.field)}
        shape = images.shape if images else ()
        return FieldSpec(name, shape, self._column.dtype, {**attributes, **said}, self._lengths)

    def read(self, rows: Int64s) -> list[bytes]:
        items, offsets = self._reader.read_ragged(self._column, rows)
        raw = np.ascontiguousarray(items).reshape(-1).view(np.uint8)
        edges = (offsets * items.dtype.itemsize).tolist()
        return [raw[begin:end].tobytes() for begin, end in pairwise(edges)]


class SparsePart(Lists):
    """The values, or the column indices, of a sparse matrix.

    Parameters
    ----------
    field : Field
        The matrix.
    part : Field
        One of its `Field.parts`.
    """

    def __init__(self, field: Field, part: Field, reader: Reader, rows: Int64s) -> None:
        super().__init__(part, reader, rows)
        self.field, self._suffix = field, part.name.removeprefix(field.name + ".")

    def spec(self, name: str, attributes: Mapping[str, Any]) -> FieldSpec:
        own = attributes if self._suffix == "data" else {}
        columns = self.field.sample_shape[0]
        return FieldSpec(f"{name}/{self._suffix}", (), self._column.dtype, own, self._lengths, columns=columns)


def _decoding(field: Field) -> dict[str, Any]:
    """How to decode images, from the field's attributes (which ``h5feed.toml`` may override)."""
    images = field.images
    assert images is not None
    return {
        "shape": images.shape,
        "resize": images.resize,
        "interpolation": images.interpolation,
        "channels": images.colour,
    }


def lengths_of(field: Field, reader: Reader, rows: Int64s) -> Int64s:
    """Number of items per row, (n,) int64."""
    column = field.column.encoded
    lengths = np.zeros(len(rows), np.int64)
    step = max(1, _MEASURED_BYTES // max(1, reader.typical_items(column) * column.dtype.itemsize))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        offsets = reader.list_offsets(column, some) if column.has_lists else None
        if offsets is None:
            offsets = reader.read_ragged(column, some)[1]
        lengths[start : start + step] = np.diff(offsets)
    return lengths


def whole(stored: StoredField, rows: Int64s, attributes: Mapping[str, Any]) -> Column:
    """All rows of a small field, in memory."""
    values = stored.read(rows)
    assert isinstance(values, np.ndarray)
    spec = stored.spec("", attributes)
    if spec.enum_names is not None:
        return Column(values.astype(h5py.enum_dtype(dict(spec.enum_names), spec.dtype)), attributes)
    return Column(values.view(spec.dtype).reshape(len(rows), *spec.shape), attributes)


def attributes_of(field: Field) -> dict[str, Any]:
    """Those of its first array that hold in any file."""
    kept: dict[str, Any] = {}
    unpacked = field.array.packing is not None and field.column.segments[0].served_as is not None
    with h5py.File(field.column.segments[0].file.path) as file:
        dataset = file.get(field.array.path)
        if not isinstance(dataset, h5py.Dataset):
            # A member of records: its attributes are those of the table.
            return kept
        for name in dataset.attrs:
            try:
                value = dataset.attrs[name]
            except (OSError, TypeError, ValueError):
                continue
            dtype = getattr(value, "dtype", None)
            here = name in _OF_ITS_FILE or name.startswith(_OF_ITS_WRITER) or (unpacked and name in PACKING)
            leads = dtype is not None and h5py.check_ref_dtype(dtype) is not None
            if not here and not leads and not isinstance(value, h5py.Empty):
                kept[name] = value.tolist() if dtype is not None and dtype.kind == "O" else value
    return kept
