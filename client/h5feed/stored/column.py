"""A column: the rows of a field, from one array or from several concatenated arrays."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..images import ImageSpec
from .layout import ArrayLayout
from .local_file import FileSource
from .source import Source

Int64s = npt.NDArray[np.int64]

_MANY = 16
"""With more segments than this, the key of a column is a digest."""


def wire_array(array: ArrayLayout) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Dtype and sample shape of an array on the wire: little-endian, complex as a last axis of 2."""
    stored = np.dtype(array.dtype)
    if stored.kind == "c":
        return np.dtype(f"<f{stored.itemsize // 2}"), (*array.sample_shape, 2)
    return stored.newbyteorder("<"), array.sample_shape


class Offsets(Protocol):
    """Where the items of each row begin, then where those of the last row end, (rows + 1,) int64: an array, or what
    reads one when it is needed."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> Any: ...


@dataclass(frozen=True)
class About:
    """Metadata of an array by the conventions of the program that wrote it.

    Attributes
    ----------
    role, reason : str or None
        Its role, and why; None: the role depends on its name.
    is_column : bool
        It is a column of a data frame. Its name is not the name of a split, and its numbers are features by default.
    class_names : tuple of str or None
        Names of the classes that its numbers stand for.
    note : str or None
        A remark for the description of the field.
    apart : str or None
        Why it does not share its rows with arrays of the same length; None if it may.
    rows_of : str or None
        The object that its rows describe, such as a time series. Arrays of different objects do not share rows, even if
        they have equally many. None: not known.
    """

    role: str | None = None
    reason: str | None = None
    is_column: bool = False
    class_names: tuple[str, ...] | None = None
    note: str | None = None
    apart: str | None = None
    rows_of: str | None = None


@dataclass(frozen=True)
class Segment:
    """One array of a column.

    Attributes
    ----------
    axis : int
        Rows are along this axis of the array: usually the first, but the last in matrices that MATLAB writes, and
        that of time in netCDF files.
    offsets : Offsets or None
        Rows are lists: where the items of each row begin in `array`, then where those of the last row end.
    about : About or None
        Metadata by a convention, if there is any.
    served_as : str or None
        NumPy type string of the served values, if it differs from the stored type: the float that packed numbers are
        unpacked to, or the longest text of all segments.
    indices : Segment or None
        Rows are sparse: the column index of each item, with the same offsets. Its `below` is the number of columns.
    below : int or None
        Items are integers from 0 to ``below - 1``. They are checked when they are read.
    parts : tuple of Segment
        If given, it stands for these segments, with one row each, until a column is made of them: `array` has only
        their shape and dtype.
    """

    source: Source
    array: ArrayLayout
    axis: int = 0
    offsets: Offsets | None = field(default=None, compare=False, repr=False)
    about: About | None = field(default=None, compare=False, repr=False)
    served_as: str | None = None
    indices: Segment | None = field(default=None, compare=False, repr=False)
    below: int | None = None
    parts: tuple[Segment, ...] = field(default=(), compare=False, repr=False)

    @property
    def transposed(self) -> bool:
        """Whether rows are not along the first axis."""
        return self.axis != 0

    @cached_property
    def as_row(self) -> ArrayLayout:
        """The whole array as a single row. Its own rows are then parts of that row."""
        chunk_shape = None if self.array.chunk_shape is None else (1, *self.array.chunk_shape)
        return replace(self.array, shape=(1, *self.array.shape), chunk_shape=chunk_shape)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Lengths of a row as a part of `as_row`."""
        return (*self.array.shape[: self.axis], 1, *self.array.shape[self.axis + 1 :])

    @property
    def file(self) -> FileSource:
        """The source, on the server: there it is always a file."""
        assert isinstance(self.source, FileSource)
        return self.source

    @cached_property
    def rows(self) -> int:
        if self.offsets is not None:
            return len(self.offsets) - 1
        return self.array.shape[self.axis] if self.array.shape else 0

    @property
    def has_lists(self) -> bool:
        """Whether rows are variable-length lists."""
        return self.array.ragged or self.offsets is not None

    @cached_property
    def wire(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Dtype and shape of a sample on the wire."""
        dtype, sample_shape = wire_array(self.array)
        if self.served_as is not None:
            dtype = np.dtype(self.served_as)
        if self.indices is not None and self.indices.below is not None:
            return dtype, (self.indices.below,)
        shape = sample_shape
        if self.transposed:
            parts = sample_shape[len(self.array.shape) - 1 :]
            shape = (*self.array.shape[: self.axis], *self.array.shape[self.axis + 1 :], *parts)
        # Drop axes of length 1 if each row is a single string.
        return dtype, () if dtype.kind == "S" and math.prod(shape) == 1 else shape

    @cached_property
    def begin(self) -> int | None:
        """Position in the file of the first row, if all rows are stored there one after the other, as they are sent."""
        array = self.array
        indirect = array.by_h5py or array.inline is not None or array.chunk_shape is not None or self.has_lists
        return None if indirect or not self.as_stored else array.offset

    @cached_property
    def as_stored(self) -> bool:
        """Whether the served bytes of rows are the stored bytes."""
        array = self.array
        if array.padding is not None or self.served_as is not None:
            return False
        return array.record is None and not self.transposed and np.dtype(array.dtype).byteorder != ">"


@dataclass(frozen=True)
class Column:
    """Concatenated segments of the same dtype and sample shape.

    Attributes
    ----------
    segments : tuple of Segment
    images : ImageSpec or None
        If given, rows are stored as the bytes of image files, and decoded to this when they are read.
    """

    segments: tuple[Segment, ...]
    images: ImageSpec | None = None

    @cached_property
    def answers_late(self) -> bool:
        """Whether a source does, see `Source.answers_late`."""
        return any(segment.source.answers_late for segment in self.segments)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Dtype on the wire."""
        return self.segments[0].wire[0]

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample on the wire."""
        return self.images.shape if self.images else self.segments[0].wire[1]

    @cached_property
    def encoded(self) -> Column:
        """The same rows without decoding of images."""
        return replace(self, images=None)

    @cached_property
    def indices(self) -> Column | None:
        """The column indices of sparse rows, as lists; None if rows are not sparse."""
        found = tuple(segment.indices for segment in self.segments if segment.indices is not None)
        return Column(found) if found else None

    @cached_property
    def stored_values(self) -> Column:
        """The values that are stored of sparse rows, as lists."""
        return replace(self, segments=tuple(replace(segment, indices=None) for segment in self.segments))

    @cached_property
    def is_ragged(self) -> bool:
        """Whether rows are variable-length lists or text, or sparse; if so, `dtype` is that of the items."""
        return self.dtype.kind == "S" or self.has_lists

    @cached_property
    def has_lists(self) -> bool:
        """Whether rows are read as variable-length lists."""
        return self.images is None and self.segments[0].has_lists

    @cached_property
    def is_bfloat16(self) -> bool:
        """Whether numbers are bfloat16. `dtype` is then a 2-byte integer, because numpy has no bfloat16."""
        return self.segments[0].array.is_bfloat16

    def widened(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values of the column, with bfloat16 converted to float32. All other types are returned as they are."""
        if not self.is_bfloat16:
            return values
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)

    @cached_property
    def row_bytes(self) -> int:
        return math.prod(self.sample_shape) * self.dtype.itemsize

    @cached_property
    def rows(self) -> int:
        return int(self.bounds[-1])

    @cached_property
    def pieces(self) -> int:
        """Number of parts of chunks that all rows are assembled from."""
        return sum(segment.rows * segment.array.cells for segment in self.segments)

    @cached_property
    def stored_nbytes(self) -> int:
        """Bytes that are decoded to read all rows; for members of records, the whole records."""
        return sum(segment.array.rows * segment.array.stored_row_bytes for segment in self.segments)

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @cached_property
    def key(self) -> Hashable:
        """Identifies the content, for caches."""
        parts = tuple(
            (one.source.key, one.array.path, one.array.shape, one.axis, one.served_as) for one in self.segments
        )
        if len(parts) > _MANY:
            # Tuples do not cache their hash, and hashing a long one for each lookup is slow.
            return self.images, hashlib.blake2b(
                repr(parts).encode("utf-8", "backslashreplace"), digest_size=16
            ).digest()
        return self.images, *parts

    @cached_property
    def bounds(self) -> Int64s:
        """First row of each segment, and the number of rows, (segments + 1,) int64."""
        return np.cumsum([0, *(segment.rows for segment in self.segments)], dtype=np.int64)

    def parts(self, start: int, stop: int) -> list[tuple[Segment, int, int]]:
        """The segments of rows start … stop-1, each with its first row of them and the one after the last."""
        begins, found = self.bounds, []
        number = max(0, int(np.searchsorted(begins, start, side="right")) - 1)
        while number < len(self.segments) and begins[number] < stop:
            first, last = max(start, int(begins[number])), min(stop, int(begins[number + 1]))
            if first < last:
                found.append((self.segments[number], first - int(begins[number]), last - int(begins[number])))
            number += 1
        return found

    def divide(self, rows: Int64s) -> Iterator[tuple[Segment, Int64s | None, Int64s]]:
        """Divide rows by segment.

        Parameters
        ----------
        rows : (k,) int64

        Yields
        ------
        segment : Segment
            A segment that holds some of the rows.
        places : (n,) int64 or None
            Their positions in `rows`; None: the segment holds all rows, in order.
        local : (n,) int64
            Their row numbers in the segment.
        """
        if len(self.segments) == 1:
            yield self.segments[0], None, rows
            return
        owner = np.searchsorted(self.bounds, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        numbers, begins = np.unique(owner[order], return_index=True)
        for number, places in zip(numbers.tolist(), np.split(order, begins[1:]), strict=len(rows) > 0):
            yield self.segments[number], places, rows[places] - self.bounds[number]
