"""Turns the columns of a data frame into fields, or into matrices if there are many."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from h5feed.stored.column import About, Segment
from h5feed.stored.layout import ArrayLayout

from ..storage.hdf5.matrix_columns import columns_of
from .vocabulary import has_meaning

MAX_COLUMNS = 64
"""Each column of a frame with up to this many columns is a field. The blocks of wider frames stay matrices."""

PICKLED = (
    "pandas has pickled these values, and unpickling can run any code: write the frame with to_hdf(format='table'), "
    "which stores text as text"
)
_NO_EXTENT = re.compile(r"^\((?:[IL]\d+L?\n)*[IL]0L?\n")
"""A pickled tuple of integers that contains 0: the shape of an empty array."""

_TIMES = ("datetime64", "timedelta64")


@dataclass(frozen=True)
class FrameColumn:
    """A column, or several consecutive ones of a block."""

    names: tuple[str, ...]
    block: Segment
    begin: int
    """Number of the first column in the block."""
    dtype: str
    """pandas' name of the dtype."""
    categories: tuple[str, ...] | None = None
    pickled: bool = False
    whole: bool = False
    """The whole block, because the names of its columns are not known."""


def fields_of(columns: Sequence[FrameColumn]) -> Iterator[tuple[str, Segment]]:
    """Columns as fields, with their names. In a wide frame, consecutive features of a block become a matrix."""
    if len(columns) <= MAX_COLUMNS:
        for column in columns:
            yield column.names[0], segment_of(column)
        return
    runs: list[FrameColumn] = []
    for column in sorted(columns, key=lambda one: (one.block.array.path, one.begin)):
        last = runs[-1] if runs else None
        follows = last is not None and last.block is column.block and last.begin + len(last.names) == column.begin
        if last is not None and follows and not _is_alone(last) and not _is_alone(column):
            runs[-1] = replace(last, names=(*last.names, *column.names))
        else:
            runs.append(column)
    matrices = [run for run in runs if len(run.names) > 1]
    for run in runs:
        if len(run.names) == 1:
            yield run.names[0], segment_of(run)
            continue
        name = "values" if len(matrices) == 1 else f"values_{np.dtype(run.block.array.dtype).name}"
        whole = _matrix(run)
        if whole is not None:
            yield name, whole
            continue
        for place, own in enumerate(run.names):
            yield own, segment_of(replace(run, names=(own,), begin=run.begin + place))


def _is_alone(column: FrameColumn) -> bool:
    """Whether a column must stay a field of its own because it is not one of many features."""
    if column.pickled or column.whole or column.categories is not None or time_note(column.dtype) is not None:
        return True
    return any(has_meaning(name) for name in column.names)


def _matrix(run: FrameColumn) -> Segment | None:
    """Consecutive columns as one array (rows, columns); None if they cannot be read as such."""
    array = run.block.array
    attributes = {**array.attributes, "columns": list(run.names)}
    about = About("input", f"{len(run.names)} columns of a frame: its attribute 'columns' has their names", True)
    if len(array.shape) == 2 and len(run.names) == array.shape[1]:
        return replace(run.block, array=replace(array, attributes=attributes), about=about)
    layout = columns_of(array, run.begin, run.begin + len(run.names), attributes)
    return None if layout is None else replace(run.block, array=layout, about=about)


def segment_of(column: FrameColumn) -> Segment:
    array = column.block.array
    note = time_note(column.dtype)
    if column.categories is not None:
        note = "codes of pandas' categories, which are its class names; -1 where a value is missing"
    about = About(
        "other" if note and column.categories is None else None,
        "a point in time" if note and column.categories is None else None,
        is_column=True,
        class_names=column.categories,
        note=note,
    )
    if column.pickled:
        return replace(column.block, array=refused(array, PICKLED), about=about)
    if array.unreadable is not None:
        own = f"{array.path}[:, {column.begin}]"
        return replace(column.block, array=replace(refused(array, array.unreadable), path=own), about=about)
    if column.whole or len(array.shape) == 1:
        return replace(column.block, array=replace(array, attributes={}), about=about)
    # Without attributes: those of the block are about all its columns.
    layout = columns_of(array, column.begin, column.begin + 1, {})
    if layout is None and array.shape[1:] == (1,):
        # h5py reads this array. Dropping an axis of length 1 does not change the bytes of a row.
        layout = replace(array, shape=array.shape[:1], attributes={})
    if layout is None:
        path = f"{array.path}[:, {column.begin}]"
        reason = (
            f"it is one of {array.shape[1]} columns that can only be read together: add {array.path!r} to h5feed.toml"
        )
        layout = replace(refused(array, reason), path=path)
    return replace(column.block, array=layout, about=about)


def with_bools(segment: Segment) -> Segment:
    """The array as bools if PyTables wrote bools, which it stores as bit fields of one byte."""
    array = segment.array
    if not array.is_bitfield or array.dtype != "|u1":
        return segment
    return replace(segment, array=replace(array, dtype="|b1"))


def without_placeholder(segment: Segment) -> Segment:
    """The array; unreadable if it is empty. pandas stores an empty array as one element, and its shape as attribute."""
    if not _NO_EXTENT.search(str(segment.array.attributes.get("shape"))):
        return segment
    return replace(segment, array=refused(segment.array, "the frame has no rows"))


def is_pickled(array: ArrayLayout) -> bool:
    return array.attributes.get("PSEUDOATOM") == "object"


def time_note(dtype: str) -> str | None:
    if not dtype.startswith(_TIMES):
        return None
    since = " since 1970-01-01" if dtype.startswith("datetime64") else ""
    unit = dtype[dtype.find("[") + 1 :].split(",")[0].rstrip("]") if "[" in dtype else "ns"
    return f"{dtype.split(',')[0]}: whole {_UNITS.get(unit, unit)}{since}"


_UNITS = {"ns": "nanoseconds", "us": "microseconds", "ms": "milliseconds", "s": "seconds"}


def refused(array: ArrayLayout, reason: str) -> ArrayLayout:
    return ArrayLayout(array.path, (), "|u1", unreadable=reason, attributes=array.attributes)
