"""A column: the rows of a field, from one array or from several that follow each other."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.images import ImageSpec

from .layout import ArrayLayout
from .local_file import LocalFile

Int64s = npt.NDArray[np.int64]

_MANY = 16
"""Segments of which the key is a digest."""


def wire_array(array: ArrayLayout) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Dtype and sample shape of an array on the wire: little-endian, complex as a last axis of 2."""
    stored = np.dtype(array.dtype)
    if stored.kind == "c":
        return np.dtype(f"<f{stored.itemsize // 2}"), (*array.sample_shape, 2)
    return stored.newbyteorder("<"), array.sample_shape


@dataclass(frozen=True)
class About:
    """What the program that wrote an array says of it.

    Attributes
    ----------
    role, reason : str or None
        Its role, and why; None: its name is to tell.
    is_column : bool
        It is a column of a data frame: its name is no split's, and its numbers are features where nothing says else.
    class_names : tuple of str or None
        Names of the classes that its numbers stand for.
    note : str or None
    """

    role: str | None = None
    reason: str | None = None
    is_column: bool = False
    class_names: tuple[str, ...] | None = None
    note: str | None = None


@dataclass(frozen=True)
class Segment:
    """One array of a column.

    Attributes
    ----------
    transposed : bool
        Its rows lie along its last axis, as MATLAB writes matrices.
    offsets : (rows + 1,) int64 or None
        Rows are lists: where the items of each begin in `array`, and where those of the last one end.
    about : About or None
        What is known of it beside its name, where a convention tells.
    served_as : str or None
        numpy's code of what its values become, where that is another type than theirs: the float that numbers are
        unpacked to, as its attributes say, or the longest text of all pieces.
    """

    source: LocalFile
    array: ArrayLayout
    transposed: bool = False
    offsets: Int64s | None = field(default=None, compare=False, repr=False)
    about: About | None = field(default=None, compare=False, repr=False)
    served_as: str | None = None

    @cached_property
    def rows(self) -> int:
        if self.offsets is not None:
            return len(self.offsets) - 1
        return self.array.shape[-1] if self.transposed else self.array.rows

    @property
    def has_lists(self) -> bool:
        """Whether rows are lists of their own lengths."""
        return self.array.ragged or self.offsets is not None

    @cached_property
    def wire(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Dtype and shape of a sample on the wire."""
        dtype, sample_shape = wire_array(self.array)
        if self.served_as is not None:
            dtype = np.dtype(self.served_as)
        shape = self.array.shape[:-1] if self.transposed else sample_shape
        # Of text, one string a row is one, along however many axes.
        return dtype, () if dtype.kind == "S" and math.prod(shape) == 1 else shape

    @cached_property
    def as_stored(self) -> bool:
        """Whether rows travel byte by byte as they are stored."""
        array = self.array
        if array.padding is not None or self.served_as is not None:
            return False
        return array.record is None and not self.transposed and np.dtype(array.dtype).byteorder != ">"


@dataclass(frozen=True)
class Column:
    """Segments of one dtype and sample shape, one after the other.

    Attributes
    ----------
    images : ImageSpec or None
        Rows are the bytes of image files, which are decoded to this when they are read.
    """

    segments: tuple[Segment, ...]
    images: ImageSpec | None = None

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """On the wire."""
        return self.segments[0].wire[0]

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """On the wire."""
        return self.images.shape if self.images else self.segments[0].wire[1]

    @cached_property
    def encoded(self) -> Column:
        """The same rows, as they are stored."""
        return replace(self, images=None)

    @cached_property
    def is_ragged(self) -> bool:
        """Whether rows are lists, or text, of their own lengths; `dtype` is then that of the items."""
        return self.dtype.kind == "S" or self.has_lists

    @cached_property
    def has_lists(self) -> bool:
        """Whether rows are read as lists of their own lengths."""
        return self.images is None and self.segments[0].has_lists

    @cached_property
    def is_bfloat16(self) -> bool:
        """Whether its two bytes are bfloat16, for which numpy has no number of its own."""
        return self.segments[0].array.is_bfloat16

    @cached_property
    def row_bytes(self) -> int:
        return math.prod(self.sample_shape) * self.dtype.itemsize

    @cached_property
    def rows(self) -> int:
        return int(self._bounds[-1])

    @cached_property
    def pieces(self) -> int:
        """Parts of chunks that all rows are put together from."""
        return sum(segment.rows * segment.array.cells for segment in self.segments)

    @cached_property
    def stored_nbytes(self) -> int:
        """Bytes that are decoded to read all rows: of members of records, the whole records."""
        return sum(segment.array.rows * segment.array.stored_row_bytes for segment in self.segments)

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @cached_property
    def key(self) -> Hashable:
        """Stands for the content, in caches."""
        parts = tuple(
            (one.source.key, one.array.path, one.array.shape, one.transposed, one.served_as) for one in self.segments
        )
        if len(parts) > _MANY:
            # A tuple's hash is computed each time that it is asked for.
            return self.images, hashlib.blake2b(
                repr(parts).encode("utf-8", "backslashreplace"), digest_size=16
            ).digest()
        return self.images, *parts

    @cached_property
    def _bounds(self) -> Int64s:
        return np.cumsum([0, *(segment.rows for segment in self.segments)], dtype=np.int64)

    def divide(self, rows: Int64s) -> Iterator[tuple[Segment, Int64s | None, Int64s]]:
        """Each segment that holds some of `rows`, their places among `rows` (None: all), and their numbers in it."""
        if len(self.segments) == 1:
            yield self.segments[0], None, rows
            return
        owner = np.searchsorted(self._bounds, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        numbers, begins = np.unique(owner[order], return_index=True)
        for number, places in zip(numbers.tolist(), np.split(order, begins[1:]), strict=len(rows) > 0):
            yield self.segments[number], places, rows[places] - self._bounds[number]
