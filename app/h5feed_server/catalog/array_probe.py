"""Reads samples of arrays during inspection: list offsets, names, first rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import FeedError, Overloaded, ReaderCrashed, ReadTimeout, RevisionChanged, SourceUnavailable
from h5feed.stored.byte_cache import ByteCache
from h5feed.stored.column import Column, Segment
from h5feed.stored.layout import ArrayLayout
from h5feed.wire import OFFSETS

from ..storage.hdf5.reader_pool import CRASHES, ReaderPool
from ..storage.reader import Reader

MAX_OFFSETS_BYTES = 256 << 20
"""Maximum bytes of the offsets of one field, which stay in memory."""

MAX_NAMES_BYTES = 16 << 20
"""Maximum bytes of an array of names of columns or categories, which is read during inspection."""

LOOKED_AT = 256
"""Number of rows that are read to tell classes from running numbers. Columns with fewer than `FEW_ROWS` rows always
count as classes."""

FEW_ROWS = 16

TRANSIENT_ERRORS = (Overloaded, RevisionChanged, SourceUnavailable)
"""Errors that say nothing about the file: a later attempt may succeed."""


class ArrayProbe:
    """Reads parts of arrays; shared by all threads.

    Parameters
    ----------
    hdf5 : ReaderPool
        Reads arrays whose layout is not known.
    timeout : float
        Seconds that one read may take.
    """

    def __init__(self, hdf5: ReaderPool, timeout: float) -> None:
        self._hdf5 = hdf5
        # No cache: everything is read only once here.
        self._reader = Reader(1, ByteCache(0, timeout), 0, timeout, hdf5)

    def close(self) -> None:
        """End the threads."""
        self._reader.close()

    def pair_offsets(self, segments: dict[str, Segment]) -> None:
        """Combine flat arrays of items with their arrays of offsets, in place. Invalid pairs become unreadable."""
        for path, segment in list(segments.items()):
            offsets = segments.get(path + OFFSETS)
            if offsets is None or not is_flat(segment) or not are_offsets(offsets):
                continue
            segments[path] = self.paired(segment, offsets)
            if segments[path].offsets is not None:
                del segments[path + OFFSETS]

    def paired(self, items: Segment, offsets: Segment) -> Segment:
        """A flat array of items as lists, divided by an array of offsets; unreadable if that does not divide it."""
        if offsets.array.nbytes > MAX_OFFSETS_BYTES:
            reason = f"its offsets have {offsets.array.nbytes} bytes, more than the {MAX_OFFSETS_BYTES} that are read"
        else:
            try:
                stored = self._reader.read_all(Column((offsets,)))
            except TRANSIENT_ERRORS:
                raise
            except FeedError as error:
                reason = f"its offsets: {error.detail}"
            else:
                values = stored.astype(np.int64, copy=False)
                if values[0] == 0 and values[-1] == items.array.rows and (values[1:] >= values[:-1]).all():
                    return replace(items, offsets=values)
                reason = f"its offsets do not ascend from 0 to {items.array.rows}, its number of items"
        return Segment(items.source, unreadable_array(items.array.path, reason))

    def values(self, segment: Segment) -> npt.NDArray[Any]:
        """All values of an array of names; empty if there are too many or they cannot be read."""
        nothing = np.zeros(0, np.uint8)
        if segment.array.nbytes > MAX_NAMES_BYTES or (segment.parts and segment.has_lists):
            return nothing
        try:
            return self._reader.read_all(Column(segment.parts or (segment,)))
        except TRANSIENT_ERRORS:
            raise
        except FeedError:
            return nothing

    def holds_classes(self, column: Column) -> bool:
        """Whether values repeat among the first rows, as classes do and running numbers or file names do not."""
        rows = min(column.rows, LOOKED_AT)
        if rows < FEW_ROWS:
            return True
        values = self.block(column, 0, rows)
        return values is None or len(np.unique(values)) < rows

    def block(self, column: Column, start: int, stop: int) -> npt.NDArray[Any] | None:
        """Rows start … stop-1; None if they cannot be read."""
        try:
            return self._reader.read_block(column, start, stop)
        except TRANSIENT_ERRORS:
            raise
        except FeedError:
            return None

    def problem(self, segment: Segment) -> str | None:
        """Why h5py cannot read an array, determined from its first row."""
        files = (segment.file, *segment.file.companions)
        rows = np.zeros(min(1, segment.array.rows), np.int64)
        read = self._hdf5.read_ragged if segment.array.ragged else self._hdf5.read
        for _ in range(CRASHES):
            try:
                read(files, segment.array, rows)
                return None
            except ReaderCrashed:
                continue
            except (Overloaded, ReadTimeout):
                # This says nothing about the array.
                return None
            except TRANSIENT_ERRORS:
                raise
            except FeedError as error:
                return error.detail.removeprefix(f"{segment.array.path!r}: ")
        return "reading it crashes HDF5"


def unreadable_array(path: str, reason: str) -> ArrayLayout:
    """An array that is listed with the reason why it cannot be served."""
    return ArrayLayout(path, (), "|u1", unreadable=reason)


def are_offsets(segment: Segment) -> bool:
    """Whether an array may divide another one into lists: flat, of integers, and not empty."""
    return is_flat(segment) and np.dtype(segment.array.dtype).kind in "iu" and segment.rows > 0


def is_flat(segment: Segment) -> bool:
    """Whether an array is a one-dimensional array of numbers that this process reads without h5py."""
    array = segment.array
    if array.unreadable is not None or array.by_h5py or array.record is not None or len(array.shape) != 1:
        return False
    if segment.parts:
        # Its values are those of its parts.
        return False
    return np.dtype(array.dtype).kind in "biuf"
