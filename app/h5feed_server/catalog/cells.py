"""MATLAB's cells, and fields of its arrays of structs: one row for each entry, if these are alike.

See https://www.mathworks.com/help/matlab/ref/save.html for version 7.3. Entries are arrays in the group ``#refs#``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from h5feed.stored.column import About, Segment
from h5feed.stored.layout import ArrayLayout

from .array_probe import MAX_NAMES_BYTES
from .frame_columns import refused
from .grouping.stacking import as_row

_NOTE = "entries of MATLAB's cells or structs"

_MOST_ENTRIES = 20_000
"""Maximum number of entries of all arrays of a file that are not texts: each is an object in memory."""

_EMPTY = "MATLAB_empty"
"""The attribute of entries without values: what is stored there is their shape in MATLAB."""


class _Unservable(Exception):
    """The entries cannot be rows, for the reason given."""


def with_cells(segments: Mapping[str, Segment]) -> dict[str, Segment]:
    """The arrays of a file, with references of MATLAB replaced by the rows that they lead to.

    Entries of equal type and shape are rows of that shape, vectors of different lengths are lists, and texts are text.
    All others are listed with the reason why they are not rows.
    """
    fields = dict(segments)
    bytes_left, entries_left = MAX_NAMES_BYTES, _MOST_ENTRIES
    for path, segment in segments.items():
        array = segment.array
        if not array.refers:
            continue
        try:
            if len(array.refers) != max(array.shape):
                sides = " × ".join(map(str, reversed(array.shape)))
                raise _Unservable(f"it is a matrix of {sides} cells: rows are the entries of a vector of cells")
            if array.text is not None:
                fields[path] = _texts(segment, array.text, bytes_left)
                bytes_left -= fields[path].array.nbytes
            else:
                entries_left -= len(array.refers)
                if entries_left < 0:
                    raise _Unservable(f"the file has more than {_MOST_ENTRIES} entries of cells and structs")
                fields[path] = _rows(segment, [segments.get(one) for one in array.refers])
        except _Unservable as why:
            fields[path] = replace(segment, array=refused(replace(array, text=None), str(why)))
    return fields


def _texts(segment: Segment, texts: Sequence[str], left: int) -> Segment:
    """Rows of text, which are in memory.

    Raises
    ------
    _Unservable
        They have more than `left` bytes: one long text among many takes as much for each of them.
    """
    encoded = [text.encode("utf-8") for text in texts]
    nbytes = len(encoded) * max(map(len, encoded))
    if nbytes > left:
        raise _Unservable(f"its {len(texts)} texts, each as long as the longest, have {nbytes} bytes, more than kept")
    values = np.array(encoded, "S")
    array = ArrayLayout(segment.array.path, values.shape, values.dtype.str, inline=values.tobytes(), text=tuple(texts))
    return replace(segment, array=array, about=About(note=_NOTE))


def _rows(segment: Segment, entries: Sequence[Segment | None]) -> Segment:
    """One segment that stands for those of all entries.

    Raises
    ------
    _Unservable
    """
    parts: list[Segment] = []
    for number, entry in enumerate(entries):
        if entry is None or entry.array.refers:
            what = "it is a cell, a struct or not listed"
            raise _Unservable(f"entry {number} is neither an array of numbers nor a text: {what}")
        if entry.array.unreadable is not None:
            raise _Unservable(f"entry {number} cannot be read: {entry.array.unreadable}")
        if entry.has_lists or entry.array.by_h5py or entry.array.record is not None:
            raise _Unservable(f"entry {number} is not stored as an array of MATLAB is")
        parts.append(_emptied(entry))
    kinds = sorted({str(one.array.attributes.get("MATLAB_class", one.array.dtype)) for one in parts})
    types = {one.array.dtype for one in parts if not one.array.attributes.get(_EMPTY)}
    if len(kinds) > 1 or len(types) > 1:
        raise _Unservable(f"its entries have different classes: {', '.join([*kinds, *sorted(types)][:4])}")
    if kinds == ["char"]:
        which = "together more than 1 MiB, or some of several lines, not UTF-16, or ending in NUL"
        raise _Unservable(f"its entries are texts, {which}")
    if not types:
        raise _Unservable("all its entries are empty")
    # What is stored of an empty entry has another type.
    parts = [replace(one, array=replace(one.array, dtype=next(iter(types)))) for one in parts]
    shapes = {one.array.shape for one in parts}
    reversed_axes = any(_flat(one) is None for one in parts)
    about = About(note=f"{_NOTE}: their axes are reversed" if reversed_axes else _NOTE)
    parts = [replace(one, about=about) for one in parts]
    flat = [_flat(one) for one in parts]
    vectors = [one for one in flat if one is not None]
    if len(shapes) > 1 and len(vectors) == len(parts):
        lists = tuple(replace(one, offsets=np.array([0, one.array.shape[0]])) for one in vectors)
        return replace(lists[0], offsets=np.arange(len(lists) + 1), about=about, parts=lists)
    if len(shapes) > 1:
        shown = ", ".join(str([*shape]) for shape in sorted(shapes)[:3])
        raise _Unservable(f"its entries have different shapes: {shown}")
    rows: list[Segment] = []
    for own, one in zip(flat, parts, strict=True):
        row = own if own is not None and own.array.shape == (1,) else as_row(own or one)
        if isinstance(row, str):
            raise _Unservable(row)
        rows.append(row)
    first = rows[0].array
    whole = ArrayLayout(segment.array.path, (len(rows), *first.shape[1:]), first.dtype)
    return replace(segment, array=whole, about=about, parts=tuple(rows))


def _emptied(entry: Segment) -> Segment:
    """The entry; without what is stored of it if it is empty."""
    array = entry.array
    if not array.attributes.get(_EMPTY):
        return entry
    nothing = ArrayLayout(array.path, (0,), array.dtype, inline=b"", attributes=array.attributes)
    return replace(entry, array=nothing)


def _flat(entry: Segment) -> Segment | None:
    """A vector or a single number, with one axis; None for others."""
    array = entry.array
    long = [axis for axis, extent in enumerate(array.shape) if extent != 1]
    if len(long) > 1:
        return None
    axis = long[0] if long else 0
    chunk_shape = array.chunk_shape
    if chunk_shape is not None and any(width != 1 for other, width in enumerate(chunk_shape) if other != axis):
        return None
    flat = replace(
        array,
        shape=(array.shape[axis],),
        chunk_shape=None if chunk_shape is None else (chunk_shape[axis],),
        extends=False,
    )
    return replace(entry, array=flat)
